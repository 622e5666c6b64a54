"""A pool of recorded configurations: what each was given, what its probes read as it trained, how
good its pictures were in the end.

One file of JSON lines: a header, then a line for every configuration that has ended, in the order
in which they ended.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from flowray.config.errors import InputError
from flowray.config.rows import Row, parse_rows
from flowray.config.train import OPEN_SCORES as LEFT_OPEN
from flowray.sweepconfig.distributions import (
    Categorical,
    Constant,
    IntUniform,
    Parameter,
    QUniform,
    Uniform,
)
from flowray.sweepconfig.file import text_sweep
from flowray.sweepconfig.sweep import Sweep
from flowray.tune.space import Params

# what a configuration's pictures are ranked by, and what stands beside it
CLOSED = "mean_attribute_accuracy", "all_correct"


@dataclass(frozen=True)
class Entry:
    """One recorded configuration.

    rows: `step` and metrics at every probe; score: {} where it failed, with `error` in one line.
    """

    number: int
    params: Params
    rows: tuple[Row, ...]
    score: Mapping[str, float]
    error: str | None = None

    @property
    def rank(self) -> tuple[float, float]:
        """Higher is better; of captions that leave things open what is named, then coverage."""
        if LEFT_OPEN[0] in self.score:
            named, coverage = (self.score[name] for name in LEFT_OPEN)
            return named, -coverage
        first, beside = (self.score.get(name, -math.inf) for name in CLOSED)
        return first, beside


@dataclass(frozen=True)
class Pool:
    """sweep: the one that the configurations were drawn from; drawn: how many were, those
    without an entry have not ended yet.
    """

    sweep: Sweep
    budget_steps: int
    drawn: int
    entries: tuple[Entry, ...]
    facts: Mapping[str, Any] = field(default_factory=dict)

    @property
    def judged_by(self) -> tuple[str, str]:
        """The score that ranks, and the one beside it."""
        judged = [entry for entry in self.entries if entry.error is None]
        return LEFT_OPEN if judged and LEFT_OPEN[0] in judged[0].score else CLOSED

    def best(self, count: int = 3) -> frozenset[int]:
        """The numbers of the configurations with the best pictures, with all that tie with the
        last of them.
        """
        ranks = sorted((entry.rank for entry in self.entries if entry.error is None), reverse=True)
        if len(ranks) < count:
            raise InputError(
                f"the pool has {len(ranks)} finished configurations, want at least {count}; record"
                " more"
            )
        return frozenset(
            entry.number
            for entry in self.entries
            if entry.error is None and entry.rank >= ranks[count - 1]
        )


def packaged_pool() -> Path:
    """The record that comes with the benchmarks."""
    return Path(__file__).parent / "pools" / "head.jsonl"


def read_pool(path: Path) -> Pool:
    """InputError where there is no such file, or it is not a pool. A torn last line is left out."""
    if not path.is_file():
        raise InputError(
            f"{path}: no such record; type python -m benchmarks record FOLDER, then --pool"
            " FOLDER/pool.jsonl"
        )
    rows, bad = parse_rows(path.read_text(encoding="utf-8"))
    if bad or not rows or "pool" not in rows[0]:
        raise InputError(f"{path}:{bad[0] if bad else 1}: not a record of benchmarks record")
    head = rows[0]["pool"]
    sweep = text_sweep(head["sweep"], str(path))
    entries = [
        Entry(row["number"], row["params"], tuple(row["rows"]), row["score"] or {}, row["error"])
        for row in rows[1:]
    ]
    return Pool(
        sweep,
        head["budget_steps"],
        head["drawn"],
        tuple(sorted(entries, key=lambda e: e.number)),
        head["facts"],
    )


class Space:
    """Distances between points of a sweep's parameters: each parameter has length 1, a choice is
    the same or it is not.
    """

    def __init__(self, parameters: Mapping[str, Parameter]):
        self._parameters = parameters

    def nearest(self, point: Params, entries: Iterable[Entry]) -> Entry:
        """The entry nearest to the point; of equals the lowest number."""

        def place(entry: Entry) -> tuple[float, int]:
            # 1e-3 is as far from 1e-2 as from 1e-4, but for the rounding of logarithms
            return round(self._distance(point, entry.params), 12), entry.number

        return min(entries, key=place)

    def _distance(self, a: Params, b: Params) -> float:
        return math.sqrt(
            sum(
                self._apart(parameter, a.get(key), b.get(key)) ** 2
                for key, parameter in self._parameters.items()
            )
        )

    @staticmethod
    def _apart(parameter: Parameter, a: Any, b: Any) -> float:
        if isinstance(parameter, Categorical | Constant) or a is None or b is None:
            return float(a != b)
        if isinstance(parameter, Uniform | QUniform | IntUniform):
            return abs(a - b) / (parameter.max - parameter.min)
        return abs(math.log(a / b)) / math.log(parameter.max / parameter.min)


def value_at(entry: Entry, metric: str, step: float) -> float:
    """The metric at the last probe up to `step` (a float only so that shares of a budget can be
    asked for); nan where there is none.
    """
    seen = [
        row[metric] for row in entry.rows if row["step"] <= step and row.get(metric) is not None
    ]
    return float(seen[-1]) if seen else math.nan


def spearman(a: np.ndarray, b: np.ndarray) -> float:
    """Rank correlation of two series, ties at their mean rank; nan where one is constant or
    there are fewer than three.
    """
    if len(a) < 3:
        return math.nan
    ranks = np.stack([_ranks(np.asarray(x, float)) for x in (a, b)])
    if np.any(np.ptp(ranks, axis=1) == 0):
        return math.nan
    return float(np.cov(ranks)[0, 1] / np.prod(ranks.std(axis=1, ddof=1)))


def _ranks(values: np.ndarray) -> np.ndarray:
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return ((last - (counts - 1) / 2)[inverse]).astype(float)
