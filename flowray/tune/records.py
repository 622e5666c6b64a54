"""The sweep's own account: trials.jsonl, one row per trial, rewritten atomically, and the
verdict drawn from it.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, Literal, NamedTuple

from flowray.config.errors import InputError
from flowray.store.rows import read_rows

Status = Literal["running", "waiting", "finished", "stopped", "failed"]
StopKind = Literal["rule", "not_finite", "comparison"]


class Stop(NamedTuple):
    """Why a trial stops: in words, and what of the sweep did it.

    waits: it only waits at its rung. kind: a rule of `stop`, a number that is not finite, or the
    comparison with other trials (`early_terminate`). rule: which of the sweep's rules.
    """

    why: str
    waits: bool
    kind: StopKind
    rule: int | None = None


@dataclass
class TrialRecord:
    """One trial. `stopped_by` says in words why it was stopped, `error` why it failed; `seconds` is
    wall time over all sessions.

    stop_kind, stop_rule: see `Stop`; None also in rows of older sweeps.

    Steps are counted over all seeds. repeats: the last probe's metrics of each seed, where a trial
    has several; `metrics` is then the mean over the seeds that are through (the first alone until
    then), `noise` the standard deviation over them.

    The status is `waiting` while a trial is paused until the next session, and while a rung holds
    it (`waits`) until it is among the best there.
    """

    trial: int
    params: dict[str, Any]
    status: Status = "running"
    last_step: int = 0
    budget_steps: int = 0
    stopped_by: str | None = None
    metrics: dict[str, float | None] = field(default_factory=dict)
    seconds: float = 0.0
    error: str | None = None
    repeats: list[dict[str, float | None]] = field(default_factory=list)
    noise: dict[str, float] = field(default_factory=dict)
    waits: bool = False
    stop_kind: StopKind | None = None
    stop_rule: int | None = None

    def stop(self, stop: Stop) -> None:
        """Note why it stops or waits; the status changes once it has ended."""
        self.stopped_by, self.waits = stop.why, stop.waits
        self.stop_kind, self.stop_rule = stop.kind, stop.rule

    def go_on(self) -> None:
        """It is stopped no more."""
        self.stopped_by, self.waits, self.stop_kind, self.stop_rule = None, False, None, None

    def see(self, row: Mapping[str, Any], seeds: int = 1) -> None:
        """Take over the step and the metrics of a newer probe row; `repeat` in it says which of
        the `seeds` it is from.
        """
        repeat, step = int(row.get("repeat", 0)), int(row["step"])
        budget = int(row.get("budget_steps", self.budget_steps // seeds))
        place = repeat * budget + step
        if place < self.last_step:
            return
        self.last_step, self.budget_steps = place, budget * seeds
        if seeds == 1:
            self.metrics = metrics_of(row)
            return
        self.repeats[repeat:] = [metrics_of(row)]
        through = self.repeats[: max(1, repeat + (step >= budget))]
        columns = {name: [metrics.get(name) for metrics in through] for name in through[0]}
        whole = {name: [x for x in held if x is not None] for name, held in columns.items()}
        # a mean over fewer seeds would not compare
        whole = {name: held for name, held in whole.items() if len(held) == len(through)}
        self.metrics = {name: fmean(whole[name]) if name in whole else None for name in columns}
        self.noise = {name: stdev(held) for name, held in whole.items()} if len(through) > 1 else {}


def metrics_of(row: Mapping[str, Any]) -> dict[str, float | None]:
    """The `group/name` numbers of a row; what is not finite becomes None, as JSON has no word
    for it.
    """
    numbers = {
        k: v
        for k, v in row.items()
        if "/" in k and isinstance(v, int | float) and not isinstance(v, bool)
    }
    return {k: float(v) if math.isfinite(v) else None for k, v in numbers.items()}


def _record(row: Mapping[str, Any]) -> TrialRecord:
    """A row of trials.jsonl; older ones have a trial that waits at a rung as stopped."""
    record = TrialRecord(**row)
    if record.waits and record.status == "stopped":
        record.status = "waiting"
    return record


class Records:
    """All trials of a sweep, by number, mirrored in `<sweep_dir>/trials.jsonl`."""

    def __init__(self, path: Path):
        self.path = path
        self.trials: dict[int, TrialRecord] = {
            row["trial"]: _record(row) for row in read_rows(path)
        }
        # the trials as they were last written: most of hundreds have ended and change no more
        self._lines: dict[int, str] = {}

    def save(self, *changed: int) -> None:
        """Rewrite the file in one step: a reader, or a session after a crash, sees the old rows or
        the new ones, never half of them.

        changed: the trials that differ from the last save, where the caller knows; without them all
        are taken to.
        """
        for number in [*(changed or self.trials), *(self.trials.keys() - self._lines.keys())]:
            self._lines[number] = json.dumps(vars(self.trials[number]), allow_nan=False) + "\n"
        part = self.path.with_name(self.path.name + ".part")
        with part.open("w") as file:
            file.writelines(self._lines[number] for number in sorted(self.trials))
            file.flush()
            os.fsync(file.fileno())
        part.replace(self.path)

    def by(self, *statuses: Status) -> list[TrialRecord]:
        return [self.trials[n] for n in sorted(self.trials) if self.trials[n].status in statuses]

    def waiting(self) -> list[int]:
        """The trials that wait at a rung."""
        return [trial.trial for trial in self.by("waiting") if trial.waits]

    def to_finish(self, number: int) -> TrialRecord:
        """A trial that can be trained to its last step.

        InputError where it has ended otherwise, or is none.
        """
        record = self.trials.get(number)
        if record is None or record.status in ("finished", "failed"):
            stopped = [str(trial.trial) for trial in self.by("stopped", "waiting")]
            what = f"its state is {record.status}" if record else "there is no such trial"
            raise InputError(
                f"--finish {number}: {what}; stopped trials: {', '.join(stopped) or 'none'}"
            )
        return record

    def saved(self) -> float:
        """Share of the full-budget steps that early stopping saved, over finished and stopped
        trials.
        """
        done = self.by("finished", "stopped")
        budget = sum(t.budget_steps for t in done)
        return 1 - sum(t.last_step for t in done) / budget if budget else 0.0
