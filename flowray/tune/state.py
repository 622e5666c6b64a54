"""What a sweep holds while it runs: the study, the ledger and the policy, kept in step."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from optuna.trial import FrozenTrial

from flowray.sweepconfig.sweep import Sweep
from flowray.tune.ledger import Ledger, place_of
from flowray.tune.policy import Continue, Decision, Pause, Policy, Stop
from flowray.tune.records import TrialRecord
from flowray.tune.space import Params
from flowray.tune.study import PartialResult, SweepStudy


class SweepState:
    """The study says which trials there are and whether they have ended, the ledger how far they
    came and why they stopped, the policy whether they go on.

    earlier: trials of earlier sweeps for the sampler to learn from.
    """

    def __init__(
        self,
        sweep: Sweep,
        sweep_dir: Path,
        policy: Policy,
        *,
        concurrent: int = 1,
        earlier: Sequence[FrozenTrial] = (),
    ):
        self.sweep, self.sweep_dir, self.policy = sweep, sweep_dir, policy
        self.ledger = Ledger(sweep_dir / "trials.jsonl", sweep.seeds)
        self.study = SweepStudy(
            sweep,
            sweep_dir / "study.journal",
            concurrent=concurrent,
            earlier=earlier,
            partial_result=self._partial_result,
        )

    def record(self, number: int, params: Params) -> TrialRecord:
        """The trial's record, a new one where it has none."""
        budget = int(params.get("train.steps", self.policy.budget_steps)) * self.sweep.seeds
        new = TrialRecord(number, params, budget_steps=budget)
        return self.ledger.trials.setdefault(number, new)

    def take(self, record: TrialRecord, row: dict[str, Any], *, tell: bool) -> Decision:
        """Take over a complete probe row, and what the policy makes of it.

        tell: the study hears of the value too, as the trial is one that it has running.
        """
        if place_of(row) > record.last_step:
            record.update(row, self.sweep.seeds)
        value = row.get(self.sweep.metric.name)
        if tell and value is not None and not row["repeat"]:
            self.study.report(record.trial, int(row["step"]), value)
        return self.policy.decide(record.trial, row)

    def note(self, record: TrialRecord, decision: Decision) -> None:
        """Write down why a trial is to stop or to wait; it ends later, with `stop`."""
        match decision:
            case Pause(why):
                record.stop(why, "comparison", waits=True)
            case Stop(why, kind, rule):
                record.stop(why, kind, rule, waits=False)
            case Continue():
                pass

    def stop(self, record: TrialRecord) -> None:
        """End a trial for the reason in its record. One that waits at a rung stays running in the
        study.
        """
        record.status = "waiting" if record.waits else "stopped"
        if not record.waits:
            by = record.stop_kind, record.stop_rule
            self.study.stop(record.trial, record.stopped_by or "", by)

    def _partial_result(self, number: int) -> PartialResult | None:
        """What a sampler may learn from a trial that has not finished: it was stopped, or has come
        to a rung.
        """
        record = self.ledger.trials.get(number)
        if record is None or record.status in ("finished", "failed"):
            return None
        paused = record.status == "waiting" and not record.waits
        if (paused or record.status == "running") and not self.policy.reached_rung(number):
            return None
        found = [record.metrics.get(metric.name) for metric in self.sweep.objectives]
        values = [value for value in found if value is not None]
        return PartialResult(record.last_step, values) if len(values) == len(found) else None
