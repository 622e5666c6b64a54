"""Which global names a module's definitions refer to, and where in their text."""

from __future__ import annotations

import ast
import builtins
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

_Function = ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda
_Comprehension = ast.ListComp | ast.SetComp | ast.DictComp | ast.GeneratorExp
_UNKNOWN = frozenset({"pydantic"})  # what exported code does without


class Ref(NamedTuple):
    """A definition: dotted module and name; the module itself where the name is ''."""

    module: str
    name: str


class Span(NamedTuple):
    """A reference in a definition's text, bytes [start, end), where `old` stands.

    annotation: in one, which is never evaluated. shadowed: names that mean something local there.
    """

    start: int
    end: int
    old: str
    ref: Ref
    annotation: bool
    shadowed: frozenset[str]


@dataclass
class Definition:
    """A top-level statement's text, its references, and the imports of other libraries it needs."""

    text: str
    spans: list[Span] = field(default_factory=list)
    external: dict[str, str] = field(default_factory=dict)


class Source:
    """A module of flowray: its top-level definitions and imports."""

    def __init__(self, module: str, file: Path, is_module: Callable[[str], bool]):
        self.module, self._is_module = module, is_module
        self._lines = file.read_text(encoding="utf-8").splitlines(keepends=True)
        self.statements: dict[str, ast.stmt] = {}
        self.imports: dict[str, Ref | str] = {}
        for node in ast.parse("".join(self._lines)).body:
            self.imports |= self.imported(node)
            self.statements |= dict.fromkeys(_defined(node), node)

    def imported(self, node: ast.AST) -> dict[str, Ref | str]:
        """What an import statement binds: a Ref into flowray, or the import of another library."""
        if isinstance(node, ast.Import):
            return {
                alias.asname or alias.name.partition(".")[0]: f"import {_as(alias)}"
                for alias in node.names
            }
        if not isinstance(node, ast.ImportFrom) or node.module in (None, "__future__"):
            return {}
        module = str(node.module)
        if module.partition(".")[0] != "flowray":
            return {a.asname or a.name: f"from {module} import {_as(a)}" for a in node.names}
        return {
            a.asname or a.name: (
                Ref(inner, "")
                if self._is_module(inner := f"{module}.{a.name}")
                else Ref(module, a.name)
            )
            for a in node.names
        }

    def ref(self, name: str) -> Ref | str | None:
        """What a global name means here; None for what is neither defined nor imported."""
        return Ref(self.module, name) if name in self.statements else self.imports.get(name)

    def names_of(self, name: str) -> list[str]:
        """All names that the statement of a name defines."""
        return _defined(self.statements[name])

    def primary(self, name: str) -> str:
        """The first of them."""
        return self.names_of(name)[0]

    def line(self, ref: Ref) -> int:
        """Where it stands."""
        return self.statements[ref.name].lineno

    def text_of(self, node: ast.stmt) -> str:
        """Its lines, its decorators and the comments on it."""
        decorators = getattr(node, "decorator_list", [])
        first = min([node.lineno, *(each.lineno for each in decorators)]) - 1
        while first and self._lines[first - 1].startswith("#"):
            first -= 1
        return "".join(self._lines[first : node.end_lineno])

    def definition(self, text: str, more: Mapping[str, str] | None = None) -> Definition:
        """The references of a statement's text. more: imports beside the module's."""
        found = Definition(text)
        _Scan(self, found, dict(more or {})).visit(ast.parse(text))
        return found


def _as(alias: ast.alias) -> str:
    return f"{alias.name} as {alias.asname}" if alias.asname else alias.name


def _defined(node: ast.stmt) -> list[str]:
    """The names that a top-level statement defines."""
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        return [node.name]
    targets = node.targets if isinstance(node, ast.Assign) else []
    targets = [node.target] if isinstance(node, ast.AnnAssign) and node.value else targets
    return [each.id for target in targets for each in ast.walk(target) if _is_name(each)]  # type: ignore[attr-defined]


def _is_name(node: ast.AST) -> bool:
    return isinstance(node, ast.Name)


def _bound(node: ast.AST) -> Iterator[str]:
    """Names bound in a function's own scope by the statements below a node."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield child.name
        elif isinstance(child, ast.Name) and isinstance(child.ctx, ast.Store):
            yield child.id
        elif isinstance(child, ast.ExceptHandler | ast.MatchAs | ast.MatchStar) and child.name:
            yield child.name
        elif isinstance(child, ast.Import | ast.ImportFrom):
            yield from (alias.asname or alias.name.partition(".")[0] for alias in child.names)
        if not isinstance(
            child, _Function | ast.ClassDef | _Comprehension
        ):  # each a scope of its own
            yield from _bound(child)


class _Scan(ast.NodeVisitor):
    """Fills a Definition. Local names hide global ones."""

    def __init__(self, source: Source, found: Definition, more: dict[str, str]):
        self._source, self._found = source, found
        self._inner: dict[str, Ref | str] = dict(more)
        self._locals: list[frozenset[str]] = []
        self._annotation = False
        starts = [0]
        for line in found.text.encode().splitlines(keepends=True):
            starts.append(starts[-1] + len(line))
        self._starts = starts

    def visit_FunctionDef(self, node: ast.FunctionDef | ast.AsyncFunctionDef) -> None:
        self._define(node)
        for each in (*node.decorator_list, *node.args.defaults, *node.args.kw_defaults):
            if each is not None:
                self.visit(each)
        self._visit_annotation(node.returns)
        arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
        arguments += [each for each in (node.args.vararg, node.args.kwarg) if each]
        for argument in arguments:
            self._visit_annotation(argument.annotation)
        bound = {each.arg for each in arguments}
        with self._scope(bound | set(_bound(ast.Module(node.body, [])))):
            for statement in node.body:
                self.visit(statement)

    visit_AsyncFunctionDef = visit_FunctionDef

    def visit_Lambda(self, node: ast.Lambda) -> None:
        for each in (*node.args.defaults, *(d for d in node.args.kw_defaults if d)):
            self.visit(each)
        with self._scope({each.arg for each in ast.walk(node.args) if isinstance(each, ast.arg)}):
            self.visit(node.body)

    def visit_ClassDef(self, node: ast.ClassDef) -> None:
        self._define(node)
        self.generic_visit(node)

    def visit_AnnAssign(self, node: ast.AnnAssign) -> None:
        self._visit_annotation(node.annotation)
        self.visit(node.target)
        if node.value:
            self.visit(node.value)

    def _visit_comprehension(self, node: _Comprehension) -> None:
        with self._scope({name for each in node.generators for name in _bound(each)}):
            self.generic_visit(node)

    visit_ListComp = visit_SetComp = visit_DictComp = visit_GeneratorExp = _visit_comprehension

    def visit_Name(self, node: ast.Name) -> None:
        if any(node.id in names for names in self._locals):
            return
        if isinstance(node.ctx, ast.Store):  # of the statement itself
            if node.id in self._source.statements and not self._locals and node.col_offset == 0:
                self._add(node, node.id, Ref(self._source.module, node.id))
            return
        meant = self._inner.get(node.id) or self._source.ref(node.id)
        if isinstance(meant, Ref) and meant.name:
            self._add(node, node.id, meant)
        elif isinstance(meant, str):
            self._outside(node.id, meant)
        elif not self._annotation and not hasattr(builtins, node.id) and node.id[:2] != "__":
            raise ValueError(f"{self._source.module}: {node.id!r} cannot be followed")

    def visit_Attribute(self, node: ast.Attribute) -> None:
        name = node.value.id if isinstance(node.value, ast.Name) else ""
        hidden = any(name in names for names in self._locals)
        meant = None if hidden else self._inner.get(name) or self._source.ref(name)
        if isinstance(meant, Ref) and not meant.name:
            self._add(node, f"{name}.{node.attr}", Ref(meant.module, node.attr))
        else:
            self.generic_visit(node)

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        if any(isinstance(meant, Ref) for meant in self._source.imported(node).values()):
            raise ValueError(f"{self._source.module}: imports flowray inside a function")

    def _visit_annotation(self, node: ast.expr | None) -> None:
        if node is not None:
            before, self._annotation = self._annotation, True
            self.visit(node)
            self._annotation = before

    @contextmanager
    def _scope(self, names: set[str]) -> Iterator[None]:
        self._locals.append(frozenset(names))
        try:
            yield
        finally:
            self._locals.pop()

    def _outside(self, name: str, statement: str) -> None:
        library = re.split(r"[ .]", statement)[1]
        if library in _UNKNOWN:
            if not self._annotation:
                raise ValueError(f"{self._source.module}: {name!r} needs {library}")
            return
        self._found.external[name] = statement

    def _define(self, node: ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) -> None:
        if self._locals or node.col_offset:
            return
        start = self._starts[node.lineno - 1]
        after = self._found.text.encode()[start:]
        if match := re.search(rb"(?:def|class)\s+(\w+)", after):
            begin, end = start + match.start(1), start + match.end(1)
            self._span(begin, end, node.name, Ref(self._source.module, node.name))

    def _add(self, node: ast.expr, old: str, ref: Ref) -> None:
        start = self._starts[node.lineno - 1] + node.col_offset
        self._span(start, start + len(old.encode()), old, ref)

    def _span(self, start: int, end: int, old: str, ref: Ref) -> None:
        shadowed = frozenset().union(*self._locals)
        self._found.spans.append(Span(start, end, old, ref, self._annotation, shadowed))
