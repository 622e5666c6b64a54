"""Which trial of a sweep is the best, and what its early stops saved: the one answer of the ledger,
the console, the gauges and the report.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

from flowray.config.rounding import finite, rounded


class Entry(Protocol):
    """A trial, as far as it takes to rank it and to count its steps."""

    @property
    def number(self) -> int: ...
    @property
    def params(self) -> Mapping[str, Any]: ...
    @property
    def status(self) -> str: ...
    @property
    def last_step(self) -> int: ...
    @property
    def budget_steps(self) -> int: ...
    @property
    def repeats(self) -> Sequence[Mapping[str, Any]]:
        """The last metrics of each of its own seeds, where it has several."""

    def value(self, key: str) -> float | None:
        """The metric's last value; None where missing or not finite."""


class Objective(Protocol):
    """A metric that trials are ranked by; goal: minimize or maximize."""

    @property
    def name(self) -> str: ...
    @property
    def goal(self) -> str: ...


T = TypeVar("T", bound=Entry)


@dataclass(frozen=True)
class Arm(Generic[T]):
    """One setting of the parameters: its finished trials, best first, and the value of each seed.

    A setting that was trained twice from one seed is one value, of the earlier trial: the same run
    again says nothing of the noise.
    """

    trials: tuple[T, ...]
    values: tuple[float, ...]

    @property
    def mean(self) -> float:
        return statistics.fmean(self.values)


def ranked(trials: Iterable[T], metric: Objective) -> list[T]:
    """Best first by the metric's last value; without a value after those, failed last; of equal
    ones the earlier.
    """
    key, sign = metric.name, _sign(metric)

    def place(trial: T) -> tuple[bool, bool, float, int]:
        value = trial.value(key)
        by = 0.0 if value is None else sign * rounded(value)
        return trial.status == "failed", value is None, by, trial.number

    return sorted(trials, key=place)


def arms(trials: Iterable[T], metric: Objective) -> list[Arm[T]]:
    """The settings with a finished trial, best mean over their seeds first."""
    key, sign = metric.name, _sign(metric)
    found: dict[str, list[T]] = {}
    for trial in ranked(trials, metric):
        if trial.status == "finished" and seed_values(trial, key):
            found.setdefault(setting(trial.params), []).append(trial)
    made = [Arm(tuple(each), _of_each_seed(each, key)) for each in found.values()]
    return sorted(made, key=lambda arm: (sign * rounded(arm.mean), arm.trials[0].number))


def best(trials: Iterable[T], metric: Objective) -> T | None:
    """Of the finished settings the one with the best mean over its seeds, of this the best trial.

    Before any has finished, the best so far; None without a single value. A failed trial is never
    the best.
    """
    order = ranked(trials, metric)
    if finished := arms(order, metric):
        return finished[0].trials[0]
    return next(
        (t for t in order if t.status != "failed" and t.value(metric.name) is not None), None
    )


def _sign(metric: Objective) -> int:
    return 1 if metric.goal == "minimize" else -1


def seed_values(trial: Entry, key: str) -> dict[tuple[Any, int], float]:
    """The metric's last value of each seed, without those that are missing or not finite; by what
    tells the seeds apart: the searched `seed`, where there is one, and the place among the trial's
    own.
    """
    found = (
        [finite(row.get(key)) for row in trial.repeats]
        if len(trial.repeats) > 1
        else [trial.value(key)]
    )
    return {
        (trial.params.get("seed"), place): value
        for place, value in enumerate(found)
        if value is not None
    }


def _of_each_seed(trials: Iterable[Entry], key: str) -> tuple[float, ...]:
    values: dict[tuple[Any, int], float] = {}
    for trial in sorted(trials, key=lambda trial: trial.number):
        for seed, value in seed_values(trial, key).items():
            values.setdefault(seed, value)
    return tuple(values.values())


def setting(params: Mapping[str, Any]) -> str:
    """Parameters as text, without the seed: trials of one setting are repeats of each other."""
    plain = {key: _whole(value) for key, value in params.items() if key != "seed"}
    return json.dumps(plain, sort_keys=True)


def _whole(value: Any) -> Any:
    """A parameter without the rounding of a sum of steps: 0.1 + 2 x 0.1 is 0.3."""
    if isinstance(value, list):
        return [_whole(each) for each in value]
    return float(f"{value:.12g}") if isinstance(value, float) else value


@dataclass(frozen=True)
class Steps:
    """Steps of the finished and stopped trials: what they trained, and what they would have
    without early stopping.
    """

    spent: int
    budget: int

    @property
    def saved(self) -> float:
        """Share of the budget that early stopping saved; 0 without a budget."""
        return 1 - self.spent / self.budget if self.budget else 0.0


def steps(trials: Iterable[Entry]) -> Steps:
    through = [trial for trial in trials if trial.status in ("finished", "stopped")]
    return Steps(
        sum(trial.last_step for trial in through), sum(trial.budget_steps for trial in through)
    )
