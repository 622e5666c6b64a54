"""The stop rules of a trial over its rows, in their order; a resumed sweep feeds it the rows again,
from probes.jsonl and findings.jsonl.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from flowray.sweepconfig.stop import StopRule


class StopRules:
    """All rules of one trial.

    Rows must come in the order of their steps; a step seen before is ignored, so a replay does no
    harm.
    """

    def __init__(self, rules: Sequence[StopRule], metric: str):
        self._rules = tuple(rules)
        # an ordered set
        self._names = dict.fromkeys([metric, *(name for rule in rules for name in rule.metrics)])
        self._read: list[list[Any]] = [[] for _ in self._rules]
        self.last_step = -1
        self.rule: int | None = None  # which rule stopped it; None: a number that is not finite

    def feed(self, row: Mapping[str, Any]) -> str | None:
        """Why the trial should stop after this row (`step`, metrics, `findings` where the doctor
        came), in words, or None.
        """
        step = int(row["step"])
        if step <= self.last_step:
            return None
        self.last_step = step
        for name in self._names:
            value = row.get(name)
            if value is not None and not math.isfinite(value):
                self.rule = None
                return f"{name} is {value} at step {step}"
        met: dict[int, str] = {}
        for index, (rule, read) in enumerate(zip(self._rules, self._read, strict=True)):
            found = rule.read(row) if step >= rule.after else None
            if found is not None:  # every rule counts every row
                read.append(found)
                if why := rule.judge(read, step):
                    met[index] = why
        self.rule = next(iter(met), None)
        return None if self.rule is None else met[self.rule]
