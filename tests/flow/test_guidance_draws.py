"""Guidance by the null indicator, the pairing of null samples, and draws that depend on nothing
but their place.
"""

import pytest
import torch
from torch import Tensor

from flowray.config.flow import EulerSolver, HeunSolver, MidpointSolver, SolverConfig
from flowray.flow.draws import Draws, null_partners
from flowray.flow.guidance import conditional, guided
from flowray.flow.solver import integrate, time_grid

CPU = torch.device("cpu")


class Toy:
    """v = x * (2 where null else 5) + t, and what it was called with."""

    def __init__(self) -> None:
        self.calls: list[tuple[Tensor, Tensor, Tensor]] = []

    def __call__(self, x: Tensor, t: Tensor, null: Tensor) -> Tensor:
        self.calls.append((x, t, null))
        factor = torch.where(null, 2.0, 5.0).view(-1, 1, 1, 1)
        return x * factor + t.view(-1, 1, 1, 1)


X, T = (
    torch.randn(3, 1, 2, 2, generator=torch.Generator().manual_seed(0)),
    torch.tensor([0.1, 0.5, 0.9]),
)


@pytest.mark.parametrize("scale", [1.0, 0.1 + 3 * 0.3, 1 + 1e-15])
def test_scale_1_is_off_and_costs_one_pass(scale: float) -> None:
    """Also as a step of a range: 0.1 + 3 x 0.3 is 0.9999999999999999."""
    toy = Toy()
    out = guided(toy, scale)(X, T)
    assert torch.equal(out, conditional(Toy())(X, T))
    assert torch.equal(out, 5 * X + T.view(-1, 1, 1, 1))
    assert len(toy.calls) == 1
    assert len(toy.calls[0][0]) == 3
    assert not toy.calls[0][2].any()


@pytest.mark.parametrize("scale", [0.0, 0.5, 3.0, 5.5])
def test_formula(scale: float) -> None:
    out = guided(Toy(), scale)(X, T)
    assert torch.allclose(out, (2 + scale * (5 - 2)) * X + T.view(-1, 1, 1, 1), atol=1e-5)


def test_guidance_on_an_interval_of_times_alone() -> None:
    """Of times 0.1, 0.5, 0.9 with both ends counted: outside it is the plain velocity."""
    off, on = conditional(Toy())(X, T), guided(Toy(), 3.0)(X, T)
    for interval, inside in (((0.0, 1.0), "yyy"), ((0.5, 0.5), "nyn"), ((0.6, 1.0), "nny")):
        out = guided(Toy(), 3.0, interval)(X, T)
        for i, yes in enumerate(inside):
            assert torch.equal(out[i], (on if yes == "y" else off)[i])


@pytest.mark.parametrize("solver", [EulerSolver(), HeunSolver(), MidpointSolver()])
def test_a_step_outside_the_interval_costs_one_pass(solver: SolverConfig) -> None:
    """0.3 in fp32 is above 0.3, and 3 x 0.1 above both: an edge of the grid lies in the interval
    that begins or ends there.
    """
    toy, edges = Toy(), time_grid("uniform", 10)
    made = integrate(solver, guided(toy, 3.0, (0.3, 0.7)), X, edges)
    for _, t, null in toy.calls:
        alike = float(t[0])
        assert len(t) == (6 if 0.2999 < alike < 0.7001 else 3)
        assert bool(null.any()) == (len(t) == 6)
    assert {len(t) for _, t, _ in toy.calls} == {3, 6}
    own = guided(Toy(), 3.0, (0.3, 0.7))
    # as samples that each have a time of their own
    assert torch.equal(made, integrate(solver, lambda x, t: own(x, t), X, edges))


def test_rescaled_guidance_has_the_size_of_the_plain_velocity() -> None:
    """Equations 15 and 16 of Lin et al., by hand: all of the way, a half of it, none."""
    off, on = conditional(Toy())(X, T), guided(Toy(), 3.0)(X, T)
    std_off, std_on = (v.flatten(1).std(dim=1).view(-1, 1, 1, 1) for v in (off, on))
    assert float((std_on / std_off).min()) > 2
    whole = guided(Toy(), 3.0, rescale=1.0)(X, T)
    assert torch.allclose(whole, on * std_off / std_on)
    assert torch.allclose(whole.flatten(1).std(dim=1), std_off.flatten())
    half = guided(Toy(), 3.0, rescale=0.5)(X, T)
    assert torch.allclose(half, (whole + on) / 2, atol=1e-6)
    assert torch.equal(guided(Toy(), 3.0, rescale=0.0)(X, T), on)


def test_both_halves_run_on_the_same_x_and_t() -> None:
    toy = Toy()
    guided(toy, 3.0)(X, T)
    ((x, t, null),) = toy.calls
    assert torch.equal(x[:3], X)
    assert torch.equal(x[3:], X)
    assert torch.equal(t[:3], t[3:])
    assert null.dtype == torch.bool
    assert null.tolist() == [False] * 3 + [True] * 3


def test_draws_do_not_depend_on_the_ranks() -> None:
    def rows(where: slice) -> tuple[Tensor, Tensor]:
        draws = Draws(3, 17, 12, where, CPU)
        return draws.normal("source", (2, 4, 4)), draws.uniform("time")

    whole = rows(slice(None))
    for world in (2, 3, 4):
        share = 12 // world
        parts = [rows(slice(r * share, (r + 1) * share)) for r in range(world)]
        assert torch.equal(torch.cat([n for n, _ in parts]), whole[0])
        assert torch.equal(torch.cat([u for _, u in parts]), whole[1])
    assert torch.equal(Draws(3, 17, 12, slice(0, 4), CPU).uniform_batch("time"), whole[1])


def test_draws_differ_by_seed_step_and_stream_and_leave_the_global_rng() -> None:
    before = torch.get_rng_state()
    made = [
        Draws(*place, 8, slice(None), CPU).normal(s, (3,))
        for place in ((0, 0), (0, 1), (1, 0), (1, 1))
        for s in ("a", "b")
    ]
    again = Draws(0, 1, 8, slice(None), CPU).normal("a", (3,))
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(again, made[2])
    assert len({tuple(x.flatten().tolist()) for x in made}) == len(made)


def test_draws_are_what_they_say() -> None:
    draws = Draws(0, 0, 40_000, slice(None), CPU)
    normal, uniform = draws.normal("n", (1,)), draws.uniform("u")
    assert abs(float(normal.mean())) < 0.02
    assert float(normal.std()) == pytest.approx(1, abs=0.02)
    assert float(uniform.min()) >= 0
    assert float(uniform.max()) < 1
    assert float(uniform.mean()) == pytest.approx(0.5, abs=0.01)
    assert normal.dtype == uniform.dtype == torch.float32


@pytest.mark.parametrize("batch", [2, 3, 8, 64])
@pytest.mark.parametrize("probability", [0.0, 0.1, 0.5, 1.0])
def test_null_samples_never_keep_their_own_target(batch: int, probability: float) -> None:
    for seed in range(30):
        u = torch.rand(batch, generator=torch.Generator().manual_seed(seed))
        null, partner = null_partners(u, probability, range(batch))
        own = torch.arange(batch)
        assert torch.equal(null, u < probability)
        assert torch.equal(partner[~null], own[~null])
        assert bool((partner[null] != own[null]).all())
        if int(null.sum()) > 1:  # they exchange targets among themselves
            assert sorted(partner[null].tolist()) == own[null].tolist()


def test_a_lone_null_sample_borrows_the_next_ones_target() -> None:
    null, partner = null_partners(torch.tensor([0.9, 0.9, 0.01, 0.9]), 0.1, range(4))
    assert null.tolist() == [False, False, True, False]
    assert partner.tolist() == [0, 1, 3, 3]
    assert null_partners(torch.tensor([0.9, 0.01]), 0.1, range(2))[1].tolist() == [0, 0]


@pytest.mark.parametrize(
    ("null", "samples", "partner"),
    [
        # both null places hold sample 5: each takes the next place
        ((1, 0, 1, 0), (5, 6, 5, 7), [1, 1, 3, 3]),
        # the next null place holds the same sample, the one after it another
        ((1, 1, 1, 0), (5, 5, 6, 7), [2, 2, 0, 3]),
        # a lone null place, whose next place holds its own sample
        ((0, 0, 0, 1), (5, 6, 7, 5), [0, 1, 2, 1]),
        ((0, 1, 0, 1), (5, 6, 7, 8), [0, 3, 2, 1]),  # nothing twice: they exchange
        ((1, 1), (5, 5), [0, 1]),  # there is no other sample
    ],
)
def test_a_sample_that_stands_twice_in_a_batch_is_no_partner_of_itself(
    null, samples, partner
) -> None:
    u = torch.tensor([0.0 if flag else 0.9 for flag in null])
    assert null_partners(u, 0.5, samples)[1].tolist() == partner
