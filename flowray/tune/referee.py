"""The referee of a sweep: hands out trials, judges every probe row, tells the study how each trial
ended. No Ray in here.

It is the one place where the study, the records, the stop rules and the halving rungs meet, so a
resume is one replay of the rows.
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
from flowray.store.run import RunDirectory
from flowray.tune.halving import Halving, Rungs
from flowray.tune.records import Records, Status, Stop, TrialRecord
from flowray.tune.space import Params, left_to_begin
from flowray.tune.stop import Watch
from flowray.tune.study import REASON, STOPPED_BY, Come, SweepStudy

GIVE_UP = 3  # where the first trials of a session have all failed, the rest would too
_FINAL: dict[TrialState, Status] = {
    TrialState.COMPLETE: "finished",
    TrialState.PRUNED: "stopped",
    TrialState.FAIL: "failed",
}


class Audience(Protocol):
    """Whoever shows the sweep as it goes."""

    def known(self, trial: TrialRecord) -> None:
        """A trial that an earlier session left, as this one begins."""

    def started(self, trial: TrialRecord) -> None: ...

    def probed(self, trial: TrialRecord) -> None: ...

    def ended(self, trial: TrialRecord) -> None: ...


class Referee:
    """Starts from what the sweep directory holds: nothing, or an earlier session's study, records
    and probe rows.

    deadline: time.monotonic() from which no trial begins and running ones pause, to be continued by
    a later session.
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
        self._halving, self._audience, self._deadline = halving, audience, deadline
        self._rungs = halving if isinstance(halving, Rungs) else None  # at which trials wait
        self._study = SweepStudy(
            sweep,
            sweep_dir / "study.journal",
            concurrent=concurrent,
            earlier=earlier,
            come=self._come,
        )
        self._watches: dict[int, Watch] = {}
        self._clock: dict[int, float] = {}
        self._ended = self._failed = 0  # in this session
        self._paused: set[int] = set()
        self.held: OSError | InputError | None = None
        named = (
            *(metric.name for metric in sweep.objectives),
            *(rule.metric or "" for rule in sweep.stop),
        )
        self._on_losses = any(name.startswith("loss/") for name in named)
        self._queue: deque[tuple[int, Params]] = deque(self._study.unfinished())
        self._finishing: dict[int, TrialRecord] = {}
        # trials to finish of which the study has heard that they were stopped
        self._told: set[int] = set()
        self._replay()
        if self.records.trials:
            self.records.save()
        if finish:
            self._finishing = {number: self._to_finish(number) for number in finish}
            self._queue = deque(
                (number, record.params) for number, record in self._finishing.items()
            )
        for number in sorted(self.records.trials):
            audience.known(self.records.trials[number])

    @property
    def out_of_time(self) -> bool:
        return time.monotonic() >= self._deadline

    def hold(self, error: OSError | InputError) -> None:
        """Nothing can be written, here or on a node: no trial begins from now on, running ones
        pause, and a later session goes on.
        """
        self.held = self.held or error

    @property
    def _no_more(self) -> bool:
        """Whether this session hands out nothing more, whatever is left."""
        return self._failed == self._ended >= GIVE_UP or self.out_of_time or self.held is not None

    def remaining(self) -> int:
        """How many trials are still to begin, or to be continued from an earlier session."""
        begun = (record.params for record in self.records.trials.values())
        return len(self._queue) + (0 if self._finishing else left_to_begin(self.sweep, begun))

    def due(self) -> bool:
        """Whether a trial is to begin or to go on.

        Where all that is left waits and none of it goes on, the study is told so instead.
        """
        if self._queue or self.remaining() or self._promoted() is not None:
            return True
        self._settle()
        return False

    def next(self) -> tuple[int, Params] | None:
        """The next trial's number and parameters: those left unfinished first, then those that go
        on from their rung, then new ones; None where there is none now (see `may_promote`).
        """
        if self._no_more:
            return None
        if self._queue:
            number, params = self._queue.popleft()
        elif (again := self._promoted()) is not None:
            number, params = again, self.records.trials[again].params
            self.records.trials[again].go_on()
        elif self.remaining():
            number, params = self._study.ask()
        else:
            self._settle()
            return None
        record = self._record(number, params)
        record.status = "running"
        self._watches.setdefault(number, self._watch())
        self._clock[number] = time.monotonic() - record.seconds
        self.records.save(number)
        self._audience.started(record)
        return number, params

    def may_promote(self) -> bool:
        """Whether a trial that waits at a rung may go on once one that runs has got further."""
        return (
            self._rungs is not None
            and not (self._no_more or self._finishing)
            and bool(self.records.by("running"))
        )

    def _promoted(self) -> int | None:
        """The trial that belongs on from the rung it waits at.

        Where no trial came through, the most promising one does in the end.
        """
        waiting = self.records.waiting()
        if self._rungs is None or self._finishing or not waiting:
            return None
        last = not (self.remaining() or self.records.by("running") or self.records.by("finished"))
        return self._rungs.promote(waiting, last=last)

    def _come(self, number: int) -> Come | None:
        """What a sampler may learn from a trial that has not finished: it was stopped, or has
        come to a rung.
        """
        record = self.records.trials.get(number)
        if record is None or record.status in ("finished", "failed"):
            return None
        paused = record.status == "waiting" and not record.waits
        if (paused or record.status == "running") and not self._met_a_rung(number):
            return None
        values = [
            value
            for metric in self.sweep.objectives
            if (value := record.metrics.get(metric.name)) is not None
        ]
        return Come(record.last_step, values) if len(values) == len(self.sweep.objectives) else None

    def _met_a_rung(self, number: int) -> bool:
        return self._rungs is not None and self._rungs.met(number)

    def _settle(self) -> None:
        """Tell the study of the trials that wait, where none of them goes on any more."""
        if self._rungs is None or self._finishing or self.records.by("running"):
            return
        for number in self.records.waiting():
            record = self.records.trials[number]
            record.status, why = "stopped", self._rungs.why(number)
            record.stop(Stop(why, False, "comparison"))
            self._study.stop(number, why, (record.stop_kind, record.stop_rule))
            self.records.save(number)

    def see(self, number: int, row: Mapping[str, Any]) -> bool:
        """A probe row (`step`, `budget_steps`, metrics; `repeat`, which seed) of a running
        trial; True when the trial is to be stopped.
        """
        record = self.records.trials[number]
        if "step" in row and (place := self._place(record, row)) > record.last_step:
            for new in (*self._unheard(record, place), row):
                stop = self._judge(record, self._watches[number], new)
                if stop and number not in self._finishing:
                    record.stop(stop)
                    break
            record.seconds = time.monotonic() - self._clock[number]
            self.records.save(number)
            self._audience.probed(record)
        if (
            record.stopped_by is None
            and record.last_step < record.budget_steps
            and (self.out_of_time or self.held)
        ):
            self._paused.add(number)
        return record.stopped_by is not None or number in self._paused

    def ended(self, number: int, error: str | None = None) -> None:
        """The trial runs no more: finished, stopped by `see` (also to pause), or failed with
        `error` (one line).
        """
        record = self.records.trials[number]
        if error is None and record.stopped_by is None:
            if number not in self._paused:
                for row in self._unheard(record):
                    self._judge(record, self._watches[number], row)
            if number in self._paused or (self.held and record.last_step < record.budget_steps):
                record.status = "waiting"
                self.records.save(number)
                self._audience.ended(record)
                return
        values = [record.metrics.get(metric.name) for metric in self.sweep.objectives]
        if error is None and record.stopped_by is None:
            error = self._unfinished(record, values)
        if record.stopped_by is not None:
            self._stopped(record)
        elif error is not None:
            record.status, record.error = "failed", error
            if number not in self._told:
                self._study.fail(number, error)
        else:
            record.status, told = "finished", [value for value in values if value is not None]
            (self._study.finish_later if number in self._told else self._study.finish)(
                number, *told
            )
        self._ended += 1
        self._failed += record.status == "failed"
        record.seconds = time.monotonic() - self._clock[number]
        self.records.save(number)
        self._audience.ended(record)

    def _unfinished(self, record: TrialRecord, values: Sequence[float | None]) -> str | None:
        """What is wrong with a trial that ended of itself, None where nothing is."""
        if record.last_step < record.budget_steps:
            return f"it ended at step {record.last_step} of {record.budget_steps} without an error"
        missing = [
            metric.name
            for metric, value in zip(self.sweep.objectives, values, strict=True)
            if value is None
        ]
        return f"it reported no {missing[0]} at its last step" if missing else None

    def _to_finish(self, number: int) -> TrialRecord:
        record = self.records.to_finish(number)
        if record.status == "stopped":
            self._told.add(number)
        record.go_on()
        self._watches[number] = Watch((), self.sweep.metric.name)
        return record

    def _watch(self) -> Watch:
        return Watch(self.sweep.stop, self.sweep.metric.name)

    def _place(self, record: TrialRecord, row: Mapping[str, Any]) -> int:
        """The row's step counted over all seeds."""
        budget = int(row.get("budget_steps", record.budget_steps // self.sweep.seeds))
        return int(row.get("repeat", 0)) * budget + int(row["step"])

    def _stopped(self, record: TrialRecord) -> None:
        record.status = "waiting" if record.waits else "stopped"
        if not record.waits:
            by = record.stop_kind, record.stop_rule
            self._study.stop(record.trial, record.stopped_by or "", by)

    def _judge(self, record: TrialRecord, watch: Watch, row: Mapping[str, Any]) -> Stop | None:
        """Take the row over everywhere; why to stop, or None. At the last step, and after the
        first seed, there is nothing to judge.
        """
        if self._place(record, row) > record.last_step:
            record.see(row, self.sweep.seeds)
        step, value = int(row["step"]), row.get(self.sweep.metric.name)
        if row.get("repeat", 0):
            return None
        if value is not None and record.trial not in self._told:
            self._study.report(record.trial, step, value)
        why, rung = watch.feed(self._with_findings(record.trial, row)), self._compare(record, row)
        if step >= record.budget_steps // self.sweep.seeds:
            return None
        if why:
            return Stop(why, False, "not_finite" if watch.rule is None else "rule", watch.rule)
        return Stop(rung, self._rungs is not None, "comparison") if rung else None

    def _compare(self, record: TrialRecord, row: Mapping[str, Any]) -> str | None:
        """Why to stop by what compares trials with each other.

        It sees every row of a first seed, also of one that a rule stops.
        """
        value, step = row.get(self.sweep.metric.name), int(row["step"])
        over = row.get("repeat", 0) or step >= record.budget_steps // self.sweep.seeds
        if self._halving is None or over or value is None or not math.isfinite(value):
            return None
        return self._halving.judge(record.trial, step, value)

    def _record(self, number: int, params: Params) -> TrialRecord:
        budget = int(params.get("train.steps", self.budget_steps)) * self.sweep.seeds
        return self.records.trials.setdefault(
            number, TrialRecord(number, params, budget_steps=budget)
        )

    def _rows(self, record: TrialRecord) -> list[dict[str, Any]]:
        """The trial's probe rows on disk, of all seeds."""
        runs = [
            repeat_dir(self.sweep_dir / str(record.trial), repeat)
            for repeat in range(self.sweep.seeds)
        ]
        return [
            {**row, "repeat": repeat}
            for repeat, run in enumerate(runs)
            for row in read_rows(RunDirectory(run).probes)
        ]

    def _unheard(self, record: TrialRecord, before: float = math.inf) -> list[dict[str, Any]]:
        """Rows that the trial wrote and could not report, up to the place `before`, as its
        process was killed in between.
        """
        return self._as_reported(
            record,
            [
                row
                for row in self._rows(record)
                if record.last_step < self._place(record, row) < before
            ],
        )

    def _as_reported(
        self, record: TrialRecord, rows: Sequence[dict[str, Any]]
    ) -> list[dict[str, Any]]:
        """Rows from the disk as the trial reports them: the losses of a step stand in
        metrics.jsonl, and NaN is kept as null.
        """
        losses: dict[tuple[int, int], dict[str, Any]] = {}
        for repeat in {row["repeat"] for row in rows}:
            run = RunDirectory(repeat_dir(self.sweep_dir / str(record.trial), repeat))
            for row in read_rows(run.metrics):
                losses[repeat, row["step"]] = {
                    key: value for key, value in row.items() if key.startswith("loss/")
                }
        whole = [{**row, **losses.get((row["repeat"], row["step"]), {})} for row in rows]
        return [
            {key: math.nan if value is None else value for key, value in row.items()}
            for row in whole
        ]

    def _with_findings(self, number: int, row: Mapping[str, Any]) -> Mapping[str, Any]:
        """The probe row with what the doctor found at its step, where a rule asks for it and the
        doctor came.
        """
        if not any(rule.finding for rule in self.sweep.stop):
            return row
        visits = read_rows(self.sweep_dir / str(number) / "findings.jsonl")
        return next(
            (
                {**row, "findings": visit["findings"]}
                for visit in visits
                if visit["step"] == row["step"]
            ),
            row,
        )

    def _replay(self) -> None:
        """Bring the records in line with the study, and the rungs, watches and intermediate values
        with the probe rows.

        What the earlier sessions judged comes first, for all trials, and no decision of theirs is
        taken again: so the rungs stand as they stood. Then comes what was written and not heard, as
        if it were reported now; it may stop a trial that was left running. A trial
        that waited at a rung which there is no more, as the halving was changed, goes on: it is
        judged where the new one has its say.
        """
        running, finished, states = (
            dict(self._queue),
            self._study.finished_later(),
            self._study.trials(),
        )
        if lost := sorted(self.records.trials.keys() - {frozen.number for frozen in states}):
            what = f"lacks trial {lost[0]}, which {self.records.path.name} has"
            raise InputError(
                f"{self._study.path}: {what}; put back a copy of it, or type name=OTHER for a new"
                " sweep"
            )
        for frozen in states:
            if frozen.state == TrialState.WAITING:
                continue
            known = frozen.number in self.records.trials
            record = self.records.trials.get(frozen.number)
            record = record or self._record(
                frozen.number, running.get(frozen.number) or self._study.params(frozen)
            )
            if frozen.number in running:
                waits = known and record.status == "waiting" and record.waits
                record.status = "waiting" if waits else "running"
                heard: float = record.last_step
                self._watches[frozen.number] = self._watch()
            else:
                record.status = "finished" if frozen.number in finished else _FINAL[frozen.state]
                record.go_on()
                if record.status == "stopped":
                    record.stopped_by = frozen.user_attrs.get(REASON)
                    record.stop_kind, record.stop_rule = frozen.user_attrs.get(
                        STOPPED_BY, (None, None)
                    )
                if record.status == "failed":
                    record.error = record.error or frozen.user_attrs.get(REASON)
                heard = self._last_heard(record, frozen, known=known)
            rows = [row for row in self._rows(record) if self._place(record, row) <= heard]
            # the account is behind the study
            late = any(self._place(record, row) > record.last_step for row in rows)
            for row in self._as_reported(record, rows) if late or self._on_losses else rows:
                if frozen.number in running:
                    self._judge(record, self._watches[frozen.number], row)
                    continue
                if self._place(record, row) > record.last_step:
                    record.see(row, self.sweep.seeds)
                self._compare(record, row)
        for number in running:
            record = self.records.trials[number]
            if record.waits and not self._met_a_rung(number):
                record.go_on()
                record.status = "running"
            if record.status == "running":
                self._catch_up(record)
        self._queue = deque(
            (number, params)
            for number, params in self._queue
            if self.records.trials[number].status == "running"
        )

    def _last_heard(self, record: TrialRecord, frozen: FrozenTrial, *, known: bool) -> float:
        """Up to which place the rows of a trial that has ended were judged; a stopped one may
        have gone on a little.
        """
        told = frozen.last_step or 0
        if record.status == "finished" or not (known or told):
            return math.inf
        return max(told, record.last_step)

    def _catch_up(self, record: TrialRecord) -> None:
        """Judge what an unfinished trial wrote and nobody heard; stop it where that, or what was
        heard last, says so.
        """
        for row in self._unheard(record):
            if record.stopped_by is None and (
                stop := self._judge(record, self._watches[record.trial], row)
            ):
                record.stop(stop)
        if record.stopped_by is not None:
            self._stopped(record)
            self._audience.ended(record)


def repeat_dir(run_dir: Path, repeat: int) -> Path:
    """Where a trial trains with its seed number `repeat`: the first in the trial's run
    directory, the others below it.
    """
    return run_dir / "seeds" / str(repeat) if repeat else run_dir


def repeat_of(run_dir: Path) -> int:
    """The inverse of `repeat_dir`."""
    return int(run_dir.name) if run_dir.parent.name == "seeds" else 0
