"""Every head: shape, gradients, what it may and may not read, and its start near the prior."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from flowray.config.base import LatentSpec
from flowray.config.model import ConvHead, GridHead, HeadConfig, PooledHead, PosteriorConfig
from flowray.config.schema import members
from flowray.model.heads import build_head
from flowray.model.posterior import make_posterior
from flowray.model.text import TextTokens

WIDTH = 24
SPECS = [LatentSpec(channels=4, height=8, width=8), LatentSpec(channels=3, height=4, width=6)]


def tokens(batch: int = 3, count: int = 5, seed: int = 0) -> TextTokens:
    values = torch.randn(batch, count, WIDTH, generator=torch.Generator().manual_seed(seed))
    mask = torch.ones(batch, count, dtype=torch.bool)
    mask[1, 3:] = False
    return TextTokens(values, mask)


class HeadContract:
    """What every member of HeadConfig must do."""

    config: PooledHead | GridHead | ConvHead

    def head(self, spec: LatentSpec = SPECS[0]) -> nn.Module:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return build_head(self.config, WIDTH, spec)

    @pytest.mark.parametrize("spec", SPECS, ids=str)
    def test_shape(self, spec: LatentSpec) -> None:
        mu, logvar = self.head(spec)(tokens())
        assert mu.shape == logvar.shape == (3, *spec.shape)
        assert mu.dtype == logvar.dtype == torch.float32

    def test_gradients_reach_every_parameter(self) -> None:
        head = self.head()
        mu, logvar = head(tokens())
        w = torch.randn(2, *mu.shape, generator=torch.Generator().manual_seed(1))
        (w[0] * mu + w[1] * logvar).sum().backward()
        without = [name for name, p in head.named_parameters() if p.grad is None or not p.grad.any()]
        assert without == []

    def test_gradient_reaches_the_tokens(self) -> None:
        given = tokens()
        given.values.requires_grad_(True)
        self.head()(given)[0].square().sum().backward()
        grad = given.values.grad
        assert grad is not None
        assert bool(grad[given.mask].abs().sum(-1).gt(0).all())
        assert not grad[~given.mask].any()

    def test_reads_the_tokens_but_not_the_masked_ones(self) -> None:
        head, given = self.head(), tokens()
        mu, logvar = head(given)
        changed = given.values.clone()
        changed[~given.mask] = 100.0
        same = head(TextTokens(changed, given.mask))
        assert torch.allclose(same[0], mu, atol=1e-6)
        assert torch.allclose(same[1], logvar, atol=1e-6)
        other = head(tokens(seed=1))
        assert float((other[0] - mu).detach().abs().mean()) > 1e-3

    def test_samples_do_not_mix(self) -> None:
        head, given = self.head(), tokens()
        alone = head(TextTokens(given.values[1:2, :3], given.mask[1:2, :3]))
        assert torch.allclose(alone[0], head(given)[0][1:2], atol=1e-5)

    def test_starts_near_the_prior(self) -> None:
        with torch.no_grad():
            posterior = make_posterior(PosteriorConfig(), *self.head()(tokens(batch=16)))
        assert float(posterior.mu.square().mean().sqrt()) < 0.4
        assert float((posterior.std - 1).abs().mean()) < 0.3

    def test_mu_and_logvar_are_different_outputs(self) -> None:
        mu, logvar = self.head()(tokens())
        assert not torch.allclose(mu, logvar, atol=1e-3)


class TestPooled(HeadContract):
    config = PooledHead(hidden=32)


class TestPooledLinear(HeadContract):
    config = PooledHead(layers=1)


class TestGrid(HeadContract):
    config = GridHead(hidden=32, heads=4)

    def test_cells_differ(self) -> None:
        """A grid without positions would give every cell the same latent."""
        mu, _ = self.head()(tokens())
        assert float(mu.detach().flatten(2).std(dim=2).mean()) > 1e-3


class TestGridNoConv(HeadContract):
    config = GridHead(hidden=16, heads=2, layers=1, convs=0)


class TestConv(HeadContract):
    config = ConvHead(hidden=8, mlp=32)


def test_every_member_has_its_contract_test() -> None:
    assert {type(cls.config) for cls in HeadContract.__subclasses__()} == set(members(HeadConfig))


def test_posterior_clamps_and_draws() -> None:
    mu, logvar = torch.full((2, 1, 2, 2), 3.0), torch.tensor([-50.0, 50.0]).view(2, 1, 1, 1).expand(2, 1, 2, 2)
    posterior = make_posterior(PosteriorConfig(), mu.bfloat16(), logvar)
    assert posterior.mu.dtype == posterior.logvar.dtype == torch.float32
    assert posterior.logvar.flatten(1)[:, 0].tolist() == [-6.0, 6.0]
    noise: Tensor = torch.ones(2, 1, 2, 2)
    assert torch.allclose(posterior.sample(noise), 3 + (posterior.logvar / 2).exp())
    assert torch.equal(posterior.sample(torch.zeros_like(noise)), posterior.mu)
