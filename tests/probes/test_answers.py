"""A blur against pictures: the scores of gaussians in closed form, and what the battery makes of a
real set.
"""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import permutations, product

import numpy as np
import pytest
import torch
from support import perturbed, tiny_latents, tiny_recipe
from torch import Tensor

from flowray.config.recipe import Recipe
from flowray.flow.guidance import conditional, with_time_code
from flowray.model.assemble import build_model
from flowray.model.latent import Moments
from flowray.model.posterior import Posterior
from flowray.probes.answers import (
    DRAWN,
    ENOUGH,
    PARTNERS,
    Answers,
    answer_metrics,
    distances,
    energies,
    left_open,
    same_captions,
    separation,
    source_metrics,
    strangers,
)
from flowray.probes.battery import ProbeBatch, make_probe_batch, run_probes
from flowray.probes.copies import make_seen
from flowray.probes.rollout import shoot
from flowray.store.latents import LatentSet, load_latents

CPU = torch.device("cpu")
MANY = 40_000
LEFT_OPEN = 0.25  # of variance 1, of what a caption says 0.75
LINE, LATENT = (1, 1, 1), (2, 4, 4)


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def gaussian(shape: tuple[int, ...], *, alike: bool = True) -> tuple[Tensor, Answers]:
    """(caption means, answers): z1 = caption mean + noise, of variances 0.75 and LEFT_OPEN. alike:
    each caption has another picture in the set.
    """
    told = math.sqrt(1 - LEFT_OPEN) * normal(0, MANY, *shape)
    noise = math.sqrt(LEFT_OPEN)
    rows = torch.arange(MANY if alike else 0)
    drawn = normal(1, 2, MANY, *shape)
    partners = told[rows] + noise * normal(3, len(rows), *shape)
    return told, Answers(told + noise * normal(2, MANY, *shape), drawn, rows, partners)


# shoot/energy of N(caption mean, width^2) where the truth is N(caption mean, LEFT_OPEN): in one
# dimension sqrt(2 (LEFT_OPEN + width^2)) - width
WIDTHS = [0.0, 0.1, math.sqrt(LEFT_OPEN), 1.0]


@pytest.mark.parametrize("width", WIDTHS)
def test_energy_of_a_caption_s_gaussian(width: float) -> None:
    told, answers = gaussian(LINE)
    x, other = (told + width * normal(seed, MANY, *LINE) for seed in (4, 5))
    expected = math.sqrt(2 * (LEFT_OPEN + width**2)) - width
    rows = answer_metrics(x, other, answers)
    assert rows["shoot/energy"] == pytest.approx(expected, abs=0.015)
    assert rows["shoot/diversity"] == pytest.approx(width / math.sqrt(LEFT_OPEN), rel=0.03)


@pytest.mark.parametrize("shape", [LINE, LATENT])
def test_energy_ranks_a_true_draw_before_blurs_and_any_picture(shape: tuple[int, ...]) -> None:
    """In any dimension a blur of gaussians scores sqrt(2) times what draws score."""
    told, answers = gaussian(shape)
    a, b = normal(4, MANY, *shape), normal(5, MANY, *shape)
    width = math.sqrt(LEFT_OPEN)
    score = {
        name: answer_metrics(x, other, answers)
        for name, (x, other) in {
            "truth": (told + width * a, told + width * b),
            "blur": (told, told),
            "any picture": (a, b),
            "mean of all": (torch.zeros_like(a), torch.zeros_like(a)),
            "wrong captions": (told.roll(1, 0) + width * a, told.roll(1, 0) + width * b),
        }.items()
    }
    energy = {name: row["shoot/energy"] for name, row in score.items()}
    assert energy == {
        "truth": pytest.approx(width, abs=0.015),
        "blur": pytest.approx(math.sqrt(2) * width, abs=0.015),
        "any picture": pytest.approx(1.0, abs=0.015),
        "mean of all": pytest.approx(math.sqrt(2), abs=0.03),
        "wrong captions": pytest.approx(energy["wrong captions"]),
    }
    assert energy["truth"] < energy["blur"] < energy["any picture"] < energy["wrong captions"]
    assert score["truth"]["shoot/diversity"] == pytest.approx(1.0, abs=0.015)
    assert score["blur"]["shoot/diversity"] == 0
    # where a caption leaves more open than it says, its blur is behind any picture
    assert math.sqrt(2 * LEFT_OPEN) < 1 < math.sqrt(2 * 0.75)


def test_energy_over_several_draws_by_hand() -> None:
    z1, *draws = (torch.tensor([[[[x]]]]) for x in (1.0, 0.0, 4.0, 7.0))
    assert float(energies(torch.stack(draws), z1)) == pytest.approx(
        (1 + 3 + 6) / 3 - (4 + 7 + 3) / 6
    )
    assert float(energies(draws[1][None], z1)) == 3


def test_the_pairs_of_the_data_are_of_the_captions_that_are_drawn() -> None:
    """Two captions leave much open and have no other picture: they have no say."""
    z1, partners = normal(0, 4, *LATENT), normal(1, 2, *LATENT)
    rows = torch.tensor([1, 1])
    answers = Answers(z1, normal(2, 2, 4, *LATENT), rows, partners)
    x = normal(3, 4, *LATENT)
    apart = [7.0, 2.0, 9.0, 8.0]
    other = x + torch.tensor(apart).view(4, 1, 1, 1) / math.sqrt(math.prod(LATENT))
    data = np.mean([float((z1[1] - p).norm()) for p in partners])
    found = answer_metrics(x, other, answers)
    assert found["shoot/diversity"] == pytest.approx(2.0 / data, rel=1e-4)
    std = torch.tensor([3.0, 0.5, 4.0, 5.0]).log().view(4, 1, 1, 1).expand_as(z1)
    posterior = Posterior(z1, 2 * std)
    within = np.mean([float((z1[1] - p).square().mean()) for p in partners]) / 2
    width = source_metrics(posterior, z1, ["a", "b", "c", "d"], answers, 1e-5)["source/width"]
    assert width == pytest.approx(0.25 / within, rel=1e-4)


def test_without_equal_captions_the_pairs_are_of_any_two_pictures() -> None:
    told, answers = gaussian(LATENT, alike=False)
    x, other = (told + 0.5 * normal(seed, MANY, *LATENT) for seed in (4, 5))
    rows = answer_metrics(x, other, answers)
    assert rows.keys() == {"shoot/energy", "shoot/diversity_all"}
    assert rows["shoot/diversity_all"] == pytest.approx(0.5, abs=0.01)
    posterior = Posterior(told, torch.full_like(told, math.log(0.09)))
    found = source_metrics(posterior, told, ["one", "other"] * (MANY // 2), answers, 1e-5)
    assert "source/width" not in found
    assert found["source/width_all"] == pytest.approx(0.09, rel=0.01)


def test_width_of_a_source_as_wide_as_its_captions() -> None:
    told, answers = gaussian(LATENT)
    posterior = Posterior(told, torch.full_like(told, math.log(LEFT_OPEN)))
    rows = source_metrics(posterior, told, ["one", "other"] * (MANY // 2), answers, 1e-5)
    assert rows["source/width"] == pytest.approx(1.0, rel=0.01)
    doubled = replace(answers, partners=2 * answers.partners - answers.z1)
    rows = source_metrics(posterior, told, ["one", "other"] * (MANY // 2), doubled, 1e-5)
    assert rows["source/width"] == pytest.approx(0.25, rel=0.01)


def phi(x: float) -> float:
    return 0.5 * (1 + math.erf(x / math.sqrt(2)))


def of_two(
    mu: tuple[float, float], std: tuple[float, float], t: float, mean: float = 5.0, v: float = 4.0
) -> float:
    """separation at t of two captions' sources in one dimension; the data are N(mean, v)."""
    place = torch.arange(MANY) % 2
    mus, stds = (torch.tensor(pair)[place].view(MANY, *LINE) for pair in (mu, std))
    posterior = Posterior(mus, 2 * stds.log())
    z1, one, two = mean + math.sqrt(v) * normal(0, 3, MANY, *LINE)
    answers = Answers(z1, torch.stack([one, two]), place[:0], z1[:0])
    z0 = posterior.sample(normal(1, MANY, *LINE))
    texts = [("this", "that")[i] for i in place.tolist()]
    return separation(posterior, z0, texts, answers, 1e-5, t)


@pytest.mark.parametrize("t", [0.0, 0.25, 0.5, 0.9])
def test_separation_of_two_places(t: float) -> None:
    """mu = 1 +- 1.5, sigma 0.8: the nearer mean is right with probability phi(distance / std)."""
    std = math.sqrt((1 - t) ** 2 * 0.8**2 + t**2 * 4.0)
    assert of_two((2.5, -0.5), (0.8, 0.8), t) == pytest.approx(phi((1 - t) * 1.5 / std), abs=0.01)


@pytest.mark.parametrize(("t", "std"), [(0.0, (1, 3)), (0.25, (0.3, 3)), (0.9, (0.1, 30))])
def test_separation_of_two_widths(t: float, std: tuple[float, float]) -> None:
    """One mean, variances a < b of x_t: b is likelier beyond x^2 = ln(b / a) / (1 / a - 1 / b)."""
    a, b = ((1 - t) ** 2 * sigma**2 + t**2 * 4.0 for sigma in std)
    edge = math.sqrt(math.log(b / a) / (1 / a - 1 / b))
    within, beyond = 2 * phi(edge / math.sqrt(a)) - 1, 2 - 2 * phi(edge / math.sqrt(b))
    assert of_two((2.0, 2.0), std, t) == pytest.approx((within + beyond) / 2, abs=0.008)


def codes(scale: float, std: float = 1.0) -> tuple[Posterior, list[str]]:
    """Sources of 32 captions, the second of which is the first again."""
    mu = scale * normal(7, 32, *LATENT)
    mu[1] = mu[0]
    return Posterior(mu, torch.full_like(mu, 2 * math.log(std))), ["0", *map(str, range(31))]


def test_far_codes_are_read_and_a_blind_source_is_chance() -> None:
    z1, one, two = 2 * normal(0, 3, 32, *LATENT)
    answers = Answers(z1, torch.stack([one, two]), torch.arange(0), z1[:0])
    far, texts = codes(10.0, 0.1)
    noise = normal(1, 32, *LATENT)

    def along(posterior: Posterior) -> list[float]:
        found = source_metrics(posterior, posterior.sample(noise), texts, answers, 1e-5)
        return [found[f"source/separation@{t}"] for t in ("0", "0.25", "0.5")]

    assert along(far) == [1.0, 1.0, 1.0]
    near = along(codes(0.6)[0])
    assert 1 > near[0] > near[1] > near[2] > 1 / 31
    assert along(codes(0.0)[0]) == pytest.approx([1 / 31] * 3)


@pytest.mark.parametrize("count", range(2, 7))
def test_strangers_are_other_samples(count: int) -> None:
    """Evenly spread u give all of them in every order, each once."""
    size = min(3, count - 1)
    places = product(*(range(count - 1 - k) for k in range(size)))
    seen: list[list[tuple[int, ...]]] = [[], []]
    for place in places:
        u = [(p + 0.5) / (count - 1 - k) for k, p in enumerate(place)] + [0.0] * (3 - size)
        drawn = strangers(torch.tensor(u)[:, None].expand(3, 2), count)
        for i, others in enumerate(drawn.T.tolist()):
            seen[i].append(tuple(others))
    for i, orders in enumerate(seen):
        assert sorted(orders) == sorted(permutations({*range(count)} - {i}, size))


def test_pairs_are_other_samples_with_the_batch_s_own_caption() -> None:
    captions = [[f"c{i % 6}", "a picture", f"c{i % 6}"] for i in range(60)]
    rows, samples = same_captions([said[0] for said in captions[:8]], captions)
    assert rows == [row for row in range(8) for _ in range(PARTNERS)]
    assert all(
        row != other and row % 6 == other % 6 for row, other in zip(rows, samples, strict=True)
    )
    assert len(set(zip(rows, samples, strict=True))) == len(rows)
    rows, samples = same_captions(["c"] * 20, [["c"]] * 20)
    assert rows == [row for row in range(20) for _ in range(PARTNERS)]
    # too few: each of 6 captions twice among 12 samples
    assert same_captions([said[0] for said in captions[:6]], captions[:12]) == ([], [])
    enough = same_captions([said[0] for said in captions[:4]], captions[:30])
    assert len(enough[0]) == ENOUGH


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    return tiny_recipe(tmp_path_factory.mktemp("answers"))


@pytest.fixture(scope="module")
def held_out(tmp_path_factory: pytest.TempPathFactory) -> LatentSet:
    """40 pictures under 5 captions."""
    latents = load_latents(tiny_latents(tmp_path_factory.mktemp("answers") / "latents", 40))
    return replace(latents, captioned_by=np.arange(40) % 5)


@pytest.fixture(scope="module")
def batch(recipe: Recipe, held_out: LatentSet) -> ProbeBatch:
    return make_probe_batch(recipe, held_out, CPU)


def nearest(held_out: LatentSet, latents: Tensor) -> list[int]:
    """Which sample each latent is a draw of."""
    moments = held_out.moments(np.arange(len(held_out)))
    z = held_out.scale.sample(moments, torch.zeros_like(moments.mean)).flatten(1)
    return torch.cdist(latents.flatten(1), z).argmin(1).tolist()


def test_answers_of_a_real_set(recipe: Recipe, held_out: LatentSet, batch: ProbeBatch) -> None:
    answers = batch.answers
    assert answers.z1 is batch.z1
    others = [nearest(held_out, drawn) for drawn in answers.drawn]
    assert len(others) == DRAWN
    for i, drawn in enumerate(zip(*others, strict=True)):
        assert len({i, *drawn}) == DRAWN + 1
    assert len({sample for drawn in others for sample in drawn}) > 25  # of the whole set
    partners = nearest(held_out, answers.partners)
    assert answers.rows.tolist() == [row for row in range(8) for _ in range(PARTNERS)]
    for row, other in zip(answers.rows.tolist(), partners, strict=True):
        assert row != other
        assert held_out.captions(row) == held_out.captions(other)
    torch.manual_seed(5)
    again = make_probe_batch(recipe, held_out, CPU).answers
    assert all(torch.equal(getattr(answers, name), value) for name, value in vars(again).items())
    moments = held_out.moments(np.array(partners))
    middle = held_out.scale.sample(Moments(*moments), torch.zeros_like(moments.mean))
    assert not torch.equal(answers.partners, middle)  # drawn, as z1 is


@torch.no_grad()
def test_the_battery_draws_each_caption_twice(recipe: Recipe, batch: ProbeBatch) -> None:
    model = build_model(recipe.model, recipe.loss, 0).eval()
    perturbed(model)
    rows = run_probes(model, recipe, batch, endpoints=False)
    source = model.source(batch.captions, batch.noise)
    posterior = source.posterior
    starts = [posterior.sample(noise) for noise in (batch.noise, batch.other_noise)]
    field = conditional(with_time_code(model.field(source)))
    ends = [shoot(field, z0, recipe.probes.shoot_steps) for z0 in starts]
    data = energies(batch.answers.drawn, batch.z1).mean()
    for prefix, (x, other) in {"": ends, "trivial/": starts}.items():
        off = (distances(x, batch.z1) + distances(other, batch.z1)) / 2
        mine = (off - distances(x, other) / 2).mean()
        assert rows[f"{prefix}shoot/energy"] == pytest.approx(float(mine / data), rel=1e-4)
        found = answer_metrics(x, other, batch.answers)["shoot/diversity"]
        assert rows[f"{prefix}shoot/diversity"] == pytest.approx(found, rel=1e-4)
    assert rows["shoot/energy"] != pytest.approx(rows["trivial/shoot/energy"], rel=1e-3)
    assert rows["trivial/source/separation@0"] == pytest.approx(0.2)  # five captions
    told = source_metrics(posterior, starts[0], batch.captions, batch.answers, 1e-5)
    assert told.items() <= rows.items()


@pytest.mark.parametrize("alike", [True, False])
def test_what_a_caption_leaves_open(alike: bool) -> None:
    _, answers = gaussian(LINE, alike=alike)
    found = left_open(answers)
    assert found == ({"data/left_open": pytest.approx(LEFT_OPEN, rel=0.05)} if alike else {})


def test_copies_of_training_latents_are_told_from_new_ones() -> None:
    training, new, others = (normal(seed, 400, 1, 2, 2) for seed in (10, 11, 12))
    seen = make_seen(training, new)
    assert seen.copies(others) < 0.05
    assert seen.copies(training) == 1.0
    assert seen.copies(torch.cat([training[:100], others[:300]])) == pytest.approx(0.25, abs=0.03)
    # a blur is far from every picture
    assert (
        make_seen(normal(13, 400, *LATENT), normal(14, 400, *LATENT)).copies(
            torch.full((8, *LATENT), 3.0)
        )
        == 0.0
    )


@torch.no_grad()
def test_the_battery_looks_for_copies_among_training_latents(
    recipe: Recipe, held_out: LatentSet, batch: ProbeBatch
) -> None:
    model = build_model(recipe.model, recipe.loss, 0).eval()
    perturbed(model)
    assert "shoot/copies" not in run_probes(model, recipe, batch, endpoints=False)
    seen = make_probe_batch(recipe, held_out, CPU, held_out).seen
    assert seen is not None
    known = seen.latents.unflatten(1, batch.z1.shape[1:])
    assert sorted(nearest(held_out, known)) == list(range(len(held_out)))
    source = model.source(batch.captions, batch.noise)
    field = conditional(with_time_code(model.field(source)))
    starts = [source.posterior.sample(noise) for noise in (batch.noise, batch.other_noise)]
    ends = torch.cat([shoot(field, z0, recipe.probes.shoot_steps) for z0 in starts])
    # so near that a quarter of the shots is nearer
    near = torch.cdist(ends.flatten(1), seen.latents).amin(1).quantile(0.25)
    rows = run_probes(model, recipe, replace(batch, seen=replace(seen, near=near)), endpoints=False)
    assert rows["shoot/copies"] == pytest.approx(0.25, abs=0.07)
