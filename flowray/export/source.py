"""Python source of a class and of all that it needs of flowray, as one file without flowray.

References are followed from definition to definition, so that the file holds what is used and
nothing else. Settings become plain dataclasses, and tables from settings to code keep the entries
of the settings that are there.
"""

from __future__ import annotations

import ast
import builtins
import dataclasses
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from flowray.config.base import Config
from flowray.export.scan import Definition, Ref, Source, Span

_SETTINGS = Ref(Config.__module__, "Config")
_STANDS_IN = Ref("flowray.export.settings", "Config")
_PACKAGE = Path(__file__).parent.parent
_PLAIN = {"dataclass": "from dataclasses import dataclass"}
_INDENT = " " * 4


class Bundle(NamedTuple):
    """The text of a file, and what the definitions in it are called."""

    text: str
    names: dict[Ref, str]


def bundled(root: type, settings: Iterable[type] = (), title: str = "") -> Bundle:
    """The file that defines `root`. settings: the config classes that its objects will be of.

    ValueError where the source has something that cannot be followed.
    """
    kept = {Ref(each.__module__, each.__name__) for each in settings}
    return _Bundler(kept).bundle(Ref(root.__module__, root.__name__), title)


def written(value: Any, names: Mapping[Ref, str], left_out: frozenset[str], depth: int = 0) -> str:
    """Source of an object of the bundle's classes; fields named in left_out are None."""
    if isinstance(value, Config):
        fields = {key: getattr(value, key) for key in type(value).model_fields}
    elif dataclasses.is_dataclass(value):
        fields = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    else:
        return repr(value)
    within, inner = _INDENT * depth, _INDENT * (depth + 1)
    lines = [
        f"{inner}{key}={_field(key, each, names, left_out, depth)},\n"
        for key, each in fields.items()
    ]
    name = names[Ref(type(value).__module__, type(value).__name__)]
    return f"{name}(\n{''.join(lines)}{within})"


def _field(
    key: str, value: Any, names: Mapping[Ref, str], left_out: frozenset[str], depth: int
) -> str:
    return "None" if key in left_out else written(value, names, left_out, depth + 1)


class _Bundler:
    def __init__(self, kept: set[Ref]):
        self.kept = kept
        self.sources: dict[str, Source] = {}
        self.included: dict[Ref, Definition] = {}

    def source(self, module: str) -> Source:
        if module not in self.sources:
            self.sources[module] = Source(module, _file_of(module), _is_module)
        return self.sources[module]

    def resolved(self, ref: Ref) -> Ref:
        """Where a name is defined, through modules that import it from others."""
        source = self.source(ref.module)
        if ref == _SETTINGS:
            return _STANDS_IN
        if ref.name in source.statements:
            return Ref(ref.module, source.primary(ref.name))
        passed_on = source.imports.get(ref.name)
        if not isinstance(passed_on, Ref):
            raise ValueError(f"{ref.module}: no definition of {ref.name!r} can be followed")
        return self.resolved(passed_on)

    def is_settings(self, ref: Ref) -> bool:
        """Whether it is a config class, by its bases."""
        if (ref := self.resolved(ref)) == _STANDS_IN:
            return True
        source = self.source(ref.module)
        node = source.statements[ref.name]
        return isinstance(node, ast.ClassDef) and any(
            isinstance(base, ast.Name)
            and isinstance(found := source.ref(base.id), Ref)
            and self.is_settings(found)
            for base in node.bases
        )

    def include(self, ref: Ref) -> None:
        """It and what it refers to."""
        if (ref := self.resolved(ref)) in self.included:
            return
        source = self.source(ref.module)
        node = source.statements[ref.name]
        if isinstance(node, ast.ClassDef) and ref != _STANDS_IN and self.is_settings(ref):
            found = source.definition(_plain_settings(node), _PLAIN)
        elif pruned := self.pruned(source, node):
            found = source.definition(pruned)
        else:
            found = source.definition(source.text_of(node))
        self.included[ref] = found
        for span in found.spans:
            if not span.annotation:
                self.include(span.ref)

    def pruned(self, source: Source, node: ast.stmt) -> str | None:
        """A table by config class with the entries that are kept; None where it is none."""
        if isinstance(node, ast.Assign):
            target, value = node.targets[0], node.value
        elif isinstance(node, ast.AnnAssign) and node.value:
            target, value = node.target, node.value
        else:
            return None
        if not isinstance(value, ast.Dict) or not value.keys:
            return None
        entries = []
        for key, code in zip(value.keys, value.values, strict=True):
            ref = source.ref(key.id) if isinstance(key, ast.Name) else None
            if not isinstance(ref, Ref) or not self.is_settings(ref):
                return None
            if self.resolved(ref) in self.kept:
                entries.append((key, code))
        table = ast.Dict([key for key, _ in entries], [code for _, code in entries])
        return f"{ast.unparse(target)} = {ast.unparse(table)}\n"

    def bundle(self, root: Ref, title: str) -> Bundle:
        self.include(root)
        for ref in sorted(self.kept):
            self.include(ref)
        external = self.external()
        names = self.names(external)
        by_module: dict[str, list[Ref]] = {}
        for ref in self.included:
            by_module.setdefault(ref.module, []).append(ref)
        head = f'"""{title}"""\n\nfrom __future__ import annotations\n\n'
        parts = [head + _imports(external.values())]
        for module in self.order(root.module):
            source = self.source(module)
            for ref in sorted(by_module.get(module, ()), key=source.line):
                parts.append(self.renamed(ref, names).strip("\n"))
        text = "\n\n\n".join(parts) + "\n"
        compile(text, "bundle", "exec")
        return Bundle(text, names)

    def external(self) -> dict[str, str]:
        """Name -> import statement of what is not flowray's."""
        found: dict[str, str] = {}
        for definition in self.included.values():
            for name, statement in definition.external.items():
                if found.setdefault(name, statement) != statement:
                    raise ValueError(f"{name}: both {found[name]!r} and {statement!r}")
        return found

    def names(self, external: Mapping[str, str]) -> dict[Ref, str]:
        """What each definition is called: its own name, before it its module's where it would mean
        two things.
        """
        every = [
            Ref(ref.module, name)
            for ref in self.included
            for name in self.source(ref.module).names_of(ref.name)
        ]
        of_module = {
            self.resolved(span.ref)
            for found in self.included.values()
            for span in found.spans
            if "." in span.old
        }
        count: dict[str, int] = {}
        for ref in every:
            count[ref.name] = count.get(ref.name, 0) + 1
        taken = {*external, *dir(builtins)}
        names = {}
        for ref in every:
            own = count[ref.name] == 1 and ref.name not in taken and ref not in of_module
            bare = ref.name.lstrip("_")
            longer = f"{ref.name[: -len(bare)]}{ref.module.rpartition('.')[2]}_{bare}"
            names[ref] = ref.name if own else longer
        if len(set(names.values())) < len(names) or taken & set(names.values()):
            raise ValueError(f"{sorted(names.values())}: one name for two definitions")
        return names

    def order(self, module: str, seen: set[str] | None = None) -> list[str]:
        """Modules, each behind those that it imports."""
        seen = set() if seen is None else seen
        seen.add(module)
        behind: list[str] = []
        below = [ref.module for ref in self.source(module).imports.values() if isinstance(ref, Ref)]
        below += [_STANDS_IN.module] if module == _SETTINGS.module else []
        for other in below:
            if other not in seen:
                behind += self.order(other, seen)
        return [*behind, module]

    def renamed(self, ref: Ref, names: Mapping[Ref, str]) -> str:
        """The text of a definition with every name as it is called in the file."""
        found = self.included[ref]
        data = found.text.encode()
        edits: list[tuple[Span, str]] = []
        for span in found.spans:
            if span.annotation and self.resolved(span.ref) not in self.included:
                continue
            target = self.resolved(span.ref) if span.ref != _SETTINGS else _STANDS_IN
            name = names.get(Ref(target.module, span.ref.name), names[target])
            if name in span.shadowed:
                raise ValueError(f"{ref.module}: {name!r} means two things in {ref.name}")
            edits.append((span, name))
        for span, name in sorted(edits, key=lambda edit: -edit[0].start):
            if data[span.start : span.end].decode() != span.old:
                raise ValueError(f"{ref.module}: {span.old!r} is not where it is said to be")
            data = data[: span.start] + name.encode() + data[span.end :]
        return data.decode()


def _imports(statements: Iterable[str]) -> str:
    """Import statements, those from one module in one."""
    whole = sorted({each for each in statements if each.startswith("import ")})
    names: dict[str, set[str]] = {}
    for each in statements:
        if each.startswith("from "):
            module, _, name = each.removeprefix("from ").partition(" import ")
            names.setdefault(module, set()).add(name)
    listed = [
        f"from {module} import {', '.join(sorted(names[module]))}" for module in sorted(names)
    ]
    return "\n".join([*whole, *listed])


def _file_of(module: str) -> Path:
    inside = module.split(".")[1:]
    return _PACKAGE.joinpath(*inside).with_suffix(".py")


def _is_module(name: str) -> bool:
    return name.startswith("flowray.") and _file_of(name).is_file()


def _plain_settings(node: ast.ClassDef) -> str:
    """A config class as a dataclass: its fields without limits and defaults, its properties."""
    body: list[str] = []
    if words := ast.get_docstring(node):
        body.append('"""' + re.sub(r"\n(?=.)", f"\n{_INDENT}", words) + '"""')
    for item in node.body:
        if isinstance(item, ast.AnnAssign):
            kind = item.annotation
            if isinstance(kind, ast.Subscript) and ast.unparse(kind.value) == "Annotated":
                kind = kind.slice.elts[0] if isinstance(kind.slice, ast.Tuple) else kind
            body.append(f"{ast.unparse(item.target)}: {ast.unparse(kind)}")
        elif isinstance(item, ast.FunctionDef) and not _checks(item):
            body.append("\n" + ast.unparse(item).replace("\n", f"\n{_INDENT}"))
    bases = ", ".join(map(ast.unparse, node.bases))
    inner = "".join(f"{_INDENT}{part}\n" if part[0] != "\n" else _inner(part) for part in body)
    return f"@dataclass(frozen=True, kw_only=True)\nclass {node.name}({bases}):\n{inner}"


def _inner(part: str) -> str:
    return f"\n{_INDENT}{part[1:]}\n"


def _checks(item: ast.FunctionDef) -> bool:
    """Whether a method is one of pydantic's checks."""
    return any("validator" in ast.unparse(decorator) for decorator in item.decorator_list)
