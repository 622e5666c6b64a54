"""Every package that the project names is really imported by code that needs it, and declared."""

import ast
import re
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parent.parent
PACKAGES = {  # import name -> name in pyproject.toml
    "torch": "torch",
    "ray": "ray",
    "transformers": "transformers",
    "diffusers": "diffusers",
    "einops": "einops",
    "webdataset": "webdataset",
    "optuna": "optuna",
    "cmaes": "cmaes",
    "tensorboardX": "tensorboardX",
    "pydantic": "pydantic",
    "rich": "rich",
    "jinja2": "jinja2",
    "matplotlib": "matplotlib",
    "safetensors": "safetensors",
    "yaml": "pyyaml",
    "sklearn": "scikit-learn",
    "pyarrow": "pyarrow",
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
    """What comes only because another package happens to need it may be gone with the next
    release.
    """
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = project["dependencies"] + [
        line for extra in project["optional-dependencies"].values() for line in extra
    ]
    declared = {re.split(r"[\[<>=!~ ]", line)[0].lower().replace("-", "_") for line in lines}
    others = {
        "PIL": "pillow",
        "grpc": "grpcio",
        "yaml": "pyyaml",
        "sklearn": "scikit_learn",
        "markdown_it": "markdown_it_py",
    }
    # flowray.bench says so where the checkout's `benchmarks` is not there
    needed = used - sys.stdlib_module_names - {"flowray", "benchmarks"}
    assert {others.get(name, name).lower() for name in needed} <= declared


def test_the_licence_and_the_pythons_are_said_alike_everywhere() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    cited = re.findall(r"^(version|license): (\S+)$", (ROOT / "CITATION.cff").read_text(), re.M)
    assert dict(cited) == {name: project[name] for name in ("version", "license")}
    assert [name for name in project["license-files"] if not (ROOT / name).is_file()] == []
    prefix = "Programming Language :: Python :: "
    pythons = [line.removeprefix(prefix) for line in project["classifiers"] if prefix in line]
    ci = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())
    assert pythons == ci["jobs"]["test"]["strategy"]["matrix"]["python"]


def requirements() -> list[Requirement]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = [project["dependencies"], *project["optional-dependencies"].values()]
    return [Requirement(line) for some in lines for line in some]


def test_what_is_tested_lies_in_the_declared_ranges() -> None:
    """constraints.txt holds the versions that `make setup` installs and the tests pass with."""
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pinned = dict(line.split("==") for line in lines if line and not line.startswith("#"))
    pinned = {canonicalize_name(name): version for name, version in pinned.items()}
    needed = {canonicalize_name(each.name): each.specifier for each in requirements()}
    known = {name: specifier for name, specifier in needed.items() if name in pinned}
    assert {"ray", "optuna", "torch", "transformers", "diffusers"} <= known.keys()
    outside = [name for name, specifier in known.items() if pinned[name] not in specifier]
    assert outside == []


@pytest.mark.parametrize("name", ["cmaes", "ray", "optuna", "torch"])
def test_a_range_has_an_end_where_private_names_are_used(name: str) -> None:
    specifiers = [each.specifier for each in requirements() if each.name == name]
    assert any(part.operator in ("<", "<=", "==", "~=") for each in specifiers for part in each)


def test_no_torchvision(used: set[str]) -> None:
    """Its wheel wants CUDA torch."""
    assert "torchvision" not in used
