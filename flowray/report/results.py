"""A run or a sweep as its files have it, in plain records, and what follows from these alone."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from flowray.config.ranking import Arm, arms, best, seed_values, steps
from flowray.config.rounding import finite
from flowray.config.rows import Row
from flowray.config.scale import OLDER_UNIT, older_unit, scale_keys
from flowray.findings.facts import recipe_facts
from flowray.findings.finding import recorded
from flowray.findings.judge import Judge
from flowray.report.goodput import Spent

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
    spent: Spent | None = None  # None of a run of before, whose times nobody wrote down

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

    def either(self, key: str) -> float | None:
        """The EMA's last value, which is what gets sampled, else the raw one."""
        ema = self.last(f"ema/{key}")
        return self.last(key) if ema is None else ema

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
        return tuple(seed_values(self, key).values())

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


@dataclass(frozen=True)
class Sweep:
    """A sweep. metrics: what it optimises, the one that ranks first. trials: best first by it,
    those without a value after, failed last.

    scales: trial numbers by the scale that their values are measured on (autoencoder, latent,
    held-out pictures, unit), as changed keys in words; with more than one, values do not compare
    and there is no best trial.
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
        """The best trial; None without a single value, and where trials do not compare."""
        return best(self.trials, self.metric) if self.comparable else None

    def arms(self) -> list[Arm[Trial]]:
        """The settings with a finished trial, best mean first."""
        return arms(self.trials, self.metric)

    def by(self, *statuses: Status) -> list[Trial]:
        return [trial for trial in self.trials if trial.status in statuses]

    @property
    def spent_steps(self) -> int:
        """Steps trained by the finished and stopped trials."""
        return steps(self.trials).spent

    @property
    def budget_steps(self) -> int:
        """Steps that those trials would have trained without early stopping."""
        return steps(self.trials).budget

    @property
    def saved(self) -> float:
        """Share of the full budget that early stopping saved."""
        return steps(self.trials).saved

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


def scales_of(trials: Sequence[Trial], metrics: Sequence[Metric]) -> dict[str, tuple[int, ...]]:
    """Trial numbers by what of the scale the trials differ in, keys or the unit of a metric; trials
    that never wrote a config are not asked.
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
    older: dict[int, list[str]] = {}
    for name in (metric.name for metric in metrics):
        units = {t.number: older_unit(name, t.metrics) for t in trials if name in t.metrics}
        for number in (n for n, old in units.items() if old and len(set(units.values())) > 1):
            older.setdefault(number, []).append(f"{name} {OLDER_UNIT}")
    found: dict[str, tuple[int, ...]] = {}
    for number, config in sorted(known.items()):
        own = [f"{key}={json.dumps(config.get(key))}" for key in differ] + older.get(number, [])
        words = ", ".join(own) or "all alike"
        found[words] = (*found.get(words, ()), number)
    return found
