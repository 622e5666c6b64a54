"""What a sweep's records say: runner-up and noise, the Pareto front, hours, the best recipe
against its base.
"""

from __future__ import annotations

import json
import math
import re
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flowray.config.dotted import dotted
from flowray.config.errors import InputError
from flowray.config.load import load_recipe, override_recipe, recipe_diffs
from flowray.config.ranking import Arm, arms
from flowray.config.rounding import finite
from flowray.findings.judge import Verdict
from flowray.report.results import Sweep, Trial

CALLS = "perf/network_calls"
CLEAR = 2.0  # gaps of this many standard errors are more than noise
HEAT_KEYS = (
    "shoot/energy",
    "shoot/diversity",
    "shoot/diversity_all",
    "shoot/nmse",
    "shoot/skill",
    "shoot/cond_gain",
    "flow/cos",
    "flow/nmse",
    "flow/speed_ratio",
    "std/mean",
    "mu/rms",
    "text/cos_mu",
    "text/snr",
    "source/separation@0.25",
    "source/width",
    "source/width_all",
    "scale/ratio",
)


@dataclass(frozen=True)
class Hours:
    """Device hours of all trials.

    unit: GPU-hours, or core-hours where no trial had a GPU; saved: what the early stops would have
    cost.
    """

    unit: str
    spent: float
    saved: float


@dataclass(frozen=True)
class ScaleGroup:
    """Trials whose values compare with each other, but not with those of another group.

    words: what they have in common.
    """

    label: str
    words: str
    numbers: tuple[int, ...]
    best: Trial | None


def scale_groups(sweep: Sweep) -> list[ScaleGroup]:
    """The groups of a sweep whose trials do not all compare, each with its best trial; [] where
    they do.
    """
    if sweep.comparable:
        return []
    groups = []
    for index, (words, numbers) in enumerate(sweep.scales.items()):
        finished = arms([t for t in sweep.trials if t.number in numbers], sweep.metric)
        groups.append(
            ScaleGroup(
                f"{chr(65 + index)}" if index < 26 else f"{index}",
                words,
                numbers,
                finished[0].trials[0] if finished else None,
            )
        )
    return groups


def runner_up(sweep: Sweep) -> Arm[Trial] | None:
    """The second best setting that has finished."""
    order = sweep.arms()
    return order[1] if sweep.comparable and len(order) > 1 else None


def noise(settings: Sequence[Arm[Trial]]) -> float | None:
    """Standard deviation between seeds, pooled over those that were trained more than once; None
    where none was.
    """
    repeated = [arm for arm in settings if len(arm.values) > 1]
    if not repeated:
        return None
    return math.sqrt(
        sum(statistics.variance(arm.values) * (len(arm.values) - 1) for arm in repeated)
        / sum(len(arm.values) - 1 for arm in repeated)
    )


def runner_up_words(sweep: Sweep) -> str:
    """The runner-up, and whether the gap to it is more than the noise between seeds; '' without
    one.
    """
    second = runner_up(sweep)
    if second is None:
        return ""
    first, spread, key = sweep.arms()[0], noise(sweep.arms()), sweep.metric.name
    gap = abs(second.mean - first.mean)
    words = (
        f"Runner-up: trial {second.trials[0].number}, {key} {second.mean:.3g}, behind by"
        f" {gap:.2g}. "
    )
    if spread is None:
        return (
            words
            + "Every setting was trained with one seed, so whether that is more than noise is not"
            " known: train both again with another seed, or every setting by seeds: 3 in the"
            " sweep."
        )
    error = spread * math.sqrt(1 / len(first.values) + 1 / len(second.values))
    seeds = f"noise between seeds {spread:.2g} ({len(first.values)} and {len(second.values)} seeds)"
    if gap > CLEAR * error:
        return words + f"More than the {seeds}: a clear win."
    return (
        words + f"Within the {seeds}: a tie; take the cheaper one, or train both with more seeds."
    )


def incomparable_words(sweep: Sweep) -> str:
    """Why the trials are not ranked; '' where they may be."""
    if sweep.comparable:
        return ""
    groups = "; ".join(
        f"{words} (trial {', '.join(map(str, numbers))})" for words, numbers in sweep.scales.items()
    )
    return (
        "Not ranked: the trials differ in what sets the scale of every value (autoencoder,"
        f" resolution, latent size or scale, unit), so their values do not compare: {groups}. Make"
        " a sweep of each."
    )


def front(sweep: Sweep) -> list[Trial]:
    """The finished trials that no other beats in every metric; [] with one metric, or where
    trials do not compare.
    """
    if len(sweep.metrics) < 2 or not sweep.comparable:
        return []
    signs = [1 if metric.goal == "minimize" else -1 for metric in sweep.metrics]
    points = {}
    for trial in sweep.by("finished"):
        values = [trial.value(metric.name) for metric in sweep.metrics]
        if all(value is not None for value in values):
            points[trial] = tuple(
                sign * value for sign, value in zip(signs, values, strict=True) if value is not None
            )

    def beaten(point: tuple[float, ...]) -> bool:
        return any(
            other != point and all(a <= b for a, b in zip(other, point, strict=True))
            for other in points.values()
        )

    return [trial for trial, point in points.items() if not beaten(point)]


def best_for_calls(sweep: Sweep) -> list[tuple[float, Trial]]:
    """(calls, trial), calls rising: the finished trial that is best by the first metric among all
    that ask the network at most so often for a picture; [] where trials do not say or compare.
    """
    if not sweep.comparable:
        return []
    sign = 1 if sweep.metric.goal == "minimize" else -1
    known = [
        (calls, sign * value, trial.number, trial)
        for trial in sweep.by("finished")
        if (calls := trial.value(CALLS)) is not None
        and (value := trial.value(sweep.metric.name)) is not None
    ]
    found: list[tuple[float, Trial]] = []
    least = math.inf
    for calls, value, _, trial in sorted(known, key=lambda each: each[:3]):
        if value < least:
            least = value
            found.append((calls, trial))
    return found


def best_for_calls_words(sweep: Sweep) -> str:
    """`best_for_calls` in a line; '' where there are none."""
    told = [
        f"{calls:g}: {trial.value(sweep.metric.name):.3g} (trial {trial.number})"
        for calls, trial in best_for_calls(sweep)
    ]
    words = f"Best {sweep.metric.name} for at most N network calls a picture:"
    return f"{words} {', '.join(told)}." if told else ""


def hours(sweep: Sweep) -> Hours:
    """What the trials took, and what those stopped early would have taken on to their budget, at
    their own pace.
    """
    spent, saved, gpus = 0.0, 0.0, False
    rows = []
    for trial in sweep.trials:
        config, workers = (
            trial.run.config,
            finite(trial.run.config.get("resources.num_workers")) or 1.0,
        )
        gpu, cpu = (
            finite(config.get("resources.gpus_per_worker")) or 0.0,
            finite(config.get("resources.cpus_per_worker")) or 1.0,
        )
        gpus = gpus or gpu > 0
        rows.append((trial, workers * gpu, workers * cpu))
    for trial, gpu, cpu in rows:
        cost = trial.seconds / 3600 * (gpu if gpus else cpu)
        spent += cost
        if trial.status == "stopped" and trial.last_step:
            saved += cost * max(0, trial.budget_steps - trial.last_step) / trial.last_step
    return Hours("GPU-hours" if gpus else "core-hours", spent, saved)


def best_diff(sweep: Sweep) -> str:
    """The best trial as a recipe: `base` and what differs from it, with the base's values as
    comments; '' without a best trial.

    The base of a sweep over the pictures of a run is the run's own recipe.
    """
    if sweep.best is None:
        return ""
    base = str(sweep.settings.get("base") or "")
    if (config := Path(base) / "config.yaml").is_file():
        base = str(config)
    changes = {**dotted(sweep.settings.get("set")), **sweep.best.params}
    old: dict[str, Any] = {}
    try:
        recipe = load_recipe(base).recipe
        diffs = recipe_diffs(recipe, override_recipe(recipe, changes))
        old = {key: before for key, (before, _) in diffs.items() if key in changes}
        changes = {key: value for key, value in changes.items() if key in diffs}
    except InputError:  # a base that is no longer here: what was set is still known
        pass
    tree: dict[str, Any] = {}
    for key, value in changes.items():
        *sections, last = key.split(".")
        inner = tree
        for name in sections:
            inner = inner.setdefault(name, {})
        inner[last] = (key, value)
    return "\n".join([f"base: {base}", *_yaml_lines(tree, old, "")])


def _yaml_lines(tree: Mapping[str, Any], old: Mapping[str, Any], indent: str) -> list[str]:
    lines = []
    for name, value in tree.items():
        if isinstance(value, dict):
            lines += [f"{indent}{name}:", *_yaml_lines(value, old, indent + "  ")]
        else:
            was = f"  # {json.dumps(old[value[0]])} in the base" if value[0] in old else ""
            lines.append(f"{indent}{name}: {yaml_value(value[1])}{was}")
    return lines


def yaml_value(value: Any) -> str:
    """A value on one line, as YAML and as the right side of an override read it back.

    PyYAML wants a point in 1.0e-05.
    """
    if isinstance(value, float):
        text = f"{value:.6g}"
        return re.sub(r"^(-?\d+)e", r"\1.0e", text)
    plain = (
        isinstance(value, str)
        and re.fullmatch(r"[A-Za-z_][\w./-]*", value)
        and value not in ("true", "false", "null", "yes", "no")
    )
    return str(value) if plain else json.dumps(value)


def heat_map(trials: Sequence[Trial]) -> tuple[list[str], list[tuple[Trial, list[Verdict]]]]:
    """The probes that the trials have, and for each trial the doctor's verdict on each of them."""
    keys = [key for key in HEAT_KEYS if any(trial.either(key) is not None for trial in trials)]
    rows = []
    for trial in trials:
        if any(trial.either(key) is not None for key in keys):
            row = {key: value for key, value in trial.metrics.items() if value is not None}
            judge = trial.run.judge(row, trial.last_step)
            rows.append((trial, [judge(key) for key in keys]))
    return keys, rows
