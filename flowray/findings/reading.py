"""A run's numbers as rules see them: measured, derived from what was measured, or absent."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from flowray.config.rounding import finite

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
            if finite(value) is not None
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
                if (measured := finite(row.get(name))) is not None:
                    for seen in self._open.values():
                        seen.add(name)
                    return Number(name, measured)
        if "/" not in key and (known := finite(self.facts.get(key))) is not None:
            return Number(key, known)
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

    def has(self, key: str) -> bool:
        """Whether the metric was measured or follows from what was."""
        return math.isfinite(self.get(key, math.nan))

    def fact(self, name: str) -> Any:
        """What is known under this name; Absent where nothing is."""
        if name not in self.facts:
            raise Absent(name)
        return self.facts[name]

    def points(self, key: str, least: int = 2) -> Points:
        """(step, value) of the history, raw before EMA; Absent where there are fewer than
        `least`.
        """
        found: dict[int, float] = {}
        for row in self.history:
            value = finite(row.get(key, row.get(f"ema/{key}")))
            if value is not None:
                found[row["step"]] = value
        if len(found) < least:
            raise Absent(key)
        for seen in self._open.values():
            seen.add(key)
        return sorted(found.items())

    def broken(self) -> list[tuple[str, int | None]]:
        """Metrics that are not finite, the examination's first, without a step, then those of the
        history with theirs.
        """
        rows = [(self.metrics, None), *((row, row["step"]) for row in self.history)]
        return [
            (key, step)
            for row, step in rows
            for key, value in row.items()
            if isinstance(value, float) and not math.isfinite(value)
        ]
