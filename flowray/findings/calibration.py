"""What healthy runs measure, so that a number can be held against them.

healthy.json has the quantiles of every key over small runs that nothing was wrong with (both
sources, all heads, three data sets, several sizes and lengths); tests/doctor_calibration.py writes
it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from flowray.config.keys import describe
from flowray.config.rounding import finite
from flowray.findings.reading import Absent, Reading

FILE = Path(__file__).with_name("healthy.json")
LEVELS = 20  # quantiles 0, 1/20, ..., 1 of every key
SPREAD = 3.0  # healthy runs' middle four fifths, above which a number varies by factors
LEAST = 10  # healthy runs that must have measured a key


@dataclass(frozen=True)
class Range:
    """A key over the healthy runs: how many measured it, its LEVELS + 1 quantiles in order."""

    runs: int
    quantiles: tuple[float, ...]

    def beyond(self, value: float, side: str) -> float:
        """Share of the healthy runs, in steps of 1 / LEVELS, that are at least as far out."""
        if side == "above":
            return sum(q >= value for q in self.quantiles[1:]) / LEVELS
        return sum(q <= value for q in self.quantiles[:-1]) / LEVELS

    def outside(self, value: float, better: str) -> float:
        """How far out of the range of all healthy runs, in widths of its middle four fifths; 0
        inside, and on the side that is better (`higher`, `lower` or `none`).

        A number that is positive in all of them has an end below and none above: a share of the
        velocity's norm, say, where the velocity is small by right. Where it spreads over factors
        it is held by factors, above.
        """
        low, high = self.quantiles[0], self.quantiles[-1]
        width = self.quantiles[-3] - self.quantiles[2]
        # a number that all runs agree on to rounding says nothing by being a little off
        width = max(width, 0.02 * max(abs(low), abs(high)), 0.01)
        if value > high:
            above = (value - high) / width
            if low > 0 and self.quantiles[-3] > SPREAD * self.quantiles[2]:
                middle = math.log(self.quantiles[-3] / self.quantiles[2])
                above = min(above, math.log(value / high) / middle)
            return 0.0 if better == "higher" else above
        return 0.0 if better == "lower" else max(low - value, 0.0) / width


@dataclass(frozen=True)
class Unlike:
    """A number far from what healthy runs measure. far: as `Range.outside` has it."""

    key: str
    value: float
    far: float
    healthy: Range


@cache
def _file() -> Mapping[str, Any]:
    kept: Mapping[str, Any] = json.loads(FILE.read_text())
    return kept


@cache
def healthy_ranges() -> Mapping[str, Range]:
    """Key -> its range over the healthy runs."""
    return {
        key: Range(runs, tuple(quantiles)) for key, (runs, quantiles) in _file()["ranges"].items()
    }


def unlike_limit() -> float:
    """Of the third furthest number of a run: what all healthy runs but few stay below, each held
    against the others.
    """
    return float(_file()["limit"])


def domain() -> Mapping[str, tuple[float, float]]:
    """Numeric facts (`steps`, ...) -> least and greatest among the healthy runs."""
    return {name: (low, high) for name, (low, high) in _file()["domain"].items()}


def most_unlike(
    r: Reading, ranges: Mapping[str, Range], keys: Sequence[str], count: int = 3
) -> list[Unlike]:
    """The `count` measured keys that lie furthest out of their healthy ranges, furthest first."""
    found = []
    for key in keys:
        try:
            value = r[key]
        except Absent:
            continue
        known = describe(key)
        far = ranges[key].outside(value, known.direction if known else "none")
        if far > 0:
            found.append(Unlike(key, value, far, ranges[key]))
    return sorted(found, key=lambda one: -one.far)[:count]


def ranges_of(rows: Sequence[Mapping[str, float]]) -> dict[str, Range]:
    """The ranges of the keys that at least LEAST of the healthy runs' rows have."""
    ranges = {}
    for key in sorted({key for row in rows for key in row}):
        values = sorted(v for row in rows if (v := finite(row.get(key))) is not None)
        if len(values) >= LEAST:
            at = [values[round(i / LEVELS * (len(values) - 1))] for i in range(LEVELS + 1)]
            ranges[key] = Range(len(values), tuple(float(f"{value:.4g}") for value in at))
    return ranges
