"""Whether every trial of a sweep can be made and judged, found before anything runs."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flowray.config.errors import InputError, OtherKind
from flowray.config.load import load_recipe, override_recipe, recipe_names
from flowray.config.paths import exists, is_file, no_such
from flowray.config.recipe import Recipe
from flowray.config.scale import scale_keys
from flowray.config.schema import show
from flowray.config.train import (
    CHECKED,
    CHECKED_SCORES,
    FRECHET,
    LEFT_OPEN,
    OPEN_SCORES,
    OTHER_SCORES,
)
from flowray.sweepconfig.distributions import Parameter, drawn, in_order
from flowray.sweepconfig.parameters import ends
from flowray.sweepconfig.sweep import SuccessiveHalving, Sweep, milestones


def base_recipe(sweep: Sweep) -> Recipe:
    """The recipe that every trial starts from: `base`, for task sample that of the run `base`,
    with `set` applied.
    """
    if sweep.task == "train":
        return override_recipe(load_recipe(sweep.base).recipe, sweep.set)
    config = Path(sweep.base) / "config.yaml"
    if not is_file(config):
        run = Path(sweep.base)
        what = f"{no_such(sweep.base)}" if not exists(run) else "no trained run"
        recipe = run.name if run.name in recipe_names() else "RECIPE"
        raise InputError(
            f"sweep {sweep.name}: it scores the pictures of a trained run, and base {sweep.base}:"
            f" {what}; type python -m flowray.train {recipe} first, or base=runs/NAME of"
            " another run"
        )
    return override_recipe(load_recipe(str(config)).recipe, sweep.set)


def check_trials(sweep: Sweep, base: Recipe) -> None:
    """Make the recipes at the ends of the space, so that a range that the recipe refuses is found
    before anything runs.

    Also refuses metrics of the raw weights where the recipe probes the EMA only, as they would
    never be seen; a ranking of what does not compare; rungs without a checkpoint.
    """

    def refuse(words: str) -> InputError:
        return InputError(f"sweep {sweep.name}: {words}")

    if base.probes.doctor_every == 0 and any(rule.examines for rule in sweep.stop):
        words = "a stop rule waits for a finding, but no doctor comes"
        raise refuse(f"{words}; type set.probes.doctor_every=1")
    if sweep.task == "sample" and base.flow.null_probability == 0 and _guides(sweep, base):
        words = f"{sweep.base} was trained with flow.null_probability 0, so nothing can guide it"
        raise refuse(f"{words}; type 'parameters.sample.guidance_scale={{value: 1}}'")
    for name in (*(metric.name for metric in sweep.objectives), *sweep.rule_metrics):
        if words := _unseen(name, sweep, base):
            raise refuse(f"{name} {words}")
    _check_scale(sweep, base)
    for case in _cases(sweep):
        try:
            trial = override_recipe(base, case)
        except InputError as error:
            values = ", ".join(f"{key}={show(value)}" for key, value in case.items())
            words = f"no recipe can be made with {values}: {error}{_condition_hint(sweep, error)}"
            raise refuse(words) from None
        if trial.data.partial is True:
            words = "data.partial true would give each trial the shards encoded at its own start"
            how = "name them as `python -m flowray.data encode RECIPE data.partial=true` does"
            raise refuse(f"{words}; {how}")
        if trial.train.checkpoint_url is not None:
            words = "train.checkpoint_url is of single runs: a trial would go on from whatever lies"
            how = "leave it out; a sweep keeps its checkpoints in its own folder"
            raise refuse(f"{words} there by its number; {how}")
        _check_rungs(sweep, base, trial)


# measured for raw and EMA weights
_PROBED = (
    "flow/",
    "shoot/",
    "source/",
    "text/",
    "mu/",
    "logvar/",
    "std/",
    "z_init/",
    "scale/",
    "teacher/",
)
_OF_TEXT_SOURCE = ("source/", "text/", "mu/", "logvar/", "std/")
_NO_EMA = ("ema/loss/", "ema/vae/", "ema/latent/")
_LOGGED = ("grad/", "lr/", "perf/", "amp/", "weight/", "step/", "ent/")


def _unseen(name: str, sweep: Sweep, base: Recipe) -> str:
    """Why the probes of a trial would never have the metric, and what to type; '' where they do."""
    trains = sweep.task == "train"
    if trains and name.removeprefix("ema/").startswith(_LOGGED):
        return (
            "is in the training log only; trials are judged by their probes: ema/shoot/nmse,"
            " loss/flow, ..."
        )
    if name.startswith(_NO_EMA):
        return f"is not measured on the EMA weights; type {name.removeprefix('ema/')}"
    if name.removeprefix("ema/").startswith(_OF_TEXT_SOURCE) and _from_noise(sweep, base):
        return "is of a text source, and every trial starts from noise"
    weight = f"loss.{name.removeprefix('loss/').removesuffix('_raw')}.weight"
    if name.startswith("loss/") and _weighs_nothing(weight, sweep, base):
        return f"is not computed, as {weight} is 0 in every trial"
    if not base.probes.raw and name.startswith(_PROBED):
        return f"is not probed, as probes.raw is false; type ema/{name}, or set probes.raw: true"
    if trains and name.startswith("eval/"):
        return "is no probe of a training run; take ema/shoot/nmse, or task: sample"
    return _unscored(name, base) if name.startswith("eval/") else ""


def _unscored(name: str, base: Recipe) -> str:
    """Why pictures of these data have no such score, and what they have; '' where they do."""
    score, shards = name.removeprefix("eval/"), base.data.shards
    if shards not in CHECKED:
        of_a_field = score.endswith("_accuracy") and score != "mean_attribute_accuracy"
        known: tuple[str, ...] = (*OTHER_SCORES, *([score] if of_a_field else ["caption_accuracy"]))
    elif shards == LEFT_OPEN:
        known = (*CHECKED_SCORES, *OPEN_SCORES, FRECHET)
    elif score in (*OPEN_SCORES, FRECHET):
        return f"is a score of runs on {LEFT_OPEN}, this one is on {shards}; type eval/all_correct"
    else:
        known = CHECKED_SCORES
    if score in known:
        return ""
    scores = ", ".join(f"eval/{each}" for each in known)
    return f"is no score of pictures of {shards}, which have {scores}"


def _guides(sweep: Sweep, base: Recipe) -> bool:
    """Whether a trial has guidance."""
    searched = sweep.parameters.get("sample.guidance_scale")
    scales = ends(searched) if searched else [base.sample.guidance_scale]
    return any(float(str(scale)) != 1 for scale in scales)


def _from_noise(sweep: Sweep, base: Recipe) -> bool:
    """Whether no trial has a text source."""
    searched = sweep.parameters.get("model.source.kind")
    kinds = ends(searched) if searched else [base.model.source.kind]
    return all(kind == "noise" for kind in kinds)


def _weighs_nothing(key: str, sweep: Sweep, base: Recipe) -> bool:
    """Whether no trial has a weight above 0 under `key`; False where there is no such loss."""
    term = getattr(base.loss, key.split(".")[1], None)
    searched = sweep.parameters.get(key)
    weights = ends(searched) if searched else [getattr(term, "weight", 1.0)]
    return not any(float(str(weight)) > 0 for weight in weights)


def _check_scale(sweep: Sweep, base: Recipe) -> None:
    """InputError where trials of another scale would be ranked with each other, as halving and a
    learning sampler do with all there are.
    """
    searched = [key for key, parameter in sweep.parameters.items() if len(ends(parameter)) > 1]
    fixed = bool(base.data.val_shards) and "data.val_shards" not in searched
    mixed = scale_keys(searched, own_pictures=fixed)
    instead = {"early_terminate": "early_terminate=null"} if sweep.early_terminate else {}
    if sweep.method == "bayes":
        instead["method bayes"] = "method=random" + (" search=null" if sweep.search else "")
    if mixed and instead:
        raise InputError(
            f"sweep {sweep.name}: {mixed[0]} sets the scale of every value, and"
            f" {' and '.join(instead)} would rank across it; type {' '.join(instead.values())}, or"
            " make a sweep for each value of it"
        )


def _check_rungs(sweep: Sweep, base: Recipe, trial: Recipe) -> None:
    """InputError where a trial that waits at a rung would have no checkpoint there and train a
    part of its steps again.
    """
    halving = sweep.early_terminate
    if not isinstance(halving, SuccessiveHalving):
        return
    steps = sweep.parameters.get("train.steps")
    longest = max(ends(steps)) if steps else base.train.steps
    every, cadence = trial.train.probe_every, trial.train.checkpoint_every
    seen_at = {math.ceil(rung / every) * every for rung in milestones(halving, longest)}
    waits = sorted(step for step in seen_at if step < trial.train.steps)
    if any(step % cadence for step in waits):
        at = ", ".join(map(str, waits))
        raise InputError(
            f"sweep {sweep.name}: train.checkpoint_every is {cadence}, but trials wait at step {at}"
            " (the first probe from a rung on) and go on from a checkpoint there; type"
            f" set.train.checkpoint_every={math.gcd(*waits)}"
        )


def _cases(sweep: Sweep) -> list[dict[str, Any]]:
    """Points at the ends of the space: every parameter alone, with what its condition asks for;
    all at one end, for every kind.
    """
    parameters = sweep.parameters
    cases = [
        {**needed(parameters, key), key: value}
        for key, parameter in parameters.items()
        for value in ends(parameter)
    ]
    kinds = {key: ends(parameters[key]) for key in parameters if key.endswith(".kind")}
    cases += [
        corner(parameters, {key: kind}, end)
        for key, values in kinds.items()
        for kind in values
        for end in (0, -1)
    ]
    cases += [corner(parameters, {}, end) for end in (0, -1)]
    return cases + [dict(point) for point in sweep.points]


def corner(
    parameters: Mapping[str, Parameter], given: Mapping[str, Any], end: int
) -> dict[str, Any]:
    """A whole trial with these values, and what their conditions ask for; all others at one end,
    0 or -1.
    """
    fixed = {k: v for key in given for k, v in needed(parameters, key).items()} | dict(given)
    point: dict[str, Any] = {}
    for key in in_order(parameters):
        if drawn(parameters[key], point):
            point[key] = fixed.get(key, ends(parameters[key])[end])
    return point


def needed(parameters: Mapping[str, Parameter], key: str) -> dict[str, Any]:
    """Values of other parameters with which this one is drawn."""
    wanted = {parent: values[0] for parent, values in parameters[key].when.items()}
    return {**{k: v for parent in wanted for k, v in needed(parameters, parent).items()}, **wanted}


def _condition_hint(sweep: Sweep, error: InputError) -> str:
    """What to type where an option of one kind is searched together with another kind."""
    if not isinstance(error, OtherKind) or f"{error.section}.kind" not in sweep.parameters:
        return ""
    return (
        f"; to search it with that kind only, type when: {{{error.section}.kind:"
        f" [{', '.join(error.kinds)}]}}"
    )
