"""The sweep: which recipe keys are searched, how trials are judged, what they may use.

It follows the W&B sweep schema.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from flowray.config.base import Config
from flowray.config.errors import RuleError
from flowray.config.keys import describe
from flowray.config.paths import RunPaths, StoragePath
from flowray.config.recipe import CardConfig, Name
from flowray.sweepconfig.distributions import LogUniform, Parameter, QLogUniform, Uniform
from flowray.sweepconfig.search import (
    CmaEsSearch,
    GridSearch,
    LearningSearch,
    RandomSearch,
    SearchConfig,
    TpeSearch,
)
from flowray.sweepconfig.stop import StopRule

Auto = Literal["auto"]


Count = Annotated[int, Field(gt=0)]


class Metric(Config):
    """What a trial is judged by: a probe metric, its value at the trial's last probe. goal:
    unless given, the metric's own better side.
    """

    name: str
    goal: Literal["minimize", "maximize"] = "minimize"

    @model_validator(mode="before")
    @classmethod
    def _better_side(cls, data: Any) -> Any:
        """W&B takes minimize; of a cosine or an accuracy nobody means that."""
        known = (
            describe(str(data["name"]))
            if isinstance(data, Mapping) and "name" in data and "goal" not in data
            else None
        )
        return (
            {**data, "goal": "maximize"}
            if known is not None and known.direction == "higher"
            else data
        )


class Hyperband(Config):
    """Asynchronous successive halving: at min_iter * eta^k steps a trial waits until it is among
    the best 1/eta that came so far.
    """

    type: Literal["hyperband"] = "hyperband"
    min_iter: Count
    eta: float = Field(3.0, gt=1)


class Asha(Config):
    """The same with rungs of one's own: at rungs[k] steps a trial waits until it is among the
    best 1/eta[k] that came so far.
    """

    type: Literal["asha"] = "asha"
    rungs: tuple[Count, ...] = Field(min_length=1)
    eta: tuple[Annotated[float, Field(gt=1)], ...]

    @model_validator(mode="after")
    def _pairs(self) -> Asha:
        if len(self.eta) != len(self.rungs):
            raise ValueError(
                f"eta has {len(self.eta)} values for {len(self.rungs)} rungs; it takes one for each"
            )
        if sorted(set(self.rungs)) != list(self.rungs):
            raise ValueError(f"rungs {list(self.rungs)} must rise")
        return self


SuccessiveHalving = Hyperband | Asha


class Median(Config):
    """From min_iter on, a trial whose best value so far is worse than the median of the others'
    means up to the same step is stopped.

    min_trials: how many others must have come that far before anyone is judged (the rule of
    Google's Vizier).
    """

    type: Literal["median"] = "median"
    min_iter: Count
    min_trials: Count = 3


class SweepResources(Config):
    """What each trial takes; `auto` is worked out from the cluster when the sweep starts, unset
    is what the recipe says.
    """

    num_workers: Count | Auto | None = None
    cpus_per_worker: Count | Auto | None = None
    gpus_per_worker: Annotated[float, Field(ge=0)] | Auto | None = None


class SweepCard(CardConfig):
    """The hand-written fields of the experiment card (log 0826); the comment block on top of the
    file fills what `card:` leaves out.

    expects: the reading that is expected, to be held against what comes out.
    """

    key_diffs: str = ""
    core_params: str = ""
    expects: str = ""


_UNITS = {"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}


def _seconds(value: Any) -> Any:
    """'1h30m' and '90' as seconds."""
    if not isinstance(value, str):
        return value
    parts = re.fullmatch(r"((?:\d+(?:\.\d+)?[smhd])+)", value.replace(" ", ""))
    if parts is None:
        raise ValueError(f"got {value!r}, want a time such as 90s, 45m, 8h, 1h30m or 2d")
    return sum(
        float(number) * _UNITS[unit] for number, unit in re.findall(r"([\d.]+)([smhd])", parts[1])
    )


class Sweep(Config):
    """A sweep, whole: `python -m flowray.tune SWEEP` needs nothing else. It writes
    `<storage_path>/<name>`.

    base: the recipe that every trial starts from; set: dotted recipe keys that differ from it in
    every trial.
    task: `train`, or `sample`: `base` is a trained run, `sample.*` is searched, and the run's
    pictures are scored as flowray.eval does.
    metric: one, or a list, which gives a front of best trials; stops and halving then look at the
    first.
    parameters: dotted recipe key -> what it is drawn from. points: known good values, tried first.
    search: how method bayes learns, TPE if left out. startup_trials: trials drawn at random before
    it does.
    warm_start: earlier sweeps whose trials it learns from, as far as their recipes differ in
    searched keys only.
    run_cap: the number of trials, those of earlier sessions included; unset: the whole grid, or 12.
    seeds: how often each configuration is trained, each time with the next seed; the mean counts.
    Stops look at the first seed.
    time_budget: after so many seconds (or `8h`, `1h30m`) no trial begins, and the running ones
    pause at their next probe.
    """

    name: Name
    description: str = ""
    card: SweepCard = SweepCard()
    storage_path: StoragePath = "runs"
    base: str
    set: dict[str, Any] = {}
    task: Literal["train", "sample"] = "train"
    method: Literal["bayes", "random", "grid"] = "bayes"
    search: LearningSearch | None = None
    metric: Metric
    more_metrics: tuple[Metric, ...] = ()
    parameters: dict[str, Parameter] = Field(min_length=1)
    points: tuple[dict[str, Any], ...] = ()
    warm_start: RunPaths = ()
    early_terminate: Annotated[Hyperband | Asha | Median, Field(discriminator="type")] | None = None
    stop: tuple[StopRule, ...] = ()
    run_cap: Count | None = None
    seeds: Count = 1
    time_budget: Annotated[float, Field(gt=0), BeforeValidator(_seconds)] | None = None
    max_concurrent: Count | Auto = "auto"
    resources: SweepResources = SweepResources()
    seed: Annotated[int, Field(ge=0)] = 0
    startup_trials: Annotated[int, Field(ge=0)] = 4

    @model_validator(mode="before")
    @classmethod
    def _list_of_metrics(cls, data: Any) -> Any:
        """`metric: [a, b]` as the first and the others."""
        if (
            isinstance(data, Mapping)
            and isinstance(data.get("metric"), list | tuple)
            and data["metric"]
        ):
            return {**data, "metric": data["metric"][0], "more_metrics": tuple(data["metric"][1:])}
        return data

    @model_validator(mode="after")
    def _grid_is_countable(self) -> Sweep:
        if self.method == "grid":
            for key, parameter in self.parameters.items():
                if isinstance(parameter, Uniform | LogUniform | QLogUniform):
                    raise RuleError(
                        f"method grid needs values for {key}, got {parameter.distribution}; give"
                        " values or take method: random",
                        "method",
                    )
            if self.points or self.warm_start:
                raise RuleError(
                    "method grid has every point once; points and warm_start belong to method:"
                    " bayes or random",
                    "method",
                )
        return self

    @model_validator(mode="after")
    def _search_fits(self) -> Sweep:
        if self.search is not None and self.method != "bayes":
            raise RuleError(
                f"search belongs to method: bayes, got method: {self.method}; leave search out",
                "search",
            )
        if isinstance(self.search, CmaEsSearch) and self.more_metrics:
            raise RuleError(
                "search.kind cmaes has one metric; for several take nsga2 or tpe", "search"
            )
        names = [metric.name for metric in self.objectives]
        if twice := [name for name in names if names.count(name) > 1]:
            raise RuleError(f"metric {twice[0]} is named twice; leave one out", "metric")
        if self.run_cap is not None and len(self.points) > self.run_cap:
            raise RuleError(
                f"run_cap {self.run_cap} is less than the {len(self.points)} points, each of which"
                " is a trial; raise it",
                "run_cap",
            )
        if self.seeds > 1 and "seed" in {*self.parameters, *self.set}:
            raise RuleError(
                "seeds repeats every configuration with the next seed; leave seed out of set and"
                " parameters",
                "seeds",
            )
        return self

    @model_validator(mode="after")
    def _samples_only(self) -> Sweep:
        if self.task == "train":
            return self
        other = [key for key in (*self.parameters, *self.set) if not key.startswith("sample.")]
        if other:
            raise RuleError(
                f"task sample draws pictures of a trained run, got {other[0]}; only sample.* keys"
                " can differ",
                "task",
            )
        wrong = [
            metric.name
            for metric in self.objectives
            if not metric.name.startswith(("eval/", "perf/images_per_s", "perf/network_calls"))
        ]
        if wrong:
            raise RuleError(
                f"task sample scores pictures, got metric {wrong[0]}; type eval/all_correct or"
                " another eval/... score",
                "task",
            )
        if self.early_terminate or self.stop or self.warm_start:
            raise RuleError(
                "task sample trains nothing; leave early_terminate, stop and warm_start out", "task"
            )
        return self

    @property
    def minimise(self) -> bool:
        return self.metric.goal == "minimize"

    @property
    def objectives(self) -> tuple[Metric, ...]:
        """Every metric, the one that stops look at first."""
        return self.metric, *self.more_metrics

    @property
    def rule_metrics(self) -> tuple[str, ...]:
        """Every metric that a stop rule reads."""
        return tuple(dict.fromkeys(name for rule in self.stop for name in rule.metrics))

    @property
    def sampler(self) -> SearchConfig:
        """What draws the trials."""
        if self.method == "bayes":
            return self.search or TpeSearch()
        return RandomSearch() if self.method == "random" else GridSearch()


def milestones(halving: SuccessiveHalving, budget_steps: int) -> dict[int, float]:
    """{rung: eta}, the lowest first. Of hyperband: min_iter * eta^k up to half the budget, since
    stopping later saves next to nothing; the first one always.
    """
    if isinstance(halving, Asha):
        return {
            rung: eta
            for rung, eta in zip(halving.rungs, halving.eta, strict=True)
            if rung < budget_steps
        }
    rungs: dict[int, float] = {}
    rung = float(halving.min_iter)
    while rung < budget_steps and (not rungs or rung <= budget_steps / 2):
        rungs[round(rung)] = halving.eta
        rung *= halving.eta
    return rungs
