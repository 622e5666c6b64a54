"""`benchmarks trial-startup`: from a trial being asked for to its training, beside stock Ray
Tune with a TorchTrainer in every trial.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.overhead import ratio
from benchmarks.record import machine
from benchmarks.trial_startup import Start, through_flowray, through_stock
from flowray.cluster.session import started
from flowray.config.load import load_recipe, override_recipe
from flowray.store.latents import ensure_latents

TINY: Mapping[str, Any] = {
    "model.velocity.width": 16,
    "model.velocity.depth": 1,
    "model.head.hidden": 32,
    "train.steps": 2,
    "train.batch_size": 8,
    "train.log_every": 1,
    "train.probe_every": 1,
    "train.sample_every": 2,
    "train.checkpoint_every": 2,
    "train.device": "cpu",
    "optim.schedule.warmup": 1,
    "probes.batch_size": 8,
    "probes.shoot_steps": 5,
    "sample.steps": 4,
    "resources.cpus_per_worker": 1,
    "resources.gpus_per_worker": 0,
}


def run(
    trials: int, rounds: int, workers: int, say: Callable[[str], None] = lambda _: None
) -> dict[str, Any]:
    """`trials` one after the other on each side, `rounds` times in one Ray, the order swapped every
    round; the command's JSON object.

    Ratios, stock's seconds over ours: `startup` and `first_row` of the median trial after the
    first, `first_trial` of a sweep's first.
    """
    recipe = override_recipe(
        load_recipe("sweep_proxy").recipe, {**TINY, "resources.num_workers": workers}
    )
    ensure_latents(recipe.data, recipe.model.autoencoder, recipe.model.latent)
    rounds_of: dict[str, list[list[Start]]] = {"flowray": [], "stock": []}
    sides = [("flowray", through_flowray), ("stock", through_stock)]
    with started(num_cpus=workers):
        for number in range(rounds):
            for name, side in sides[:: 1 if number % 2 == 0 else -1]:
                with tempfile.TemporaryDirectory() as folder:
                    starts = side(Path(folder), recipe, trials)
                rounds_of[name].append(starts)
                say(
                    f"round {number + 1}, {name}:"
                    f" {', '.join(f'{start.loop:.1f} s' for start in starts)} to the loop"
                )
    whole = {
        name: all(len(starts) == trials for starts in each) for name, each in rounds_of.items()
    }
    seconds = {name: _medians(each) for name, each in rounds_of.items()}
    names = {"startup": "loop", "first_row": "row", "first_trial": "first_loop"}
    return {
        "bench": "trial-startup",
        "machine": machine(),
        "ratios": {
            name: ratio(seconds["stock"][key], seconds["flowray"][key])
            for name, key in names.items()
        },
        "guards": {f"all_trials_of_{name}": holds for name, holds in whole.items()},
        "workers": workers,
        "trials": trials,
        "seconds": {
            name: {key: float(np.median(values)) for key, values in each.items()}
            for name, each in seconds.items()
        },
    }


def _medians(rounds: Sequence[Sequence[Start]]) -> dict[str, list[float]]:
    """Of every round: the median trial after the first, and the first."""
    later = [starts[1:] for starts in rounds]
    return {
        "loop": [float(np.median([start.loop for start in starts])) for starts in later],
        "row": [float(np.median([start.row for start in starts])) for starts in later],
        "first_loop": [starts[0].loop for starts in rounds],
        "first_row": [starts[0].row for starts in rounds],
    }
