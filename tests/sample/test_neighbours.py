"""Scores by nearest neighbours, with theory as the oracle: samples of known distributions, copies,
modes that are left out, gaussians in closed form.
"""

from __future__ import annotations

import numpy as np
import pytest

from flowray.sample.distances import (
    BLOCK,
    SCALE,
    bootstrap,
    copies,
    distances,
    frechet,
    gaussian,
    jackknife,
    kernel_distance,
)
from flowray.sample.manifolds import DENSE, manifold, overlap, radii
from flowray.sample.neighbours import (
    CAPTION,
    OVERLAPS,
    REFERENCE,
    SPREAD,
    WHOLES,
    Found,
    Judged,
    Real,
    Shown,
    alike,
    beats_mu,
    judge,
    scores,
    spread,
    uncertainties,
)

DIMS, LABELS, EACH, DRAWS = 8, 40, 12, 6
STYLES = ("flat", "line", "round")


def normal(count: int, seed: int, dims: int = DIMS) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((count, dims))


def shares(generated: np.ndarray, real: np.ndarray) -> dict[str, float]:
    found = overlap(generated, manifold(real))
    return {
        "precision": found.precise.mean(),
        "recall": found.recalled.any(0).mean(),
        "density": found.density.mean(),
        "coverage": found.covered.any(0).mean(),
    }


def test_distances_are_those_by_hand_in_every_block() -> None:
    among = normal(2 * BLOCK + 3, 0, 2).astype(np.float32)
    few = normal(3, 1, 2).astype(np.float32)
    (found,) = distances(few, among)
    apart = few[:, None].astype(np.float64) - among
    assert found == pytest.approx(np.sqrt(np.square(apart).mean(2)), abs=1e-6)


def test_of_large_sets_a_part_is_compared() -> None:
    features = normal(REFERENCE + 60, 0)
    same = {"label": np.full(len(features), "a", dtype=object)}
    real = Real(features, same, np.arange(len(features)) < 40, matched=40, seed=0)
    assert len(real.near) == REFERENCE
    kept, whole = real.spread({"label": "a"}), spread(features)
    assert kept == pytest.approx(whole, rel=0.04)
    assert kept != pytest.approx(whole, rel=1e-6)  # by at most SPREAD of them
    few = Real(features[:SPREAD], {"label": same["label"][:SPREAD]}, real.training[:SPREAD], 40, 0)
    assert few.spread({"label": "a"}) == spread(features[:SPREAD])


def test_radii_are_those_by_hand() -> None:
    line = np.array([[0.0], [1.0], [3.0], [7.0]])
    assert radii(line, 1).tolist() == [1, 1, 2, 4]
    assert radii(line, 2).tolist() == [3, 2, 3, 6]
    assert radii(line, 9).tolist() == [7, 6, 4, 7]  # the furthest, where there are no nine


def test_one_distribution_is_precise_recalled_dense_and_covered() -> None:
    found = shares(normal(1500, 0), normal(1500, 1))
    # of equal samples the expectation of coverage is 1 - 2^-k (Naeem et al., lemma 2), of density 1
    assert found["coverage"] == pytest.approx(1 - 2.0**-DENSE, abs=0.02)
    assert found["density"] == pytest.approx(1, abs=0.05)
    assert found["precision"] > 0.85
    assert found["recall"] > 0.85


def test_apart_there_is_nothing() -> None:
    assert set(shares(normal(200, 0), normal(200, 1) + 100).values()) == {0}


def test_a_mode_that_is_left_out_costs_recall_and_coverage_alone() -> None:
    real = np.concatenate([normal(400, 0), normal(400, 1) + 50])
    found = shares(normal(800, 2), real)
    assert found["precision"] > 0.8
    assert found["recall"] == pytest.approx(0.5, abs=0.08)
    assert found["coverage"] == pytest.approx(0.5, abs=0.05)
    # and one that the data do not have costs precision alone
    turned = shares(real, normal(800, 2))
    assert turned["recall"] > 0.8
    assert turned["precision"] == pytest.approx(0.5, abs=0.08)


def test_one_picture_for_ever_is_precise_and_recalls_nothing() -> None:
    found = shares(np.zeros((300, DIMS)), normal(300, 0))
    assert found["precision"] > 0.95  # not all that were copied are of the matched ones
    assert found["recall"] == 0
    assert found["coverage"] < 0.2


def test_frechet_distance_of_a_factored_gaussian_is_that_of_the_sample() -> None:
    first, second = normal(70, 0), 2 * normal(50, 1) + 1
    assert frechet(first, gaussian(second)) == pytest.approx(frechet(first, second))
    # N(0, 1) to N(1, 4) in every dim: 1 + (1 - 2)^2
    many = frechet(normal(200_000, 0, 2), 2 * normal(200_000, 1, 2) + 1)
    assert many == pytest.approx(2 * (1 + 1), rel=0.02)


def closed_form(first: float, second: float, apart: float, dims: int, sigma: float) -> float:
    """The kernel distance of N(0, first^2) and N(apart, second^2) in every dim."""
    square = dims * sigma**2

    def mean(variance: float, offset: float) -> float:
        near = np.exp(-dims * offset**2 / (2 * (square + variance)))
        return float((1 + variance / square) ** (-dims / 2) * near)

    within = mean(2 * first**2, 0) + mean(2 * second**2, 0)
    return SCALE * (within - 2 * mean(first**2 + second**2, apart))


@pytest.mark.parametrize("sigma", [0.5, 10.0])
@pytest.mark.parametrize("apart", [0.0, 0.5])
def test_kernel_distance_of_gaussians_in_closed_form(sigma: float, apart: float) -> None:
    first, second = normal(4000, 0), 2 * normal(3000, 1) + apart
    truth = closed_form(1, 2, apart, DIMS, sigma)
    found = kernel_distance(first, second, sigma=sigma)
    assert found == pytest.approx(truth, rel=0.15, abs=0.1)
    # the other one is larger, by little in samples of this size
    assert 0 < kernel_distance(first, second, biased=True, sigma=sigma) - found < 0.02 * SCALE


def test_kernel_distance_is_unbiased_at_every_size_and_otherwise_is_not() -> None:
    for count in (5, 40):
        found = {
            biased: [
                kernel_distance(normal(count, 2 * i), normal(count, 2 * i + 1), biased=biased)
                for i in range(300)
            ]
            for biased in (False, True)
        }
        error = np.std(found[False]) / np.sqrt(300)
        assert abs(np.mean(found[False])) < 3 * error
        assert min(found[True]) > 0
        # by theory, the two likenesses of a vector with itself, that are 1 and no mean
        bias = 2 * SCALE * (1 - (1 + 2 / (DIMS * 100)) ** (-DIMS / 2)) / count
        assert np.mean(found[True]) == pytest.approx(bias, rel=0.1)
    same = normal(50, 0)
    assert kernel_distance(same, same, biased=True) == pytest.approx(0, abs=1e-9)


def test_kernel_distance_is_that_published_on_vectors_of_one_length() -> None:
    """By the formula of arXiv 2401.09603 on unit vectors, whose scale the features' is not."""
    vectors = [normal(30, 0), normal(20, 1) + 0.5]
    x, y = (each / np.linalg.norm(each, axis=1, keepdims=True) for each in vectors)

    def mean(a: np.ndarray, b: np.ndarray) -> float:
        return float(np.exp(-np.square(a[:, None] - b).sum(2) / 200).mean())

    published = 1000 * (mean(x, x) + mean(y, y) - 2 * mean(x, y))
    long = [each * DIMS**0.5 for each in (x, y)]
    assert kernel_distance(long[0], long[1], biased=True) == pytest.approx(published, rel=1e-9)


def test_errors_are_those_of_a_mean() -> None:
    values = np.random.default_rng(0).standard_normal(60)
    truth = values.std() / np.sqrt(60)
    for told, near in (
        (bootstrap(lambda kept: values[kept].mean(), 60, 0), 0.1),
        (jackknife(lambda kept: values[kept].mean(), 60), 0.25),
    ):
        assert told.error == pytest.approx(truth, rel=near)
        ends = values.mean() + 1.96 * truth * np.array([-1, 1])
        assert told.interval == pytest.approx(ends, abs=1.96 * truth * 1.5 * near)


def test_intervals_hold_the_truth_nineteen_times_of_twenty() -> None:
    held = {"bootstrap": 0, "jackknife": 0}
    for seed in range(400):
        values = np.random.default_rng(seed).standard_normal(48)

        def figure(kept: np.ndarray, values: np.ndarray = values) -> float:
            return float(values[kept].mean())

        for name, told in (
            ("bootstrap", bootstrap(figure, 48, seed)),
            ("jackknife", jackknife(figure, 48)),
        ):
            held[name] += told.interval[0] < 0 < told.interval[1]
    # of 400, two standard errors are 9
    assert all(share == pytest.approx(380, abs=14) for share in held.values()), held


def test_errors_of_unions_are_the_spread_over_independent_sets_of_captions() -> None:
    """Resampling has but 63 % of the captions, and two thirds of the spread here."""
    count, places = 48, 300
    real = Real(normal(60, 0), {}, np.arange(60) < 40, matched=40, seed=0)
    shown = Shown(normal(count, 1), np.arange(count), {})
    figures, told = [], []
    for seed in range(400):
        rng = np.random.default_rng(seed)
        wide = rng.exponential(size=(count, 1))  # some captions reach much, some nothing
        reached = {name: rng.random((count, places)) < 0.01 * wide for name in OVERLAPS[1::2]}
        nothing = np.empty(count, dtype=int)
        found = Found(nothing, nothing, nothing)
        run = Judged(shown, found, {CAPTION: wide[:, 0]}, alike(shown, real), reached)
        figures.append([run.figure(name) for name in (CAPTION, *reached)])
        if seed < 40:
            sure = uncertainties(run, real, seed)
            told.append([one.error for name in (CAPTION, *reached) if (one := sure[name])])
    assert np.mean(told, axis=0) == pytest.approx(np.std(figures, axis=0, ddof=1), rel=0.15)


def test_copies_are_told_where_held_out_pictures_are_copies_too() -> None:
    many = np.linspace(1, 2, 90)
    found = copies(np.zeros(5), np.concatenate([np.zeros(10), many]))
    assert found == {"median_ratio": 0, "nearer": 1}
    assert copies(many, np.zeros(10)) == {"median_ratio": None, "nearer": 0}


class World:
    """Labels as points, their pictures around them, in turn of each style; the last of every label
    is held out.
    """

    def __init__(self, width: float = 0.3, style: float = 0.0) -> None:
        rng = np.random.default_rng(0)
        self.centres = 4 * rng.standard_normal((LABELS, DIMS))
        self.offset = {name: style * rng.standard_normal(DIMS) for name in STYLES}
        self.label = np.repeat(np.arange(LABELS), EACH)
        self.style = np.tile(np.resize(STYLES, EACH), LABELS).astype(object)
        self.features = self.draw(self.label, width, 1)
        self.features += np.stack([self.offset[name] for name in self.style])
        training = np.tile(np.arange(EACH) < EACH - 2, LABELS)
        values = {"label": self.label.astype(str).astype(object), "style": self.style}
        self.real = Real(self.features, values, training, matched=LABELS * DRAWS, seed=0)

    def draw(self, labels: np.ndarray, width: float, seed: int) -> np.ndarray:
        noise = np.random.default_rng(seed).standard_normal((len(labels), DIMS))
        return self.centres[labels] + width * noise

    def judge(self, features: np.ndarray, wanted: np.ndarray, styles: object = None) -> Judged:
        caption = np.repeat(np.arange(LABELS), len(features) // LABELS)
        asked = {"label": wanted.astype(str).astype(object)}
        if styles is not None:
            asked["style"] = np.asarray(styles, dtype=object)
        spreads = np.array([self.real.spread({"label": str(i)}) for i in range(LABELS)])
        return judge(Shown(features, caption, asked), self.real, spreads, "label")


WANTED = np.repeat(np.arange(LABELS), DRAWS)


def test_draws_of_the_data_are_as_the_data() -> None:
    world = World()
    run = world.judge(world.draw(WANTED, 0.3, 2), WANTED)
    found = scores(run, world.real)
    assert found[CAPTION] == 1
    assert found["diversity"] == pytest.approx(1, abs=0.05)
    assert found["copies"]["nearer"] < 0.06
    assert found["copies"]["median_ratio"] == pytest.approx(1, abs=0.1)
    assert found["precision"] > 0.8
    assert found["frechet"] < 0.1 * frechet(normal(240, 0), world.real.reference)
    for name, biased in (("kernel", False), ("kernel_biased", True)):
        by_hand = kernel_distance(run.shown.features, world.real.reference, biased=biased)
        assert found[name] == pytest.approx(by_hand)
    assert abs(found["kernel"]) < 0.05 * found["kernel_biased"] + 1
    kept = np.arange(3, 30)
    few = run.shown.features[np.isin(run.shown.caption, kept)]
    by_hand = kernel_distance(few, world.real.reference)
    assert run.kernel(world.real, kept) == pytest.approx(by_hand)
    # against other captions: a cycle of labels leaves none right
    assert world.judge(run.shown.features, np.roll(WANTED, DRAWS)).figure(CAPTION) == 0
    # against random ones: chance
    rng, chance = np.random.default_rng(3), []
    for _ in range(20):
        chance.append(world.judge(run.shown.features, rng.permutation(WANTED)).figure(CAPTION))
    assert np.mean(chance) == pytest.approx(1 / LABELS, abs=0.01)


def test_copies_have_every_accuracy_and_are_told() -> None:
    world = World(style=40)
    places = np.flatnonzero(world.real.training).reshape(LABELS, -1)[:, :DRAWS].ravel()
    run = world.judge(world.features[places], WANTED, world.style[places])
    found = scores(run, world.real)
    assert found[CAPTION] == found["style_accuracy"] == 1
    assert found["copies"] == {"median_ratio": pytest.approx(0, abs=1e-5), "nearer": 1}
    assert found["precision"] > 0.95  # not all that were copied are of the matched ones


def test_a_style_is_looked_for_among_other_captions() -> None:
    """A caption's own pictures, all around, say nothing of the style that is asked for."""
    world = World(style=1)
    styles = np.tile(STYLES, LABELS * DRAWS // 3)
    drawn = world.draw(WANTED, 0.3, 2) + np.stack([world.offset[name] for name in styles])
    run = world.judge(drawn, WANTED, styles)
    assert (world.label[run.found.places] == WANTED).mean() > 0.9
    assert (world.label[run.found.others] != WANTED).all()
    by_hand = [
        np.square(world.features[world.label != WANTED[i]] - drawn[i]).sum(1).argmin()
        for i in range(9)
    ]
    others = [np.flatnonzero(world.label != WANTED[i])[by_hand[i]] for i in range(9)]
    assert run.found.others[:9].tolist() == others


def test_a_picture_is_not_its_own_neighbour_where_it_is_left_out() -> None:
    world = World(width=0)  # all of a label in one place, and no style in the features
    held = np.flatnonzero(~world.real.training)
    kinds = np.repeat(np.arange(LABELS), len(held) // LABELS)
    wanted = {name: values[held] for name, values in world.real.values.items()}
    spreads = np.ones(LABELS)
    alone = Shown(world.features[held], kinds, wanted, held)
    found = judge(alone, world.real, spreads, "label")
    assert found.figure(CAPTION) == 1
    assert (found.found.places != held).all()


def test_a_style_counts_only_where_it_is_named() -> None:
    world = World(style=40)
    places = np.flatnonzero(world.real.training).reshape(LABELS, -1)[:, :DRAWS].ravel()
    styles = world.style[places].copy()
    styles[: len(styles) // 2] = None
    styles[-DRAWS:] = "none of these"
    run = world.judge(world.features[places], WANTED, styles)
    rows = run.rows["style_accuracy"]
    assert np.isnan(rows[: LABELS // 2]).all()
    assert rows[-1] == 0
    assert run.figure("style_accuracy") == pytest.approx(1 - 1 / (LABELS // 2))


def test_diversity_is_that_of_a_caption_s_own_pictures() -> None:
    points = np.array([[0.0, 0.0], [3.0, 4.0], [0.0, 0.0]])
    assert spread(points) == pytest.approx(2 / 3 * 5 / np.sqrt(2))  # root of the mean square
    assert np.isnan(spread(points[:1]))
    world = World()
    narrow = world.judge(world.draw(WANTED, 0.15, 2), WANTED)
    assert narrow.figure("diversity") == pytest.approx(0.5, abs=0.03)
    both = world.real.spread({"label": "3", "style": "flat"})
    of_style = world.features[(world.label == 3) & (world.style == "flat")]
    assert both == spread(of_style)
    assert world.real.spread({"label": "3", "style": None}) == spread(
        world.features[world.label == 3]
    )


def test_what_beats_the_mean_picture() -> None:
    world = World()
    run = world.judge(world.draw(WANTED, 0.3, 2), WANTED)
    blur = 0.4 * world.centres[WANTED]  # pulled to the mean of all, the same in every draw
    mu = world.judge(blur, WANTED)
    assert mu.figure("diversity") == pytest.approx(0, abs=1e-6)
    assert mu.figure("recall") == 0
    beaten = beats_mu(run, mu, world.real, 0)
    assert set(beaten) == {*run.rows, *run.reached, *WHOLES}
    # copies: few, or none as of a blur; density: a blur lies within the wide balls of outliers
    assert {name for name, does in beaten.items() if not does} <= {"copies", "density"}
    assert set(beats_mu(mu, mu, world.real, 0).values()) == {False}
    sure = uncertainties(run, world.real, 0)
    assert set(sure) == set(beaten)
    told = {name: one.error for name, one in sure.items() if one}
    assert told[CAPTION] == 0  # every one is right
    # leaving captions out takes the draws away from the data, in the mean and in the covariance
    assert told["frechet"] > scores(run, world.real)["frechet"]
    assert 0 < told["coverage"] < 0.1
