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

import cmaes
import numpy as np
import optuna
import pytest
import ray
import torch

from flowray.cluster import ray_private
from flowray.tune import optuna_private
from flowray.tune.cmaes import Strategy

ROOT = Path(__file__).parent.parent
WATCHED = ("ray", "optuna", "cmaes", "torch", "transformers", "diffusers", "tensorboardX")
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


def _trial() -> optuna.Trial:
    return _study().ask()


# Where a private attribute is found: an object of the class that flowray reads it from.
HOLDERS: dict[str, Callable[[], Any]] = {
    "_storage": _study,
    "_trial_id": _trial,
    "_base_exc": lambda: ray_private.UserError(ValueError(), ""),
    "_is_stateful": lambda: import_module("transformers").PreTrainedModel,
    "_exit": lambda: import_module("os"),  # Python's own, and documented
    "_strip_protocol": lambda: import_module("fsspec").AbstractFileSystem,
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
    assert {"_is_stateful", "_exit"} <= {name for _, name in private_attributes()}


def test_of_torch_there_are_none() -> None:
    """What it promises serves as well: swa_utils averages, StorageWeakRef tells storages apart."""
    assert not [
        found for found in private_imports(parsed()) if found[1].partition(".")[0] == "torch"
    ]
    used = {name for _, name in private_attributes()}
    assert not {name for name in used if hasattr(torch, name) or hasattr(torch.Tensor, name)}


def test_optunas_private_names_stand_in_one_file() -> None:
    """In no other file that imports Optuna, `self` of a class derived from one of its apart."""
    only = "flowray/tune/optuna_private.py"
    holders = {name for name, make in HOLDERS.items() if make in (_study, _trial)}
    assert {file for file, name in private_attributes() if name in holders} == {only}
    assert [
        file for file, module, _ in private_imports(parsed()) if module.startswith("optuna")
    ] == []


@pytest.mark.parametrize(
    ("ours", "theirs", "name"),
    [
        (optuna_private.ViewedStudy, optuna.Study, "_get_trials"),
        (optuna_private.DraftTrial, optuna.trial.FixedTrial, "_suggest"),
        (Strategy, cmaes.CMA, "_sample_solution"),
    ],
)
def test_what_is_overridden_is_called_as_it_was(ours: type, theirs: type, name: str) -> None:
    assert issubclass(ours, theirs)
    got, wanted = (inspect.signature(getattr(each, name)).parameters for each in (ours, theirs))
    assert [(each.name, each.default) for each in got.values()] == [
        (each.name, each.default) for each in wanted.values()
    ]


def test_cma_es_has_what_its_draws_are_made_of() -> None:
    """flowray/tune/cmaes.py reads these of its own `self`."""
    strategy = cmaes.CMA(mean=np.zeros(2), sigma=1.0, seed=0)
    vectors, lengths = strategy._eigen_decomposition()
    assert (vectors.shape, lengths.shape, strategy._sigma) == ((2, 2), (2,), 1.0)
    assert strategy._mean.shape == strategy._rng.randn(2).shape == (2,)


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
