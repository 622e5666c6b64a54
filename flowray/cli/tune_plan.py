"""`flowray.tune --plan`: the sweep's plan on the machines that there are, in a table. No trial is
started.

Where nothing like its trials was timed before, a few steps of one are, on this machine.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from flowray.cli.progress import START_S
from flowray.config.cluster import in_cluster
from flowray.config.errors import InputError
from flowray.config.load import override_recipe
from flowray.config.progress import duration
from flowray.config.recipe import Recipe
from flowray.config.sources import packaged
from flowray.sweepconfig.check import corner, needed
from flowray.sweepconfig.parameters import ends
from flowray.sweepconfig.stop import rule_words
from flowray.sweepconfig.sweep import Sweep

if TYPE_CHECKING:
    from flowray.tune.pace import Pace
    from flowray.tune.plan import Cluster

FP32, GIB = 4, 2**30


def plan(sweep: Sweep, base: Recipe, *, resume: bool = False) -> dict[str, Any]:
    """`make_plan` for the cluster that RAY_ADDRESS names, as far as it can grow, else for this
    machine, and the `problems` that a run there would refuse. InputError where that cluster does
    not answer.
    """
    # torch takes seconds to import: not for --help
    from flowray.model.assemble import part_sizes, planned_model
    from flowray.tune.folder import refuse_other
    from flowray.tune.plan import make_plan
    from flowray.tune.room import place

    cluster, found, kept = _cluster(), _Problems(), 0
    with found.noted():
        refuse_other(sweep, base, resume)
    with found.noted():
        place(sweep, base, cluster)
    with found.noted():
        model = planned_model(base.model, base.loss)
        trained = sum(part_sizes(model).values()) - sum(part_sizes(model, trainable=False).values())
        kept = 4 * FP32 * trained
    facts = make_plan(sweep, base, cluster, checkpoint_bytes=kept, recorded=_recorded(base))
    found.lines += [*filter(None, [facts["storage"]["problem"]]), *problems(sweep, base)]
    if facts["hours_at_most"]["cpu"] is None and sweep.task == "train" and not found.lines:
        with found.noted():
            timed = _timed(override_recipe(base, facts["takes"]))
            facts = make_plan(sweep, base, cluster, checkpoint_bytes=kept, recorded=timed)
    more = {"wall_time": _wall_time(facts), "weights": needed_weights(sweep, base)}
    return {**facts, **more, "problems": list(dict.fromkeys(found.lines))}


class _Problems:
    """Lines of what was refused."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    @contextmanager
    def noted(self) -> Iterator[None]:
        """A block whose InputError becomes a line."""
        try:
            yield
        except InputError as error:
            self.lines.append(str(error))


def needed_weights(sweep: Sweep, base: Recipe) -> list[dict[str, Any]]:
    """Every set of weights that a trial may read, and whether it is on this machine."""
    from flowray.cli.plan import weights

    read = {
        (each["key"], each["path"]): each
        for recipe in _corners(sweep, base)
        for each in weights(recipe)
    }
    return list(read.values())


def _corners(sweep: Sweep, base: Recipe) -> list[Recipe]:
    """Of each value of a choice and each end of a range that is searched the trials with all others
    at one end; where those cannot be, the base recipe with that value.
    """
    made = []
    for key, parameter in sweep.parameters.items():
        for value in ends(parameter):
            whole = [corner(sweep.parameters, {key: value}, end) for end in (0, -1)]
            made += _trials(base, whole) or _trials(
                base, [{**needed(sweep.parameters, key), key: value}]
            )
    return made


def _trials(base: Recipe, points: list[dict[str, Any]]) -> list[Recipe]:
    """Their recipes; of what no trial is made of (see `check_trials`) none."""
    made = []
    for point in points:
        with suppress(InputError):
            made.append(override_recipe(base, point))
    return made


def problems(sweep: Sweep, base: Recipe) -> Iterator[str]:
    """A line for whatever of the files and devices here would stop the sweep; nodes of a cluster
    have weights and GPUs of their own.
    """
    from flowray.cli.ready import check_device, unusable_shards, unusable_weights

    if sweep.task == "sample":
        return
    here = not in_cluster()
    trials = _corners(sweep, base)
    for line in unusable_shards(trials):
        yield f"sweep {sweep.name}: {line}"
    if here:
        try:
            check_device(base)
        except InputError as error:
            yield f"sweep {sweep.name}: {error}"
    for key, line in unusable_weights(trials) if here else ():
        instead = f"type set.{key}=PATH for others, or leave out the values that need them"
        yield f"sweep {sweep.name}: {line}; {instead}"


def _recorded(base: Recipe) -> Pace | None:
    """The pace of the trials of `make sweep`, as recorded, where the sweep's are like them."""
    from flowray.tune.pace import Pace, same_cost

    recorded = json.loads((packaged("assets") / "pace" / "sweep_proxy.json").read_text())
    try:
        like = same_cost(Recipe.model_validate(recorded["recipe"]), base)
    except ValidationError:  # recorded before the recipe changed
        return None
    if not like:
        return None
    step_s = recorded["seconds_per_step"]
    words = (
        f"{step_s:.2g} s a step, all included, as in {recorded['trials']} trials of"
        f" {recorded['recipe']['name']} recorded on {recorded['machine']}"
    )
    return Pace(step_s, words, rough=True)


def _timed(trial: Recipe) -> Pace | None:
    """The pace of a trial's recipe as it is timed on this machine now; None where it cannot be."""
    from flowray.cli.estimate import JUST_NOW, time_steps
    from flowray.cli.plan import make_plan
    from flowray.train.measure import NotTimed
    from flowray.tune.pace import Pace

    facts = make_plan(trial)
    try:
        step_s = time_steps(trial, sum(facts["memory_per_gpu"].values()), facts["weights"]).step_s
    except NotTimed:
        return None
    words = f"{step_s:.3g} s a step, {JUST_NOW}, start-up and probes apart"
    return Pace(step_s, words, rough=True, on_gpu=trial.resources.gpus_per_worker > 0)


def _wall_time(facts: dict[str, Any]) -> dict[str, Any]:
    """{"seconds", "basis"} of the whole sweep, halving counted on; None where nothing tells."""
    bound, takes = facts["hours_at_most"], facts["takes"]
    if bound["cpu"] is None:
        return {"seconds": None, "basis": bound["from"]}
    cpus = takes["resources.num_workers"] * takes["resources.cpus_per_worker"]
    seconds = bound["cpu"] * 3600 / cpus / facts["concurrent"]
    seconds = START_S + seconds * facts["steps_expected"] / facts["steps_at_most"]
    if facts["time_budget_s"] is not None:
        seconds = min(seconds, facts["time_budget_s"])
    return {"seconds": seconds, "basis": bound["from"]}


def _cluster() -> Cluster:
    if not in_cluster():
        from flowray.tune.room import this_machine

        return this_machine()
    from flowray.cluster.capacity import cluster_of_address

    return cluster_of_address()


def print_plan(facts: dict[str, Any]) -> None:
    """The plan for people."""
    console = Console(soft_wrap=True, highlight=False)
    goals = ", ".join(
        f"{metric['goal']} {metric['name']}" for metric in [facts["metric"], *facts["more_metrics"]]
    )
    how = facts["search"]["kind"] if facts["method"] == "bayes" else facts["method"]
    table = Table(title=f"{facts['name']}: {how} search, {goals}")
    table.add_column("recipe key")
    table.add_column("drawn from")
    for key, spec in facts["parameters"].items():
        table.add_row(key, escape(_space(spec)))
    console.print(table)
    lines = [
        f"base {facts['base']}" + "".join(f"  {key}={value}" for key, value in facts["set"].items())
    ]
    lines += [
        f"first: {'  '.join(f'{key}={value}' for key, value in point.items())}"
        for point in facts["points"]
    ]
    lines += [facts["warm_start"]] if facts["warm_start"] else []
    lines += [f"stop: {rule_words(rule)}" for rule in facts["stop"]]
    if facts["rungs"]:
        lines.append(f"halving at steps {', '.join(map(str, facts['rungs']))}")
    elif facts["early_terminate"]:
        lines.append(_without_rungs(facts["early_terminate"], facts["budget_steps"]))
    if facts["task"] == "train":
        seeds = f" with {facts['seeds']} seeds each" if facts["seeds"] > 1 else ""
        expected = f", about {facts['steps_expected']} with halving" if facts["rungs"] else ""
        at_most = (
            f"at most {facts['steps_at_most']} steps ({facts['image_steps_at_most']:,} image-steps)"
        )
        lines.append(
            f"{facts['trials']} trials of {facts['budget_steps']} steps{seeds}: {at_most}{expected}"
        )
    else:
        lines.append(f"{facts['trials']} trials, each one evaluation of the run's pictures")
    if facts["settings"] is not None:
        beyond = (facts["run_cap"] or 0) > facts["settings"]
        end = f"; the sweep ends with them, before run_cap {facts['run_cap']}" if beyond else ""
        lines.append(f"the space has {facts['settings']:,} settings, none drawn twice{end}")
    lines += [_resources(facts), _hours(facts)]
    if (seconds := facts["wall_time"]["seconds"]) is not None:
        lines.append(
            f"wall time: about {duration(seconds)}" + ", with halving" * bool(facts["rungs"])
        )
    lines.append(_storage(facts))
    missing = [each for each in facts["weights"] if not each["present"]]
    lines += [f"{each['key']}: {each['path']} is not here" for each in missing]
    lines += [f"problem: {problem}" for problem in facts["problems"]]
    for line in lines:
        console.print(line, markup=False)


def _without_rungs(early: dict[str, Any], steps: int) -> str:
    if early["type"] == "median":
        return f"median rule from step {early['min_iter']}"
    if early["type"] == "asha":
        return (
            f"asha stops nothing: its first rung, {early['rungs'][0]}, is not below the {steps}"
            " steps of a trial"
        )
    first = (
        f"its first rung, min_iter {early['min_iter']}, is not below the {steps} steps of a trial"
    )
    return (
        f"hyperband stops nothing: {first}; type"
        f" early_terminate.min_iter={max(1, round(steps / early['eta'] ** 2))}"
    )


def _space(spec: dict[str, Any]) -> str:
    ends = (
        f"{spec['min']:g} .. {spec['max']:g}"
        if "min" in spec
        else spec.get("values", spec.get("value"))
    )
    step = f" in steps of {spec['q']:g}" if "q" in spec else ""
    prior = spec.get("prior")
    near = (
        f"  prior {prior['value']}" + (f" ± {prior['sigma']:g}" if prior.get("sigma") else "")
        if prior
        else ""
    )
    when = "".join(
        f"  when {key} is {' or '.join(map(str, values))}"
        for key, values in spec.get("when", {}).items()
    )
    return f"{spec['distribution']}  {ends}{step}{near}{when}"


def _resources(facts: dict[str, Any]) -> str:
    takes, have = facts["takes"], facts["cluster"]
    workers, cpus, gpus = (
        takes[f"resources.{name}"] for name in ("num_workers", "cpus_per_worker", "gpus_per_worker")
    )
    each = f"{workers} worker{'s' if workers > 1 else ''} x {cpus} CPU" + (
        f" + {gpus:g} GPU" if gpus else ""
    )
    nodes = f" on {have['nodes']} nodes" if have["nodes"] > 1 else ""
    return (
        f"{facts['concurrent']} at once, {each} each; of {have['cpus']} CPUs and {have['gpus']}"
        f" GPUs{nodes}"
    )


def _hours(facts: dict[str, Any]) -> str:
    bound = facts["hours_at_most"]
    if bound["cpu"] is None:
        return f"hours at most: not known ({bound['from']})"
    if bound["rough"]:
        return (
            f"about {bound['gpu']:.3g} GPU-hours, {bound['cpu']:.3g} CPU-hours if none stops early"
            f" (rough: {bound['from']})"
        )
    return f"at most {bound['gpu']:.3g} GPU-hours, {bound['cpu']:.3g} CPU-hours ({bound['from']})"


def _storage(facts: dict[str, Any]) -> str:
    storage = facts["storage"]
    state = (
        storage["problem"]
        or f"{storage['needed_bytes'] / GIB:.3g} GiB of checkpoints at most,"
        f" {storage['free_bytes'] / GIB:.3g} GiB free"
    )
    return f"results in {facts['sweep_dir']}: {state}"
