"""A run or a sweep as its files have it, in plain records, and what follows from these alone."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from flowray.config.rounding import rounded
from flowray.config.rows import Row
from flowray.config.scale import scale_keys
from flowray.findings.facts import recipe_facts
from flowray.findings.finding import recorded
from flowray.findings.judge import Judge

Series = list[tuple[int, float]]  # (step, value), steps rising
LOG_SPAN = 30.0
# waiting: at a rung, to go on once among the best
Status = Literal["running", "waiting", "finished", "stopped", "failed"]


@dataclass(frozen=True)
class Strip:
    """One sample strip: the pictures of all prompts side by side, drawn at `step`."""

    step: int
    path: Path


@dataclass(frozen=True)
class Run:
    """What one training run wrote. header: the comment block on top of config.yaml; card:
    (heading, text) of card.md.

    config: the resolved recipe, dotted keys; findings: the doctor's at its last visit, at step
    `visited`, None where it never came.
    """

    path: Path
    header: str
    config: Mapping[str, Any]
    card: tuple[tuple[str, str], ...]
    metrics: tuple[Row, ...]
    probes: tuple[Row, ...]
    strips: tuple[Strip, ...]
    prompts: tuple[str, ...]
    findings: tuple[Mapping[str, Any], ...] | None
    visited: int
    notes: tuple[str, ...]

    def series(self, key: str) -> Series:
        """A key's finite values over steps: from the probes where they have it, else from the
        training rows.
        """
        return series(self.probes, key) or series(self.metrics, key)

    def last(self, key: str) -> float | None:
        """The key's value in the last row that has it, None where that is missing or not finite."""
        for rows in (self.probes, self.metrics):
            values = [row[key] for row in rows if key in row]
            if values:
                return finite(values[-1])
        return None

    def judge(self, row: Row, step: int) -> Judge:
        """The doctor's verdicts on a row of probes: by its own findings where it came at that
        step, else by its rules.

        Findings of older runs do not say which numbers they judge; there, too, the rules are asked
        again.
        """
        own = (
            [recorded(finding) for finding in self.findings or ()]
            if self.visited == step
            else [None]
        )
        facts = {**recipe_facts(self.config), "step": step}
        typed = [finding for finding in own if finding is not None]
        return Judge(
            row, facts, [*self.metrics, *self.probes], typed if len(typed) == len(own) else None
        )


@dataclass(frozen=True)
class Metric:
    """What a sweep optimises."""

    name: str
    goal: Literal["minimize", "maximize"]


@dataclass(frozen=True, eq=False)  # told apart by identity: params and metrics are dicts
class Trial:
    """One row of trials.jsonl, with the run directory of that number.

    repeats: the metrics of each seed, where it has several.
    """

    number: int
    params: dict[str, Any]
    status: Status
    last_step: int
    budget_steps: int
    stopped_by: str
    metrics: dict[str, Any]
    seconds: float
    error: str
    repeats: tuple[Mapping[str, Any], ...]
    run: Run
    stop_kind: str | None = None
    stop_rule: int | None = None

    def values(self, key: str) -> tuple[float, ...]:
        """The key's last value of each seed, of a trial with one seed that one; without those
        that are missing or not finite.
        """
        return tuple(self.by_seed(key).values())

    def by_seed(self, key: str) -> dict[tuple[Any, int], float]:
        """The same by what tells the seeds apart: the searched `seed`, where there is one, and the
        place among the trial's own.
        """
        found = (
            [finite(row.get(key)) for row in self.repeats]
            if len(self.repeats) > 1
            else [self.value(key)]
        )
        return {
            (self.params.get("seed"), place): value
            for place, value in enumerate(found)
            if value is not None
        }

    def value(self, key: str) -> float | None:
        """The key's last value: the record's, else the run's; None where missing or not finite."""
        return finite(self.metrics[key]) if key in self.metrics else self.run.last(key)

    def spread(self, key: str) -> float | None:
        """The key's standard deviation over the seeds of a finished trial, None where it had
        one.
        """
        values = self.values(key)
        return statistics.stdev(values) if self.status == "finished" and len(values) > 1 else None

    def either(self, key: str) -> float | None:
        """The EMA's value, which is what gets sampled, else the raw one."""
        ema = self.value(f"ema/{key}")
        return self.value(key) if ema is None else ema

    @property
    def setting(self) -> str:
        """The parameters as text, without the seed: trials of one setting are repeats of each
        other.
        """
        params = {key: _whole(value) for key, value in self.params.items() if key != "seed"}
        return json.dumps(params, sort_keys=True)


def _whole(value: Any) -> Any:
    """A parameter without the rounding of a sum of steps: 0.1 + 2 x 0.1 is 0.3."""
    if isinstance(value, list):
        return [_whole(each) for each in value]
    return float(f"{value:.12g}") if isinstance(value, float) else value


@dataclass(frozen=True)
class Arm:
    """One setting of the parameters: its finished trials, best first, and the value of each seed.

    A setting that was trained twice from one seed is one value, of the earlier trial: the same run
    again says nothing of the noise.
    """

    trials: tuple[Trial, ...]
    values: tuple[float, ...]

    @property
    def mean(self) -> float:
        return statistics.fmean(self.values)


def _of_each_seed(trials: Sequence[Trial], key: str) -> tuple[float, ...]:
    values: dict[tuple[Any, int], float] = {}
    for trial in sorted(trials, key=lambda trial: trial.number):
        for seed, value in trial.by_seed(key).items():
            values.setdefault(seed, value)
    return tuple(values.values())


@dataclass(frozen=True)
class Sweep:
    """A sweep. metrics: what it optimises, the one that ranks first. trials: best first by it,
    those without a value after, failed last.

    scales: trial numbers by the scale that their values are measured on (autoencoder, latent,
    held-out pictures), as changed keys in words; with more than one, values do not compare and
    there is no best trial (the logs' rule).
    """

    path: Path
    name: str
    settings: dict[str, Any]
    metrics: tuple[Metric, ...]
    trials: tuple[Trial, ...]
    scales: Mapping[str, tuple[int, ...]]
    notes: tuple[str, ...]

    @property
    def metric(self) -> Metric:
        return self.metrics[0]

    @property
    def comparable(self) -> bool:
        """Whether the trials may be ranked against each other."""
        return len(self.scales) < 2

    @property
    def best(self) -> Trial | None:
        """The best trial: of the finished settings the one with the best mean over its seeds, of
        this the best trial.

        Before any has finished, the best so far; None without a single value, and where trials do
        not compare.
        """
        if not self.comparable:
            return None
        arms = self.arms()
        if arms:
            return arms[0].trials[0]
        return next(
            (
                trial
                for trial in self.trials
                if trial.status != "failed" and trial.value(self.metric.name) is not None
            ),
            None,
        )

    def arms(self) -> list[Arm]:
        """The settings with a finished trial, best mean first."""
        found: dict[str, list[Trial]] = {}
        for trial in self.by("finished"):
            if trial.values(self.metric.name):
                found.setdefault(trial.setting, []).append(trial)
        sign = 1 if self.metric.goal == "minimize" else -1
        arms = [
            Arm(tuple(trials), _of_each_seed(trials, self.metric.name)) for trials in found.values()
        ]
        return sorted(arms, key=lambda arm: (sign * rounded(arm.mean), arm.trials[0].number))

    def by(self, *statuses: Status) -> list[Trial]:
        return [trial for trial in self.trials if trial.status in statuses]

    @property
    def spent_steps(self) -> int:
        """Steps trained by the finished and stopped trials."""
        return sum(trial.last_step for trial in self.by("finished", "stopped"))

    @property
    def budget_steps(self) -> int:
        """Steps that those trials would have trained without early stopping."""
        return sum(trial.budget_steps for trial in self.by("finished", "stopped"))

    @property
    def saved(self) -> float:
        """Share of the full budget that early stopping saved: 1 - spent_steps / budget_steps; 0
        without a budget.
        """
        return 1 - self.spent_steps / self.budget_steps if self.budget_steps else 0.0

    def varied(self) -> list[str]:
        """Keys of the parameters that differ between trials (all of them in a sweep of one
        trial), in order of appearance.
        """
        keys = list(dict.fromkeys(key for trial in self.trials for key in trial.params))
        if len(self.trials) < 2:
            return keys
        return [
            key
            for key in keys
            if len({json.dumps(trial.params.get(key)) for trial in self.trials}) > 1
        ]


def finite(value: Any) -> float | None:
    """The value as a float, or None if it is no finite number."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        return None
    return float(value)


def numeric(values: Iterable[Any]) -> bool:
    """Whether every value is a finite number."""
    return all(finite(value) is not None for value in values)


def spans_decades(values: Sequence[float]) -> bool:
    """Whether the values are positive and spread over so wide a ratio that a log axis shows them
    better.
    """
    return bool(values) and min(values) > 0 and max(values) / min(values) > LOG_SPAN


def series(rows: Iterable[Row], key: str) -> Series:
    """(step, value) of every row that has a finite value of the key."""
    points = [(row.get("step"), finite(row.get(key))) for row in rows]
    return sorted(
        (step, value) for step, value in points if isinstance(step, int) and value is not None
    )


def ranked(trials: Sequence[Trial], metric: Metric) -> list[Trial]:
    """Best first by the metric's last value; without a value after those, failed last; ties by
    number.
    """
    sign = 1 if metric.goal == "minimize" else -1

    def place(trial: Trial) -> tuple[bool, bool, float, int]:
        value = trial.value(metric.name)
        by = 0.0 if value is None else sign * rounded(value)
        return trial.status == "failed", value is None, by, trial.number

    return sorted(trials, key=place)


def scales_of(trials: Sequence[Trial]) -> dict[str, tuple[int, ...]]:
    """Trial numbers by the keys of the scale in which the trials differ; trials that never wrote
    a config are not asked.
    """
    known = {trial.number: trial.run.config for trial in trials if trial.run.config}
    if not known:
        return {}
    own_pictures = all(config.get("data.val_shards") for config in known.values())
    keys = sorted(
        scale_keys({key for config in known.values() for key in config}, own_pictures=own_pictures)
    )
    differ = [
        key for key in keys if len({json.dumps(config.get(key)) for config in known.values()}) > 1
    ]
    found: dict[str, tuple[int, ...]] = {}
    for number, config in sorted(known.items()):
        words = ", ".join(f"{key}={json.dumps(config.get(key))}" for key in differ) or "all alike"
        found[words] = (*found.get(words, ()), number)
    return found
