"""Whether a trial goes on, decided from probe rows alone: no Ray, no files, no study, no clock.

Two things have their say: the stop rules, which look at one trial, and the pruner, which compares
trials with each other.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from flowray.sweepconfig.sweep import Sweep
from flowray.tune.pruners import Pruner, Rungs, make_pruner
from flowray.tune.records import StopKind
from flowray.tune.stop import StopRules


@dataclass(frozen=True)
class Continue:
    """The trial goes on."""


@dataclass(frozen=True)
class Pause:
    """The trial waits at its rung until it is among the best there; `why` in words."""

    why: str


@dataclass(frozen=True)
class Stop:
    """The trial ends here; `why` in words.

    kind: a rule of `stop`, a number that is not finite, or the comparison with other trials
    (`early_terminate`). rule: the index of the rule in the sweep's `stop`.
    """

    why: str
    kind: StopKind
    rule: int | None = None


Decision = Continue | Pause | Stop


class Policy:
    """The decisions of a sweep. They depend on nothing but the rows that were shown before, of all
    trials and in their order, so that a new session replays the rows and stands where the last
    one ended.

    Rows have `step`, `budget_steps` (of one seed), metrics, `repeat` (which seed, 0 without) and,
    where the doctor came, `findings`. pruner: in place of what the sweep's `early_terminate` says.
    """

    def __init__(self, sweep: Sweep, budget_steps: int, pruner: Pruner | None = None):
        self._sweep, self.budget_steps = sweep, budget_steps
        self._pruner = pruner or make_pruner(sweep, budget_steps)
        self._rungs = self._pruner if isinstance(self._pruner, Rungs) else None
        self._rules: dict[int, StopRules] = {}

    @property
    def pauses(self) -> bool:
        """Whether trials wait at rungs and may go on from there."""
        return self._rungs is not None

    def decide(self, number: int, row: Mapping[str, Any]) -> Decision:
        """Take in a row of trial `number` and decide.

        Only the first seed of a trial is judged, and there is nothing to stop at its last step.
        """
        if row.get("repeat", 0):
            return Continue()
        rules = self._rules.setdefault(number, StopRules(self._sweep.stop, self._sweep.metric.name))
        # both see every row, whatever one of them says: so a replay leaves the same state
        broken, pruned = rules.feed(row), None
        if row["step"] >= row["budget_steps"]:
            return Continue()
        value = row.get(self._sweep.metric.name)
        if self._pruner is not None and value is not None and math.isfinite(value):
            pruned = self._pruner.judge(number, int(row["step"]), value)
        if broken:
            return Stop(broken, "not_finite" if rules.rule is None else "rule", rules.rule)
        if pruned:
            return Pause(pruned) if self.pauses else Stop(pruned, "comparison")
        return Continue()

    def promote(self, waiting: Collection[int], *, last: bool) -> int | None:
        """Which of the trials that wait at a rung goes on by now; None where none does.

        last: nothing else is left to train, so the most promising one goes on whatever its place.
        """
        return self._rungs.promote(waiting, last=last) if self._rungs and waiting else None

    def reached_rung(self, number: int) -> bool:
        """Whether the trial has come to a rung."""
        return self._rungs is not None and self._rungs.reached(number)

    def place(self, number: int) -> str:
        """In words: the place of a trial that waits, among all that came to its rung."""
        assert self._rungs is not None
        return self._rungs.why(number)
