"""`benchmarks tune-overhead`: what the tuner's own work costs a trial and a row, beside stock
Ray Tune on the same synthetic sweep.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.record import machine
from benchmarks.synthetic import Cost, through_flowray, through_stock
from flowray.cluster.session import started

SIDES: Mapping[str, Callable[[Path, int, int], Cost]] = {
    "flowray": through_flowray,
    "stock": through_stock,
    "stock_reusing": partial(through_stock, reuse=True),
}


def run(
    trials: int, rows: int, rounds: int, say: Callable[[str], None] = lambda _: None
) -> dict[str, Any]:
    """All sides in turn, `rounds` times in one Ray, the order swapped every round; the command's
    JSON object.

    Ratios, against stock Tune as it comes and, named `_reusing`, with a process for many trials, as
    flowray has it: `trial_seconds`, stock's wall seconds a trial over ours; `rows_per_s`, our rows
    a second over stock's.
    """
    costs: dict[str, list[Cost]] = {name: [] for name in SIDES}
    with started():
        for number in range(rounds):
            for name, side in list(SIDES.items())[:: 1 if number % 2 == 0 else -1]:
                with tempfile.TemporaryDirectory() as folder:
                    cost = side(Path(folder), trials, rows)
                costs[name].append(cost)
                say(
                    f"round {number + 1}, {name}: {cost.trials} trials and {cost.rows} rows in"
                    f" {cost.seconds:.1f} s"
                )
    per_trial = {
        name: [cost.seconds / cost.trials for cost in each] for name, each in costs.items()
    }
    per_second = {name: [cost.rows / cost.seconds for cost in each] for name, each in costs.items()}
    ratios = {}
    for other, suffix in (("stock", ""), ("stock_reusing", "_reusing")):
        ratios[f"trial_seconds{suffix}"] = ratio(per_trial[other], per_trial["flowray"])
        ratios[f"rows_per_s{suffix}"] = ratio(per_second["flowray"], per_second[other])
    return {
        "bench": "tune-overhead",
        "machine": machine(),
        "ratios": ratios,
        "guards": {
            "all_trials_ended": all(
                cost.trials == trials for each in costs.values() for cost in each
            )
        },
        "trials": trials,
        "seconds_per_trial": {name: float(np.median(values)) for name, values in per_trial.items()},
        "rows_per_second": {name: float(np.median(values)) for name, values in per_second.items()},
    }


def ratio(above: Sequence[float], below: Sequence[float]) -> dict[str, float]:
    """What a round's numbers say of each other: median and extremes over the rounds."""
    each = [a / b for a, b in zip(above, below, strict=True)]
    return {
        "median": float(np.median(each)),
        "min": min(each),
        "max": max(each),
        "rounds": len(each),
    }
