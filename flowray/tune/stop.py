"""Stop rules of a trial: a pure state machine over its probe rows, so that a resumed sweep replays it from probes.jsonl."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from flowray.config.sweep import StopRule


class Watch:
    """All rules of one trial. Rows must come in the order of their steps; a step seen before is ignored, so a replay does no harm."""

    def __init__(self, rules: Sequence[StopRule], metric: str):
        self._rules = tuple(rules)
        self._watched = dict.fromkeys([metric, *(rule.metric for rule in rules)])  # an ordered set
        self._strikes = [0] * len(self._rules)
        self.last_step = -1

    def feed(self, row: Mapping[str, Any]) -> str | None:
        """Why the trial should stop after this row (`step` and metrics), in words, or None."""
        step = int(row["step"])
        if step <= self.last_step:
            return None
        self.last_step = step
        for name in self._watched:
            value = row.get(name)
            if value is not None and not math.isfinite(value):
                return f"{name} is {value} at step {step}"
        words = [self._judge(i, row, step) for i in range(len(self._rules))]  # every rule counts every row
        return next((text for text in words if text), None)

    def _judge(self, i: int, row: Mapping[str, Any], step: int) -> str | None:
        rule, value = self._rules[i], row.get(self._rules[i].metric)
        if value is None or step < rule.after:
            return None
        side, bound = ("below", rule.below) if rule.below is not None else ("above", rule.above)
        assert bound is not None
        self._strikes[i] = self._strikes[i] + 1 if (value < bound if side == "below" else value > bound) else 0
        if self._strikes[i] < rule.patience:
            return None
        what = f"{rule.metric} {value:.3g}"
        if rule.patience == 1:
            return f"{what} is {side} {bound:g} at step {step}"
        return f"{what} stayed {side} {bound:g} for {rule.patience} probes, to step {step}"
