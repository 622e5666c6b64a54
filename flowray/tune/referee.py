"""The referee of a sweep: hands out trials, judges every probe row, tells the study how each trial ended. No Ray in here.

It is the one place where the study, the records, the stop rules and the halving rungs meet, so a resume is one replay of the rows.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from optuna.trial import TrialState

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
    """Starts from what the sweep directory holds: nothing, or an earlier session's study, records and probe rows."""

    def __init__(
        self, sweep: Sweep, sweep_dir: Path, budget_steps: int, halving: Halving | None, audience: Audience, *, concurrent: int = 1
    ):
        self.sweep, self.sweep_dir, self.budget_steps = sweep, sweep_dir, budget_steps
        self.records = Records(sweep_dir / "trials.jsonl")
        self._study = SweepStudy(sweep, sweep_dir / "study.journal", concurrent=concurrent)
        self._halving, self._audience = halving, audience
        self._watches: dict[int, Watch] = {}
        self._clock: dict[int, float] = {}
        self._ended = self._failed = 0  # in this session
        self._queue: deque[tuple[int, Params]] = deque(self._study.unfinished())
        self._replay()

    def remaining(self) -> int:
        """How many trials are still to be handed out."""
        return len(self._queue) + max(0, trial_count(self.sweep) - len(self.records.trials))

    def next(self) -> tuple[int, Params] | None:
        """The next trial's number and parameters: those left unfinished first; None when there are no more."""
        if self._failed == self._ended >= GIVE_UP or not self.remaining():
            return None
        number, params = self._queue.popleft() if self._queue else self._study.ask()
        record = self.records.trials.setdefault(number, TrialRecord(number, params, budget_steps=self.budget_steps))
        self._watches.setdefault(number, self._watch())
        self._clock[number] = time.monotonic() - record.seconds
        self.records.save()
        self._audience.started(record)
        return number, params

    def see(self, number: int, row: Mapping[str, Any]) -> bool:
        """A probe row (`step`, `budget_steps`, metrics) of a running trial; True when the trial is to be stopped."""
        record, watch = self.records.trials[number], self._watches[number]
        if "step" not in row or int(row["step"]) <= watch.last_step:
            return record.stopped_by is not None
        record.stopped_by = self._judge(record, watch, row)
        record.seconds = time.monotonic() - self._clock[number]
        self.records.save()
        self._audience.probed(record)
        return record.stopped_by is not None

    def ended(self, number: int, error: str | None = None) -> None:
        """The trial runs no more: finished, stopped by `see`, or failed with `error` (one line)."""
        record = self.records.trials[number]
        value = record.metrics.get(self.sweep.metric.name)
        if error is None and record.stopped_by is None:
            if record.last_step < record.budget_steps:
                error = f"it ended at step {record.last_step} of {record.budget_steps} without an error"
            elif value is None:
                error = f"it reported no {self.sweep.metric.name} at its last step"
        if record.stopped_by is not None:
            record.status = "stopped"
            self._study.stop(number, record.stopped_by)
        elif error is not None:
            record.status, record.error = "failed", error
            self._study.fail(number, error)
        else:
            assert value is not None
            record.status = "finished"
            self._study.finish(number, value)
        self._ended += 1
        self._failed += record.status == "failed"
        record.seconds = time.monotonic() - self._clock[number]
        self.records.save()
        self._audience.ended(record)

    def _watch(self) -> Watch:
        return Watch(self.sweep.stop, self.sweep.metric.name)

    def _judge(self, record: TrialRecord, watch: Watch, row: Mapping[str, Any]) -> str | None:
        """Take the row over everywhere; why to stop, or None. At the last step there is nothing left to save."""
        record.see(row)
        step, value = record.last_step, row.get(self.sweep.metric.name)
        if value is not None:
            self._study.report(record.trial, step, value)
        why = watch.feed(self._with_findings(record.trial, row))
        if step >= record.budget_steps:
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
        for frozen in self._study.trials():
            if frozen.state == TrialState.WAITING:
                continue
            params = running.get(frozen.number, frozen.params)
            record = self.records.trials.setdefault(frozen.number, TrialRecord(frozen.number, params, budget_steps=self.budget_steps))
            rows = read_rows(self.sweep_dir / str(frozen.number) / "probes.jsonl")
            if frozen.number in running:
                watch = self._watches[frozen.number] = self._watch()
                for row in rows:
                    self._judge(record, watch, row)
                record.status, record.stopped_by = "running", None  # only a stop that the study was told of counts
                continue
            record.status = _FINAL[frozen.state]
            if record.status == "stopped":
                record.stopped_by = frozen.user_attrs.get(REASON)
            if self._halving:
                for row in rows:
                    value = row.get(self.sweep.metric.name)
                    if value is not None and row["step"] < record.budget_steps:
                        self._halving.judge(frozen.number, row["step"], value)
