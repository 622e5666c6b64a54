"""From a sweep's parameters to what an Optuna trial is asked for."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Mapping
from typing import Any

from optuna.trial import Trial

from flowray.config.sweep import Categorical, Constant, IntUniform, LogUniform, Parameter, QLogUniform, QUniform, Sweep, Uniform

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


def suggest(trial: Trial, parameters: Mapping[str, Parameter]) -> Params:
    """Ask the trial for every parameter. Values that it has already (a resumed or an enqueued trial) come back as they are."""
    return {key: _ask(trial, key, parameter) for key, parameter in parameters.items()}


def _ask(trial: Trial, key: str, parameter: Parameter) -> Any:
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


def grid(parameters: Mapping[str, Parameter]) -> list[Params]:
    """Every combination, the last parameter fastest, as values that can be enqueued."""
    columns = [[_category(value) for value in choices(parameter)] for parameter in parameters.values()]
    return [dict(zip(parameters, row, strict=True)) for row in itertools.product(*columns)]


def trial_count(sweep: Sweep) -> int:
    """How many trials the sweep has, all sessions together: run_cap, and for a grid never more than it has points."""
    if sweep.method != "grid":
        return sweep.run_cap or 12
    points = math.prod(len(choices(parameter)) for parameter in sweep.parameters.values())
    return min(points, sweep.run_cap or points)


def _category(value: Any) -> bool | int | float | str | None:
    """Optuna keeps scalars only, so a list stands as its JSON text."""
    return value if value is None or isinstance(value, bool | int | float | str) else json.dumps(value)
