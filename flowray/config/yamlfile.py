"""YAML that remembers the line of every key, so that an error can point at it, and `key=value`
from the command line.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml

from flowray.config.errors import InputError
from flowray.config.paths import is_file
from flowray.config.sources import holds_results

COMMAND_LINE = "command line"
_TYPED = 0  # in place of a line: the key was typed


@dataclass(frozen=True)
class YamlFile:
    """A parsed mapping, perhaps with keys typed over it.

    label: the name that errors use. lines: the 1-based line of each dotted key.
    folders: what relative paths in it start from, see `paths.absolute`.
    """

    label: str
    data: Mapping[str, Any]
    lines: Mapping[str, int]
    folders: tuple[Path, ...] = field(default_factory=lambda: (Path.cwd(),))

    def where(self, key: str) -> str:
        """'file.yaml:12' for a dotted key (or its nearest enclosing one), 'file.yaml' where none
        is in the file.
        """
        line = self._line(key)
        return (
            self.label
            if line is None
            else COMMAND_LINE
            if line == _TYPED
            else f"{self.label}:{line}"
        )

    def folders_of(self, key: str) -> tuple[Path, ...]:
        """What a relative path at `key` starts from: the working directory where it was typed."""
        return (Path.cwd(),) if self._line(key) == _TYPED else self.folders

    def typed(self, key: str) -> YamlFile:
        """The same with `key`, and what is below it, put down to the command line."""
        kept = {
            name: line for name, line in self.lines.items() if not f"{name}.".startswith(f"{key}.")
        }
        return replace(self, lines={**kept, key: _TYPED})

    def _line(self, key: str) -> int | None:
        while key and key not in self.lines:
            key = key.rpartition(".")[0]
        return self.lines[key] if key else None


def read_yaml(path: Path) -> YamlFile:
    """Read a YAML file that holds one mapping; InputError for anything else, with the line."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except IsADirectoryError:
        raise InputError(f"{path}: is a folder, want a YAML file") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise InputError(f"{path}: is not UTF-8 text, want a YAML file") from None
    folder = path.parent.absolute()
    # runs of before had relative paths of the working directory in their files; they have none now
    folders = (folder, Path.cwd()) if holds_results(folder) else (folder,)
    return replace(parse_yaml(text, str(path)), folders=folders)


def parse_yaml(text: str, label: str) -> YamlFile:
    """`read_yaml` for text already in memory; its folder is the working directory."""
    bad = yaml.reader.Reader.NON_PRINTABLE.search(text)
    if bad:
        raise InputError(
            f"{label}:{text.count(chr(10), 0, bad.start()) + 1}: not valid YAML: control character"
            f" {bad.group()!r}"
        )
    loader = yaml.SafeLoader(text)
    lines: dict[str, int] = {}
    try:
        node = loader.get_single_node()
        if node is None:
            raise InputError(f"{label}: is empty, want a mapping of keys, such as `name: my_run`")
        if not isinstance(node, yaml.MappingNode):
            raise InputError(
                f"{label}:{node.start_mark.line + 1}: got {_shape(node)}, want a mapping of keys,"
                " such as `name: my_run`"
            )
        data = _mapping(loader, node, "", label, lines, ())
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f":{mark.line + 1}" if mark else ""
        raise InputError(
            f"{label}{line}: not valid YAML: {error.problem or error.context}"
        ) from None
    finally:
        loader.dispose()
    return YamlFile(label, data, lines)


def parse_value(text: str) -> Any:
    """One YAML value, as in `key=value`; text that is no valid YAML is taken as it stands."""
    try:
        return yaml.safe_load(text)
    except (yaml.YAMLError, ValueError):
        return text


def key_values(texts: Sequence[str], example: str) -> Iterator[tuple[str, str]]:
    """('optim.lr', '3e-4') for each 'optim.lr=3e-4' of a command line; InputError, with
    `example`, for what is none.
    """
    for text, following in zip(texts, (*texts[1:], ""), strict=False):
        key, sign, raw = text.partition("=")
        key = key.strip()
        if following.startswith("=") and not sign:
            value = following[1:] or "VALUE"
            raise InputError(
                f"{COMMAND_LINE}: got {text!r} before '=', want no space around it: {key}={value}"
            )
        if sign and not raw and following and "=" not in following:
            raise InputError(
                f"{COMMAND_LINE}: got {text!r} before {following!r}, want no space:"
                f" {key}={following}"
            )
        if not sign and (text.endswith((".yaml", ".yml")) or is_file(Path(text))):
            raise InputError(
                f"{COMMAND_LINE}: got {text!r}, a second file; one is enough, want key=value, such"
                f" as {example}"
            )
        if not sign or not key:
            raise InputError(f"{COMMAND_LINE}: got {text!r}, want key=value, such as {example}")
        yield key, raw


def _shape(node: yaml.Node) -> str:
    return "a list" if isinstance(node, yaml.SequenceNode) else f"{node.value!r}"


def _mapping(
    loader: yaml.SafeLoader,
    node: yaml.MappingNode,
    prefix: str,
    label: str,
    lines: dict[str, int],
    above: tuple[yaml.Node, ...],
) -> dict[str, Any]:
    if node in above:
        raise InputError(f"{label}:{node.start_mark.line + 1}: the anchor contains itself")
    seen: dict[str, int] = {}
    for key_node, _ in node.value:
        if key_node.tag == "tag:yaml.org,2002:merge":
            continue
        line = key_node.start_mark.line + 1
        if not isinstance(key_node, yaml.ScalarNode) or key_node.tag != "tag:yaml.org,2002:str":
            raise InputError(
                f"{label}:{line}: key {prefix}{key_node.value} must be plain text; put it in quotes"
            )
        if key_node.value in seen:
            raise InputError(
                f"{label}:{line}: key {prefix}{key_node.value} is given twice, first on line"
                f" {seen[key_node.value]}"
            )
        seen[key_node.value] = line
    # a copy: an anchored mapping is visited again at each alias
    flat = yaml.MappingNode(node.tag, list(node.value))
    loader.flatten_mapping(flat)
    out: dict[str, Any] = {}
    for key_node, value_node in flat.value:
        key = prefix + key_node.value
        lines[key] = key_node.start_mark.line + 1
        if isinstance(value_node, yaml.MappingNode):
            out[key_node.value] = _mapping(
                loader, value_node, f"{key}.", label, lines, (*above, node)
            )
            continue
        try:
            out[key_node.value] = loader.construct_object(value_node, deep=True)
        except ValueError as error:
            raise InputError(
                f"{label}:{lines[key]}: {key}: got {value_node.value!r}: {error}"
            ) from None
    return out
