"""From a sweep's parameters to what an Optuna trial is asked for."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from optuna.trial import BaseTrial

from flowray.config.sweep import (
    Categorical,
    Constant,
    IntUniform,
    LogUniform,
    Parameter,
    QLogUniform,
    QUniform,
    Sweep,
    Uniform,
    drawn,
    in_order,
)

Params = dict[str, Any]


def choices(parameter: Parameter) -> tuple[Any, ...]:
    """The values of a parameter that can be counted; () for a continuous one."""
    match parameter:
        case Categorical(values=values):
            return values
        case Constant(value=value):
            return (value,)
        case IntUniform(min=low, max=high):
            return tuple(range(low, high + 1))
        case QUniform(min=low, max=high, q=q):
            return tuple(low + i * q for i in range(int((high - low) / q + 1e-9) + 1))
        case _:
            return ()


def suggest(trial: BaseTrial, parameters: Mapping[str, Parameter]) -> Params:
    """Ask the trial for every parameter whose condition holds; a value that it has (it is resumed or enqueued) comes back as it is."""
    params: Params = {}
    for key in in_order(parameters):
        if drawn(parameters[key], params):
            params[key] = _ask(trial, key, parameters[key])
    return {key: params[key] for key in parameters if key in params}


def _ask(trial: BaseTrial, key: str, parameter: Parameter) -> Any:
    match parameter:
        case Uniform(min=low, max=high):
            return trial.suggest_float(key, low, high)
        case LogUniform(min=low, max=high):
            return trial.suggest_float(key, low, high, log=True)
        case QUniform(min=low, max=high, q=q):
            return trial.suggest_float(key, low, high, step=q)
        case QLogUniform(
            min=low, max=high, q=q
        ):  # Optuna has no stepped log range: the study holds the raw draw, the recipe the rounded one
            return min(high, max(low, round(trial.suggest_float(key, low, high, log=True) / q) * q))
        case IntUniform(min=low, max=high):
            return trial.suggest_int(key, low, high)
        case Categorical() | Constant():
            values = choices(parameter)
            names = [_category(value) for value in values]
            return values[names.index(trial.suggest_categorical(key, names))]


def as_categories(parameters: Mapping[str, Parameter], point: Params) -> Params:
    """A point as the study holds it, to be enqueued."""
    plain = Categorical | Constant
    return {key: _category(value) if isinstance(parameters[key], plain) else value for key, value in point.items()}


def grid(parameters: Mapping[str, Parameter]) -> list[Params]:
    """Every combination that the conditions allow, the last parameter fastest, as values that can be enqueued."""
    points: list[Params] = [{}]
    for key in in_order(parameters):
        parameter = parameters[key]
        points = [
            {**point, **({key: value} if drawn(parameter, point) else {})}
            for point in points
            for value in (choices(parameter) if drawn(parameter, point) else (None,))
        ]
    return [as_categories(parameters, point) for point in points]


def trial_count(sweep: Sweep) -> int:
    """How many trials the sweep has, all sessions together: run_cap, and for a grid never more than it has points."""
    if sweep.method != "grid":
        return sweep.run_cap or max(12, len(sweep.points))
    conditional = any(parameter.when for parameter in sweep.parameters.values())
    every = math.prod(len(choices(parameter)) for parameter in sweep.parameters.values())
    points = len(grid(sweep.parameters)) if conditional else every
    return min(points, sweep.run_cap or points)


def from_priors(parameters: Mapping[str, Parameter], rng: np.random.Generator | None) -> Params:
    """Values for the parameters that have a prior: its own value without an rng, else a draw from the normal around it, cut at the ends.

    Choices are left out of draws.
    """
    point: Params = {}
    for key, parameter in parameters.items():
        prior = parameter.prior
        if prior is None or isinstance(parameter, Constant):
            continue
        if rng is None:
            point[key] = prior.value
        elif not isinstance(parameter, Categorical):
            assert prior.sigma is not None
            point[key] = _near(parameter, float(prior.value), prior.sigma, rng)
    return as_categories(parameters, point)


def _near(
    parameter: Uniform | LogUniform | QUniform | QLogUniform | IntUniform, value: float, sigma: float, rng: np.random.Generator
) -> float:
    """A draw from the normal around a prior's value, cut at the ends of the range; in decades on a log range."""
    logarithmic = isinstance(parameter, LogUniform | QLogUniform)
    low, high, middle = (math.log10(x) if logarithmic else float(x) for x in (parameter.min, parameter.max, value))
    inside = [x for x in rng.normal(middle, sigma, 64) if low <= x <= high] or [middle]
    found = 10 ** inside[0] if logarithmic else inside[0]
    if isinstance(parameter, IntUniform):
        return round(found)
    if isinstance(parameter, QUniform):
        return min(choices(parameter), key=lambda x: abs(x - found))
    return float(found)


def _category(value: Any) -> bool | int | float | str | None:
    """Optuna keeps scalars only, so a list stands as its JSON text."""
    return value if value is None or isinstance(value, bool | int | float | str) else json.dumps(value)
