"""What a change of a recipe changes: both trained from the same seeds, on the same batches, at
equal steps and again at equal time, and their last probes subtracted seed by seed.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.record import machine, picture_score
from benchmarks.trainings import Training, paces, processes, say
from flowray.config.errors import InputError
from flowray.config.load import load_recipe
from flowray.config.writing import write_whole
from flowray.store.rows import read_rows

PLAIN, CHANGED = "plain", "changed"
METRICS = (  # those of the last probe that runs are ranked by
    "ema/flow/nmse",
    "ema/flow/cond_gain_cos",
    "ema/shoot/nmse",
    "ema/shoot/energy",
    "ema/shoot/diversity",
)


@dataclass(frozen=True)
class Pair:
    """A recipe, what is typed behind it on both sides, and on the changed one alone. pictures:
    score pictures too, of a recipe on shapes.
    """

    base: str
    typed: tuple[str, ...]
    change: tuple[str, ...]
    pictures: bool = False

    def training(self, folder: Path, name: str, seed: int, steps: int) -> Training:
        more = self.change if name == CHANGED else ()
        return Training(folder, name, self.base, (*self.typed, *more), seed, steps)

    def kept(self) -> dict[str, Any]:
        """What a folder's trainings are of."""
        return {"recipe": self.base, "typed": list(self.typed), "change": list(self.change)}


def run(folder: Path, pair: Pair, seeds: Sequence[int], count: int) -> dict[str, Any]:
    """Train what `folder` lacks, `count` at once, and compare; a killed one goes on from its last
    checkpoint.

    InputError where the folder is of another pair.
    """
    folder.mkdir(parents=True, exist_ok=True)
    _claim(folder, pair)
    steps = load_recipe(pair.base, [*pair.typed]).recipe.train.steps
    pace = paces(folder, [pair.training(folder, name, 0, 1) for name in (PLAIN, CHANGED)])
    at_equal_time = max(1, round(steps * pace[PLAIN] / pace[CHANGED]))
    sides = {
        PLAIN: [pair.training(folder, PLAIN, seed, steps) for seed in seeds],
        "same steps": [pair.training(folder, CHANGED, seed, steps) for seed in seeds],
        "same time": [pair.training(folder, CHANGED, seed, at_equal_time) for seed in seeds],
    }
    # a seed's three after each other, so that a slow hour of the machine is in all of them
    wanted = [one for trio in zip(*sides.values(), strict=True) for one in trio]
    left = [one for one in dict.fromkeys(wanted) if not _scores(one, pair).exists()]
    with processes(count) as pool:
        for one, seconds in zip(left, pool.map(_train, left, [pair] * len(left)), strict=True):
            say(f"{one.run.path.name}: {seconds:.0f} s of training")
    told = {
        side: [json.loads(_scores(one, pair).read_text()) for one in trainings]
        for side, trainings in sides.items()
    }
    return {
        **pair.kept(),
        "machine": machine(),
        "seeds": list(seeds),
        "steps": {PLAIN: steps, "same steps": steps, "same time": at_equal_time},
        "step_s": {name: pace[name] for name in (PLAIN, CHANGED)},
        "metrics": compared(told),
    }


def compared(told: Mapping[str, Sequence[Mapping[str, float]]]) -> dict[str, Any]:
    """By metric the mean of the plain side and, of each other one, the mean difference to it seed
    by seed with its standard error, None for a single seed.
    """
    plain, found = told[PLAIN], {}
    for key in plain[0]:
        sides: dict[str, Any] = {PLAIN: statistics.mean(one[key] for one in plain)}
        for side in (side for side in told if side != PLAIN):
            apart = [b[key] - a[key] for a, b in zip(plain, told[side], strict=True)]
            error = statistics.stdev(apart) / math.sqrt(len(apart)) if len(apart) > 1 else None
            sides[side] = {"difference": statistics.mean(apart), "standard_error": error}
        found[key] = sides
    return found


def _claim(folder: Path, pair: Pair) -> None:
    file = folder / "pair.json"
    if file.exists() and json.loads(file.read_text()) != pair.kept():
        raise InputError(f"{folder}: holds trainings of another pair, see {file.name}")
    write_whole(file, json.dumps(pair.kept(), indent=1))


def _scores(training: Training, pair: Pair) -> Path:
    return training.run.path / ("pictures.json" if pair.pictures else "probe.json")


def _train(training: Training, pair: Pair) -> float:
    """Seconds that its steps took."""
    rows = training.train(f"train.sample_every={training.steps}")
    last = read_rows(training.run.probes)[-1]
    scores = {key: last[key] for key in METRICS if key in last}
    scores |= picture_score(training.run.path) if pair.pictures else {}
    write_whole(_scores(training, pair), json.dumps(scores, indent=1))
    return float(sum(row["perf/step_s"] for row in rows) * training.recipe().train.log_every)
