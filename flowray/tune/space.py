"""From a sweep's parameters to what an Optuna trial is asked for."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

import numpy as np
from optuna.trial import BaseTrial

from flowray.config.errors import InputError
from flowray.sweepconfig.distributions import (
    Categorical,
    Constant,
    IntUniform,
    LogUniform,
    Parameter,
    QLogUniform,
    QUniform,
    Uniform,
    drawn,
    in_order,
)
from flowray.sweepconfig.sweep import Sweep

Params = dict[str, Any]

COUNTED = 100_000  # settings with conditions are counted one by one so far; more never run out


def choices(parameter: Parameter) -> Sequence[Any]:
    """The values of a parameter that can be counted; () for a continuous one."""
    match parameter:
        case Categorical(values=values):
            return values
        case Constant(value=value):
            return (value,)
        case IntUniform(min=low, max=high):
            return range(low, high + 1)
        case QUniform(min=low, max=high, q=q):
            return tuple(low + i * q for i in range(int((high - low) / q + 1e-9) + 1))
        case QLogUniform(min=low, max=high, q=q):
            steps = range(round(low / q), round(high / q) + 1)
            return tuple(dict.fromkeys(_rounded(parameter, i * q) for i in steps))
        case _:
            return ()


def suggest(trial: BaseTrial, parameters: Mapping[str, Parameter]) -> Params:
    """Ask the trial for every parameter whose condition holds; a value that it has (it is
    resumed or enqueued) comes back as it is.
    """
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
        case QLogUniform(min=low, max=high):  # Optuna has no stepped log range: the study holds
            # the raw draw, the recipe the rounded one
            return _rounded(parameter, trial.suggest_float(key, low, high, log=True))
        case IntUniform(min=low, max=high):
            return trial.suggest_int(key, low, high)
        case Categorical() | Constant():
            values = choices(parameter)
            names = [_category(value) for value in values]
            return values[names.index(trial.suggest_categorical(key, names))]


def _rounded(parameter: QLogUniform, value: float) -> float:
    steps = round(value / parameter.q)
    return min(parameter.max, max(parameter.min, steps * parameter.q))


def as_categories(parameters: Mapping[str, Parameter], point: Params) -> Params:
    """A point as the study holds it, to be enqueued."""
    plain = Categorical | Constant
    return {
        key: _category(value) if isinstance(parameters[key], plain) else value
        for key, value in point.items()
    }


def settings(
    parameters: Mapping[str, Parameter],
    fixed: Params | None = None,
    rng: np.random.Generator | None = None,
) -> Iterator[Params]:
    """Every combination that the conditions allow, the last parameter fastest, made when asked for.

    fixed: values of some parameters, as the study holds them. rng: begin anywhere, and draw the
    continuous parameters; without one they have no value to give, and ValueError says so.
    """
    order, fixed = in_order(parameters), fixed or {}

    def below(place: int, point: Params) -> Iterator[Params]:
        if place == len(order):
            yield point
            return
        key = order[place]
        if not drawn(parameters[key], point):
            yield from below(place + 1, point)
            return
        for value in _values(key, parameters[key], fixed, rng):
            yield from below(place + 1, {**point, key: value})

    return below(0, {})


def _values(
    key: str, parameter: Parameter, fixed: Params, rng: np.random.Generator | None
) -> Iterable[Any]:
    values = choices(parameter)
    if key in fixed and isinstance(parameter, Categorical | Constant):
        return [value for value in values if _category(value) == fixed[key]]
    if key in fixed:
        value = fixed[key]
        return [_rounded(parameter, value) if isinstance(parameter, QLogUniform) else value]
    if not values:
        if rng is None:
            raise ValueError(f"{key} is drawn from a range without steps: its values have no end")
        assert isinstance(parameter, Uniform | LogUniform)
        even = rng.uniform(0, 1)
        if isinstance(parameter, LogUniform):
            return [parameter.min * (parameter.max / parameter.min) ** even]
        return [parameter.min + even * (parameter.max - parameter.min)]
    start = int(rng.integers(len(values))) if rng else 0
    return (values[(start + i) % len(values)] for i in range(len(values)))


def can_repeat(parameters: Mapping[str, Parameter]) -> bool:
    """Whether a setting may be drawn twice: not where all trials draw from a range without
    steps.
    """
    return all(parameter.when or choices(parameter) for parameter in parameters.values())


def setting_count(parameters: Mapping[str, Parameter]) -> int | None:
    """How many settings there are; None where they never run out: a range without steps, or
    many.
    """
    if not all(map(choices, parameters.values())):
        return None
    asked = {parent for parameter in parameters.values() for parent in parameter.when}
    tied = {key: each for key, each in parameters.items() if each.when or key in asked}
    free = math.prod(len(choices(each)) for key, each in parameters.items() if key not in tied)
    count = sum(1 for _ in islice(settings(tied), COUNTED + 1))
    return free * count if count <= COUNTED else None


def setting_of(params: Params) -> str:
    """What tells a setting from others, as text: the key and value of all that was drawn.

    Numbers to twelve digits, as the steps of a range are sums.
    """
    return json.dumps({key: _plain(value) for key, value in params.items()}, sort_keys=True)


def _plain(value: Any) -> Any:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return value
    return float(f"{value:.12g}")


def trial_count(sweep: Sweep) -> int:
    """How many trials the sweep has, all sessions together: run_cap, or fewer where settings
    are.
    """
    return left_to_begin(sweep, ())


def ends_with_its_space(sweep: Sweep) -> int | None:
    """How many settings there are, where the sweep ends with them before run_cap; else None."""
    count = setting_count(sweep.parameters)
    return (
        count if sweep.run_cap is not None and count is not None and count < sweep.run_cap else None
    )


def left_to_begin(sweep: Sweep, begun: Iterable[Params]) -> int:
    """How many trials are still to begin where those with these parameters have begun.

    InputError where a grid has more settings than anyone trains.
    """
    there, count = [setting_of(params) for params in begun], setting_count(sweep.parameters)
    cap = sweep.run_cap
    if cap is None and sweep.method == "grid":
        if count is None:
            raise InputError(f"run_cap is missing: the grid has over {COUNTED:,} settings")
        cap = count
    cap = cap or max(12, len(sweep.points))
    new = cap if count is None else count - len(set(there))
    return max(0, min(cap - len(there), new))


def from_priors(parameters: Mapping[str, Parameter], rng: np.random.Generator | None) -> Params:
    """Values for the parameters that have a prior: its own value without an rng, else a draw from
    the normal around it, cut at the ends.

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
    parameter: Uniform | LogUniform | QUniform | QLogUniform | IntUniform,
    value: float,
    sigma: float,
    rng: np.random.Generator,
) -> float:
    """A draw from the normal around a prior's value, cut at the ends of the range; in decades on
    a log range.
    """
    logarithmic = isinstance(parameter, LogUniform | QLogUniform)
    low, high, middle = (
        math.log10(x) if logarithmic else float(x) for x in (parameter.min, parameter.max, value)
    )
    inside = [x for x in rng.normal(middle, sigma, 64) if low <= x <= high] or [middle]
    found = 10 ** inside[0] if logarithmic else inside[0]
    if isinstance(parameter, IntUniform):
        return round(found)
    if isinstance(parameter, QUniform):
        return min(choices(parameter), key=lambda x: abs(x - found))
    return float(found)


def _category(value: Any) -> bool | int | float | str | None:
    """Optuna keeps scalars only, so a list stands as its JSON text."""
    return (
        value if value is None or isinstance(value, bool | int | float | str) else json.dumps(value)
    )
