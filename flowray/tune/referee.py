"""The referee of a sweep: hands out trials, judges every probe row, tells the study how each trial ended. No Ray in here.

It is the one place where the study, the records, the stop rules and the halving rungs meet, so a resume is one replay of the rows.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from optuna.trial import FrozenTrial, TrialState

from flowray.config.errors import InputError
from flowray.config.sweep import Sweep
from flowray.store.rows import read_rows
from flowray.tune.records import Records, Status, TrialRecord
from flowray.tune.space import Params, trial_count
from flowray.tune.stop import Watch
from flowray.tune.study import REASON, SweepStudy

GIVE_UP = 3  # where the first trials of a session have all failed, the rest would too
_FINAL: dict[TrialState, Status] = {TrialState.COMPLETE: "finished", TrialState.PRUNED: "stopped", TrialState.FAIL: "failed"}


class Halving(Protocol):
    """Successive halving over trial numbers."""

    def judge(self, number: int, step: int, value: float) -> str | None:
        """Record the value at its rung; why the trial should stop there, in words, or None."""


class Audience(Protocol):
    """Whoever shows the sweep as it goes."""

    def started(self, trial: TrialRecord) -> None: ...

    def probed(self, trial: TrialRecord) -> None: ...

    def ended(self, trial: TrialRecord) -> None: ...


class Referee:
    """Starts from what the sweep directory holds: nothing, or an earlier session's study, records and probe rows.

    deadline: time.monotonic() from which no trial begins and running ones pause, to be continued by a later session.
    finish: stopped trials to train to the end, which is then all that this session does.
    earlier: trials of earlier sweeps to learn from.
    """

    def __init__(
        self,
        sweep: Sweep,
        sweep_dir: Path,
        budget_steps: int,
        halving: Halving | None,
        audience: Audience,
        *,
        concurrent: int = 1,
        deadline: float = math.inf,
        finish: Sequence[int] = (),
        earlier: Sequence[FrozenTrial] = (),
    ):
        self.sweep, self.sweep_dir, self.budget_steps = sweep, sweep_dir, budget_steps
        self.records = Records(sweep_dir / "trials.jsonl")
        self._study = SweepStudy(sweep, sweep_dir / "study.journal", concurrent=concurrent, earlier=earlier)
        self._halving, self._audience, self._deadline = halving, audience, deadline
        self._watches: dict[int, Watch] = {}
        self._clock: dict[int, float] = {}
        self._ended = self._failed = 0  # in this session
        self._paused: set[int] = set()
        self._queue: deque[tuple[int, Params]] = deque(self._study.unfinished())
        self._finishing: dict[int, TrialRecord] = {}
        self._replay()
        if self.records.trials:
            self.records.save()
        if finish:
            self._finishing = {number: self._to_finish(number) for number in finish}
            self._queue = deque((number, record.params) for number, record in self._finishing.items())

    @property
    def out_of_time(self) -> bool:
        return time.monotonic() >= self._deadline

    def remaining(self) -> int:
        """How many trials are still to be handed out."""
        return len(self._queue) + (0 if self._finishing else max(0, trial_count(self.sweep) - len(self.records.trials)))

    def next(self) -> tuple[int, Params] | None:
        """The next trial's number and parameters: those left unfinished first; None when there are no more."""
        if self._failed == self._ended >= GIVE_UP or self.out_of_time or not self.remaining():
            return None
        number, params = self._queue.popleft() if self._queue else self._study.ask()
        budget = self.budget_steps * self.sweep.seeds
        record = self.records.trials.setdefault(number, TrialRecord(number, params, budget_steps=budget))
        record.status = "running"
        self._watches.setdefault(number, self._watch())
        self._clock[number] = time.monotonic() - record.seconds
        self.records.save()
        self._audience.started(record)
        return number, params

    def see(self, number: int, row: Mapping[str, Any]) -> bool:
        """A probe row (`step`, `budget_steps`, metrics; `repeat`, which seed) of a running trial; True when the trial is to be stopped."""
        record = self.records.trials[number]
        if "step" in row and self._place(record, row) > record.last_step:
            why = self._judge(record, self._watches[number], row)
            record.stopped_by = None if number in self._finishing else why
            record.seconds = time.monotonic() - self._clock[number]
            self.records.save()
            self._audience.probed(record)
        if record.stopped_by is None and record.last_step < record.budget_steps and self.out_of_time:
            self._paused.add(number)
        return record.stopped_by is not None or number in self._paused

    def ended(self, number: int, error: str | None = None) -> None:
        """The trial runs no more: finished, stopped by `see` (also to pause), or failed with `error` (one line)."""
        record = self.records.trials[number]
        if number in self._paused and error is None:
            self.records.save()
            self._audience.ended(record)
            return
        values = [record.metrics.get(metric.name) for metric in self.sweep.objectives]
        if error is None and record.stopped_by is None:
            error = self._unfinished(record, values)
        if record.stopped_by is not None:
            record.status = "stopped"
            self._study.stop(number, record.stopped_by)
        elif error is not None:
            record.status, record.error = "failed", error
            if number not in self._finishing:
                self._study.fail(number, error)
        else:
            record.status, told = "finished", [value for value in values if value is not None]
            (self._study.finish_later if number in self._finishing else self._study.finish)(number, *told)
        self._ended += 1
        self._failed += record.status == "failed"
        record.seconds = time.monotonic() - self._clock[number]
        self.records.save()
        self._audience.ended(record)

    def _unfinished(self, record: TrialRecord, values: Sequence[float | None]) -> str | None:
        """What is wrong with a trial that ended of itself, None where nothing is."""
        if record.last_step < record.budget_steps:
            return f"it ended at step {record.last_step} of {record.budget_steps} without an error"
        missing = [metric.name for metric, value in zip(self.sweep.objectives, values, strict=True) if value is None]
        return f"it reported no {missing[0]} at its last step" if missing else None

    def _to_finish(self, number: int) -> TrialRecord:
        record = self.records.trials.get(number)
        if record is None or record.status != "stopped":
            stopped = [str(trial.trial) for trial in self.records.by("stopped")]
            what = f"its state is {record.status}" if record else "there is no such trial"
            raise InputError(f"--finish {number}: {what}; stopped trials: {', '.join(stopped) or 'none'}")
        record.stopped_by = None
        self._watches[number] = Watch((), self.sweep.metric.name)
        return record

    def _watch(self) -> Watch:
        return Watch(self.sweep.stop, self.sweep.metric.name)

    def _place(self, record: TrialRecord, row: Mapping[str, Any]) -> int:
        """The row's step counted over all seeds."""
        budget = int(row.get("budget_steps", record.budget_steps // self.sweep.seeds))
        return int(row.get("repeat", 0)) * budget + int(row["step"])

    def _judge(self, record: TrialRecord, watch: Watch, row: Mapping[str, Any]) -> str | None:
        """Take the row over everywhere; why to stop, or None. At the last step, and after the first seed, there is nothing to judge."""
        record.see(row, self.sweep.seeds)
        step, value = int(row["step"]), row.get(self.sweep.metric.name)
        if row.get("repeat", 0):
            return None
        if value is not None and record.trial not in self._finishing:
            self._study.report(record.trial, step, value)
        why = watch.feed(self._with_findings(record.trial, row))
        if step >= record.budget_steps // self.sweep.seeds:
            return None
        if self._halving and value is not None:
            why = why or self._halving.judge(record.trial, step, value)
        return why

    def _with_findings(self, number: int, row: Mapping[str, Any]) -> Mapping[str, Any]:
        """The probe row with what the doctor found at its step, where a rule asks for it and the doctor came."""
        if not any(rule.finding for rule in self.sweep.stop):
            return row
        visits = read_rows(self.sweep_dir / str(number) / "findings.jsonl")
        return next(({**row, "findings": visit["findings"]} for visit in visits if visit["step"] == row["step"]), row)

    def _replay(self) -> None:
        """Bring the records in line with the study, and the rungs, watches and intermediate values with the probe rows."""
        running = dict(self._queue)
        finished = self._study.finished_later()
        for frozen in self._study.trials():
            if frozen.state == TrialState.WAITING:
                continue
            params = running.get(frozen.number, frozen.params)
            budget = self.budget_steps * self.sweep.seeds
            record = self.records.trials.setdefault(frozen.number, TrialRecord(frozen.number, params, budget_steps=budget))
            rows = read_rows(repeat_dir(self.sweep_dir / str(frozen.number), 0) / "probes.jsonl")
            if frozen.number in running:
                watch = self._watches[frozen.number] = self._watch()
                record.last_step = 0
                for row in rows:
                    self._judge(record, watch, row)
                for repeat in range(1, self.sweep.seeds):
                    for row in read_rows(repeat_dir(self.sweep_dir / str(frozen.number), repeat) / "probes.jsonl"):
                        self._judge(record, watch, {**row, "repeat": repeat})
                record.status, record.stopped_by = "running", None  # only a stop that the study was told of counts
                continue
            record.status = "finished" if frozen.number in finished else _FINAL[frozen.state]
            record.stopped_by = frozen.user_attrs.get(REASON) if record.status == "stopped" else None
            if self._halving:
                for row in rows:
                    value = row.get(self.sweep.metric.name)
                    if value is not None and row["step"] < record.budget_steps // self.sweep.seeds:
                        self._halving.judge(frozen.number, row["step"], value)


def repeat_dir(run_dir: Path, repeat: int) -> Path:
    """Where a trial trains with its seed number `repeat`: the first in the trial's run directory, the others below it."""
    return run_dir / "seeds" / str(repeat) if repeat else run_dir


def repeat_of(run_dir: Path) -> int:
    """The inverse of `repeat_dir`."""
    return int(run_dir.name) if run_dir.parent.name == "seeds" else 0
