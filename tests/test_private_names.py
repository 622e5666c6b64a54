"""What flowray uses of other packages without their promise: the next version may lack it.

What is imported stands in flowray/cluster/ray_private.py alone. Each name is touched in the
installed version, so that a version that moved one says what broke. The ranges in pyproject.toml
are those that pass here.
"""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Callable, Iterable, Iterator
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any

import optuna
import pytest
import ray
import torch

from flowray.cluster import ray_private

ROOT = Path(__file__).parent.parent
WATCHED = ("ray", "optuna", "torch", "transformers", "diffusers", "tensorboardX")
KUBERAY = {"RAY_CLUSTER_NAME", "RAY_CLUSTER_NAMESPACE"}  # set in its pods, not read by Ray


def parsed() -> Iterator[tuple[str, ast.Module]]:
    for path in sorted((ROOT / "flowray").rglob("*.py")):
        yield str(path.relative_to(ROOT)), ast.parse(path.read_text(encoding="utf-8"))


def private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def private_imports(
    files: Iterable[tuple[str, ast.Module]] | None = None,
) -> list[tuple[str, str, str]]:
    """(file, module, name) of every import of which a part begins with an underscore; of flowray's
    files unless others are given.
    """
    found = []
    for file, tree in parsed() if files is None else files:
        for node in ast.walk(tree):
            names: list[tuple[str, str]] = []
            if isinstance(node, ast.ImportFrom) and node.module:
                names = [(node.module, alias.name) for alias in node.names]
            elif isinstance(node, ast.Import):
                names = [(alias.name, "") for alias in node.names]
            for module, name in names:
                parts = [*module.split("."), name]
                if parts[0] in WATCHED and any(map(private, parts)):
                    found.append((file, module, name))
    return found


def own_names(tree: ast.Module) -> set[str]:
    """Private names that a file defines or sets on its own objects."""
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            names |= {node.attr} if node.value.id in ("self", "cls") else set()
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            names.add(node.target.id)
    return names


def private_attributes() -> list[tuple[str, str]]:
    """(file, attribute) of every private attribute of an object of another package."""
    found = set()
    for file, tree in parsed():
        ours = own_names(tree)
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and private(node.attr):
                mine = isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")
                if not mine and (node.attr in HOLDERS or node.attr not in ours):
                    found.add((file, node.attr))
    return sorted(found)


def _study() -> optuna.Study:
    return optuna.create_study(storage=optuna.storages.InMemoryStorage())


# Where a private attribute is found: an object of the class that flowray reads it from.
HOLDERS: dict[str, Callable[[], Any]] = {
    "_storage": _study,
    "_get_trials": _study,
    "_trial_id": lambda: (study := _study(), study.ask(), study.trials[0])[-1],
    "_foreach_lerp_": lambda: torch,
    "_cdata": lambda: torch.zeros(1).untyped_storage(),
    "_base_exc": lambda: ray_private.UserError(ValueError(), ""),
    "_is_stateful": lambda: import_module("transformers").PreTrainedModel,
    "_exit": lambda: import_module("os"),  # Python's own, and documented
    "_SubParsersAction": lambda: import_module("argparse"),  # in annotations only
}


@pytest.mark.parametrize("name", ray_private.PLACES)
def test_rays(name: str) -> None:
    """All that is Ray's stands in one module, by which the others have it."""
    try:
        assert getattr(ray_private, name) is not None
    except (ImportError, AttributeError) as error:
        pytest.fail(f"Ray {version('ray')} lacks {ray_private.PLACES[name]}: {error}")


def test_nothing_else_is_imported() -> None:
    assert private_imports() == []
    code = ast.parse("from ray._private import services\nimport torch._inductor")
    found = [("ray._private", "services"), ("torch._inductor", "")]
    assert private_imports([("a.py", code)]) == [("a.py", *each) for each in found]


@pytest.mark.parametrize(("file", "name"), private_attributes())
def test_attributes(file: str, name: str) -> None:
    assert name in HOLDERS, f"{file} uses {name}: say in HOLDERS of this test where it is found"
    assert hasattr(HOLDERS[name](), name), f"{file} needs {name}"


def test_there_are_some() -> None:
    """The search finds what is known to be there."""
    assert {"_foreach_lerp_", "_storage"} <= {name for _, name in private_attributes()}


def test_studies_hand_trials_on_as_optuna_asks_for_them() -> None:
    """flowray/tune/study.py and nsga.py override `_get_trials`, which Optuna's samplers call."""
    import flowray.tune.nsga as nsga
    import flowray.tune.study as study

    wanted = list(inspect.signature(optuna.Study._get_trials).parameters.values())
    for ours in (study._StudyWithPartialResults, nsga._Graded):
        got = inspect.signature(ours._get_trials).parameters
        assert list(got) == [each.name for each in wanted], ours
        assert [each.default for each in got.values()] == [each.default for each in wanted], ours


def test_the_backend_is_started_as_ray_starts_it() -> None:
    """flowray/cluster/network.py overrides `on_start` of Ray Train's torch backend."""
    from flowray.cluster.network import _Bound

    wanted = inspect.signature(ray_private.TorchBackend.on_start).parameters
    assert list(inspect.signature(_Bound.on_start).parameters) == list(wanted)


def ray_sources() -> str:
    """Ray's Python code that reads variables, as one text."""
    root = Path(ray.__file__).parent
    parts = ("_private", "_common", "air", "train", "tune", "autoscaler")
    files = [file for part in parts for file in (root / part).rglob("*.py")]
    return "\n".join(file.read_text(encoding="utf-8", errors="replace") for file in files)


def test_rays_variables_are_still_read() -> None:
    """One that Ray reads no more is set in vain, and nothing says so."""
    used: dict[str, str] = {}
    for file, tree in parsed():
        texts = [node.value for node in ast.walk(tree) if isinstance(node, ast.Constant)]
        found = [text for text in texts if re.fullmatch(r"RAY_[A-Z_]+", str(text))]
        used |= dict.fromkeys(found, file)
    read = ray_sources()
    assert "RAY_CHDIR_TO_TRIAL_DIR" in used
    assert {name: used[name] for name in used.keys() - KUBERAY if name not in read} == {}


def test_the_heads_resource_has_its_name() -> None:
    assert [file for file, tree in parsed() if ray_private.HEAD in ast.unparse(tree)] == [
        "flowray/cluster/ray_private.py"
    ]
    assert ray_private.HEAD in ray_sources().replace('NODE_ID_PREFIX + "', '"node:')
