"""Loss terms: one contract for all, each formula against an independent one, and the objective that joins them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support import tiny_recipe
from torch import Tensor
from torch.distributions import Normal, kl_divergence

from flowray.config.losses import ClipLossConfig, Cosine, FlowLossConfig, KLLossConfig, Linear, LossConfig, Until
from flowray.config.schema import members
from flowray.flow.path import sample_path
from flowray.losses.schedule import weight_at
from flowray.losses.terms import Forward, flow_mse, info_nce, kl_per_dim, loss_term
from flowray.losses.total import Batch, Objective, active_terms, total_loss, weights_at
from flowray.model.assemble import build_model
from flowray.model.posterior import Posterior

SHAPE = (4, 2, 3, 3)


def noise(seed: int, shape: tuple[int, ...] = SHAPE) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def forward_pass(source_grad: str = "full") -> tuple[Forward, dict[str, Tensor]]:
    """A forward pass made by hand, and the leaves that gradients may reach."""
    leaves = {"mu": noise(0), "logvar": 0.3 * noise(1), "v": noise(2), "image": noise(3, (4, 8)), "scale": torch.tensor(10.0)}
    for leaf in leaves.values():
        leaf.requires_grad_(True)
    posterior = Posterior(leaves["mu"], leaves["logvar"])
    z0, z1 = posterior.sample(noise(4)), noise(5)
    path = sample_path(torch.rand(4, generator=torch.Generator().manual_seed(6)), z0, z1, 1e-5, source_grad)
    text = torch.nn.functional.normalize(z0.flatten(1)[:, :8], dim=1)
    embeddings = (text, torch.nn.functional.normalize(leaves["image"], dim=1))
    return Forward(posterior, z0, z1, path, 0.5 * path.xt + leaves["v"], embeddings, leaves["scale"]), leaves


class LossContract:
    """What every term must do; `reaches`: the leaves of `forward_pass` that its gradient must and may reach."""

    config: FlowLossConfig | KLLossConfig | ClipLossConfig
    reaches: set[str]

    def perfect(self, forward: Forward) -> Forward:
        """The forward pass at which the term is 0."""
        raise NotImplementedError

    def test_finite_non_negative_scalar(self) -> None:
        loss = loss_term(self.config, forward_pass()[0])
        assert loss.shape == ()
        assert loss.dtype == torch.float32
        assert bool(torch.isfinite(loss))
        assert float(loss.detach()) > 0

    def test_gradient_reaches_exactly_what_it_should(self) -> None:
        forward, leaves = forward_pass()
        loss_term(self.config, forward).backward()
        assert {name for name, leaf in leaves.items() if leaf.grad is not None and bool(leaf.grad.any())} == self.reaches

    def test_zero_at_its_ideal(self) -> None:
        ideal = self.perfect(forward_pass()[0])
        assert float(loss_term(self.config, ideal).detach()) == pytest.approx(0, abs=1e-5)

    def test_falls_along_its_gradient(self) -> None:
        forward, leaves = forward_pass()
        loss = loss_term(self.config, forward)
        grads = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
        with torch.no_grad():
            for leaf, grad in zip(leaves.values(), grads, strict=True):
                if grad is not None:
                    leaf -= 1e-2 * grad
        posterior = Posterior(leaves["mu"], leaves["logvar"])
        z0 = posterior.sample(noise(4))
        path = sample_path(forward.path.t, z0, forward.z1, 1e-5)
        text = torch.nn.functional.normalize(z0.flatten(1)[:, :8], dim=1)
        after = Forward(
            posterior, z0, forward.z1, path, 0.5 * path.xt + leaves["v"],
            (text, torch.nn.functional.normalize(leaves["image"], dim=1)), leaves["scale"],
        )  # fmt: skip
        assert float(loss_term(self.config, after).detach()) < float(loss.detach())


class TestFlow(LossContract):
    config = FlowLossConfig()
    reaches = {"mu", "logvar", "v"}

    def perfect(self, forward: Forward) -> Forward:
        return replace(forward, v_pred=forward.path.v_target)

    @pytest.mark.parametrize("mode", ["path", "none"])
    def test_source_grad(self, mode: str) -> None:
        forward, leaves = forward_pass(mode)
        loss_term(self.config, forward).backward()
        reached = {name for name, leaf in leaves.items() if leaf.grad is not None and bool(leaf.grad.any())}
        assert reached == ({"v"} if mode == "none" else {"mu", "logvar", "v"})

    def test_is_the_mean_square_in_fp32(self) -> None:
        forward, _ = forward_pass()
        half = forward.v_pred.bfloat16()
        expected = (half.double() - forward.path.v_target.double()).square().mean()
        assert torch.allclose(flow_mse(half, forward.path.v_target).double(), expected, rtol=1e-6)


class TestKLBox(LossContract):
    config = KLLossConfig(form="box")
    reaches = {"mu", "logvar"}

    def perfect(self, forward: Forward) -> Forward:
        return replace(forward, posterior=Posterior(torch.zeros(SHAPE), torch.zeros(SHAPE)))


class TestKLGaussian(TestKLBox):
    config = KLLossConfig(form="gaussian")


class TestClip(LossContract):
    config = ClipLossConfig(weight=1.0)
    reaches = {"mu", "logvar", "image", "scale"}

    def perfect(self, forward: Forward) -> Forward:
        same = torch.eye(4)
        return replace(forward, embeddings=(same, same), logit_scale=torch.tensor(50.0))

    def test_without_a_tower_it_says_so(self) -> None:
        with pytest.raises(RuntimeError, match="tower"):
            loss_term(self.config, replace(forward_pass()[0], embeddings=None))


def test_every_term_has_its_contract_test() -> None:
    terms = {term for field in LossConfig.model_fields.values() for term in members(field.annotation)}
    assert {type(cls.config) for cls in LossContract.__subclasses__()} == terms
    assert {type(term) for term in active_terms(LossConfig(clip=ClipLossConfig(weight=1.0))).values()} == terms


def test_gaussian_kl_is_torch_distributions() -> None:
    mu, logvar = noise(0), noise(1)
    expected = kl_divergence(Normal(mu, (logvar / 2).exp()), Normal(torch.zeros(SHAPE), torch.ones(SHAPE)))
    assert torch.allclose(kl_per_dim(mu, logvar, "gaussian"), expected, atol=1e-5)


def test_box_leaves_mu_free_within_2_and_holds_it_beyond_3() -> None:
    mu = torch.tensor([-6.0, -4.0, -2.0, -1.0, 0.0, 1.0, 2.0, 4.0, 6.0], requires_grad=True)
    (grad,) = torch.autograd.grad(kl_per_dim(mu, torch.zeros(9), "box").sum(), mu)
    inside = mu.detach().abs() <= 2
    assert float(grad[inside].abs().max()) < 0.1
    assert bool((grad[~inside].sign() == mu.detach()[~inside].sign()).all())
    assert float(grad[~inside].abs().min()) > 1  # gaussian: 4
    logvar = torch.tensor([-1.0, 0.0, 1.0], requires_grad=True)
    (grad,) = torch.autograd.grad(kl_per_dim(torch.ones(3), logvar, "box").sum(), logvar)
    assert torch.allclose(grad, 0.5 * (logvar.detach().exp() - 1))


def test_info_nce_is_the_plain_formula() -> None:
    text, image = (torch.nn.functional.normalize(noise(s, (6, 5)), dim=1) for s in (0, 1))
    scale = torch.tensor(7.0)
    logits = [[float(scale) * float(text[i] @ image[j]) for j in range(6)] for i in range(6)]
    table = torch.tensor(logits, dtype=torch.float64)
    rows = sum(float(torch.logsumexp(table[i], 0) - table[i, i]) for i in range(6)) / 6
    columns = sum(float(torch.logsumexp(table[:, i], 0) - table[i, i]) for i in range(6)) / 6
    assert float(info_nce(text, image, scale)) == pytest.approx((rows + columns) / 2, abs=1e-5)


def test_info_nce_keeps_fp32_under_autocast() -> None:
    text, image = (torch.nn.functional.normalize(noise(s, (16, 32)), dim=1) for s in (0, 1))
    exact = info_nce(text, image, torch.tensor(100.0))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.allclose(info_nce(text, image, torch.tensor(100.0)), exact, rtol=1e-6)


def test_schedules() -> None:
    assert [weight_at(2.0, Linear(steps=4), step, 100) for step in (0, 1, 2, 4, 50)] == [0.0, 0.5, 1.0, 2.0, 2.0]
    assert [weight_at(2.0, Linear(fraction=0.1), step, 100) for step in (0, 5, 10, 99)] == [0.0, 1.0, 2.0, 2.0]
    assert [weight_at(2.0, Until(steps=3), step, 100) for step in (0, 2, 3, 99)] == [2.0, 2.0, 0.0, 0.0]
    cosine = [weight_at(2.0, Cosine(floor=0.25), step, 100) for step in (0, 50, 100, 200)]
    assert cosine == pytest.approx([2.0, 1.25, 0.5, 0.5])
    assert weight_at(2.0, FlowLossConfig().schedule, 0, 100) == 2.0


def test_active_terms_weights_and_total() -> None:
    config = LossConfig(kl=KLLossConfig(weight=3.0, schedule=Linear(steps=10)), clip=ClipLossConfig(weight=0.0))
    assert list(active_terms(config)) == ["flow", "kl"]
    assert weights_at(config, 5, 100) == {"flow": 1.0, "kl": 1.5}
    losses = {"flow": torch.tensor(0.5), "kl": torch.tensor(2.0)}
    assert float(total_loss(losses, weights_at(config, 5, 100))) == pytest.approx(3.5)


def test_objective_end_to_end(tmp_path: Path) -> None:
    """Null samples train towards another latent, while KL and contrastive losses keep the true pair; every parameter learns."""
    recipe = tiny_recipe(tmp_path, **{"loss.clip.weight": 1.0, "model.semantic.hidden": 4, "model.semantic.dim": 8})
    model = build_model(recipe.model, recipe.loss, 0)
    with torch.no_grad():
        for p in model.velocity.parameters():
            p += 0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(0))
    shape = (3, *recipe.model.latent.shape)
    z1 = noise(1, shape)
    null = torch.tensor([False, True, False])
    batch = Batch(["a red circle", "a blue square", "cross"], z1, z1[[0, 2, 2]], noise(2, shape), torch.tensor([0.1, 0.5, 0.9]), null)
    losses, forward = Objective(model, recipe.flow, recipe.loss)(batch)
    assert list(losses) == ["flow", "kl", "clip"]
    assert torch.equal(forward.path.x1, batch.target)
    assert torch.equal(forward.z1, z1)
    assert torch.allclose(losses["flow"], (forward.v_pred - (forward.path.x1 - forward.path.x0)).square().mean(), rtol=1e-3)
    total_loss(losses, {"flow": 1.0, "kl": 1.0, "clip": 1.0}).backward()
    assert [name for name, p in model.trainable().items() if p.grad is None or not p.grad.any()] == []
    swapped, _ = Objective(model, recipe.flow, recipe.loss)(replace(batch, target=z1))
    assert float(swapped["flow"].detach()) != float(losses["flow"].detach())
    assert torch.equal(swapped["kl"], losses["kl"])
    assert torch.equal(swapped["clip"], losses["clip"])
