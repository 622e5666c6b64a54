"""Every package that the project names is really imported by code that needs it, and declared."""

import ast
import re
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = {  # import name -> name in pyproject.toml
    "torch": "torch",
    "ray": "ray",
    "transformers": "transformers",
    "diffusers": "diffusers",
    "einops": "einops",
    "webdataset": "webdataset",
    "optuna": "optuna",
    "tensorboardX": "tensorboardX",
    "pydantic": "pydantic",
    "rich": "rich",
    "jinja2": "jinja2",
    "matplotlib": "matplotlib",
    "safetensors": "safetensors",
    "yaml": "pyyaml",
    "sklearn": "scikit-learn",
}


def imported(path: Path) -> set[str]:
    """Top-level names of all imports in a file."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names.add(node.module.partition(".")[0])
    return names


@pytest.fixture(scope="module")
def used() -> set[str]:
    return set().union(*(imported(path) for path in (ROOT / "flowray").rglob("*.py")))


@pytest.mark.parametrize("name", PACKAGES)
def test_is_imported(name: str, used: set[str]) -> None:
    assert name in used


def test_is_declared() -> None:
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    declared = {re.split(r"[\[<>=!~ ]", line)[0].lower() for line in listed}
    assert {name.lower() for name in PACKAGES.values()} <= declared


def test_every_import_is_declared(used: set[str]) -> None:
    """What comes only because another package happens to need it may be gone with the next release."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = project["dependencies"] + [line for extra in project["optional-dependencies"].values() for line in extra]
    declared = {re.split(r"[\[<>=!~ ]", line)[0].lower().replace("-", "_") for line in lines}
    others = {"PIL": "pillow", "yaml": "pyyaml", "sklearn": "scikit_learn", "markdown_it": "markdown_it_py"}
    needed = used - sys.stdlib_module_names - {"flowray"}
    assert {others.get(name, name).lower() for name in needed} <= declared


def test_no_torchvision(used: set[str]) -> None:
    """Its wheel wants CUDA torch."""
    assert "torchvision" not in used
