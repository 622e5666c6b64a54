"""How long a trial's step takes, as far as anything was measured: the sweep's own trials, or
other runs of the same model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from flowray.config.errors import InputError
from flowray.config.load import load_recipe, recipe_diffs
from flowray.config.recipe import Recipe
from flowray.config.rows import read_rows
from flowray.sweepconfig.sweep import Sweep
from flowray.tune.ledger import Ledger

# what a step's time depends on; the weights of losses that look at latents alone hardly matter
COSTLY = (
    "model.",
    "loss.repa.",
    "loss.lpips.",
    "loss.dino.teacher",
    "train.batch_size",
    "train.accumulate",
    "train.precision",
    "optim.matrices.kind",
)
LATEST = 20  # runs that are looked at


@dataclass(frozen=True)
class Pace:
    """seconds: of a step of one trial, on its GPU or CPUs.

    rough: not from this sweep's trials. words: what it is from.
    """

    seconds: float
    words: str
    rough: bool
    on_gpu: bool = False


def same_cost(one: Recipe, other: Recipe) -> bool:
    """Whether a step of both recipes takes about as long, on the same number of workers."""
    return not any(f"{key}.".startswith(COSTLY) for key in recipe_diffs(one, other))


def own_pace(sweep: Sweep) -> Pace | None:
    """From the trials of the sweep, and of those that it starts from."""
    folders = [Path(sweep.storage_path) / sweep.name, *map(Path, sweep.warm_start)]
    step_s = seconds_per_step(folders)
    return (
        None
        if step_s is None
        else Pace(step_s, f"{step_s:.3g} s a step, as in the trials so far", rough=False)
    )


def pace_of_runs(folder: Path, base: Recipe, *, workers: int, on_gpu: bool) -> Pace | None:
    """From the latest run in a storage folder whose model, batch and kind of device are the base
    recipe's; of trials too.

    Its steps alone count: start-up, probes and pictures come on top. workers: those of a run, which
    share a step's work.
    """
    logs = [*folder.glob("*/metrics.jsonl"), *folder.glob("*/*/metrics.jsonl")]
    for log in sorted(logs, key=lambda path: path.stat().st_mtime, reverse=True)[:LATEST]:
        run = log.parent
        try:
            recipe = load_recipe(str(run / "config.yaml")).recipe
        except InputError:  # another version's, or not whole
            continue
        times = [
            row["perf/step_s"]
            for row in read_rows(log)
            if isinstance(row.get("perf/step_s"), float)
        ]
        if times and same_cost(recipe, base) and (recipe.resources.gpus_per_worker > 0) == on_gpu:
            step_s = median(times) * recipe.resources.num_workers / workers
            return Pace(
                step_s,
                f"{step_s:.3g} s a step as in {run}, start-up and probes apart",
                rough=True,
                on_gpu=on_gpu,
            )
    return None


def seconds_per_step(sweep_dirs: Sequence[Path]) -> float | None:
    """Mean wall time of a step, start-up included, over the trials that the sweep directories
    have; None without any.
    """
    done = [
        t
        for folder in sweep_dirs
        for t in Ledger(folder / "trials.jsonl").trials.values()
        if t.last_step and t.seconds
    ]
    return sum(t.seconds for t in done) / sum(t.last_step for t in done) if done else None
