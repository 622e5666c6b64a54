"""Scores of pictures by the real pictures that they lie near to in features: is the nearest one of
the caption, how do both sets cover each other, do draws of a caption differ, are any copied. No
torch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any, NamedTuple

import numpy as np

from flowray.sample.distances import (
    SCALE,
    Gaussian,
    Uncertainty,
    bootstrap,
    copies,
    distances,
    frechet,
    gaussian,
    is_nearer,
    jackknife,
    likeness,
    mean,
    nearest,
    pairs,
)
from flowray.sample.manifolds import Manifold, manifold, overlap

CAPTIONS, PICTURES = 48, 288  # of an evaluation: held-out captions, and draws of all of them
REFERENCE = 4096  # training pictures, at most, that sets of pictures are compared with
SPREAD = 512  # pictures of a caption, at most, whose distances are taken
CAPTION = "caption_accuracy"
CLIP = "clip_score"
OVERLAPS = ("precision", "recall", "density", "coverage")
WHOLES = ("frechet", "kernel")  # distances of a whole column to the reference

Values = dict[str, np.ndarray]  # field -> what each picture shows (N,), None where not said


@dataclass(frozen=True)
class Choices:
    """What may be chosen; None and empty: as the samples' JSON has it.

    limit: captions of each kind, at most; features: as for open_judge; clip: the folder of a CLIP
    model that scores pictures against captions; label, attributes, group:
    fields of the samples' JSON; held_out: shards whose captions are asked for.
    """

    captions: int | None = None
    draws: int | None = None
    limit: int | None = None
    features: str | None = None
    clip: str | None = None
    label: str | None = None
    attributes: tuple[str, ...] = ()
    group: str | None = None
    held_out: str | None = None


@dataclass(frozen=True)
class Real:
    """All real pictures: features (M, dims), what they show, which were trained on, bool (M,).

    matched: how many make the manifold; recall and coverage are made for samples of one size.
    """

    features: np.ndarray
    values: Values
    training: np.ndarray
    matched: int
    seed: int

    @cached_property
    def reference(self) -> np.ndarray:
        """Features of training pictures, at most REFERENCE, drawn evenly."""
        drawn = np.random.default_rng(self.seed).permutation(np.flatnonzero(self.training))
        return self.features[drawn[:REFERENCE]]

    @cached_property
    def manifold(self) -> Manifold:
        """Of the first of the reference, as many as are matched."""
        return manifold(self.reference[: self.matched])

    @cached_property
    def gaussian(self) -> Gaussian:
        """Of the reference."""
        return gaussian(self.reference)

    @cached_property
    def likeness(self) -> float:
        """The mean `likeness` of two different pictures of the reference."""
        every = sum(part.sum() for part in likeness(self.reference, self.reference))
        return float(every) / pairs(len(self.reference))

    @cached_property
    def near(self) -> np.ndarray:
        """Of held-out pictures, at most REFERENCE, the distance to the nearest training picture."""
        drawn = np.random.default_rng(self.seed).permutation(np.flatnonzero(~self.training))
        return nearest(self.features[drawn[:REFERENCE]], self.features[self.training])

    def spread(self, wanted: Mapping[str, str | None]) -> float:
        """Mean distance between two pictures that show what is wanted, of at most SPREAD; nan where
        there is but one.
        """
        fits = np.ones(len(self.features), dtype=bool)
        for name, value in wanted.items():
            if value is not None:
                fits &= self.values[name] == value
        drawn = np.random.default_rng(self.seed).permutation(np.flatnonzero(fits))[:SPREAD]
        return spread(self.features[np.sort(drawn)])


@dataclass(frozen=True)
class Shown:
    """Pictures to judge: features (N, dims), of which caption each is (N,), what they should show.

    own: their places among the real pictures, where they are some of these.
    """

    features: np.ndarray
    caption: np.ndarray
    wanted: Values
    own: np.ndarray | None = None


class Found(NamedTuple):
    """Of each picture the place of the nearest real one, that of the nearest of other captions than
    its own, and the distance to the nearest training picture; all (N,).
    """

    places: np.ndarray
    others: np.ndarray
    near: np.ndarray


class Likeness(NamedTuple):
    """Sums of `likeness`: of each caption's pictures with each other one's (captions, captions),
    and mean over the reference with it (captions,); of how many pictures, (captions,).
    """

    within: np.ndarray
    between: np.ndarray
    counts: np.ndarray


@dataclass(frozen=True)
class Judged:
    """A column of the scores.

    rows: figure -> mean over each caption's pictures (captions,), nan where it has none.
    reached: recall, coverage -> which of the reference each caption's pictures reach, bool
    (captions, matched).
    """

    shown: Shown
    found: Found
    rows: dict[str, np.ndarray]
    likeness: Likeness
    reached: dict[str, np.ndarray] = field(default_factory=dict)

    def figure(self, name: str, kept: np.ndarray | None = None) -> float:
        """The mean over captions, all or those kept; nan where no caption has it."""
        kept = np.arange(len(self.rows[CAPTION])) if kept is None else kept
        if name in self.reached:
            return float(self.reached[name][kept].any(0).mean())
        value = mean(self.rows[name][kept])
        return np.nan if value is None else value

    def frechet(self, real: Real, kept: np.ndarray | None = None) -> float:
        """The Frechet distance to the reference."""
        features = self.shown.features
        if kept is not None:
            features = features[np.isin(self.shown.caption, kept)]
        return frechet(features, real.gaussian)

    def kernel(self, real: Real, kept: np.ndarray | None = None, *, biased: bool = False) -> float:
        """`kernel_distance` to the reference."""
        within, between, counts = self.likeness
        kept = np.arange(len(counts)) if kept is None else kept
        count = int(counts[kept].sum())
        own = within[np.ix_(kept, kept)].sum() / pairs(count, biased)
        if biased:
            own += real.likeness * (len(real.reference) - 1) / len(real.reference)
        else:
            own += real.likeness
        return float(SCALE * (own - 2 * between[kept].sum() / count))

    def whole(self, name: str, real: Real, kept: np.ndarray | None = None) -> float:
        """One of WHOLES."""
        return self.frechet(real, kept) if name == "frechet" else self.kernel(real, kept)


def spread(features: np.ndarray) -> float:
    """Mean distance between two of the vectors (N, dims); nan where there is but one."""
    count = len(features)
    if count < 2:
        return np.nan
    return float(sum(part.sum() for part in distances(features, features)) / (count * (count - 1)))


def by_caption(values: np.ndarray, caption: np.ndarray) -> np.ndarray:
    """Means of values (N,) over the pictures of each caption; nan counts for nothing."""
    known, captions = ~np.isnan(values), int(caption.max()) + 1
    counts = np.bincount(caption[known], minlength=captions)
    sums = np.bincount(caption[known], values[known], captions)
    return np.where(counts, sums / np.maximum(counts, 1), np.nan)


def alike(shown: Shown, real: Real) -> Likeness:
    """Sums by caption, from which the kernel distance of any captions is made."""
    member = (shown.caption[:, None] == np.arange(shown.caption.max() + 1)).astype(np.float64)
    own = np.concatenate([part @ member for part in likeness(shown.features, shown.features)])
    to_real = [part.mean(1) for part in likeness(shown.features, real.reference)]
    return Likeness(member.T @ own, np.concatenate(to_real) @ member, member.sum(0))


def find(shown: Shown, real: Real, label: str) -> Found:
    """What lies next to pictures; one that is among the real ones is left out for itself."""
    places, others, near, start = [], [], [], 0
    kinds = real.values[label]
    for part in distances(shown.features, real.features):
        rows = slice(start, start + len(part))
        start += len(part)
        if shown.own is not None:
            part[np.arange(len(part)), shown.own[rows]] = np.inf
        places.append(part.argmin(1))
        near.append(part[:, real.training].min(1))
        part[shown.wanted[label][rows, None] == kinds] = np.inf
        others.append(part.argmin(1))
    return Found(*map(np.concatenate, (places, others, near)))


def accuracies(
    real: Real, wanted: Values, found: Found, caption: np.ndarray, label: str
) -> dict[str, np.ndarray]:
    """Figure -> share of each caption's pictures whose nearest real one shows what is wanted, nan
    where nothing is.

    Another attribute than the caption is looked for among the pictures of other captions: its own
    in other styles are often the nearest.
    """
    rows = {}
    for name, want in wanted.items():
        places = found.places if name == label else found.others
        right = (real.values[name][places] == want).astype(float)
        right[[value is None for value in want]] = np.nan
        rows[CAPTION if name == label else f"{name}_accuracy"] = by_caption(right, caption)
    return rows


def judge(shown: Shown, real: Real, spreads: np.ndarray, label: str) -> Judged:
    """All figures of pictures. spreads: of each caption's real pictures (captions,), nan where
    there are none to compare.
    """
    caption, captions = shown.caption, int(shown.caption.max()) + 1
    found = find(shown, real, label)
    held = overlap(shown.features, real.manifold)
    unit = mean(spreads)
    drawn = np.array([spread(shown.features[caption == i]) for i in range(captions)])
    rows = accuracies(real, shown.wanted, found, caption, label)
    rows["precision"] = by_caption(held.precise.astype(float), caption)
    rows["density"] = by_caption(held.density, caption)
    rows["diversity"] = np.where(np.isnan(spreads), np.nan, drawn / unit if unit else np.nan)
    rows["copies"] = by_caption(is_nearer(found.near, real.near).astype(float), caption)
    reached = {
        name: np.stack([every[caption == i].any(0) for i in range(captions)])
        for name, every in (("recall", held.recalled), ("coverage", held.covered))
    }
    return Judged(shown, found, rows, alike(shown, real), reached)


def scores(judged: Judged, real: Real) -> dict[str, Any]:
    """A column's figures; None where there is nothing to go by."""
    fitting = [*accuracies_of(judged), *([CLIP] if CLIP in judged.rows else [])]
    means = {name: judged.figure(name) for name in (*fitting, *OVERLAPS, "diversity")}
    if len(judged.found.near) < real.matched:  # fewer pictures reach less
        means |= dict.fromkeys(judged.reached, np.nan)
    return {
        **{name: None if np.isnan(value) else value for name, value in means.items()},
        **{name: judged.whole(name, real) for name in WHOLES},
        "kernel_biased": judged.kernel(real, biased=True),
        "copies": copies(judged.found.near, real.near),
    }


def accuracies_of(judged: Judged) -> list[str]:
    """The names of its accuracies, the caption's first."""
    return [name for name in judged.rows if name.endswith("_accuracy")]


def _quality(judged: Judged, figure: str, kept: np.ndarray) -> float:
    """The more, the better: few copies, diversity as in the data."""
    value = judged.figure(figure, kept)
    return {"copies": -value, "diversity": -abs(1 - value)}.get(figure, value)


def _uncertainty(
    judged: Judged, name: str, of: Callable[[np.ndarray], float], seed: int
) -> Uncertainty | None:
    """Over captions, of what is made of a figure; None where no caption has it.

    Only means over captions are resampled.
    """
    captions = len(judged.rows[CAPTION])
    if np.isnan(of(np.arange(captions))):
        return None
    if name in judged.rows:
        return bootstrap(of, captions, seed)
    told = jackknife(of, captions)
    if name not in judged.reached:
        return told
    low, high = told.interval  # of a share
    return Uncertainty(told.error, (max(low, 0.0), min(high, 1.0)))


def uncertainties(judged: Judged, real: Real, seed: int) -> dict[str, Uncertainty | None]:
    """Over captions, of every figure; None of what no caption has."""
    figures = {name: partial(judged.figure, name) for name in (*judged.rows, *judged.reached)}
    figures |= {name: partial(judged.whole, name, real) for name in WHOLES}
    return {name: _uncertainty(judged, name, figure, seed) for name, figure in figures.items()}


def beats_mu(run: Judged, mu: Judged, real: Real, seed: int) -> dict[str, bool | None]:
    """Figure -> whether the run is better than its source's mean picture by more than the standard
    error of the difference over captions; None of what no caption has.
    """
    every, beaten = np.arange(len(run.rows[CAPTION])), dict[str, bool | None]()

    def gain(name: str, kept: np.ndarray) -> float:
        if name in WHOLES:
            return mu.whole(name, real, kept) - run.whole(name, real, kept)
        return _quality(run, name, kept) - _quality(mu, name, kept)

    for name in (*run.rows, *run.reached, *WHOLES):
        told = _uncertainty(run, name, partial(gain, name), seed)
        beaten[name] = None if told is None else gain(name, every) > told.error
    return beaten


def of_groups(
    columns: Mapping[str, Judged], groups: Mapping[str, Sequence[str]], figures: Sequence[str]
) -> dict[str, dict[str, Any]]:
    """Group -> captions of the run, and column -> figures.

    groups: column -> group of each of its captions; other columns are left out.
    """
    told: dict[str, dict[str, Any]] = {}
    for group in sorted(set(groups["run"])):
        kept = {name: np.flatnonzero(np.array(of) == group) for name, of in groups.items()}
        told[group] = {"captions": len(kept["run"])}
        for name, chosen in kept.items():
            rows = columns[name].rows
            told[group][name] = {figure: mean(rows[figure][chosen]) for figure in figures}
    return told
