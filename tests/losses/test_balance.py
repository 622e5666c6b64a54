"""Gradient balancing against closed forms, autograd and the projections written out; nothing
here trains a model.
"""

from __future__ import annotations

import json
import math
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from flowray.config.balance import (
    BalanceConfig,
    GradNormBalance,
    NoBalance,
    PCGradBalance,
    SharesBalance,
    ShareTargets,
)
from flowray.config.errors import InputError
from flowray.config.keys import describe
from flowray.config.load import override_recipe
from flowray.config.losses import LossConfig, TermConfig
from flowray.config.recipe import Recipe
from flowray.config.schema import members
from flowray.losses.balance import Balancer, Measured, gradient_metrics

NAMES = ("flow", "kl", "dino")


def gradients(*norms: float, seed: int = 0) -> Tensor:
    """Rows of these norms in random directions, (L, 50) fp64."""
    rows = torch.randn(
        len(norms), 50, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)
    )
    return rows / rows.norm(dim=1, keepdim=True) * torch.tensor(norms, dtype=torch.float64)[:, None]


def measured(
    rows: Tensor,
    weights: tuple[float, ...],
    losses: tuple[float, ...] = (1.0, 1.0, 1.0),
    now=None,
    seed: int = 0,
) -> Measured:
    names = NAMES[: len(rows)]
    scheduled = weights if now is None else now
    return Measured(
        gramian=rows @ rows.T,
        losses=dict(zip(names, losses, strict=False)),
        weights=dict(zip(names, scheduled, strict=True)),
        full=dict(zip(names, weights, strict=True)),
        seed=seed,
    )


def shares(balancer: Balancer, what: Measured) -> dict[str, float]:
    """Weighted gradient norms relative to flow's, as balanced."""
    pull = {
        name: what.full[name] * norm * balancer.multiplier(name)
        for name, norm in what.norms.items()
    }
    return {name: value / pull["flow"] for name, value in pull.items()}


class BalanceContract:
    """What every member of BalanceConfig must do; subclasses give `config`."""

    config: NoBalance | SharesBalance | GradNormBalance | PCGradBalance

    def test_one_until_measured(self) -> None:
        balancer = Balancer(self.config)
        assert [balancer.multiplier(name) for name in NAMES] == [1.0] * 3
        assert balancer.due(0) == balancer.active

    def test_conflicting_losses_get_finite_positive_multipliers_and_the_state_is_json(self) -> None:
        balancer, again = Balancer(self.config), Balancer(self.config)
        for step in range(8):
            what = measured(
                gradients(3.0, 0.01, 8.0, seed=step),
                (1.0, 0.5, 2.0),
                (1.0, 0.1 + step, 2.0),
                seed=step,
            )
            balancer.update(what)
            again.restore(json.loads(json.dumps(again.kept())))  # a resume before every step
            again.update(what)
        assert again.kept() == balancer.kept()
        values = [balancer.multiplier(name) for name in NAMES]
        assert all(math.isfinite(value) and value > 0 for value in values)
        assert (values != [1.0] * 3) == balancer.active

    def test_overflowed_gradients_change_nothing(self) -> None:
        balancer = Balancer(self.config)
        balancer.update(measured(gradients(3.0, 0.01, 8.0), (1.0, 1.0, 1.0)))
        before = json.dumps(balancer.kept())
        balancer.update(measured(gradients(3.0, math.inf, 8.0), (1.0, 1.0, 1.0)))
        assert json.dumps(balancer.kept()) == before

    def test_losses_of_weight_0_and_vanished_gradients_do_no_harm(self) -> None:
        balancer = Balancer(self.config)
        balancer.update(measured(gradients(3.0, 1.0, 0.0), (1.0, 1.0, 1.0), now=(1.0, 0.0, 1.0)))
        assert all(math.isfinite(balancer.multiplier(name)) for name in NAMES)


class TestNone(BalanceContract):
    config = NoBalance()


class TestShares(BalanceContract):
    config = SharesBalance(every=5)

    def test_every_k_steps(self) -> None:
        assert [step for step in range(12) if Balancer(self.config).due(step)] == [0, 5, 10]

    def test_shares_move_into_the_logs_bands_and_stay_where_they_are_inside(self) -> None:
        """dino:flow:kl 0.2-0.5 : 1 : 0.1-0.3."""
        balancer, what = Balancer(self.config), measured(gradients(2.0, 0.01, 8.0), (1.0, 1.0, 1.0))
        assert shares(balancer, what) == pytest.approx({"flow": 1.0, "kl": 0.005, "dino": 4.0})
        for _ in range(60):
            balancer.update(what)
        assert shares(balancer, what) == pytest.approx(
            {"flow": 1.0, "kl": 0.1, "dino": 0.5}, rel=1e-3
        )
        inside = Balancer(self.config)
        inside.update(measured(gradients(2.0, 0.4, 0.8), (1.0, 1.0, 1.0)))
        assert [inside.multiplier(name) for name in NAMES] == [1.0] * 3

    def test_one_number_is_a_target(self) -> None:
        balancer = Balancer(SharesBalance(targets=ShareTargets(kl=0.25, dino=None)))
        what = measured(gradients(2.0, 4.0, 8.0), (1.0, 3.0, 1.0))
        for _ in range(60):
            balancer.update(what)
        assert shares(balancer, what) == pytest.approx(
            {"flow": 1.0, "kl": 0.25, "dino": 4.0}, rel=1e-3
        )

    def test_the_multiplier_is_an_exponential_average(self) -> None:
        balancer = Balancer(SharesBalance(targets=ShareTargets(kl=0.2), smoothing=0.75))
        balancer.update(measured(gradients(1.0, 1.0), (1.0, 1.0)))
        assert balancer.multiplier("kl") == pytest.approx(0.2**0.25)
        bounded = Balancer(SharesBalance(targets=ShareTargets(kl=0.2), smoothing=0, limit=3))
        bounded.update(measured(gradients(1.0, 1e-6), (1.0, 1.0)))
        assert bounded.multiplier("kl") == 3

    def test_a_warm_up_stays_one(self) -> None:
        """The band is for the full weight: at a tenth of it the same multiplier is found, and
        the schedule still cuts the weight.
        """
        ramp, whole = Balancer(self.config), Balancer(self.config)
        rows = gradients(2.0, 0.01, 8.0)
        ramp.update(measured(rows, (1.0, 1.0, 1.0), now=(1.0, 0.1, 1.0)))
        whole.update(measured(rows, (1.0, 1.0, 1.0)))
        assert ramp.kept() == whole.kept()
        off = Balancer(self.config)
        off.update(measured(rows, (1.0, 1.0, 1.0), now=(1.0, 0.0, 1.0)))
        assert off.multiplier("kl") == 1.0
        assert off.multiplier("dino") != 1.0

    def test_a_bad_band_is_refused(self) -> None:
        with pytest.raises(ValueError, match="low <= high"):
            ShareTargets(kl=(0.3, 0.1))
        with pytest.raises(InputError, match=r"loss\.balance\.targets\.kl"):
            override_recipe(
                Recipe(), {"loss.balance.kind": "shares", "loss.balance.targets.kl": [0.3, 0.1]}
            )
        recipe = override_recipe(
            Recipe(), {"loss.balance.targets.kl": 0.2, "loss.balance.kind": "shares"}
        )
        assert isinstance(recipe.loss.balance, SharesBalance)
        assert recipe.loss.balance.targets.kl == (0.2, 0.2)

    def test_every_loss_but_flow_can_have_a_target(self) -> None:
        terms = {
            name
            for name, field in LossConfig.model_fields.items()
            if issubclass(members(field.annotation)[0], TermConfig)
        }
        assert set(ShareTargets.model_fields) == terms - {"flow"}


class TestGradNorm(BalanceContract):
    config = GradNormBalance(alpha=1.5, lr=0.1)

    def test_one_step_is_autograds(self) -> None:
        """L_grad = sum |G_i - mean(G) r_i^alpha|, the target held fixed, its slope relative to
        mean(G); then sum m = L.
        """
        weights, first, later = (1.0, 0.5, 2.0), (2.0, 1.0, 0.5), (1.0, 0.9, 0.1)
        balancer, rows = Balancer(self.config), gradients(3.0, 0.4, 1.5)
        m = torch.ones(3, dtype=torch.float64)
        for losses in (first, later, later):
            balancer.update(measured(rows, weights, losses))
            m = m.detach().requires_grad_()
            norms = m * torch.tensor(weights) * rows.norm(dim=1)
            rate = torch.tensor(losses, dtype=torch.float64) / torch.tensor(
                first, dtype=torch.float64
            )
            target = (norms.mean() * (rate / rate.mean()) ** 1.5).detach()
            (slope,) = torch.autograd.grad((norms - target).abs().sum(), m)
            m = m - 0.1 * slope / norms.detach().mean()
            m = m * 3 / m.sum()
            assert [balancer.multiplier(name) for name in NAMES] == pytest.approx(
                m.tolist(), rel=1e-6
            )

    def test_alpha_0_makes_the_weighted_norms_equal(self) -> None:
        balancer, what = (
            Balancer(GradNormBalance(alpha=0, lr=0.002)),
            measured(gradients(3.0, 0.4, 1.5), (1.0, 1.0, 1.0)),
        )
        for _ in range(4000):
            balancer.update(what)
        assert list(shares(balancer, what).values()) == pytest.approx([1.0, 1.0, 1.0], rel=0.03)
        assert sum(balancer.multiplier(name) for name in NAMES) == pytest.approx(3)

    def test_the_loss_that_falls_slowest_gains(self) -> None:
        balancer, rows = Balancer(self.config), gradients(1.0, 1.0, 1.0)
        balancer.update(measured(rows, (1.0, 1.0, 1.0), (1.0, 1.0, 1.0)))
        balancer.update(measured(rows, (1.0, 1.0, 1.0), (0.2, 0.6, 0.9)))
        assert balancer.multiplier("flow") < 1 < balancer.multiplier("dino")


class TestPCGrad(BalanceContract):
    config = PCGradBalance()

    def direction(self, rows: Tensor, weights: tuple[float, ...], seed: int = 0) -> Tensor:
        balancer = Balancer(self.config)
        balancer.update(measured(rows, weights, seed=seed))
        factors = [
            balancer.multiplier(name) * weight for name, weight in zip(NAMES, weights, strict=False)
        ]
        return torch.tensor(factors, dtype=torch.float64) @ rows

    def test_two_losses_in_closed_form(self) -> None:
        a, b = (
            torch.tensor([1.0, 0.0], dtype=torch.float64),
            torch.tensor([-1.0, 1.0], dtype=torch.float64),
        )
        # a without its part along b is (0.5, 0.5); b without its part along a is (0, 1)
        torch.testing.assert_close(
            self.direction(torch.stack([a, b]), (1.0, 1.0)),
            torch.tensor([0.5, 1.5], dtype=torch.float64),
        )

    def test_without_a_conflict_it_is_the_weighted_sum(self) -> None:
        rows = torch.tensor([[1.0, 0.2, 0.0], [0.1, 1.0, 0.3]], dtype=torch.float64)
        torch.testing.assert_close(self.direction(rows, (2.0, 0.5)), 2.0 * rows[0] + 0.5 * rows[1])

    def test_three_losses_by_projections_written_out(self) -> None:
        """Algorithm 1 of the paper on the vectors themselves, with the same random order."""
        rows, weights = gradients(3.0, 1.0, 2.0, seed=4), (1.0, 0.5, 2.0)
        rows[1] -= 2 * rows[0] / 3  # make them conflict
        weighted = torch.tensor(weights, dtype=torch.float64)[:, None] * rows
        for seed in range(5):
            with torch.random.fork_rng():
                torch.manual_seed(seed)
                expected = torch.zeros(50, dtype=torch.float64)
                for i in range(3):
                    g = weighted[i].clone()
                    for j in torch.randperm(3).tolist():
                        if j != i and g @ weighted[j] < 0:
                            g -= (g @ weighted[j]) / (weighted[j] @ weighted[j]) * weighted[j]
                    expected += g
            torch.testing.assert_close(self.direction(rows, weights, seed), expected)
        assert not torch.allclose(self.direction(rows, weights), weighted.sum(0))

    def test_the_order_comes_from_the_seed_and_leaves_the_global_rng(self) -> None:
        rows = gradients(3.0, 1.0, 2.0, seed=4)
        rows[1] -= rows[0]
        before = torch.get_rng_state()
        found = {
            tuple(self.direction(rows, (1.0, 1.0, 1.0), seed).tolist()) for seed in (0, 1, 2, 3, 0)
        }
        assert len(found) > 1
        assert torch.equal(torch.get_rng_state(), before)
        assert all(
            torch.equal(*pair)
            for pair in pairwise(self.direction(rows, (1.0, 1.0, 1.0), 7) for _ in range(3))
        )


def test_every_member_has_its_contract_test() -> None:
    assert {type(cls.config) for cls in BalanceContract.__subclasses__()} == set(
        members(BalanceConfig)
    )


def test_metrics_of_a_gramian() -> None:
    rows = gradients(3.0, 0.4, 0.0)
    row = gradient_metrics(rows @ rows.T, {"flow": 2.0, "kl": 0.5, "dino": 1.0})
    cos = float(torch.cosine_similarity(rows[0], rows[1], dim=0))
    expected = {"grad/flow": 3.0, "grad/kl": 0.4, "grad/dino": 0.0}
    expected |= {"grad/flow_weighted": 6.0, "grad/kl_weighted": 0.2, "grad/dino_weighted": 0.0}
    assert row == pytest.approx(
        expected | {"grad/cos_flow_kl": cos, "grad/cos_flow_dino": 0.0, "grad/cos_kl_dino": 0.0}
    )
    assert all(describe(name) is not None for name in row)
