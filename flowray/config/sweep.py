"""The sweep: which recipe keys are searched, how trials are judged, what they may use. It follows the W&B sweep schema."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from flowray.config.base import Config
from flowray.config.recipe import Name

Auto = Literal["auto"]
Count = Annotated[int, Field(gt=0)]


class _Range(Config):
    min: float
    max: float

    @model_validator(mode="after")
    def _ordered(self) -> _Range:
        if self.min >= self.max:
            raise ValueError(f"min {self.min:g} must lie below max {self.max:g}")
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


class QLogUniform(_LogRange):
    """log_uniform_values, rounded to multiples of q."""

    distribution: Literal["q_log_uniform_values"] = "q_log_uniform_values"
    q: float = Field(1.0, gt=0)


class IntUniform(_Range):
    """Whole numbers, both ends included."""

    distribution: Literal["int_uniform"] = "int_uniform"
    min: int
    max: int


class Categorical(Config):
    """One of the values."""

    distribution: Literal["categorical"] = "categorical"
    values: tuple[Any, ...] = Field(min_length=1)


class Constant(Config):
    """Always the value."""

    distribution: Literal["constant"] = "constant"
    value: Any


Parameter = Annotated[
    Uniform | LogUniform | QUniform | QLogUniform | IntUniform | Categorical | Constant, Field(discriminator="distribution")
]

NEAREST = {  # W&B distributions that Optuna does not draw from, and the nearest that it does
    "inv_log_uniform": "log_uniform_values",
    "inv_log_uniform_values": "log_uniform_values",
    "log_uniform": "log_uniform_values (its min and max are values, not exponents)",
    "q_log_uniform": "q_log_uniform_values (its min and max are values, not exponents)",
    "normal": "uniform over mean -+ 2 standard deviations",
    "q_normal": "q_uniform over mean -+ 2 standard deviations",
    "log_normal": "log_uniform_values",
    "q_log_normal": "q_log_uniform_values",
    "beta": "uniform",
    "q_beta": "q_uniform",
}


class Metric(Config):
    """What a trial is judged by: a probe metric, its value at the trial's last probe."""

    name: str
    goal: Literal["minimize", "maximize"] = "minimize"


class Hyperband(Config):
    """Asynchronous successive halving: at min_iter * eta^k steps a trial outside the best 1/eta so far is stopped."""

    type: Literal["hyperband"] = "hyperband"
    min_iter: Count
    eta: float = Field(3.0, gt=1)


class StopRule(Config):
    """A trial whose metric is below (or above) a bound at `patience` probes in a row, from step `after` on, is stopped.

    finding, in place of a metric: the id of one of the doctor's findings, or a severity, which the worse ones meet too; its
    patience counts examinations, and the base recipe must ask for them (`probes.doctor_every`).
    """

    metric: str | None = None
    finding: str | None = None
    below: float | None = None
    above: float | None = None
    after: int = Field(0, ge=0)
    patience: Count = 1

    @model_validator(mode="after")
    def _one_bound(self) -> StopRule:
        if (self.metric is None) == (self.finding is None):
            raise ValueError("a stop rule takes either metric or finding")
        if self.finding is not None and (self.below is not None or self.above is not None):
            raise ValueError("a stop rule on a finding takes neither below nor above")
        if self.metric is not None and (self.below is None) == (self.above is None):
            raise ValueError("a stop rule takes either below or above")
        return self


class SweepResources(Config):
    """What each trial takes; `auto` is worked out from the cluster when the sweep starts, unset is what the recipe says."""

    num_workers: Count | Auto | None = None
    cpus_per_worker: Count | Auto | None = None
    gpus_per_worker: Annotated[float, Field(ge=0)] | Auto | None = None


class Sweep(Config):
    """A sweep, whole: `python -m flowray.tune SWEEP` needs nothing else. It writes `<storage_path>/<name>`.

    base: the recipe that every trial starts from; set: dotted recipe keys that differ from it in every trial.
    parameters: dotted recipe key -> what it is drawn from. run_cap: the number of trials,
    those of earlier sessions included; unset: the whole grid, or 12.
    startup_trials: trials drawn at random before the sampler learns from the results.
    """

    name: Name
    description: str = ""
    storage_path: str = "runs"
    base: str
    set: dict[str, Any] = {}
    task: Literal["train"] = "train"
    method: Literal["bayes", "random", "grid"] = "bayes"
    metric: Metric
    parameters: dict[str, Parameter] = Field(min_length=1)
    early_terminate: Hyperband | None = None
    stop: tuple[StopRule, ...] = ()
    run_cap: Count | None = None
    max_concurrent: Count | Auto = "auto"
    resources: SweepResources = SweepResources()
    seed: Annotated[int, Field(ge=0)] = 0
    startup_trials: Annotated[int, Field(ge=0)] = 4

    @model_validator(mode="after")
    def _grid_is_countable(self) -> Sweep:
        if self.method == "grid":
            for key, parameter in self.parameters.items():
                if isinstance(parameter, Uniform | LogUniform | QLogUniform):
                    raise ValueError(
                        f"method grid needs values for {key}, got {parameter.distribution}; give values or take method: random"
                    )
        return self

    @property
    def minimise(self) -> bool:
        return self.metric.goal == "minimize"


def infer_distribution(spec: Mapping[str, Any], whole: bool) -> str | None:
    """W&B's rule for a parameter without a distribution; whole: the recipe field is an integer. None: it cannot be told."""
    if "values" in spec:
        return "categorical"
    if "value" in spec:
        return "constant"
    if "min" in spec and "max" in spec:
        return "int_uniform" if whole else "uniform"
    return None
