"""No outcome of gradient balancing hangs on the sign or the presence of a rounding error.

Processors add the same numbers in different orders. Where losses stand at a coincidence (equal
norms, a gradient that vanishes, a loss of 0), one finds 1e-16 more and another 1e-16 less.
"""

from __future__ import annotations

from itertools import product

import pytest
import torch
from torch import Tensor

from flowray.config.balance import (
    BalanceConfig,
    GradNormBalance,
    NoBalance,
    PCGradBalance,
    SharesBalance,
)
from flowray.config.schema import members
from flowray.losses.balance import Balancer, Measured, gradient_metrics

NAMES = ("flow", "kl", "dino")
METHODS = (
    SharesBalance(every=1),
    GradNormBalance(lr=0.1),
    GradNormBalance(alpha=0),
    PCGradBalance(),
)
SIGNS = [torch.tensor(signs, dtype=torch.float64) for signs in product((-1.0, 1.0), repeat=3)]


def run(config: BalanceConfig, gramian: Tensor, kl: float | None = None) -> list[float]:
    """The multipliers after 20 steps, all losses falling at one rate. kl: how that loss starts."""
    balancer, ones = Balancer(config), dict.fromkeys(NAMES, 1.0)
    for step in range(20):
        now = [0.9**step] * 3
        if step == 0 and kl is not None:
            now[1] = kl
        losses = dict(zip(NAMES, now, strict=True))
        balancer.update(Measured(gramian, losses, ones, ones, seed=step))
    return [balancer.multiplier(name) for name in NAMES]


@pytest.mark.parametrize("config", METHODS, ids=lambda config: f"{config.kind}")
@pytest.mark.parametrize("relative", [1e-15, 1e-7])
class TestRelativeRounding:
    """Every entry of the Gramian a little more or less, as fp64 (1e-15) and fp32 (1e-7) round."""

    def test_equal_orthogonal_gradients(self, config: BalanceConfig, relative: float) -> None:
        exact = run(config, torch.eye(3, dtype=torch.float64))
        for sign in SIGNS:
            noise = relative * torch.outer(sign, sign.flip(0))
            found = run(config, torch.eye(3, dtype=torch.float64) + noise)
            assert found == pytest.approx(exact, rel=1e-4)

    def test_gradients_along_each_other(self, config: BalanceConfig, relative: float) -> None:
        """The second is minus half of the first: PCGrad leaves 0 of it, or a rounding error."""
        rows = torch.tensor([[2.0, 0.0], [-1.0, 0.0], [0.0, 1.0]], dtype=torch.float64)
        gramian = rows @ rows.T
        exact = run(config, gramian)
        for sign in SIGNS:
            found = run(config, gramian * (1 + relative * torch.outer(sign, sign)))
            assert found == pytest.approx(exact, rel=1e-4)


@pytest.mark.parametrize("config", METHODS, ids=lambda config: f"{config.kind}")
@pytest.mark.parametrize("noise", [1e-16, 1e-9])
def test_a_gradient_that_is_0_but_for_rounding_is_none(config: BalanceConfig, noise: float) -> None:
    """In the worst case the noise points against the others, and nothing of them would be left."""
    rows = torch.tensor([[1.0, 0.0], [0.0, 0.0], [0.6, 0.8]], dtype=torch.float64)
    exact = run(config, rows @ rows.T)
    for along in ((1.0, 0.0), (-1.0, 0.0), (0.6, -0.8)):
        rows[1] = noise * torch.tensor(along, dtype=torch.float64)
        assert run(config, rows @ rows.T) == pytest.approx(exact, rel=1e-4)


@pytest.mark.parametrize("config", METHODS, ids=lambda config: f"{config.kind}")
def test_a_loss_that_is_0_but_for_rounding(config: BalanceConfig) -> None:
    """exp(x) - 1 - x of a KL that starts at 0 comes out as 1e-9, or as -1e-9."""
    rows = torch.tensor([[1.0, 0.0], [0.2, 0.1], [0.6, 0.8]], dtype=torch.float64)
    exact = run(config, rows @ rows.T, kl=0.0)
    for kl in (1e-9, -1e-9, 1e-16, -1e-16):
        assert run(config, rows @ rows.T, kl=kl) == pytest.approx(exact, rel=1e-4)


@pytest.mark.parametrize("last", [1e-9, -1e-9, 0.0])
def test_a_loss_that_falls_to_0_is_the_fastest(last: float) -> None:
    balancer, ones = Balancer(GradNormBalance(lr=0.1)), dict.fromkeys(NAMES, 1.0)
    for kl in (1.0, last):
        losses = dict(zip(NAMES, (1.0, kl, 1.0), strict=True))
        balancer.update(Measured(torch.eye(3, dtype=torch.float64), losses, ones, ones, seed=0))
    assert balancer.multiplier("kl") < 1 < balancer.multiplier("flow")


def test_the_cosine_of_a_vanished_gradient_is_0() -> None:
    rows = torch.tensor([[1.0, 0.0], [-1e-12, 0.0], [0.6, 0.8]], dtype=torch.float64)
    row = gradient_metrics(rows @ rows.T, dict.fromkeys(NAMES, 1.0))
    assert row["grad/cos_flow_kl"] == row["grad/cos_kl_dino"] == 0
    assert row["grad/cos_flow_dino"] == pytest.approx(0.6)


def test_every_method_is_tried() -> None:
    assert {type(config) for config in METHODS} == set(members(BalanceConfig)) - {NoBalance}
