"""What compares the trials of a sweep with each other: asynchronous successive halving, or the
median rule, by which a trial that is worse than half of the others at the same step is stopped.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from statistics import fmean, median
from types import MappingProxyType
from typing import Protocol

from flowray.config.base import Config
from flowray.config.rounding import rounded
from flowray.sweepconfig.sweep import Asha, Hyperband, Median, SuccessiveHalving, Sweep, milestones


class Pruner(Protocol):
    """Compares trials by number. A replay of the same values leaves the same state."""

    def judge(self, number: int, step: int, value: float) -> str | None:
        """Record the value at its step; why the trial should stop there, in words, or None."""


class Rungs:
    """ASHA as published (Li et al. 2020, arXiv 1810.05934): a trial goes on from a rung while it is
    among the best 1/eta of all that came that far. One that is not stops there, and is taken up
    again when it is: with more trials the best 1/eta are more.

    Ray's AsyncHyperBandScheduler never comes back to a trial, so it lets the first ones go on
    whatever they are worth; on the recorded pool that took two fifths more compute to find one of
    the best. Every rung compares values at its very step: between two probes on either side of it
    the value is interpolated.
    """

    def __init__(self, sweep: Sweep, budget_steps: int):
        halving = sweep.early_terminate
        assert isinstance(halving, SuccessiveHalving)
        self._metric, self._eta = sweep.metric.name, milestones(halving, budget_steps)
        self._sign = 1.0 if sweep.minimise else -1.0  # lower is better from here on
        self._rungs: dict[int, dict[int, float]] = {at: {} for at in self._eta}  # the lowest first
        self._last: dict[int, tuple[int, float]] = {}

    def judge(self, number: int, step: int, value: float) -> str | None:
        """Record the value at the rungs that the trial has reached since its last probe; why it
        should stop at one, or None.
        """
        before, old = self._last.get(number, (0, value))
        self._last[number] = (step, value)
        reasons: list[str] = []
        for rung, values in self._rungs.items():
            if before < rung <= step:
                there = (
                    value
                    if before == 0
                    else old + (value - old) * (rung - before) / (step - before)
                )
                values[number] = self._sign * there
                if number not in self._best(rung):
                    reasons.append(self._place(number, rung, " so far; {} go on"))
        # all rungs have their values, whatever one says: so a replay leaves the same state
        return reasons[0] if reasons else None

    def promote(self, stopped: Collection[int], *, last: bool) -> int | None:
        """Which of the trials that it stopped goes on by now: the best of those among the best
        1/eta of their rung, at the highest rung that has one; None where none does. last: of all
        that it stopped the best at the highest rung.
        """
        further: set[int] = set()
        for rung, values in reversed(self._rungs.items()):
            waiting = [
                number
                for number in (self._ranked(rung) if last else self._best(rung))
                if number in stopped and number not in further
            ]
            if waiting:
                return waiting[0]
            further |= values.keys()
        return None

    def reached(self, number: int) -> bool:
        """Whether the trial has come to a rung."""
        return any(number in values for values in self._rungs.values())

    def why(self, number: int) -> str:
        """Its place at the highest rung that it came to, among all that came there by now."""
        return self._place(
            number,
            max(rung for rung, values in self._rungs.items() if number in values),
            "; {} went on",
        )

    def _ranked(self, rung: int) -> list[int]:
        """The trials that came to this rung, best first; of equals the earlier."""
        values = self._rungs[rung]
        return sorted(values, key=lambda number: (rounded(values[number]), number))

    def _best(self, rung: int) -> list[int]:
        share = len(self._rungs[rung]) / self._eta[rung]
        return self._ranked(rung)[: int(share + 1e-9)]  # 33 / 1.1 is 30, and 29.999999999999996

    def _place(self, number: int, rung: int, rest: str) -> str:
        values, eta = self._rungs[rung], self._eta[rung]
        place = 1 + sum(rounded(value) < rounded(values[number]) for value in values.values())
        share = f"1/{eta:g}" if eta == int(eta) else f"{1 / eta:.0%}"
        value = self._sign * values[number]
        return (
            f"{self._metric} {value:.3g} at step {rung} is number {place} of {len(values)}"
            + rest.format(f"the best {share}")
        )


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


PRUNERS: Mapping[type[Config], Callable[[Sweep, int], Pruner]] = MappingProxyType(
    {Hyperband: Rungs, Asha: Rungs, Median: MedianRule}
)


def make_pruner(sweep: Sweep, budget_steps: int) -> Pruner | None:
    """What compares the trials of the sweep with each other, None where nothing does."""
    return (
        PRUNERS[type(sweep.early_terminate)](sweep, budget_steps) if sweep.early_terminate else None
    )
