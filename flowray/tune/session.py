"""One session of a sweep: hands out trials, takes their probe rows, and says which are to end.

A session ends with its process; the next one restores the sweep from what is on disk. No Ray here:
`flowray.rayrun.search` connects a session to Ray Tune.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from optuna.trial import FrozenTrial

from flowray.config.errors import InputError
from flowray.sweepconfig.sweep import Sweep
from flowray.tune.ledger import Ledger, ProbeRow, place_of
from flowray.tune.observers import Observer, Observers
from flowray.tune.policy import Continue, Policy
from flowray.tune.records import TrialRecord
from flowray.tune.restore import Restoration
from flowray.tune.space import Params, left_to_begin
from flowray.tune.state import SweepState
from flowray.tune.study import SweepStudy

GIVE_UP = 3  # where the first trials of a session have all failed, the rest would too


class SweepSession:
    """Starts from what the sweep directory holds: nothing, or what earlier sessions left.

    deadline: time.monotonic() from which no trial begins and running ones pause, to be continued by
    a later session.
    finish: stopped trials to train to the end, which is then all that this session does.
    earlier: trials of earlier sweeps to learn from.
    """

    def __init__(
        self,
        sweep: Sweep,
        sweep_dir: Path,
        policy: Policy,
        observers: Sequence[Observer] = (),
        *,
        concurrent: int = 1,
        deadline: float = math.inf,
        finish: Sequence[int] = (),
        earlier: Sequence[FrozenTrial] = (),
    ):
        self.sweep, self.sweep_dir = sweep, sweep_dir
        self._state = SweepState(sweep, sweep_dir, policy, concurrent=concurrent, earlier=earlier)
        self._policy = policy
        self._observers, self._deadline = Observers(*observers), deadline
        # time.monotonic(), less the seconds of earlier sessions
        self._started_at: dict[int, float] = {}
        # the step that a seed's process started from, as its last row said
        self._starts: dict[tuple[int, int], int] = {}
        self._ended = self._failed = 0  # in this session
        self._pausing: set[int] = set()
        self.suspended_by: OSError | InputError | None = None
        queue, stopping = Restoration(self._state).run()
        self._queue: deque[tuple[int, Params]] = deque(queue)
        for record in stopping:
            self._state.stop(record)
            self._observers.ended(record)
        if self.ledger.trials:
            self.ledger.save()
        self._finishing = {number: self.ledger.to_finish(number) for number in finish}
        # of these the study knows that they were stopped, which cannot be taken back
        self._stopped_before = {n for n, r in self._finishing.items() if r.status == "stopped"}
        if finish:
            self._queue = deque((number, r.params) for number, r in self._finishing.items())
        for record in self._finishing.values():
            record.resume()
        for number in sorted(self.ledger.trials):
            self._observers.known(self.ledger.trials[number])

    @property
    def ledger(self) -> Ledger:
        return self._state.ledger

    @property
    def study(self) -> SweepStudy:
        return self._state.study

    @property
    def out_of_time(self) -> bool:
        return time.monotonic() >= self._deadline

    def suspend(self, error: OSError | InputError) -> None:
        """Nothing can be written, here or on a node: no trial begins from now on, running ones
        pause, and a later session goes on.
        """
        self.suspended_by = self.suspended_by or error

    @property
    def _over(self) -> bool:
        """Whether this session hands out nothing more, whatever is left."""
        gave_up = self._failed == self._ended >= GIVE_UP
        return gave_up or self.out_of_time or self.suspended_by is not None

    def remaining(self) -> int:
        """How many trials are still to begin, or to be continued from an earlier session."""
        begun = (record.params for record in self.ledger.trials.values())
        return len(self._queue) + (0 if self._finishing else left_to_begin(self.sweep, begun))

    def due(self) -> bool:
        """Whether a trial is to begin or to go on.

        Where all that is left waits and none of it goes on, the study is told so instead.
        """
        if self._queue or self.remaining() or self._promoted() is not None:
            return True
        self._end_waiting()
        return False

    def next(self) -> tuple[int, Params] | None:
        """The next trial's number and parameters: those left unfinished first, then those that go
        on from their rung, then new ones; None where there is none now (see `may_promote`).
        """
        if self._over:
            return None
        if self._queue:
            number, params = self._queue.popleft()
        elif (promoted := self._promoted()) is not None:
            number, params = promoted, self.ledger.trials[promoted].params
            self.ledger.trials[promoted].resume()
        elif self.remaining():
            number, params = self.study.ask()
        else:
            self._end_waiting()
            return None
        record = self._state.record(number, params)
        record.status = "running"
        self._started_at[number] = time.monotonic() - record.seconds
        self.ledger.save(number)
        self._observers.started(record)
        return number, params

    def may_promote(self) -> bool:
        """Whether a trial that waits at a rung may go on once one that runs has got further."""
        if not self._policy.pauses or self._over or self._finishing:
            return False
        return bool(self.ledger.by("running"))

    def _promoted(self) -> int | None:
        """The trial that is to go on from its rung now. Where all wait and none was good enough to
        go on, the most promising one does, so that a sweep ends with a finished trial.
        """
        if self._finishing:
            return None
        last = not (self.remaining() or self.ledger.by("running", "finished"))
        return self._policy.promote(self.ledger.waiting(), last=last)

    def _end_waiting(self) -> None:
        """Stop the trials that wait at a rung, where none of them goes on any more."""
        if not self._policy.pauses or self._finishing or self.ledger.by("running"):
            return
        for number in self.ledger.waiting():
            record = self.ledger.trials[number]
            record.stop(self._policy.place(number), "comparison", waits=False)
            self._state.stop(record)
            self.ledger.save(number)

    def report(self, number: int, row: Mapping[str, Any]) -> bool:
        """Take a probe row of a running trial: `step`, `budget_steps`, metrics; `repeat`, which
        seed; `start`, the step its process started from. True when the trial is to end here.
        """
        record = self.ledger.trials[number]
        row = self.ledger.complete(record, row)
        if "step" in row and place_of(row) > record.last_step:
            for each in (*self._missed(record, row), row):
                decision = self._take(record, each)
                if number not in self._finishing and not isinstance(decision, Continue):
                    self._state.note(record, decision)
                    break
            self._wrote(record)
            self._observers.probed(record)
        goes_on = record.stopped_by is None and record.last_step < record.budget_steps
        if goes_on and (self.out_of_time or self.suspended_by):
            self._pausing.add(number)
        return record.stopped_by is not None or number in self._pausing

    def end(self, number: int, error: str | None = None) -> None:
        """Take note that the trial's process has ended: at its last step, because `report` said so
        (to stop or to pause), or with `error` (one line).
        """
        record = self.ledger.trials[number]
        if error is None and record.stopped_by is None:
            if number not in self._pausing and record.last_step < record.budget_steps:
                # its process may have been killed between the last row and the report of it
                for row in self._rows_on_disk(record):
                    self._take(record, row)
            short = record.last_step < record.budget_steps
            if number in self._pausing or (self.suspended_by and short):
                record.status = "waiting"
                self.ledger.save(number)
                self._observers.ended(record)
                return
            error = self._what_is_missing(record)
        if record.stopped_by is not None:
            self._state.stop(record)
        elif error is not None:
            record.status, record.error = "failed", error
            if number not in self._stopped_before:
                self.study.fail(number, error)
        else:
            record.status = "finished"
            found = [record.metrics.get(metric.name) for metric in self.sweep.objectives]
            values = [value for value in found if value is not None]
            if number in self._stopped_before:
                self.study.finish_later(number, *values)
            else:
                self.study.finish(number, *values)
        self._ended += 1
        self._failed += record.status == "failed"
        self._wrote(record)
        self._observers.ended(record)

    def _what_is_missing(self, record: TrialRecord) -> str | None:
        """What is wrong with a trial that ended of itself, None where nothing is."""
        if record.last_step < record.budget_steps:
            return f"it ended at step {record.last_step} of {record.budget_steps} without an error"
        for metric in self.sweep.objectives:
            if record.metrics.get(metric.name) is None:
                return f"it reported no {metric.name} at its last step"
        return None

    def _take(self, record: TrialRecord, row: ProbeRow) -> Any:
        return self._state.take(record, row, tell=record.trial not in self._stopped_before)

    def _missed(self, record: TrialRecord, row: ProbeRow) -> list[ProbeRow]:
        """Rows that the trial wrote and could not report, as its process was killed in between:
        there are some only where a process has started since the last row.
        """
        seed, start = (record.trial, row["repeat"]), int(row.get("start", 0))
        if self._starts.get(seed) == start:
            return []
        self._starts[seed] = start
        return self._rows_on_disk(record, before=place_of(row))

    def _rows_on_disk(self, record: TrialRecord, before: float = math.inf) -> list[ProbeRow]:
        rows = self.ledger.rows(record, after=record.last_step, to=before - 1)
        return self.ledger.as_reported(record, rows)

    def _wrote(self, record: TrialRecord) -> None:
        record.seconds = time.monotonic() - self._started_at[record.trial]
        self.ledger.save(record.trial)
