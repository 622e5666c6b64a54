"""What a sweep would do and take, as plain data, from the sweep, its recipe and the machines that there are; nothing is started."""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from flowray.config.recipe import Recipe
from flowray.config.sweep import Hyperband, Sweep
from flowray.config.sweepfile import plain_parameter
from flowray.store.run import storage_folder
from flowray.tune.records import Records
from flowray.tune.space import trial_count
from flowray.tune.warm import earlier_trials

GIB = 2**30


def longest(sweep: Sweep, base: Recipe) -> int:
    """The largest step budget of a run of any trial; scoring pictures is one step."""
    if sweep.task == "sample":
        return 1
    parameter = sweep.parameters.get("train.steps")
    if parameter is None:
        return base.train.steps
    spec = parameter.model_dump()
    return int(max(spec.get("values") or [spec.get("max", spec.get("value"))]))


def share_cluster(sweep: Sweep, base: Recipe, cpus: int, gpus: int) -> tuple[dict[str, Any], int]:
    """What each trial takes, as recipe overrides, and how many run at once; `auto` parts follow from the cluster's CPUs and GPUs.

    auto: a GPU for each worker where there are any; as many workers as the GPUs allow, else one; the CPUs in equal parts; as many trials
    as then fit. At least one of each, for a cluster that grows when it is asked. Pictures of a trained run have one worker.
    """

    def pick(name: str, auto: float) -> Any:
        value = getattr(sweep.resources, name)
        return auto if value == "auto" else getattr(base.resources, name) if value is None else value

    slots = None if sweep.max_concurrent == "auto" else sweep.max_concurrent
    per_gpu = pick("gpus_per_worker", 1 if gpus else 0)
    workers = pick("num_workers", max(1, gpus // (slots or gpus)) if gpus and per_gpu else 1)
    workers = 1 if sweep.task == "sample" else workers
    per_cpu = pick("cpus_per_worker", max(1, cpus // (workers * (slots or max(1, gpus)))))
    fits = min(cpus // (workers * per_cpu), gpus // (workers * per_gpu) if per_gpu else cpus)
    chosen = {"resources.num_workers": workers, "resources.cpus_per_worker": per_cpu, "resources.gpus_per_worker": per_gpu}
    return chosen, min(slots or max(1, int(fits)), trial_count(sweep))


def rungs_and_steps(sweep: Sweep, trials: int, steps: int) -> tuple[list[int], int]:
    """(rungs of halving, steps that it lets the first seeds train if every rung keeps its best 1/eta and the other seeds follow)."""
    halving, rungs = sweep.early_terminate, []
    if not isinstance(halving, Hyperband):
        return [], trials * steps * sweep.seeds
    rung = float(halving.min_iter)
    while rung < steps:
        rungs.append(int(rung))
        rung *= halving.eta
    ends = [*rungs, steps]
    parts = [trials * halving.eta**-i * (end - start) for i, (start, end) in enumerate(zip([0, *ends], ends, strict=False))]
    left = trials * halving.eta ** -len(rungs)
    return rungs, round(sum(parts) + left * steps * (sweep.seeds - 1))


def make_plan(sweep: Sweep, base: Recipe, *, cpus: int, gpus: int, checkpoint_bytes: int = 0) -> dict[str, Any]:
    """The plan: space, trials, halving, resources, hours at most and storage. checkpoint_bytes: of one checkpoint of a trial."""
    trials, steps = trial_count(sweep), longest(sweep, base)
    rungs, expected = rungs_and_steps(sweep, trials, steps)
    takes, concurrent = share_cluster(sweep, base, cpus, gpus)
    at_most = trials * steps * sweep.seeds
    kept = trials * sweep.seeds * base.train.keep_checkpoints * checkpoint_bytes if sweep.task == "train" else 0
    return {
        "name": sweep.name,
        "sweep_dir": f"{sweep.storage_path}/{sweep.name}",
        "task": sweep.task,
        "base": sweep.base,
        "set": sweep.set,
        "method": sweep.method,
        "search": sweep.sampler.model_dump(),
        "metric": sweep.metric.model_dump(),
        "more_metrics": [metric.model_dump() for metric in sweep.more_metrics],
        "parameters": {key: plain_parameter(parameter) for key, parameter in sweep.parameters.items()},
        "points": list(sweep.points),
        "warm_start": str(earlier_trials(sweep, base)) if sweep.warm_start else "",
        "early_terminate": sweep.early_terminate.model_dump() if sweep.early_terminate else None,
        "stop": [rule.model_dump(exclude_none=True) for rule in sweep.stop],
        "rungs": rungs,
        "trials": trials,
        "seeds": sweep.seeds,
        "budget_steps": steps,
        "steps_at_most": at_most,
        "steps_expected": expected,
        "cluster": {"cpus": cpus, "gpus": gpus},
        "takes": takes,
        "concurrent": concurrent,
        "time_budget_s": sweep.time_budget,
        "hours_at_most": _hours(sweep, takes, concurrent, at_most),
        "storage": check_storage(storage_folder(sweep.storage_path), kept),
    }


def _hours(sweep: Sweep, takes: dict[str, Any], concurrent: int, steps: int) -> dict[str, Any]:
    """GPU-hours and CPU-hours at most, None where nothing bounds them, and what the bound comes from."""
    folders = [storage_folder(sweep.storage_path) / sweep.name, *map(storage_folder, sweep.warm_start)]
    step_s = seconds_per_step(folders)
    bounds = {}  # hours of one trial's resources
    if step_s is not None:
        bounds[f"{step_s:.3g} s a step, as in the trials so far"] = steps * step_s / 3600
    if sweep.time_budget is not None:
        bounds["time_budget x trials at once"] = concurrent * sweep.time_budget / 3600
    if not bounds:
        return {"gpu": None, "cpu": None, "from": "no trial has been timed yet; set time_budget, or run one (run_cap=1) and plan again"}
    why = min(bounds, key=lambda name: bounds[name])
    workers = takes["resources.num_workers"]
    return {
        "gpu": bounds[why] * workers * takes["resources.gpus_per_worker"],
        "cpu": bounds[why] * workers * takes["resources.cpus_per_worker"],
        "from": why,
    }


def seconds_per_step(sweep_dirs: Sequence[Path]) -> float | None:
    """Mean wall time of a step, start-up included, over the trials that the sweep directories have; None without any."""
    done = [t for folder in sweep_dirs for t in Records(folder / "trials.jsonl").trials.values() if t.last_step and t.seconds]
    return sum(t.seconds for t in done) / sum(t.last_step for t in done) if done else None


def check_storage(folder: Path, needed: int) -> dict[str, Any]:
    """Whether the sweep can write there and has room. needed: bytes of all checkpoints that are kept; problem: '' where all is well."""
    there = folder.absolute()
    while not there.exists() and there != there.parent:
        there = there.parent
    free = shutil.disk_usage(there).free
    problem = ""
    if not there.is_dir():
        problem = f"{there} is a file; type storage_path=FOLDER"
    elif not os.access(there, os.W_OK | os.X_OK):
        problem = f"{there} cannot be written; type storage_path=FOLDER"
    elif free < needed:
        problem = f"{free / GIB:.3g} GiB free, {math.ceil(needed / GIB * 10) / 10:g} GiB of checkpoints to come; type storage_path=FOLDER"
    return {"folder": str(folder.absolute()), "free_bytes": free, "needed_bytes": needed, "problem": problem}
