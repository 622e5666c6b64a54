"""YAML that remembers the line of every key, so that an error can point at it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from flowray.config.errors import InputError


@dataclass(frozen=True)
class YamlFile:
    """A parsed mapping; `lines` gives the 1-based line of each dotted key, `label` the name that errors use."""

    label: str
    data: Mapping[str, Any]
    lines: Mapping[str, int]

    def where(self, key: str) -> str:
        """'file.yaml:12' for a dotted key (or its nearest enclosing one), 'file.yaml' where none is in the file."""
        while key and key not in self.lines:
            key = key.rpartition(".")[0]
        return f"{self.label}:{self.lines[key]}" if key else self.label


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
    return parse_yaml(text, str(path))


def parse_yaml(text: str, label: str) -> YamlFile:
    """`read_yaml` for text already in memory."""
    bad = yaml.reader.Reader.NON_PRINTABLE.search(text)
    if bad:
        raise InputError(f"{label}:{text.count(chr(10), 0, bad.start()) + 1}: not valid YAML: control character {bad.group()!r}")
    loader = yaml.SafeLoader(text)
    lines: dict[str, int] = {}
    try:
        node = loader.get_single_node()
        if node is None:
            raise InputError(f"{label}: is empty, want a mapping of keys, such as `name: my_run`")
        if not isinstance(node, yaml.MappingNode):
            raise InputError(f"{label}:{node.start_mark.line + 1}: got {_shape(node)}, want a mapping of keys, such as `name: my_run`")
        data = _mapping(loader, node, "", label, lines, ())
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f":{mark.line + 1}" if mark else ""
        raise InputError(f"{label}{line}: not valid YAML: {error.problem or error.context}") from None
    finally:
        loader.dispose()
    return YamlFile(label, data, lines)


def parse_value(text: str) -> Any:
    """One YAML value, as in `key=value`; text that is no valid YAML is taken as it stands."""
    try:
        return yaml.safe_load(text)
    except (yaml.YAMLError, ValueError):
        return text


def _shape(node: yaml.Node) -> str:
    return "a list" if isinstance(node, yaml.SequenceNode) else f"{node.value!r}"


def _mapping(
    loader: yaml.SafeLoader, node: yaml.MappingNode, prefix: str, label: str, lines: dict[str, int], above: tuple[yaml.Node, ...]
) -> dict[str, Any]:
    if node in above:
        raise InputError(f"{label}:{node.start_mark.line + 1}: the anchor contains itself")
    seen: dict[str, int] = {}
    for key_node, _ in node.value:
        if key_node.tag == "tag:yaml.org,2002:merge":
            continue
        line = key_node.start_mark.line + 1
        if not isinstance(key_node, yaml.ScalarNode) or key_node.tag != "tag:yaml.org,2002:str":
            raise InputError(f"{label}:{line}: key {prefix}{key_node.value} must be plain text; put it in quotes")
        if key_node.value in seen:
            raise InputError(f"{label}:{line}: key {prefix}{key_node.value} is given twice, first on line {seen[key_node.value]}")
        seen[key_node.value] = line
    flat = yaml.MappingNode(node.tag, list(node.value))  # a copy: an anchored mapping is visited again at each alias
    loader.flatten_mapping(flat)
    out: dict[str, Any] = {}
    for key_node, value_node in flat.value:
        key = prefix + key_node.value
        lines[key] = key_node.start_mark.line + 1
        if isinstance(value_node, yaml.MappingNode):
            out[key_node.value] = _mapping(loader, value_node, f"{key}.", label, lines, (*above, node))
            continue
        try:
            out[key_node.value] = loader.construct_object(value_node, deep=True)
        except ValueError as error:
            raise InputError(f"{label}:{lines[key]}: {key}: got {value_node.value!r}: {error}") from None
    return out
