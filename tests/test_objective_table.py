"""docs/objective.md and first-contact.md: every test that they name is there, and every row
names one.
"""

from __future__ import annotations

import ast
import re
from functools import lru_cache
from pathlib import Path

ROOT = Path(__file__).parent.parent
ROWS = [
    line
    for line in (ROOT / "docs" / "objective.md").read_text(encoding="utf-8").splitlines()
    if line.startswith("| ")
]


@lru_cache
def classes(path: Path) -> dict[str, ast.ClassDef]:
    return {
        node.name: node
        for node in ast.parse(path.read_text(encoding="utf-8")).body
        if isinstance(node, ast.ClassDef)
    }


def methods(path: Path, name: str) -> set[str]:
    """Test methods of a class, those of its bases in the same file included."""
    node = classes(path)[name]
    inherited = (
        methods(path, base.id)
        for base in node.bases
        if isinstance(base, ast.Name) and base.id in classes(path)
    )
    return {
        item.name
        for item in node.body
        if isinstance(item, ast.FunctionDef) and item.name.startswith("test_")
    }.union(*inherited)


def exists(name: str) -> bool:
    """Whether `path::test`, `path::Class` (with a test in it) or `path::Class::test` is defined."""
    file, first, *method = name.split("::")
    path = ROOT / file
    if not path.is_file():
        return False
    if first in classes(path):
        return bool(methods(path, first)) if not method else method[0] in methods(path, first)
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return (
        not method
        and first.startswith("test_")
        and any(isinstance(n, ast.FunctionDef) and n.name == first for n in tree.body)
    )


def test_every_named_test_exists() -> None:
    named = [name for row in ROWS for name in re.findall(r"`(tests/[^`]+::[^`]+)`", row)]
    assert len(named) > 90
    assert [name for name in named if not exists(name)] == []


def test_first_contact_names_tests_that_exist() -> None:
    """Each kind of input has its own, whole files or single tests, parameters left out."""
    kinds = (
        (ROOT / "docs" / "benchmarks" / "first-contact.md")
        .read_text(encoding="utf-8")
        .split("\n## ")[1:]
    )
    for kind in kinds:
        named = re.findall(r"tests/[\w/]+\.py(?:::\w+)*", kind)
        assert named, kind
        missing = [
            name
            for name in named
            if not (exists(name) if "::" in name else (ROOT / name).is_file())
        ]
        assert missing == []


def test_every_row_names_a_test() -> None:
    heads = ("| behaviour |", "| formula |")
    assert [
        row
        for row in ROWS
        if not row.startswith(heads) and not re.search(r"`tests/[^`]+::[^`]+` ?(\||,)", row)
    ] == []


def test_what_is_not_there_is_noticed() -> None:
    assert exists("tests/flow/test_time.py::TestAlpha::test_a_stage_covers_t_0")  # inherited
    for name in (
        "test_time.py::TestAlpha::test_nothing",
        "test_time.py::test_nothing",
        "test_nothing.py::test_it",
        "test_time.py::TestNothing",
    ):
        assert not exists(f"tests/flow/{name}")
