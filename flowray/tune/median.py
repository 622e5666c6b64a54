"""The median rule: a trial that is worse than half of the others at the same step is stopped."""

from __future__ import annotations

from statistics import fmean, median

from flowray.config.rounding import rounded
from flowray.sweepconfig.sweep import Median, Sweep


class MedianRule:
    """Google Vizier's rule (Golovin et al. 2017), on values up to a common step; a replay of the
    same values leaves the same state.
    """

    def __init__(self, sweep: Sweep, budget_steps: int):
        assert isinstance(sweep.early_terminate, Median)
        self._rule, self._metric = sweep.early_terminate, sweep.metric.name
        self._sign = 1.0 if sweep.minimise else -1.0  # lower is better from here on
        self._seen: dict[int, dict[int, float]] = {}

    def judge(self, number: int, step: int, value: float) -> str | None:
        """Record the value; why the trial should stop here, or None."""
        mine = self._seen.setdefault(number, {})
        mine[step] = self._sign * value
        others = [
            seen for other, seen in self._seen.items() if other != number and max(seen) >= step
        ]
        if step < self._rule.min_iter or len(others) < self._rule.min_trials:
            return None
        means = [
            fmean(held) for seen in others if (held := [v for at, v in seen.items() if at <= step])
        ]
        best = min(v for at, v in mine.items() if at <= step)
        if not means or rounded(best) <= rounded(median(means)):
            return None
        middle = self._sign * median(means)
        return (
            f"{self._metric} at best {self._sign * best:.3g} by step {step} is worse than the"
            f" median {middle:.3g} of {len(means)} trials"
        )
