"""A run's numbers as rules see them: measured, derived from what was measured, or absent."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeGuard

Row = Mapping[str, Any]
Points = list[tuple[int, float]]


class Absent(Exception):
    """The number was not measured; the rule that asked stays silent."""


class Number(NamedTuple):
    """name: the key it was read under, `ema/KEY` where only the EMA has it; of: the one measured
    number that it follows from.
    """

    name: str
    value: float
    of: str = ""


class Reading:
    """metrics: one row of probe values; facts: recipe keys (dotted) and what else is known of the
    run; history: rows with `step`.

    A metric is the raw weights', else the EMA's (`ema/KEY`), else the history's last, else derived
    from others; a name without `/` is a numeric fact. Values that are not finite count as absent
    everywhere but in `broken`.
    """

    def __init__(
        self,
        metrics: Row,
        facts: Mapping[str, Any],
        history: Sequence[Row],
        derived: Mapping[str, Callable[[Reading], float]],
    ):
        self.metrics, self.facts = metrics, facts
        self.history = sorted(
            (row for row in history if isinstance(row.get("step"), int)),
            key=lambda row: row["step"],
        )
        self._last = {
            key: value
            for row in self.history
            for key, value in row.items()
            if _number(value) and math.isfinite(value)
        }
        self._derived = derived
        # derivations under way, with what each has read: one that needs itself is absent
        self._open: dict[str, set[str]] = {}

    def __getitem__(self, key: str) -> float:
        return self.find(key).value

    def find(self, key: str) -> Number:
        """The number and where it comes from; Absent where it was neither measured nor follows
        from what was.
        """
        for row in (self.metrics, self._last):
            for name in (key, f"ema/{key}"):
                value = row.get(name)
                if _number(value) and math.isfinite(value):
                    for seen in self._open.values():
                        seen.add(name)
                    return Number(name, float(value))
        if "/" not in key and _number(self.facts.get(key)) and math.isfinite(self.facts[key]):
            return Number(key, float(self.facts[key]))
        if key not in self._derived or key in self._open:
            raise Absent(key)
        self._open[key] = set()
        try:
            value = self._derived[key](self)
        except (ZeroDivisionError, OverflowError, ValueError) as error:
            raise Absent(key) from error
        finally:
            seen = self._open.pop(key)
        if not math.isfinite(value):
            raise Absent(key)
        return Number(key, value, seen.pop() if len(seen) == 1 else "")

    def get(self, key: str, default: float) -> float:
        """The metric, or `default` where it is absent."""
        try:
            return self[key]
        except Absent:
            return default

    def fact(self, name: str) -> Any:
        """What is known under this name; Absent where nothing is."""
        if name not in self.facts:
            raise Absent(name)
        return self.facts[name]

    def known(self, name: str) -> bool:
        """Whether there is such a fact and it is neither empty nor false."""
        return bool(self.facts.get(name))

    def points(self, key: str, least: int = 2) -> Points:
        """(step, value) of the history, raw before EMA; Absent where there are fewer than
        `least`.
        """
        found: dict[int, float] = {}
        for row in self.history:
            value = row.get(key, row.get(f"ema/{key}"))
            if _number(value) and math.isfinite(value):
                found[row["step"]] = float(value)
        if len(found) < least:
            raise Absent(key)
        for seen in self._open.values():
            seen.add(key)
        return sorted(found.items())

    def broken(self) -> list[tuple[str, int | None]]:
        """Metrics that are not finite, the examination's first, without a step, then those of the
        history with theirs.
        """
        here = [
            (key, None)
            for key, value in self.metrics.items()
            if _number(value) and not math.isfinite(value)
        ]
        then = [
            (key, row["step"])
            for row in self.history
            for key, value in row.items()
            if _number(value) and not math.isfinite(value)
        ]
        return [*here, *then]


def _number(value: Any) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool)
