"""What a sweep would do and take, as plain data, from the sweep, its recipe and the machines
that there are; nothing is started.
"""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flowray.config.errors import InputError
from flowray.config.recipe import Recipe
from flowray.store.run import require_writable
from flowray.sweepconfig.file import plain_parameter
from flowray.sweepconfig.sweep import SuccessiveHalving, Sweep, milestones
from flowray.tune.pace import Pace, own_pace, pace_of_runs
from flowray.tune.space import choices, setting_count, trial_count
from flowray.tune.warm import earlier_trials

GIB = 2**30
Node = tuple[int, int]  # CPUs, GPUs


@dataclass(frozen=True)
class Cluster:
    """The machines that a sweep may use: of each its CPUs and GPUs.

    drivers: how many processes the head has memory for, as each trial of several workers has a
    driver there; None: no bound. grows: more may come than the nodes named. here: it is this
    machine, where workers may share CPUs.
    """

    nodes: tuple[Node, ...]
    drivers: int | None = None
    grows: bool = False
    here: bool = False

    def __str__(self) -> str:
        nodes = f" on {len(self.nodes)} nodes" if len(self.nodes) > 1 else ""
        return f"{self.cpus} CPUs and {self.gpus} GPUs{nodes}"

    @property
    def cpus(self) -> int:
        return sum(cpus for cpus, _ in self.nodes)

    @property
    def gpus(self) -> int:
        return sum(gpus for _, gpus in self.nodes)

    def places(self, per_gpu: float) -> int:
        """How many workers its GPUs hold; several share one, a part of which lies on one GPU."""
        return sum(_places(gpus, per_gpu) for _, gpus in self.nodes)

    def workers(self, per_cpu: int, per_gpu: float) -> int:
        """How many workers it holds at once. On this machine CPUs are shared, and memory counts."""
        if self.here:
            room = self.cpus if self.drivers is None else self.drivers
            return min(room, self.places(per_gpu)) if per_gpu else room
        return self.without_sharing(per_cpu, per_gpu)

    def without_sharing(self, per_cpu: int, per_gpu: float) -> int:
        """How many workers it holds, each with CPUs of its own."""
        return sum(
            min(cpus // per_cpu, _places(gpus, per_gpu) if per_gpu else cpus)
            for cpus, gpus in self.nodes
        )


def _places(gpus: int, per_gpu: float) -> int:
    """Workers that so many GPUs of a node hold. 1 / 0.1 is ten."""
    return gpus * int(1 / per_gpu + 1e-9) if per_gpu < 1 else int(gpus // per_gpu)


def longest(sweep: Sweep, base: Recipe) -> int:
    """The largest step budget of a run of any trial; scoring pictures is one step."""
    if sweep.task == "sample":
        return 1
    return _most(sweep, "train.steps", base.train.steps)


def _most(sweep: Sweep, key: str, given: int) -> int:
    """The largest value of a key of whole numbers in any trial."""
    parameter = sweep.parameters.get(key)
    if parameter is None:
        return given
    spec = parameter.model_dump()
    return int(max(spec.get("values") or [spec.get("max", spec.get("value"))]))


def share_cluster(sweep: Sweep, base: Recipe, cluster: Cluster) -> tuple[dict[str, Any], int]:
    """What each trial takes, as recipe overrides, and how many run at once; `auto` parts follow
    from the cluster's nodes.

    auto: a GPU for each worker where there are any; as many workers as the GPUs allow and every
    batch splits into, else one; the CPUs in equal parts, none larger than a node holds; as many
    trials as then fit. At least one of each, for a cluster that grows when it is asked, and never
    more trials than there are, nor more drivers than the head has memory for, nor, where the nodes
    are known, more than fit at once: one too many would wait with its time running. Pictures of a
    trained run have one worker.
    """

    def pick(name: str, auto: float) -> Any:
        value = getattr(sweep.resources, name)
        return (
            auto if value == "auto" else getattr(base.resources, name) if value is None else value
        )

    trials = trial_count(sweep)
    slots = None if sweep.max_concurrent == "auto" else sweep.max_concurrent
    per_gpu = pick("gpus_per_worker", 1 if cluster.gpus else 0)
    places = cluster.places(per_gpu) if per_gpu else 0
    at_once = slots or max(1, min(places, trials))
    most = max(1, places // at_once) if per_gpu == 1 else 1
    most = next(n for n in range(most, 0, -1) if batch_that_does_not_split(sweep, base, n) is None)
    workers = 1 if sweep.task == "sample" else pick("num_workers", most)
    share = cluster.cpus // (workers * at_once)
    per_cpu = pick("cpus_per_worker", max(1, min(share, _room(cluster, per_gpu))))
    fits = max(1, cluster.without_sharing(per_cpu, per_gpu) // workers)
    known = not cluster.grows and (per_gpu or not cluster.here)
    fits = fits if slots is None else min(slots, fits) if known else slots
    if workers > 1 and cluster.drivers is not None:
        fits = min(fits, cluster.drivers)
    chosen = {
        "resources.num_workers": workers,
        "resources.cpus_per_worker": per_cpu,
        "resources.gpus_per_worker": per_gpu,
    }
    return chosen, min(fits, trials)


def split_values(sweep: Sweep, key: str, given: int) -> Sequence[int]:
    """The values of a key of whole numbers in any trial; given: the base recipe's."""
    parameter = sweep.parameters.get(key)
    if parameter is None:
        return (given,)
    return [*choices(parameter), given] if parameter.when else choices(parameter)


def batch_that_does_not_split(sweep: Sweep, base: Recipe, workers: int) -> int | None:
    """A batch size of some trial that so many workers do not split evenly, None where all do."""
    if workers == 1 or sweep.task == "sample":
        return None
    sizes = split_values(sweep, "train.batch_size", base.train.batch_size)
    parts = split_values(sweep, "train.accumulate", base.train.accumulate)
    return next((int(n) for n in sizes for part in parts if n % (workers * part)), None)


def _room(cluster: Cluster, per_gpu: float) -> int:
    """CPUs that a worker can have on one node: beside its GPUs on every node that has them,
    without GPUs on the largest.
    """
    if not per_gpu:
        return max((cpus for cpus, _ in cluster.nodes), default=0)
    return min(
        (cpus // _places(gpus, per_gpu) for cpus, gpus in cluster.nodes if gpus >= per_gpu),
        default=cluster.cpus,
    )


def rungs_and_steps(sweep: Sweep, trials: int, steps: int) -> tuple[list[int], int]:
    """(rungs of halving, steps that it lets the first seeds train if every rung keeps its best
    1/eta and the other seeds follow).
    """
    halving = sweep.early_terminate
    if not isinstance(halving, SuccessiveHalving):
        return [], trials * steps * sweep.seeds
    left, start, expected = float(trials), 0, 0.0
    rungs = milestones(halving, steps)
    for rung, eta in rungs.items():
        expected += left * (rung - start)
        left, start = left / eta, rung
    return list(rungs), round(expected + left * (steps - start) + left * steps * (sweep.seeds - 1))


def make_plan(
    sweep: Sweep,
    base: Recipe,
    cluster: Cluster,
    *,
    checkpoint_bytes: int = 0,
    recorded: Pace | None = None,
) -> dict[str, Any]:
    """The plan: space, trials, halving, resources, hours at most and storage.

    checkpoint_bytes: of one checkpoint of a trial. recorded: the pace of such trials elsewhere, for
    where there is none of this place.
    """
    trials, steps = trial_count(sweep), longest(sweep, base)
    rungs, expected = rungs_and_steps(sweep, trials, steps)
    takes, concurrent = share_cluster(sweep, base, cluster)
    at_most = trials * steps * sweep.seeds
    kept = (
        trials * sweep.seeds * base.train.checkpoints_on_disk * checkpoint_bytes
        if sweep.task == "train"
        else 0
    )
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
        "parameters": {
            key: plain_parameter(parameter) for key, parameter in sweep.parameters.items()
        },
        "points": list(sweep.points),
        "warm_start": str(earlier_trials(sweep, base)) if sweep.warm_start else "",
        "early_terminate": sweep.early_terminate.model_dump() if sweep.early_terminate else None,
        "stop": [rule.model_dump(exclude_none=True) for rule in sweep.stop],
        "rungs": rungs,
        "trials": trials,
        "settings": setting_count(sweep.parameters),
        "run_cap": sweep.run_cap,
        "seeds": sweep.seeds,
        "budget_steps": steps,
        "steps_at_most": at_most,
        "steps_expected": expected,
        "image_steps_at_most": (
            at_most * _most(sweep, "train.batch_size", base.train.batch_size)
            if sweep.task == "train"
            else None
        ),
        "cluster": {"cpus": cluster.cpus, "gpus": cluster.gpus, "nodes": len(cluster.nodes)},
        "takes": takes,
        "concurrent": concurrent,
        "time_budget_s": sweep.time_budget,
        "hours_at_most": _hours(sweep, base, takes, concurrent, at_most, recorded),
        "storage": check_storage(Path(sweep.storage_path), kept),
    }


def _hours(
    sweep: Sweep,
    base: Recipe,
    takes: dict[str, Any],
    concurrent: int,
    steps: int,
    recorded: Pace | None,
) -> dict[str, Any]:
    """GPU-hours and CPU-hours at most, None where nothing bounds them, and what the bound comes
    from.

    rough: no trial of the sweep was timed, so it is no bound, but about what all steps would take.
    """
    workers, per_gpu = takes["resources.num_workers"], takes["resources.gpus_per_worker"]
    pace = own_pace(sweep)
    bounds = {}  # hours of one trial's resources
    if pace is not None:
        bounds[pace.words] = steps * pace.seconds / 3600
    if sweep.time_budget is not None:
        bounds["time_budget x trials at once"] = concurrent * sweep.time_budget / 3600
    if not bounds and sweep.task == "train":
        runs = Path(sweep.storage_path)
        pace = pace_of_runs(runs, base, workers=workers, on_gpu=per_gpu > 0) or recorded
        if pace is not None and pace.on_gpu == (per_gpu > 0):
            bounds[pace.words] = steps * pace.seconds / 3600
    if not bounds:
        unknown = (
            "nothing like it has been timed here yet; set time_budget, or run one (run_cap=1) and"
            " plan again"
        )
        return {"gpu": None, "cpu": None, "rough": False, "from": unknown}
    why = min(bounds, key=lambda name: bounds[name])
    return {
        "gpu": bounds[why] * workers * per_gpu,
        "cpu": bounds[why] * workers * takes["resources.cpus_per_worker"],
        "rough": pace is not None and pace.rough,
        "from": why,
    }


def check_storage(folder: Path, needed: int) -> dict[str, Any]:
    """Whether the sweep can write there and has room.

    needed: bytes of all checkpoints that are kept; problem: '' where all is well.
    """
    there = folder.absolute()
    while not os.path.exists(there) and there != there.parent:  # False also below a closed folder
        there = there.parent
    free = shutil.disk_usage(there).free
    problem = ""
    if not there.is_dir():
        problem = f"{there} is a file; type storage_path=FOLDER"
    else:
        try:
            require_writable(there)
        except InputError as error:
            problem = str(error).removeprefix("storage_path: ")
    if not problem and free < needed:
        problem = (
            f"{free / GIB:.3g} GiB free, {math.ceil(needed / GIB * 10) / 10:g} GiB of checkpoints"
            " to come; type storage_path=FOLDER"
        )
    return {
        "folder": str(folder.absolute()),
        "free_bytes": free,
        "needed_bytes": needed,
        "problem": problem,
    }
