"""Scores of pictures under captions that leave things open, from the checker's readings; nothing
learnt, no torch.

A picture is a scene where the checker's error is below FLAT and it shows one object; only scenes
have values of attributes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import comb, log
from typing import Any

import numpy as np

from flowray.data.open_shapes import Description, value_of
from flowray.data.shapes import ATTRIBUTES
from flowray.sample.checker import FLAT, SHARP, Reading
from flowray.sample.distances import mean

CAPTIONS, DRAWS = 24, 12  # of an evaluation: held-out captions, and pictures of each

Truth = Mapping[str, float]  # value -> probability


@dataclass(frozen=True)
class CaptionScores:
    """One caption's draws; entropy: of each attribute that is left open and varies in the data."""

    named: float
    sharp: float
    coverage: float
    coverage_floor: float
    entropies: dict[str, float]

    @property
    def entropy(self) -> float:
        """The mean of `entropies`, nan where there are none."""
        return float(np.mean(list(self.entropies.values()))) if self.entropies else np.nan


def shows_scene(reading: Reading) -> bool:
    """Whether the picture shows one object on a background."""
    scene, error = reading
    return error < FLAT and len(scene.things) == 1


def is_named(description: Description, reading: Reading) -> bool:
    """Whether all that is said of a lone object is so."""
    return shows_scene(reading) and description.fits(reading[0])


def total_variation(values: Sequence[str], truth: Truth) -> float:
    """Half the sum of |share among the values - probability|; 1 where there is no value."""
    if not values:
        return 1.0
    counts = Counter(values)
    return (
        sum(abs(counts[value] / len(values) - truth.get(value, 0.0)) for value in {*counts, *truth})
        / 2
    )


def entropy(values: Sequence[str]) -> float:
    """Of the values' shares, in nats; 0 where there is no value."""
    return -sum(n / len(values) * log(n / len(values)) for n in Counter(values).values())


def _expected(truth: Truth, draws: int, term: Callable[[float, float], float]) -> float:
    """Expectation of the sum over values of term(share among the draws, probability): every
    value's count is binomial, so this is exact.
    """
    return sum(
        comb(draws, n) * p**n * (1 - p) ** (draws - n) * term(n / draws, p)
        for p in truth.values()
        for n in range(draws + 1)
    )


def expected_variation(truth: Truth, draws: int) -> float:
    """`total_variation` to expect of as many draws from the truth itself."""
    return _expected(truth, draws, lambda share, p: abs(share - p)) / 2


def expected_entropy(truth: Truth, draws: int) -> float:
    """`entropy` to expect of as many draws from the truth itself: below that of the truth."""
    return _expected(truth, draws, lambda share, _: -share * log(share) if share else 0.0)


def judge(
    description: Description, truths: Mapping[str, Truth], readings: Sequence[Reading]
) -> CaptionScores:
    """Scores of one caption's draws. truths: those of the attributes that it leaves open."""
    draws = len(readings)
    scenes = [scene for scene, error in readings if shows_scene((scene, error))]
    values = {name: [value_of(scene, name) for scene in scenes] for name in truths}
    expected = {name: expected_entropy(truth, draws) for name, truth in truths.items()}
    return CaptionScores(
        named=float(np.mean([is_named(description, reading) for reading in readings])),
        sharp=float(np.mean([error < SHARP for _, error in readings])),
        coverage=float(np.mean([total_variation(values[name], truths[name]) for name in truths])),
        coverage_floor=float(np.mean([expected_variation(truths[name], draws) for name in truths])),
        entropies={
            name: entropy(values[name]) / expected[name] for name in truths if expected[name] > 0
        },
    )


def figures(rows: Sequence[CaptionScores]) -> dict[str, Any]:
    """Means over captions. coverage_excess: coverage - coverage_floor, 0 as in the data."""
    coverage, floor = (
        float(np.mean([getattr(row, name) for row in rows]))
        for name in ("coverage", "coverage_floor")
    )
    return {
        "named": mean(row.named for row in rows),
        "sharp": mean(row.sharp for row in rows),
        "coverage": coverage,
        "coverage_floor": floor,
        "coverage_excess": coverage - floor,
        "entropy": mean(row.entropy for row in rows),
        "entropy_by_attribute": {
            name: mean(row.entropies.get(name, np.nan) for row in rows) for name in ATTRIBUTES
        },
    }


def per_caption(rows: Sequence[CaptionScores], figure: str) -> np.ndarray:
    """One figure of each caption, (captions,)."""
    return np.array([getattr(row, figure) for row in rows])
