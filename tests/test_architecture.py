"""The import directions of the design, held by parsing every import; and what `import flowray`
must not load.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent / "flowray"
FILES = sorted(path for path in ROOT.rglob("*.py"))

# part -> the parts right below it; what lies further down may be imported too.
BELOW: dict[str, tuple[str, ...]] = {
    "config": (),
    "findings": ("config",),
    "sweepconfig": ("findings",),
    "data": ("config",),
    "flow": ("config",),
    "model": ("config",),
    "losses": ("flow", "model"),
    "store": ("data", "model", "losses"),
    "probes": ("store",),
    "sample": ("store",),
    "export": ("sample",),
    "train": ("probes", "sample"),
    "doctor": ("train", "findings"),
    "tune": ("train", "sweepconfig", "findings"),
    "cluster": ("tune",),
    "views": ("tune", "report"),
    "rayrun": ("cluster", "views", "report", "doctor"),
    "report": ("findings", "sweepconfig"),
    "cli": ("rayrun", "export"),
}
# shims into cli; one-file modules beside the packages (flowray/eval.py) are of the same kind
FREE = {"__main__.py"}
DATA_ONLY = {"assets", "recipes", "sweeps"}
# declarative: findings/* and these may be long
LONG_TABLES = {ROOT / "config" / "keys.py", ROOT / "config" / "aliases.py"}


def reachable(part: str) -> set[str]:
    """Every part that `part` may import, itself included."""
    return {part}.union(*(reachable(below) for below in BELOW[part]))


def imports(path: Path) -> Iterator[tuple[int, str]]:
    """(line, dotted module) of every import in a file, those inside functions too; relative ones
    made absolute.
    """
    package = ("flowray", *path.relative_to(ROOT).parts[:-1])
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package[: len(package) - node.level + 1]) if node.level else ""
            module = ".".join(filter(None, (base, node.module)))
            yield node.lineno, module
            yield from (
                (node.lineno, f"{module}.{alias.name}")
                for alias in node.names
                if module == "flowray"
            )


def part_of(path: Path) -> str:
    inside = path.relative_to(ROOT).parts
    return inside[0] if len(inside) > 1 else ""


def test_every_folder_has_its_place() -> None:
    folders = {part_of(path) for path in FILES} - {""}
    assert folders - DATA_ONLY <= BELOW.keys()


def test_import_directions() -> None:
    wrong = []
    for path in FILES:
        part = part_of(path)
        if not part or path.name in FREE or part in DATA_ONLY:
            continue
        for line, module in imports(path):
            names = module.split(".")
            if names[0] == "flowray" and len(names) > 1 and names[1] not in reachable(part):
                wrong.append(f"{path.relative_to(ROOT.parent)}:{line}: {part} imports {module}")
    assert wrong == []


def test_flow_and_model_do_not_know_each_other() -> None:
    assert "flow" not in reachable("model")
    assert "model" not in reachable("flow")


@pytest.mark.parametrize(
    ("library", "allowed"),
    [
        ("ray", {"cluster", "views", "rayrun"}),
        ("torch", set(BELOW) - {"config", "findings", "report", "sweepconfig"}),
        ("optuna", {"tune", "views", "rayrun"}),
    ],
)
def test_where_libraries_may_be_imported(library: str, allowed: set[str]) -> None:
    found = {
        f"{path.relative_to(ROOT.parent)}:{line}"
        for path in FILES
        for line, module in imports(path)
        if module.split(".")[0] == library and part_of(path) not in allowed
    }
    assert found == set()


def test_shims_are_shims() -> None:
    for path in FILES:
        if path.name in FREE:
            assert {
                module.split(".")[1] for _, module in imports(path) if module.startswith("flowray.")
            } <= {"cli"}, path
            assert len(path.read_text().splitlines()) <= 10, path


@pytest.mark.parametrize(
    "module",
    [
        "flowray",
        "flowray.cli.main",
        "flowray.config.load",
        "flowray.sweepconfig.file",
        "flowray.report.load",
        "flowray.report.sweep_page",
    ],
)
def test_quick_imports_load_neither_torch_nor_ray(module: str) -> None:
    code = (
        f"import sys, {module}; print(sorted({{'torch', 'ray', 'transformers', 'diffusers'}} &"
        " sys.modules.keys()))"
    )
    out = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT.parent
    )
    assert out.stdout.strip() == "[]"


def functions(path: Path) -> Iterator[tuple[str, int]]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield (
                f"{path.relative_to(ROOT.parent)}:{node.lineno} {node.name}",
                (node.end_lineno or 0) - node.lineno + 1,
            )


def test_files_and_functions_stay_small() -> None:
    code = [path for path in FILES if path not in LONG_TABLES and part_of(path) != "findings"]
    long_files = {
        str(path): n
        for path in code
        if (n := len(path.read_text(encoding="utf-8").splitlines())) >= 500
    }
    long_functions = {name: n for path in FILES for name, n in functions(path) if n >= 80}
    assert long_files == {}
    assert long_functions == {}
    assert sum(1 for path in FILES for _ in functions(path)) > 100  # the parser does see them


def test_package_inits_are_nearly_empty() -> None:
    assert {
        str(path): n
        for path in FILES
        if path.name == "__init__.py"
        # the package's own has what is called of it, loaded on first use
        and (n := len(path.read_text().splitlines())) > (5 if part_of(path) else 20)
    } == {}


def test_the_checker_of_this_file_sees_imports_inside_functions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "flow" / "bad.py"
    file.parent.mkdir()
    file.write_text(
        "def f():\n    from flowray.model import heads\n    import ray.train\n    from ..model"
        " import text\n    from flowray import cli\n"
    )
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    assert list(imports(file)) == [
        (2, "flowray.model"),
        (3, "ray.train"),
        (4, "flowray.model"),
        (5, "flowray"),
        (5, "flowray.cli"),
    ]
