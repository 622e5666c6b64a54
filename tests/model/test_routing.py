"""Tokens that go past the blocks in the middle: which ones, and that they come back as they
were.
"""

from __future__ import annotations

import pytest
import torch
from support import perturbed
from torch import Tensor

from flowray.config.base import LatentSpec
from flowray.config.errors import InputError
from flowray.config.load import load_recipe
from flowray.config.model import (
    AdaLNCondition,
    CrossAttentionCondition,
    DiMRVelocity,
    DiTVelocity,
    NoCondition,
    TokenRoute,
)
from flowray.model.levels import VelocityNet
from flowray.model.routing import kept_places
from flowray.model.text import TextTokens
from flowray.model.velocity import build_velocity

SPEC = LatentSpec(channels=3, height=4, width=8)
ROUTE = TokenRoute(before=1, after=1)
PLAIN = DiTVelocity(width=16, depth=4, heads=2, patch=2, route=ROUTE)
KINDS = {
    "plain": PLAIN,
    "token": PLAIN.model_copy(update={"indicator": "token"}),
    "adaln": PLAIN.model_copy(update={"condition": AdaLNCondition()}),
    "cross": PLAIN.model_copy(update={"condition": CrossAttentionCondition()}),
    "checkpointed": PLAIN.model_copy(update={"gradient_checkpointing": True}),
}
KEPT = torch.tensor([[0, 3, 4], [1, 2, 7], [5, 6, 7]])  # of 8 patches


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def net_of(config: DiTVelocity | DiMRVelocity) -> VelocityNet:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return perturbed(build_velocity(config, SPEC, 6))


def inputs() -> tuple[Tensor, Tensor, Tensor, TextTokens]:
    text = TextTokens(torch.randn(3, 4, 6, generator=seeded(2)), torch.ones(3, 4, dtype=torch.bool))
    x = torch.randn(3, *SPEC.shape, generator=seeded(1))
    return x, torch.tensor([4.0, 0.5, -4.0]), torch.tensor([False, True, False]), text


class TestPlaces:
    def test_are_as_many_as_asked_and_rise(self) -> None:
        places = kept_places(torch.randn(50, 16, generator=seeded(0)), 5)
        assert places.shape == (50, 5)
        assert bool((places.diff(dim=1) > 0).all())
        assert 0 <= int(places.min()) <= int(places.max()) < 16

    def test_are_all_as_likely_each_alone_and_in_pairs(self) -> None:
        places = kept_places(torch.randn(20_000, 6, generator=seeded(1)), 3)
        held = torch.zeros(20_000, 6).scatter(1, places, 1.0)
        together = held.T @ held / 20_000
        assert torch.allclose(together.diagonal(), torch.tensor(0.5), atol=0.015)
        pairs = together[~torch.eye(6, dtype=torch.bool)]
        assert torch.allclose(pairs, torch.tensor(0.2), atol=0.015)  # 3 of 6, then 2 of 5

    @pytest.mark.parametrize("count", [0, 7])
    def test_more_than_there_are_is_refused(self, count: int) -> None:
        with pytest.raises(ValueError, match="count: want 1 to 6"):
            kept_places(torch.randn(2, 6), count)

    @pytest.mark.parametrize(
        ("keep", "tokens", "count"), [(0.5, 64, 32), (0.3, 5, 2), (0.01, 9, 1), (0.999, 4, 4)]
    )
    def test_a_share_is_a_fixed_count(self, keep: float, tokens: int, count: int) -> None:
        assert TokenRoute(keep=keep).kept(tokens) == count


@pytest.mark.parametrize("kind", KINDS)
def test_a_part_goes_through_the_middle_and_the_rest_comes_back_as_it_was(kind: str) -> None:
    net = net_of(KINDS[kind])
    given: list[Tensor] = []
    made: list[Tensor] = []
    for block in net.token_blocks().blocks:
        block.register_forward_pre_hook(lambda module, args: given.append(args[0]))
        block.register_forward_hook(lambda module, args, out: made.append(out))
    with torch.no_grad():
        net.levels(*inputs(), KEPT)
    first = 1 if kind == "token" else 0  # the indicator's, which never goes past
    assert [x.shape[1] - first for x in given] == [8, 3, 3, 8]
    rows = torch.arange(3)[:, None]
    assert torch.equal(given[1][:, first:], made[0][:, first:][rows, KEPT])
    assert torch.equal(given[1][:, :first], made[0][:, :first])
    wanted = made[0].clone()
    wanted[:, first:][rows, KEPT] = made[2][:, first:]
    wanted[:, :first] = made[2][:, :first]
    assert torch.equal(given[3], wanted)
    assert not torch.equal(given[3], made[0])


@pytest.mark.parametrize("kind", KINDS)
def test_all_of_them_kept_is_no_route(kind: str) -> None:
    net = net_of(KINDS[kind])
    everything = torch.arange(8).expand(3, -1)
    assert torch.allclose(
        net.levels(*inputs(), everything)[-1], net.levels(*inputs())[-1], atol=1e-5
    )


@pytest.mark.parametrize("kind", KINDS)
def test_every_parameter_has_a_gradient_and_samples_do_not_mix(kind: str) -> None:
    net, given = net_of(KINDS[kind]), inputs()
    out = net.levels(*given, KEPT)[-1]
    (out * torch.randn(out.shape, generator=seeded(3))).sum().backward()
    assert [name for name, p in net.named_parameters() if p.grad is None or not p.grad.any()] == []
    x, code, null, text = given
    one = torch.tensor([1])
    alone = net.levels(x[one], code[one], null[one], text.rows(one), KEPT[one])[-1]
    assert torch.allclose(out[one], alone, atol=1e-5)


@pytest.mark.parametrize(
    "config",
    [
        PLAIN.model_copy(update={"route": None}),
        DiMRVelocity(widths=(16, 8), depths=(3, 1), heads=2),
    ],
    ids=["dit", "dimr"],
)
def test_a_network_without_a_route_keeps_none(config: DiTVelocity | DiMRVelocity) -> None:
    assert isinstance(config.condition, NoCondition)
    with pytest.raises(ValueError, match="no route"):
        net_of(config).levels(*inputs(), KEPT)


@pytest.mark.parametrize(
    ("typed", "key"),
    [
        (["model.velocity.route={before: 2, after: 2}"], "route goes past no block"),
        (["model.velocity.route={keep: 1.0}"], "model.velocity.route.keep"),
        (
            ["model.velocity.route={before: 1}", "loss.repa.weight=0.5", "loss.repa.depth=2"],
            "loss.repa.depth 2 reads a block",
        ),
    ],
)
def test_what_does_not_fit_is_one_line(typed: list[str], key: str) -> None:
    with pytest.raises(InputError, match=key) as error:
        load_recipe("quickstart", typed)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("depth", [1, 4])
def test_repa_may_read_where_every_token_is(depth: int) -> None:
    typed = ["model.velocity.route={before: 1, after: 1}", f"loss.repa.depth={depth}"]
    recipe = load_recipe("quickstart", [*typed, "loss.repa.weight=0.5"]).recipe
    assert recipe.loss.repa.depth == depth
