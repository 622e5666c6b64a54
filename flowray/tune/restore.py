"""A session that begins where earlier ones ended: the ledger is brought in line with the study, the
policy with the probe rows on disk.
"""

from __future__ import annotations

import math

from optuna.trial import FrozenTrial, TrialState

from flowray.config.errors import InputError
from flowray.tune.ledger import place_of
from flowray.tune.records import Status, TrialRecord
from flowray.tune.space import Params
from flowray.tune.state import SweepState
from flowray.tune.study import REASON, STOPPED_BY

_FINAL: dict[TrialState, Status] = {
    TrialState.COMPLETE: "finished",
    TrialState.PRUNED: "stopped",
    TrialState.FAIL: "failed",
}


class Restoration:
    """Restores a sweep from what the study, the ledger and the run directories hold of it.

    The rows that earlier sessions decided on are replayed first, for all trials and without
    deciding anew, so that the rungs stand as they stood. Then the rows that were written and never
    reported count as if they were reported now; they may stop a trial that was left running. A
    trial that waits at a rung which a changed pruner no longer has goes on to the next that it has.
    """

    def __init__(self, state: SweepState):
        self._state, sweep = state, state.sweep
        self._study, self._ledger, self._policy = state.study, state.ledger, state.policy
        named = [*(metric.name for metric in sweep.objectives), *sweep.rule_metrics]
        self._needs_whole_rows = any(name.startswith("loss/") for name in named) or any(
            rule.examines for rule in sweep.stop
        )

    def run(self) -> tuple[list[tuple[int, Params]], list[TrialRecord]]:
        """The trials to continue, by number, with their parameters; and those that are to stop, or
        to wait, for rows that they wrote and did not report. The records of these say why already,
        the study does not yet.

        InputError where the study lacks a trial that the ledger has.
        """
        left = self._study.unfinished()
        running, states = dict(left), self._study.trials()
        if lost := sorted(self._ledger.trials.keys() - {frozen.number for frozen in states}):
            what = f"lacks trial {lost[0]}, which {self._ledger.path.name} has"
            raise InputError(
                f"{self._study.path}: {what}; put back a copy of it, or type name=OTHER for a new"
                " sweep"
            )
        finished_later = set(self._study.finished_later())
        for frozen in states:
            if frozen.number in running:
                self._restore_running(frozen.number, running[frozen.number])
            elif frozen.state != TrialState.WAITING:
                self._restore_ended(frozen, finished_later=frozen.number in finished_later)
        ending = []
        for number in running:
            record = self._ledger.trials[number]
            if record.waits and not self._policy.reached_rung(number):
                record.resume()
                record.status = "running"
            if record.status == "running" and self._catch_up(record):
                ending.append(record)
        stopped = {record.trial for record in ending}
        go_on = [
            (number, params)
            for number, params in left
            if number not in stopped and self._ledger.trials[number].status == "running"
        ]
        return go_on, ending

    def _restore_running(self, number: int, params: Params) -> None:
        """A trial that the study has as running: a session was killed or paused it, or it waits at
        a rung, which the ledger alone knows.
        """
        known = self._ledger.trials.get(number)
        record = self._state.record(number, params)
        waits = known is not None and known.status == "waiting" and known.waits
        record.status = "waiting" if waits else "running"
        self._replay(record, record.last_step, running=True)

    def _restore_ended(self, frozen: FrozenTrial, *, finished_later: bool) -> None:
        """A trial that has ended, as the study has it; the ledger may be behind it."""
        known = frozen.number in self._ledger.trials
        # what the ledger has is not drawn again: of an early failure the study may lack a part
        record = (
            self._ledger.trials[frozen.number]
            if known
            else self._state.record(frozen.number, self._study.params(frozen))
        )
        record.status = "finished" if finished_later else _FINAL[frozen.state]
        record.resume()
        if record.status == "stopped":
            record.stopped_by = frozen.user_attrs.get(REASON)
            record.stop_kind, record.stop_rule = frozen.user_attrs.get(STOPPED_BY, (None, None))
        if record.status == "failed":
            record.error = record.error or frozen.user_attrs.get(REASON)
        told = frozen.last_step or 0
        all_judged = record.status == "finished" or not (known or told)
        # a stopped trial may have gone on a little
        self._replay(record, math.inf if all_judged else max(told, record.last_step), running=False)

    def _replay(self, record: TrialRecord, judged: float, *, running: bool) -> None:
        """Show the policy the rows up to the place `judged`: an earlier session decided on them."""
        rows = self._ledger.rows(record, to=judged)
        behind = any(place_of(row) > record.last_step for row in rows)
        if behind or self._needs_whole_rows:
            rows = self._ledger.as_reported(record, rows)
        for row in rows:
            self._state.take(record, row, tell=running)

    def _catch_up(self, record: TrialRecord) -> bool:
        """Decide on the rows that an unfinished trial wrote and did not report. True where one of
        them, or a decision of the earlier session, ends it.
        """
        rows = self._ledger.rows(record, after=record.last_step)
        for row in self._ledger.as_reported(record, rows):
            decision = self._state.take(record, row, tell=True)
            if record.stopped_by is None:
                self._state.note(record, decision)
        return record.stopped_by is not None
