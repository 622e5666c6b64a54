"""What a sweep would do and take, as plain data, from the sweep, its recipe and the machines that there are; nothing is started."""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flowray.config.recipe import Recipe
from flowray.config.sweep import Hyperband, Sweep
from flowray.config.sweepfile import plain_parameter
from flowray.store.run import storage_folder
from flowray.tune.halving import milestones
from flowray.tune.records import Records
from flowray.tune.space import trial_count
from flowray.tune.warm import earlier_trials

GIB = 2**30
Node = tuple[int, int]  # CPUs, GPUs


@dataclass(frozen=True)
class Cluster:
    """The machines that a sweep may use: of each its CPUs and GPUs.

    drivers: how many trials of several workers may run at once, as each has a driver on the head; None: no bound.
    """

    nodes: tuple[Node, ...]
    drivers: int | None = None

    @property
    def cpus(self) -> int:
        return sum(cpus for cpus, _ in self.nodes)

    @property
    def gpus(self) -> int:
        return sum(gpus for _, gpus in self.nodes)


def longest(sweep: Sweep, base: Recipe) -> int:
    """The largest step budget of a run of any trial; scoring pictures is one step."""
    if sweep.task == "sample":
        return 1
    parameter = sweep.parameters.get("train.steps")
    if parameter is None:
        return base.train.steps
    spec = parameter.model_dump()
    return int(max(spec.get("values") or [spec.get("max", spec.get("value"))]))


def share_cluster(sweep: Sweep, base: Recipe, cluster: Cluster) -> tuple[dict[str, Any], int]:
    """What each trial takes, as recipe overrides, and how many run at once; `auto` parts follow from the cluster's nodes.

    auto: a GPU for each worker where there are any; as many workers as the GPUs allow, else one; the CPUs in equal parts, none larger
    than a node holds; as many trials as then fit. At least one of each, for a cluster that grows when it is asked, and never more trials
    than there are, nor more drivers than the head has memory for. Pictures of a trained run have one worker.
    """

    def pick(name: str, auto: float) -> Any:
        value = getattr(sweep.resources, name)
        return auto if value == "auto" else getattr(base.resources, name) if value is None else value

    slots = None if sweep.max_concurrent == "auto" else sweep.max_concurrent
    per_gpu = pick("gpus_per_worker", 1 if cluster.gpus else 0)
    places = int(cluster.gpus // per_gpu) if per_gpu else 0
    workers = pick("num_workers", max(1, places // (slots or places)) if places else 1)
    workers = 1 if sweep.task == "sample" else workers
    share = cluster.cpus // (workers * (slots or max(1, places)))
    per_cpu = pick("cpus_per_worker", max(1, min(share, _room(cluster, per_gpu))))
    fits = sum(int(min(cpus // per_cpu, gpus // per_gpu if per_gpu else cpus)) for cpus, gpus in cluster.nodes) // workers
    fits = slots or max(1, fits)
    if workers > 1 and cluster.drivers is not None:
        fits = min(fits, cluster.drivers)
    chosen = {"resources.num_workers": workers, "resources.cpus_per_worker": per_cpu, "resources.gpus_per_worker": per_gpu}
    return chosen, min(fits, trial_count(sweep))


def _room(cluster: Cluster, per_gpu: float) -> int:
    """CPUs that a worker can have on one node: beside its GPUs on every node that has them, without GPUs on the largest."""
    if not per_gpu:
        return max((cpus for cpus, _ in cluster.nodes), default=0)
    return min((int(cpus // (gpus // per_gpu)) for cpus, gpus in cluster.nodes if gpus >= per_gpu), default=cluster.cpus)


def rungs_and_steps(sweep: Sweep, trials: int, steps: int) -> tuple[list[int], int]:
    """(rungs of halving, steps that it lets the first seeds train if every rung keeps its best 1/eta and the other seeds follow)."""
    halving = sweep.early_terminate
    if not isinstance(halving, Hyperband):
        return [], trials * steps * sweep.seeds
    rungs = milestones(halving, steps)
    ends = [*rungs, steps]
    parts = [trials * halving.eta**-i * (end - start) for i, (start, end) in enumerate(zip([0, *ends], ends, strict=False))]
    left = trials * halving.eta ** -len(rungs)
    return rungs, round(sum(parts) + left * steps * (sweep.seeds - 1))


def make_plan(sweep: Sweep, base: Recipe, cluster: Cluster, *, checkpoint_bytes: int = 0) -> dict[str, Any]:
    """The plan: space, trials, halving, resources, hours at most and storage. checkpoint_bytes: of one checkpoint of a trial."""
    trials, steps = trial_count(sweep), longest(sweep, base)
    rungs, expected = rungs_and_steps(sweep, trials, steps)
    takes, concurrent = share_cluster(sweep, base, cluster)
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
        "cluster": {"cpus": cluster.cpus, "gpus": cluster.gpus, "nodes": len(cluster.nodes)},
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
