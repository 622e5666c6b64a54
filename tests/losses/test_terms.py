"""Loss terms: one contract for all, each formula against an independent one, and the objective
that joins them.
"""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support import tiny_recipe
from torch import Tensor
from torch.distributions import Categorical, Normal, kl_divergence
from torch.nn.functional import normalize

from flowray.config.keys import describe
from flowray.config.losses import (
    AnchorLossConfig,
    ClipLossConfig,
    DinoLossConfig,
    FlowLossConfig,
    KLLossConfig,
    LossConfig,
    LpipsLossConfig,
    NormLossConfig,
    RepaLossConfig,
    TermConfig,
    TVLossConfig,
)
from flowray.config.schema import members
from flowray.flow.path import sample_path
from flowray.losses.terms import (
    Forward,
    flow_mse,
    info_nce,
    kl_per_dim,
    loss_term,
    side_metrics,
    soft_entropy,
    total_variation,
)
from flowray.losses.total import Batch, Objective, active_terms, total_loss
from flowray.model.assemble import build_model
from flowray.model.posterior import Posterior
from flowray.model.semantic import Views

SHAPE = (4, 2, 3, 3)


def noise(seed: int, shape: tuple[int, ...] = SHAPE) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def make_leaves() -> dict[str, Tensor]:
    leaves = {
        "mu": noise(0),
        "logvar": 0.3 * noise(1),
        "v": noise(2),
        "image": noise(3, (4, 8)),
        "scale": torch.tensor(10.0),
    }
    leaves |= {"head": noise(7, (18, 6)), "projector": noise(8, (9, 5))}
    for leaf in leaves.values():
        leaf.requires_grad_(True)
    return leaves


def forward_of(leaves: dict[str, Tensor], source_grad: str = "full") -> Forward:
    """A forward pass made by hand: linear stand-ins for the networks, so that the terms alone
    decide where gradients go.
    """
    posterior = Posterior(leaves["mu"], leaves["logvar"])
    z0, z1 = posterior.sample(noise(4)), noise(5)
    path = sample_path(
        torch.rand(4, generator=torch.Generator().manual_seed(6)), z0, z1, 1e-5, source_grad
    )
    v_pred = 0.5 * path.xt + leaves["v"]
    estimate = path.xt + (1 - path.t).view(-1, 1, 1, 1) * v_pred
    views = Views(
        clip=(
            normalize(z0.flatten(1)[:, :8], dim=1),
            normalize(leaves["image"], dim=1),
            leaves["scale"],
        ),
        dino=(z0.flatten(1) @ leaves["head"], noise(9, (4, 6))),
        repa=((v_pred.flatten(2) @ leaves["projector"]), noise(10, (4, 2, 5))),
        lpips=(estimate - z1).square().flatten(1).mean(1),
    )
    return Forward(posterior, z0, z1, path, v_pred, (), views)


def forward_pass(source_grad: str = "full") -> tuple[Forward, dict[str, Tensor]]:
    """A forward pass, and the leaves that gradients may reach."""
    leaves = make_leaves()
    return forward_of(leaves, source_grad), leaves


class LossContract:
    """What every term must do; `reaches`: the leaves of `forward_pass` that its gradient must
    and may reach.
    """

    config: TermConfig
    reaches: set[str]
    lowest = 0.0

    def perfect(self, forward: Forward) -> Forward:
        """The forward pass at which the term is at its lowest."""
        raise NotImplementedError

    def test_finite_scalar_above_its_lowest(self) -> None:
        loss = loss_term(self.config, forward_pass()[0])
        assert loss.shape == ()
        assert loss.dtype == torch.float32
        assert bool(torch.isfinite(loss))
        assert float(loss.detach()) > self.lowest

    def test_gradient_reaches_exactly_what_it_should(self) -> None:
        forward, leaves = forward_pass()
        loss_term(self.config, forward).backward()
        assert {
            name for name, leaf in leaves.items() if leaf.grad is not None and bool(leaf.grad.any())
        } == self.reaches

    def test_lowest_at_its_ideal(self) -> None:
        ideal = self.perfect(forward_pass()[0])
        assert float(loss_term(self.config, ideal).detach()) == pytest.approx(self.lowest, abs=1e-5)

    def test_falls_along_its_gradient(self) -> None:
        forward, leaves = forward_pass()
        loss = loss_term(self.config, forward)
        grads = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
        with torch.no_grad():
            for leaf, grad in zip(leaves.values(), grads, strict=True):
                if grad is not None:
                    leaf -= 1e-2 * grad
        assert float(loss_term(self.config, forward_of(leaves)).detach()) < float(loss.detach())


class NeedsItsNetwork(LossContract):
    """A term on what a semantic network made."""

    def test_without_its_network_it_says_so(self) -> None:
        with pytest.raises(RuntimeError, match="semantic network"):
            loss_term(self.config, replace(forward_pass()[0], views=Views()))


class TestFlow(LossContract):
    config = FlowLossConfig()
    reaches = {"mu", "logvar", "v"}

    def perfect(self, forward: Forward) -> Forward:
        return replace(forward, v_pred=forward.path.v_target)

    @pytest.mark.parametrize("mode", ["path", "none"])
    def test_source_grad(self, mode: str) -> None:
        forward, leaves = forward_pass(mode)
        loss_term(self.config, forward).backward()
        reached = {
            name for name, leaf in leaves.items() if leaf.grad is not None and bool(leaf.grad.any())
        }
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


class TestClip(NeedsItsNetwork):
    config = ClipLossConfig(weight=1.0)
    reaches = {"mu", "logvar", "image", "scale"}

    def perfect(self, forward: Forward) -> Forward:
        same = torch.eye(4)
        return replace(forward, views=Views(clip=(same, same, torch.tensor(50.0))))


class TestDino(NeedsItsNetwork):
    config = DinoLossConfig(weight=1.0)
    reaches = {"mu", "logvar", "head"}

    def perfect(self, forward: Forward) -> Forward:
        sure = 20 * torch.eye(6)[:4]
        return replace(forward, views=Views(dino=(sure, sure)))

    def test_is_the_teachers_entropy_plus_the_divergence(self) -> None:
        forward, _ = forward_pass()
        student, teacher = forward.views.dino
        config = DinoLossConfig(weight=1.0, student_temperature=0.5, teacher_temperature=0.25)
        aim, guess = Categorical(logits=teacher / 0.25), Categorical(logits=student / 0.5)
        expected = (aim.entropy() + kl_divergence(aim, guess)).mean().detach()
        assert float(loss_term(config, forward).detach()) == pytest.approx(
            float(expected), rel=1e-5
        )
        told = side_metrics(LossConfig(dino=config), forward)
        assert float(told["ent/teacher"]) == pytest.approx(float(aim.entropy().mean()), rel=1e-5)
        assert float(told["ent/student"]) == pytest.approx(
            float(guess.entropy().mean().detach()), rel=1e-5
        )

    def test_a_sharper_teacher_has_less_entropy(self) -> None:
        logits = noise(0, (4, 6))
        entropies = [
            float(soft_entropy(logits, temperature)) for temperature in (0.04, 0.2, 1.0, 100.0)
        ]
        assert entropies == sorted(entropies)
        assert entropies[-1] == pytest.approx(float(torch.tensor(6.0).log()), abs=1e-3)


class TestRepa(NeedsItsNetwork):
    config = RepaLossConfig(weight=1.0)
    reaches = {"mu", "logvar", "v", "projector"}
    lowest = -1.0

    def perfect(self, forward: Forward) -> Forward:
        features = forward.views.repa[1]
        return replace(forward, views=Views(repa=(3 * features, features)))

    def test_is_minus_the_mean_cosine(self) -> None:
        forward, _ = forward_pass()
        ours, theirs = (x.detach().double().flatten(0, 1) for x in forward.views.repa)
        cosines = [float(a @ b / (a.norm() * b.norm())) for a, b in zip(ours, theirs, strict=True)]
        assert float(loss_term(self.config, forward).detach()) == pytest.approx(
            -sum(cosines) / len(cosines), abs=1e-6
        )


class TestLpips(NeedsItsNetwork):
    config = LpipsLossConfig(weight=1.0, vgg="vgg16.safetensors")
    reaches = {"mu", "logvar", "v"}

    def perfect(self, forward: Forward) -> Forward:
        return replace(forward, views=Views(lpips=torch.zeros(4)))


class TestTV(LossContract):
    config = TVLossConfig(weight=1.0)
    reaches = {"mu", "logvar"}

    def perfect(self, forward: Forward) -> Forward:
        return replace(forward, z0=noise(0, (4, 2, 1, 1)).expand(SHAPE))

    def test_is_the_mean_over_all_pairs_of_neighbours(self) -> None:
        z = noise(0, (2, 3, 2, 4))
        down = [
            float((z[b, c, i + 1, j] - z[b, c, i, j]).abs())
            for b in range(2)
            for c in range(3)
            for i in range(1)
            for j in range(4)
        ]
        across = [
            float((z[b, c, i, j + 1] - z[b, c, i, j]).abs())
            for b in range(2)
            for c in range(3)
            for i in range(2)
            for j in range(3)
        ]
        assert float(total_variation(z)) == pytest.approx(
            sum(down + across) / len(down + across), rel=1e-5
        )

    def test_a_single_cell_varies_not_at_all(self) -> None:
        assert float(total_variation(noise(0, (2, 3, 1, 1)))) == 0


class TestAnchor(LossContract):
    config = AnchorLossConfig(weight=1.0)
    reaches = {"mu"}

    def perfect(self, forward: Forward) -> Forward:
        return replace(forward, z1=forward.posterior.mu.detach())

    def test_one_caption_with_many_pictures_is_drawn_to_their_mean(self) -> None:
        forward, _ = forward_pass()
        mu = torch.zeros_like(forward.z1[:1], requires_grad=True)
        shared = Posterior(mu.expand_as(forward.z1), forward.posterior.logvar)
        loss = loss_term(self.config, replace(forward, posterior=shared))
        loss.backward()
        assert mu.grad is not None
        torch.testing.assert_close(-mu.grad, 2 * forward.z1.mean(0, keepdim=True) / mu.numel())

    def test_likelihood_is_lowest_at_the_mean_and_spread_of_the_pictures(self) -> None:
        """And is there the entropy of that Gaussian, without its constant."""
        forward, _ = forward_pass()
        mean, spread = forward.z1.mean(0), forward.z1.var(0, unbiased=False)
        fitted = [
            x.expand_as(forward.z1).clone().requires_grad_(True) for x in (mean, spread.log())
        ]
        loss = loss_term(
            self.config.model_copy(update={"form": "likelihood"}),
            replace(forward, posterior=Posterior(*fitted)),
        )
        gradients = torch.autograd.grad(loss, fitted)
        assert all(float(g.sum(0).abs().max()) < 1e-6 for g in gradients)
        normal = torch.distributions.Normal(mean, spread.sqrt())
        best = float(normal.entropy().mean()) - math.log(2 * math.pi) / 2
        assert float(loss.detach()) == pytest.approx(best, abs=1e-5)


class TestNorm(LossContract):
    config = NormLossConfig(weight=1.0)
    reaches = {"mu", "logvar", "v"}

    def perfect(self, forward: Forward) -> Forward:
        return replace(forward, v_pred=-forward.path.v_target)  # the length alone counts

    def test_is_the_squared_difference_of_lengths(self) -> None:
        forward, _ = forward_pass()
        pairs = zip(forward.v_pred.detach(), forward.path.v_target.detach(), strict=True)
        expected = [
            (float(v.square().sum()) ** 0.5 - float(w.square().sum()) ** 0.5) ** 2 for v, w in pairs
        ]
        assert float(loss_term(self.config, forward).detach()) == pytest.approx(
            sum(expected) / 4, rel=1e-5
        )

    def test_the_target_is_detached_and_a_silent_network_is_finite(self) -> None:
        forward, leaves = forward_pass()
        loss_term(self.config, replace(forward, v_pred=leaves["v"])).backward()
        assert leaves["mu"].grad is None
        still = torch.zeros(SHAPE, requires_grad=True)
        loss_term(self.config, replace(forward, v_pred=still)).backward()
        assert still.grad is not None
        assert bool(still.grad.isfinite().all())


def contracts(cls: type[LossContract] = LossContract) -> list[type[LossContract]]:
    return [
        found
        for sub in cls.__subclasses__()
        for found in ([sub] if hasattr(sub, "config") else []) + contracts(sub)
    ]


def terms_of(name: str) -> set[type]:
    """The term that LossConfig has under a name; none of what is not a term."""
    found = members(LossConfig.model_fields[name].annotation)
    return {term for term in found if issubclass(term, TermConfig)}


def term_names() -> list[str]:
    return [name for name in LossConfig.model_fields if terms_of(name)]


def all_terms() -> set[type]:
    return set().union(*map(terms_of, LossConfig.model_fields))


def test_every_term_has_its_contract_test() -> None:
    assert {type(cls.config) for cls in contracts()} == all_terms()
    needs = {"lpips": {"vgg": "vgg.pth"}}
    weighed = {name: {"weight": 1.0, **needs.get(name, {})} for name in term_names()}
    assert {
        type(term) for term in active_terms(LossConfig.model_validate(weighed)).values()
    } == all_terms()


def test_every_term_has_its_metric_keys() -> None:
    keys = [f"{kind}/{name}" for name in term_names() for kind in ("loss", "grad", "weight")]
    keys += [f"grad/{name}_weighted" for name in term_names()]
    assert [key for key in keys if describe(key) is None] == []


def test_gaussian_kl_is_torch_distributions() -> None:
    mu, logvar = noise(0), noise(1)
    expected = kl_divergence(
        Normal(mu, (logvar / 2).exp()), Normal(torch.zeros(SHAPE), torch.ones(SHAPE))
    )
    assert torch.allclose(kl_per_dim(mu, logvar, "gaussian"), expected, atol=1e-5)


@pytest.mark.parametrize("form", ["box", "gaussian"])
def test_kl_raw_is_the_sum_of_the_configured_form(form: str) -> None:
    forward, _ = forward_pass()
    config = LossConfig(kl=KLLossConfig(form=form))
    mu, logvar = forward.posterior.mu.detach().double(), forward.posterior.logvar.detach().double()
    square = (0.3 * mu) ** 6 if form == "box" else mu**2
    expected = float((0.5 * (square + logvar.exp() - 1 - logvar)).flatten(1).sum(1).mean())
    raw = float(side_metrics(config, forward)["loss/kl_raw"])
    assert raw == pytest.approx(expected, rel=1e-5)
    assert raw == pytest.approx(18 * float(loss_term(config.kl, forward).detach()), rel=1e-6)


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
    text, image = (normalize(noise(s, (6, 5)), dim=1) for s in (0, 1))
    scale = torch.tensor(7.0)
    logits = [[float(scale) * float(text[i] @ image[j]) for j in range(6)] for i in range(6)]
    table = torch.tensor(logits, dtype=torch.float64)
    rows = sum(float(torch.logsumexp(table[i], 0) - table[i, i]) for i in range(6)) / 6
    columns = sum(float(torch.logsumexp(table[:, i], 0) - table[i, i]) for i in range(6)) / 6
    assert float(info_nce(text, image, scale)) == pytest.approx((rows + columns) / 2, abs=1e-5)
    # alone there is nobody to ask
    assert float(info_nce(text, image, scale, gather=True)) == float(info_nce(text, image, scale))


def test_info_nce_keeps_fp32_under_autocast() -> None:
    text, image = (normalize(noise(s, (16, 32)), dim=1) for s in (0, 1))
    exact = info_nce(text, image, torch.tensor(100.0))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.allclose(info_nce(text, image, torch.tensor(100.0)), exact, rtol=1e-6)


def test_objective_end_to_end(tmp_path: Path) -> None:
    """Null samples train towards another latent, while KL and contrastive losses keep the true
    pair; every parameter learns.
    """
    recipe = tiny_recipe(
        tmp_path, **{"loss.clip.weight": 1.0, "model.semantic.hidden": 4, "model.semantic.dim": 8}
    )
    model = build_model(recipe.model, recipe.loss, 0)
    with torch.no_grad():
        for p in model.velocity.parameters():
            p += 0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(0))
    shape = (3, *recipe.model.latent.shape)
    z1 = noise(1, shape)
    null = torch.tensor([False, True, False])
    batch = Batch(
        ["a red circle", "a blue square", "cross"],
        z1,
        z1[[0, 2, 2]],
        noise(2, shape),
        torch.tensor([0.1, 0.5, 0.9]),
        null,
    )
    losses, forward = Objective(model, recipe.flow, recipe.loss)(batch)
    assert list(losses) == ["flow", "kl", "clip"]
    assert torch.equal(forward.path.x1, batch.target)
    assert torch.equal(forward.z1, z1)
    assert torch.allclose(
        losses["flow"],
        (forward.v_pred - (forward.path.x1 - forward.path.x0)).square().mean(),
        rtol=1e-3,
    )
    total_loss(losses, {"flow": 1.0, "kl": 1.0, "clip": 1.0}).backward()
    assert [
        name for name, p in model.trainable().items() if p.grad is None or not p.grad.any()
    ] == []
    swapped, _ = Objective(model, recipe.flow, recipe.loss)(replace(batch, target=z1))
    assert float(swapped["flow"].detach()) != float(losses["flow"].detach())
    assert torch.equal(swapped["kl"], losses["kl"])
    assert torch.equal(swapped["clip"], losses["clip"])
