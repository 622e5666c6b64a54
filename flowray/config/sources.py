"""What a name or path that was typed is: a recipe, a sweep, a run, a sweep's folder, a
checkpoint.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml

from flowray.config.errors import InputError
from flowray.config.paths import exists, is_file


def packaged(what: str) -> Any:
    """The folder of the `recipes`, `sweeps` or `assets` that come with the package."""
    return files("flowray") / what


def recipe_names() -> list[str]:
    """The recipes that come with the package."""
    return _yaml_names("recipes")


def packaged_sweeps() -> list[str]:
    """File names of the sweeps that come with flowray."""
    return [f"{name}.yaml" for name in _yaml_names("sweeps")]


def _yaml_names(what: str) -> list[str]:
    folder = packaged(what)
    names = (item.name for item in folder.iterdir()) if folder.is_dir() else ()
    return sorted(name.removesuffix(".yaml") for name in names if name.endswith(".yaml"))


def is_sweep(data: Mapping[str, Any]) -> bool:
    """Whether the top-level keys of a file are a sweep's: a recipe has neither of these."""
    return "parameters" in data or "metric" in data


def is_run(path: Path) -> bool:
    """Whether a folder is a run directory."""
    return is_file(path / "config.yaml") and not is_file(path / "sweep.yaml")


# what stands beside the two files once a run or a sweep has begun: not beside one written by hand
_BEGUN = {
    "config.yaml": ("checkpoints", "metrics.jsonl"),
    "sweep.yaml": ("trials.jsonl", "study.journal"),
}


def is_kept(file: Path, name: str) -> bool:
    """Whether `file` is the `name`, config.yaml or sweep.yaml, that a run or sweep keeps in its
    folder.
    """
    return file.name == name and any(exists(file.parent / other) for other in _BEGUN[name])


def holds_results(folder: Path) -> bool:
    """Whether the folder is a run's or a sweep's, and its YAML files are those that flowray
    wrote.
    """
    return any(is_file(folder / name) and is_kept(folder / name, name) for name in _BEGUN)


def what_it_is(source: str | Path) -> str:
    """What a path or packaged name is and which command takes it, to go on after 'SOURCE is '.

    '' for nothing of flowray's.
    """
    path, typed = Path(source), shlex.quote(str(source))
    samples = f"`python -m flowray.sample {typed} PROMPT` samples it"
    if is_file(path / "state.json"):
        run = path.parent.parent
        return f"a checkpoint of the run {run}; {samples}, {_continues(run)}"
    if is_file(path / "sweep.yaml"):
        file, best = shlex.quote(str(path / "sweep.yaml")), path / "best.yaml"
        return (
            f"the folder of a sweep; `python -m flowray.report {typed}` shows it, "
            f"`python -m flowray.tune {file} --resume` continues it, {path}/NUMBER is a trial"
            + (f", {best} is its best recipe" if is_file(best) else "")
        )
    if is_run(path):
        return f"a run; {samples}, {_continues(path)}"
    if path.name == "checkpoints" and is_run(path.parent):
        return f"the checkpoints of the run {path.parent}; give the run, or one step_* of them"
    if is_file(path):
        if is_run(path.parent):
            return f"a file of the run {path.parent}; {_continues(path.parent)}"
        return _file(path, typed)
    if str(source) in recipe_names():
        return f"a packaged recipe; `python -m flowray.train {typed}` trains it"
    if f"{path.name.removesuffix('.yaml')}.yaml" in packaged_sweeps():
        return f"a packaged sweep; `python -m flowray.tune {typed}` runs it"
    return ""


def _continues(run: Path) -> str:
    recipe = shlex.quote(str(run / "config.yaml"))
    return f"`python -m flowray.train {recipe} --resume` continues it"


def _file(path: Path, typed: str) -> str:
    if path.suffix not in {".yaml", ".yml"}:
        return ""
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        data = None
    if not isinstance(data, dict):
        return ""
    if is_sweep(data):
        return f"a sweep; `python -m flowray.tune {typed}` runs it"
    return f"a recipe; `python -m flowray.train {typed}` trains it"


def comes_first(source: str, what: str, command: str) -> None:
    """InputError where a command begins with a `key=value` instead of the recipe or sweep."""
    if "=" in source and not exists(Path(source)):
        instead = f"python -m {command} NAME {shlex.quote(source)}"
        raise InputError(f"command line: got {source!r} where {what} comes first; type {instead}")
