"""What is drawn of a searched key: its values, their distribution, and the condition for it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from flowray.config.base import Config


class Prior(Config):
    """A guess of the best value, which the first trials follow.

    sigma: its standard deviation, in decades on a log range.
    """

    value: Any
    sigma: float | None = Field(None, gt=0)


class _Parameter(Config):
    """when: parameter -> the values of it with which this one is drawn; else the trial has the
    base recipe's value, or none.
    """

    when: dict[str, tuple[Any, ...]] = {}
    prior: Prior | None = None


class _Range(_Parameter):
    min: float
    max: float

    @model_validator(mode="after")
    def _ordered(self) -> _Range:
        if self.min >= self.max:
            raise ValueError(f"min {self.min:g} must lie below max {self.max:g}")
        if self.prior is not None:
            if not self.min <= self.prior.value <= self.max:
                raise ValueError(
                    f"prior.value {self.prior.value:g} must lie between min {self.min:g} and max"
                    f" {self.max:g}"
                )
            if self.prior.sigma is None:
                raise ValueError(
                    "a prior on a range needs sigma, its standard deviation (in decades on a log"
                    " range)"
                )
        return self


class _LogRange(_Range):
    min: float = Field(gt=0)


class Uniform(_Range):
    """Evenly between min and max."""

    distribution: Literal["uniform"] = "uniform"


class LogUniform(_LogRange):
    """Evenly in the logarithm, between the values min and max."""

    distribution: Literal["log_uniform_values"] = "log_uniform_values"


class QUniform(_Range):
    """min, min + q, min + 2q, ... up to max."""

    distribution: Literal["q_uniform"] = "q_uniform"
    q: float = Field(1.0, gt=0)

    @model_validator(mode="after")
    def _fits(self) -> QUniform:
        _check_step(self.q, self.min, self.max)
        return self


class QLogUniform(_LogRange):
    """log_uniform_values, rounded to multiples of q."""

    distribution: Literal["q_log_uniform_values"] = "q_log_uniform_values"
    q: float = Field(1.0, gt=0)

    @model_validator(mode="after")
    def _fits(self) -> QLogUniform:
        _check_step(self.q, self.min, self.max)
        return self


def _check_step(q: float, low: float, high: float) -> None:
    if q > (high - low) * (1 + 1e-9):
        raise ValueError(
            f"q {q:g} is wider than the range {low:g} to {high:g}, which leaves one value; take a"
            " smaller q"
        )


class IntUniform(_Range):
    """Whole numbers, both ends included."""

    distribution: Literal["int_uniform"] = "int_uniform"
    min: int
    max: int


class Categorical(_Parameter):
    """One of the values."""

    distribution: Literal["categorical"] = "categorical"
    values: tuple[Any, ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _prior_is_a_value(self) -> Categorical:
        if self.prior is not None and self.prior.value not in self.values:
            raise ValueError(f"prior.value {self.prior.value} must be one of the values")
        if self.prior is not None and self.prior.sigma is not None:
            raise ValueError("a prior on values has no sigma; the first trial takes its value")
        return self

    @model_validator(mode="after")
    def _each_once(self) -> Categorical:
        texts = [repr(value) for value in self.values]
        if twice := [text for text in texts if texts.count(text) > 1]:
            raise ValueError(
                f"values has {twice[0]} twice; a value is drawn as often as any other, seeds: 2"
                " trains every setting twice"
            )
        return self


class Constant(_Parameter):
    """Always the value."""

    distribution: Literal["constant"] = "constant"
    value: Any
    prior: None = None


Parameter = Annotated[
    Uniform | LogUniform | QUniform | QLogUniform | IntUniform | Categorical | Constant,
    Field(discriminator="distribution"),
]


def infer_distribution(spec: Mapping[str, Any], whole: bool) -> str | None:
    """W&B's rule for a parameter without a distribution; whole: the recipe field is an integer.
    None: it cannot be told.
    """
    if "values" in spec:
        return "categorical"
    if "value" in spec:
        return "constant"
    if "min" in spec and "max" in spec:
        return "int_uniform" if whole else "uniform"
    return None


def drawn(parameter: Parameter, params: Mapping[str, Any]) -> bool:
    """Whether a trial with `params`, its parents' among them, draws the parameter."""
    return all(
        parent in params and any(_equal(params[parent], value) for value in values)
        for parent, values in parameter.when.items()
    )


def _equal(value: Any, wanted: Any) -> bool:
    """Steps of a range are sums: 0.1 + 2 x 0.1 is the 0.3 that a file asks for."""
    numbers = isinstance(value, float) and isinstance(wanted, int | float)
    return (
        math.isclose(value, wanted, rel_tol=1e-9, abs_tol=1e-12)
        if numbers
        else bool(value == wanted)
    )


def in_order(parameters: Mapping[str, Parameter]) -> list[str]:
    """The parameters, every one after those that its condition names, else as they stand."""
    out: list[str] = []

    def take(key: str) -> None:
        for parent in parameters[key].when:
            if parent not in out:
                take(parent)
        if key not in out:
            out.append(key)

    for key in parameters:
        take(key)
    return out


def inside(parameter: Parameter, value: Any) -> bool:
    """Whether the parameter can have the value."""
    match parameter:
        case Categorical(values=values):
            return value in values
        case Constant(value=only):
            return bool(value == only)
        case QUniform(min=low, max=high, q=q):
            return low <= value <= high and abs((value - low) / q - round((value - low) / q)) < 1e-6
        case _:
            return bool(parameter.min <= value <= parameter.max)
