"""How long a run will take, for `--plan`: from an earlier run of the same model, else from a few
steps on this machine.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from flowray.cli.progress import START_S
from flowray.config.cluster import in_cluster
from flowray.config.cores import usable_cores
from flowray.config.progress import duration
from flowray.config.recipe import Recipe
from flowray.probes.field import BINS
from flowray.probes.rollout import ENDPOINT_STEPS
from flowray.store.latents import unencoded
from flowray.train.looks import GRID_PROMPTS
from flowray.train.measure import NotTimed, Timing, encode_seconds, measure
from flowray.tune.pace import pace_of_runs

GIB = 2**30
STARTS = 6  # a run starts and ends in so many times what its imports take: driver, Ray, workers
JUST_NOW = "timed on this machine just now"
STAGES = {"heun": 2, "midpoint": 2, "dopri5": 7}  # evaluations of a solver's step; Euler has one


def wall_time(
    recipe: Recipe,
    memory: int,
    weights: list[dict[str, Any]],
    problems: Sequence[str] = (),
    *,
    imports_s: float = 0.0,
) -> dict[str, Any]:
    """{"seconds", "step_s", "basis"}: None where nothing can be timed here, and why not.

    memory: bytes that a worker takes. weights: as `flowray.cli.plan.weights` lists them.
    problems: what would stop the run; where there are any, nothing is timed.
    imports_s: what importing the libraries took, which tells how fast this machine starts things.
    InputError where timing finds what would stop the run.
    """
    asked, folder = recipe.resources, Path(recipe.storage_path)
    on_gpu = asked.gpus_per_worker > 0
    pace = pace_of_runs(folder, recipe, workers=asked.num_workers, on_gpu=on_gpu)
    try:
        if pace is not None:
            share = recipe.train.batch_size / asked.num_workers
            timing, basis = Timing(pace.seconds, pace.seconds / 3 / share), pace.words
        else:
            timing = time_steps(recipe, memory, weights, problems)
            basis = f"{timing.step_s:.3g} s a step, {JUST_NOW}"
        start_s = max(START_S, STARTS * imports_s)
        seconds = start_s + recipe.train.steps * timing.step_s + passes(recipe) * timing.forward_s
        if (
            not problems
            and _usable(weights)
            and (pictures := unencoded(recipe.data, recipe.model.autoencoder, recipe.model.latent))
        ):
            each = encode_seconds(recipe)
            basis += f"; {pictures:,} pictures to encode first, {each:.2g} s each"
            seconds += pictures * each
    except NotTimed as error:
        return {"seconds": None, "step_s": None, "basis": str(error)}
    return {"seconds": seconds, "step_s": timing.step_s, "basis": basis}


def time_steps(
    recipe: Recipe, memory: int, weights: list[dict[str, Any]], problems: Sequence[str] = ()
) -> Timing:
    """`measure`, where all workers share this machine's cores. Arguments: as for `wall_time`.

    NotTimed where it cannot be, InputError where the recipe turns out not to run.
    """
    if reason := why_not(recipe, memory, weights):
        raise NotTimed(reason)
    if problems:
        raise NotTimed(f"nothing is timed before this is mended: {problems[0]}")
    timing, asked = measure(recipe), recipe.resources
    if asked.gpus_per_worker:
        return timing
    crowd = max(1.0, asked.num_workers * asked.cpus_per_worker / usable_cores())
    return Timing(timing.step_s * crowd, timing.forward_s * crowd)


def show_wall_time(estimate: dict[str, Any]) -> str:
    """The estimate on one line."""
    if estimate["seconds"] is None:
        return f"wall time: not known ({estimate['basis']})"
    return f"wall time: about {duration(estimate['seconds'])} ({estimate['basis']})"


def passes(recipe: Recipe) -> int:
    """Passes of a sample through the velocity network that all probes and pictures take of a worker
    with the largest share of them.
    """
    train, probes, sample = recipe.train, recipe.probes, recipe.sample
    workers = recipe.resources.num_workers
    kinds = 1 + probes.raw  # of weights: the EMA, and the raw ones where wanted
    rows = kinds * math.ceil(probes.batch_size / workers)
    a_probe = rows * 2 * (BINS + probes.shoot_steps)  # with another caption, and from another draw
    last = rows * sum(ENDPOINT_STEPS)
    guided = 2 if sample.guidance_scale != 1 else 1
    evaluations = sample.steps * STAGES.get(sample.solver.kind, 1) * guided
    a_strip = math.ceil((len(sample.prompts) or GRID_PROMPTS) / workers) * evaluations
    return (
        -(-train.steps // train.probe_every) * a_probe
        + last
        + -(-train.steps // train.sample_every) * a_strip
    )


def _usable(weights: list[dict[str, Any]]) -> bool:
    return all(each["present"] for each in weights)


def why_not(recipe: Recipe, memory: int, weights: list[dict[str, Any]]) -> str:
    """Why no step can be timed here, '' where one can. Arguments: as for `wall_time`."""
    if in_cluster():
        return "the cluster's machines were not timed; a short run there (train.steps=50) tells"
    if recipe.resources.gpus_per_worker and not torch.cuda.is_available():
        return (
            "no GPU here to time a step on; a short run where there is one (train.steps=50) tells"
        )
    if not _usable(weights):
        missing = next(each for each in weights if not each["present"])
        return f"a step cannot be timed without {missing['key']} ({missing['path']})"
    room, of_what = (
        os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2,
        "half of this machine's memory",
    )
    if recipe.train.device != "cpu" and torch.cuda.is_available():
        room, of_what = torch.cuda.mem_get_info()[0], "the GPU here has free"
    if memory > room:
        return f"a step takes {memory / GIB:.1f} GiB, more than {of_what}, {room / GIB:.1f} GiB"
    return ""
