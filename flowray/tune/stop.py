"""Stop rules of a trial: a pure state machine over its rows, so that a resumed sweep replays it
from probes.jsonl and findings.jsonl.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from flowray.config.errors import InputError, did_you_mean
from flowray.config.keys import describe
from flowray.config.rounding import rounded
from flowray.findings.finding import ORDER
from flowray.sweepconfig.sweep import StopRule

_WORST_FIRST: tuple[str, ...] = tuple(ORDER)


def check_findings(rules: Sequence[StopRule], ids: Sequence[str]) -> None:
    """InputError where a rule waits for a finding that is neither one of `ids` nor a severity,
    or for gains of what has no better side.
    """
    known = [*ids, *ORDER]
    for rule in rules:
        if rule.metric is not None and rule.gains_less_than is not None:
            better(rule.metric)
        if rule.finding is not None and rule.finding not in known:
            raise InputError(
                f"stop: unknown finding {rule.finding}{did_you_mean(rule.finding, known)}; "
                f"type a severity ({', '.join(ORDER)}) or one of {', '.join(ids)}"
            )


def better(metric: str) -> str:
    """Which way a metric is better, `higher` or `lower`.

    InputError for one that has no such way.
    """
    key = describe(metric)
    if key is None or key.direction == "none":
        raise InputError(
            f"stop: {metric} is neither better high nor low, so it cannot gain; take below or above"
        )
    return key.direction


class StopRules:
    """All rules of one trial.

    Rows must come in the order of their steps; a step seen before is ignored, so a replay does no
    harm.
    """

    def __init__(self, rules: Sequence[StopRule], metric: str):
        self._rules = tuple(rules)
        # an ordered set
        self._watched = dict.fromkeys([metric, *(rule.metric for rule in rules if rule.metric)])
        self._strikes = [0] * len(self._rules)
        # of a rule on gains: the best value up to each probe
        self._best: list[list[float]] = [[] for _ in self._rules]
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
        for name in self._watched:
            value = row.get(name)
            if value is not None and not math.isfinite(value):
                self.rule = None
                return f"{name} is {value} at step {step}"
        # every rule counts every row
        words = [self._judge(i, row, step) for i in range(len(self._rules))]
        self.rule = next((i for i, text in enumerate(words) if text), None)
        return None if self.rule is None else words[self.rule]

    def _judge(self, i: int, row: Mapping[str, Any], step: int) -> str | None:
        rule = self._rules[i]
        if step < rule.after:
            return None
        if rule.finding is not None:
            return self._judge_findings(i, row, step)
        value = row.get(rule.metric or "")
        if value is None:
            return None
        if rule.gains_less_than is not None:
            return self._judge_gain(i, value, step)
        side, bound = ("below", rule.below) if rule.below is not None else ("above", rule.above)
        assert bound is not None
        got, limit = rounded(value), rounded(bound)
        if not self._strike(i, got < limit if side == "below" else got > limit):
            return None
        what = f"{rule.metric} {value:.3g}"
        if rule.patience == 1:
            return f"{what} is {side} {bound:g} at step {step}"
        return f"{what} stayed {side} {bound:g} for {rule.patience} probes, to step {step}"

    def _judge_gain(self, i: int, value: float, step: int) -> str | None:
        rule, best = self._rules[i], self._best[i]
        assert rule.metric is not None
        assert rule.gains_less_than is not None
        sign = -1.0 if better(rule.metric) == "lower" else 1.0
        best.append(max([sign * rounded(value), *best[-1:]]))
        if len(best) <= rule.patience:
            return None
        gain = best[-1] - best[-1 - rule.patience]
        if rounded(gain) >= rounded(rule.gains_less_than):  # 0.9 - 0.8 is 0.09999999999999998
            return None
        return (
            f"{rule.metric} {value:.3g} gained {gain:.3g} in {rule.patience} probes, less than"
            f" {rule.gains_less_than:g}, to step {step}"
        )

    def _judge_findings(self, i: int, row: Mapping[str, Any], step: int) -> str | None:
        findings, rule = row.get("findings"), self._rules[i]
        if findings is None:  # the doctor did not come
            return None
        found = next((finding for finding in findings if _meets(finding, rule.finding or "")), None)
        if not self._strike(i, found is not None) or found is None:
            return None
        again = f", {rule.patience} times in a row" if rule.patience > 1 else ""
        return f"the doctor at step {step}{again}: {found['id']}: {found['evidence']}"

    def _strike(self, i: int, met: bool) -> bool:
        """Count a row that meets rule i, or start again; whether its patience is at an end."""
        self._strikes[i] = self._strikes[i] + 1 if met else 0
        return self._strikes[i] >= self._rules[i].patience


def _meets(finding: Mapping[str, Any], wanted: str) -> bool:
    """Its id, or its severity or a milder one."""
    bad_enough = _WORST_FIRST[: _WORST_FIRST.index(wanted) + 1] if wanted in _WORST_FIRST else ()
    return finding["id"] == wanted or finding["severity"] in bad_enough
