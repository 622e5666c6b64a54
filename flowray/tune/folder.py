"""The directory of a sweep: made for it, or held against it to go on with it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from flowray.config.errors import InputError
from flowray.config.load import dump_recipe, load_recipe, recipe_diffs
from flowray.config.recipe import Recipe
from flowray.config.scale import OLDER_UNIT, older_unit
from flowray.config.schema import show
from flowray.config.writing import write_whole
from flowray.store.run import RunDirectory, RunLock, require_writable
from flowray.sweepconfig.file import dump_sweep, text_sweep
from flowray.sweepconfig.sweep import Sweep
from flowray.tune.ledger import Ledger
from flowray.tune.plan import check_storage

_THE_SWEEP = (
    "task",
    "method",
    "search",
    "metric",
    "more_metrics",
    "parameters",
    "points",
    "warm_start",
    "seeds",
    "seed",
)
# what base and set come to stands in base.yaml
_PLACES = ("name", "storage_path", "description", "card", "base", "set")
# may differ: places, where it trains, and checkpoints, of which another halving may need more
_OF_THE_RECIPE = (
    "name",
    "storage_path",
    "card",
    "resources",
    "data.cache",
    "data.max_bad",
    "train.device",
    "train.checkpoint_every",
)


def sweep_folder(sweep: Sweep) -> Path:
    """`<storage_path>/<name>`."""
    return Path(sweep.storage_path).resolve() / sweep.name


def open_directory(sweep: Sweep, base: Recipe, resume: bool) -> Path:
    """Make `<storage_path>/<name>`, or check that the sweep there is this one, to go on with it.

    InputError where `refuse_taken` has one, before anything is written.
    """
    sweep_dir = sweep_folder(sweep)
    kept, recipe = sweep_dir / "sweep.yaml", sweep_dir / "base.yaml"
    try:
        refuse_taken(sweep, base, resume)
        _make(sweep_dir)
        for path, text in ((recipe, dump_recipe(base)), (kept, dump_sweep(sweep))):
            write_whole(path, text)
    except OSError as error:
        raise _unwritable(sweep_dir, error) from None
    return sweep_dir


@contextmanager
def held_directory(sweep: Sweep, base: Recipe, resume: bool) -> Iterator[RunLock]:
    """`open_directory` by a process that holds the sweep before it writes, and for the block."""
    sweep_dir = sweep_folder(sweep)
    try:
        _make(sweep_dir)
    except OSError as error:
        raise _unwritable(sweep_dir, error) from None
    with RunLock(RunDirectory(sweep_dir)) as lock:
        open_directory(sweep, base, resume)
        yield lock


def _make(sweep_dir: Path) -> None:
    sweep_dir.mkdir(parents=True, exist_ok=True)
    require_writable(sweep_dir)


def _unwritable(sweep_dir: Path, error: OSError) -> InputError:
    why = f"cannot be written: {error.strerror}"
    return InputError(f"{sweep_dir}: {why}; type storage_path=FOLDER")


def refuse_taken(sweep: Sweep, base: Recipe, resume: bool) -> None:
    """InputError where the folder holds another sweep (see `refuse_other`), where another process
    runs it, or where the folder cannot be written. Writes nothing.
    """
    sweep_dir = sweep_folder(sweep)
    if problem := check_storage(sweep_dir.parent, 0)["problem"]:
        raise InputError(f"storage_path: {problem}")
    if (sweep_dir / "sweep.yaml").exists():
        RunLock(RunDirectory(sweep_dir)).refuse_if_held()
        refuse_other(sweep, base, resume)


def refuse_other(sweep: Sweep, base: Recipe, resume: bool) -> None:
    """InputError where the directory holds another sweep than this one. It may hold none.

    With `resume` caps, budgets, stops and resources may differ, without it only places may.
    """
    kept, recipe = (sweep_folder(sweep) / name for name in ("sweep.yaml", "base.yaml"))
    if not kept.exists():
        return
    old = text_sweep(kept.read_text(), str(kept))
    pairs = {field: (getattr(old, field), getattr(sweep, field)) for field in Sweep.model_fields}
    changed = [field for field, (was, comes) in pairs.items() if was != comes]
    other = {field: pairs[field] for field in changed if field in _THE_SWEEP}
    if recipe.exists():
        keys = recipe_diffs(load_recipe(str(recipe)).recipe, base)
        free = tuple(f"{key}." for key in _OF_THE_RECIPE)
        other |= {key: pair for key, pair in keys.items() if not f"{key}.".startswith(free)}
    for key, (was, comes) in other.items():
        plain = all(value is None or isinstance(value, str | int | float) for value in (was, comes))
        values = f" ({show(comes)}, there it is {show(was)})" if plain else ""
        raise InputError(
            f"{kept}: {key} differs from the sweep to resume{values}; take it back, or type"
            " name=OTHER for a new sweep"
        )
    ledger = Ledger(kept.with_name("trials.jsonl"))
    judged = [*(metric.name for metric in sweep.objectives), *sweep.rule_metrics]
    for record in ledger.trials.values():
        if older := [name for name in judged if older_unit(name, record.metrics)]:
            raise InputError(
                f"{ledger.path}: trial {record.trial} has {older[0]} {OLDER_UNIT}; new trials would"
                " not compare: type name=OTHER for a new sweep, or go on with that version"
            )
    minor = [field for field in changed if field not in _PLACES]
    if minor and not resume:
        done = ledger.by("finished", "stopped", "failed")
        raise InputError(
            f"{kept}: {minor[0]} differs from the sweep that is there, of which {len(done)} trials"
            " are done; type --resume to continue it so, or name=OTHER for a new one"
        )
