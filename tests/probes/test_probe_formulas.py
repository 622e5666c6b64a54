"""Probe definitions against identities, hand-made fields and the numbers in the users' logs."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from flowray.config.errors import InputError
from flowray.flow.path import sample_path, velocity_target
from flowray.model.posterior import Posterior
from flowray.probes.battery import derangement
from flowray.probes.field import best_gain, cosines, field_metrics, nmse, speed_ratios, time_bins
from flowray.probes.latent import (
    pairwise_cosine,
    posterior_metrics,
    scale_metrics,
    start_metrics,
    text_metrics,
)
from flowray.probes.rollout import (
    endpoint_metrics,
    ends_of,
    per_sample_mse,
    shoot,
    shoot_metrics,
    teacher_metrics,
)
from flowray.probes.vae import psnr


def sample_nmse(v_pred: Tensor, v_target: Tensor) -> Tensor:
    """||v_pred - v_target||^2 / ||v_target||^2 of every sample, (B,)."""
    return (v_pred - v_target).flatten(1).square().sum(1) / v_target.flatten(1).square().sum(1)


def noise(seed: int, batch: int = 32) -> Tensor:
    return torch.randn(batch, 4, 4, 4, generator=torch.Generator().manual_seed(seed))


def with_ratio_and_cosine(k: float, c: float) -> tuple[Tensor, Tensor]:
    """A prediction whose every sample has speed ratio k and cosine c to its target."""
    target = noise(0).flatten(1)
    other = noise(1).flatten(1)
    other = other - (other * target).sum(1, True) / target.square().sum(1, True) * target
    size = target.norm(dim=1, keepdim=True)
    v = k * (c * target + (1 - c * c) ** 0.5 * size * other / other.norm(dim=1, keepdim=True))
    return v.view(-1, 4, 4, 4), target.view(-1, 4, 4, 4)


def test_nmse_identity_per_sample() -> None:
    v_pred, v_target = (
        noise(0) * torch.linspace(0.01, 5, 32).view(-1, 1, 1, 1) + 0.5 * noise(1),
        noise(1),
    )
    k, c = speed_ratios(v_pred, v_target), cosines(v_pred, v_target)
    assert torch.allclose(sample_nmse(v_pred, v_target), 1 + k**2 - 2 * k * c, rtol=1e-4)


def test_nmse_is_the_ratio_of_batch_means() -> None:
    v_pred, v_target = noise(0), noise(1) * torch.linspace(0.1, 3, 32).view(-1, 1, 1, 1)
    assert float(nmse(v_pred, v_target)) == pytest.approx(
        float((v_pred - v_target).square().mean() / v_target.square().mean()), rel=1e-5
    )
    assert float(nmse(v_pred, v_target)) != pytest.approx(
        float(sample_nmse(v_pred, v_target).mean()), rel=0.1
    )


def test_trivial_predictors() -> None:
    v = noise(0)
    assert float(nmse(torch.zeros_like(v), v)) == pytest.approx(1.0)
    assert torch.allclose(sample_nmse(torch.zeros_like(v), v), torch.ones(32))
    assert float(nmse(v, v)) == 0
    assert float(nmse(-v, v)) == pytest.approx(4.0)


def test_the_logs_gain_makes_it_worse() -> None:
    """Ratio 0.29, cosine 0.05: nmse 1.06; the logs' gain of 3.5 restores the speed and gives
    1.9.
    """
    v_pred, v_target = with_ratio_and_cosine(0.29, 0.05)
    assert float(nmse(v_pred, v_target)) == pytest.approx(1.06, abs=0.01)
    assert float(nmse(3.5 * v_pred, v_target)) == pytest.approx(1.93, abs=0.03)


def test_best_gain_is_the_least_squares_one() -> None:
    v_pred, v_target = with_ratio_and_cosine(0.29, 0.05)
    gain = float(best_gain(v_pred, v_target))
    assert gain == pytest.approx(0.05 / 0.29, rel=1e-3)  # c / k where all samples agree
    at = {g: float(nmse(g * v_pred, v_target)) for g in (gain - 0.05, gain, gain + 0.05)}
    assert min(at, key=at.__getitem__) == gain
    assert at[gain] < 1


def test_time_bins_hold_both_ends() -> None:
    assert time_bins(torch.tensor([0.0, 0.0999, 0.1, 0.55, 0.95, 1.0])).tolist() == [
        0,
        0,
        1,
        5,
        9,
        9,
    ]


def test_field_metrics_by_bin() -> None:
    v_target, t = noise(0, 20), torch.arange(20) / 20 + 0.02
    v_pred = torch.where((t < 0.5).view(-1, 1, 1, 1), v_target, torch.zeros_like(v_target))
    rows = field_metrics(v_pred, v_target, t)
    assert [rows[f"flow/nmse_t{b}"] for b in range(10)] == pytest.approx([0.0] * 5 + [1.0] * 5)
    assert [rows[f"flow/cos_t{b}"] for b in range(10)] == pytest.approx([1.0] * 5 + [0.0] * 5)
    assert rows["flow/cos"] == pytest.approx(0.5)
    assert rows["flow/speed_ratio"] == pytest.approx(0.5)
    assert rows["gain/best"] == pytest.approx(1.0)
    assert set(field_metrics(v_pred[:3], v_target[:3], t[:3])) == {
        "flow/cos",
        "flow/nmse",
        "flow/speed_ratio",
        "gain/best",
    } | {f"flow/{name}_t{b}" for name in ("cos", "nmse") for b in (0, 1)}


def test_perfect_field_hits_and_doing_nothing_scores_zero() -> None:
    z0, z1, others = noise(0), 2 * noise(1), torch.arange(32).roll(1)
    variance = float(z1.var(unbiased=False))
    v = velocity_target(z0, z1, 1e-5)
    rows = shoot_metrics(shoot(lambda x, t: v, z0, 100), z0, z1, others, variance)
    assert rows["shoot/nmse"] < 1e-8
    assert rows["shoot/skill"] == pytest.approx(1.0)
    # another's picture: E(a - b)^2 = 2 Var
    assert rows["shoot/cond_gain"] == pytest.approx(2.0, abs=0.1)
    idle = shoot_metrics(shoot(lambda x, t: 0 * x, z0, 100), z0, z1, others, variance)
    assert idle["shoot/skill"] == pytest.approx(0.0, abs=1e-6)
    assert idle["shoot/nmse"] == pytest.approx((1 + variance) / variance, rel=0.05)
    mean = shoot_metrics(torch.zeros_like(z1) + z1.mean(), z0, z1, others, variance)
    assert mean["shoot/nmse"] == pytest.approx(1.0, abs=1e-3)  # predicting the mean
    assert mean["shoot/cond_gain"] == pytest.approx(0.0, abs=1e-6)


def test_swapped_shot_is_a_shot_from_the_borrowed_source() -> None:
    z0, z1, others = (
        noise(0),
        noise(1),
        torch.randperm(32, generator=torch.Generator().manual_seed(0)),
    )

    def field(x: Tensor, t: Tensor) -> Tensor:
        return torch.sin(x) + t.view(-1, 1, 1, 1)

    rows = shoot_metrics(shoot(field, z0, 20), z0, z1, others, 1.7)
    really = float(per_sample_mse(shoot(field, z0[others], 20), z1).mean())
    own = float(per_sample_mse(shoot(field, z0, 20), z1).mean())
    assert rows["shoot/cond_gain"] == pytest.approx((really - own) / 1.7, rel=1e-5)
    assert rows["shoot/mse"] == pytest.approx(own)


def test_teacher_and_endpoint_metrics() -> None:
    z0, z1 = noise(0), 3 * noise(1)
    teacher = teacher_metrics(z0, z1, 1e-5)
    assert set(teacher) == {f"teacher/mse@{n}" for n in (5, 10, 20, 50, 100)}
    assert max(teacher.values()) <= 1e-9
    ends = ends_of(lambda x, t: 3 * (t.view(-1, 1, 1, 1) * 3).cos() * x, z0)
    falling = endpoint_metrics(ends, z0 * torch.sin(torch.tensor(3.0)).exp())
    values = [falling[f"flow/endpt_rmse@{k}"] for k in (8, 16, 32, 64)]
    assert values == sorted(values, reverse=True)
    assert values[-1] < values[0] / 4


@pytest.mark.parametrize(
    "captions",
    [["a", "b"], list("aabb"), list("abcabcab"), list("aaabbbccd"), [str(i) for i in range(9)]],
)
def test_derangement_gives_everyone_another_caption(captions: list[str]) -> None:
    others = derangement(captions)
    assert sorted(others.tolist()) == list(range(len(captions)))
    assert all(captions[i] != captions[int(j)] for i, j in enumerate(others))


def test_derangement_where_it_cannot() -> None:
    others = derangement(list("aaab"))
    assert sorted(others.tolist()) == [0, 1, 2, 3]
    assert all(i != int(j) for i, j in enumerate(others))
    with pytest.raises(InputError, match="captions"):
        derangement(["same"] * 4)


def test_text_metrics() -> None:
    shared = Posterior(noise(0, 1).expand(8, -1, -1, -1), torch.zeros(8, 4, 4, 4))
    rows = text_metrics(shared, noise(1, 8), noise(2, 8))
    assert rows["text/cos_mu"] == pytest.approx(1.0, abs=1e-5)  # the text does not arrive
    assert rows["text/snr"] == pytest.approx(0.0, abs=1e-6)
    dead = Posterior(torch.zeros(8, 4, 4, 4) + 1e-3 * noise(0, 8), torch.zeros(8, 4, 4, 4))
    rows = text_metrics(dead, noise(1, 8), noise(2, 8))
    assert abs(rows["text/cos"]) < 0.1  # low by noise alone: no evidence that text arrives
    assert abs(rows["text/cos_same"]) < 0.15
    clear = Posterior(3 * noise(0, 8), torch.full((8, 4, 4, 4), -6.0))
    rows = text_metrics(clear, noise(1, 8), noise(2, 8))
    assert rows["text/cos_same"] > 0.99
    assert abs(rows["text/cos_mu"]) < 0.1
    assert rows["text/snr"] == pytest.approx(
        float((3 * noise(0, 8)).var(0, unbiased=False).mean()) / torch.tensor(-6.0).exp().item(),
        rel=1e-4,
    )


def test_pairwise_cosine_is_the_mean_over_pairs() -> None:
    x = noise(0, 5).flatten(1)
    pairs = [
        float(torch.cosine_similarity(x[i], x[j], dim=0))
        for i in range(5)
        for j in range(5)
        if i != j
    ]
    assert pairwise_cosine(x) == pytest.approx(sum(pairs) / len(pairs), abs=1e-6)


def test_posterior_and_scale_metrics() -> None:
    posterior = Posterior(
        2 * torch.ones(2, 1, 2, 2),
        torch.log(torch.tensor([0.25, 4.0])).view(2, 1, 1, 1).expand(2, 1, 2, 2),
    )
    z0 = posterior.sample(torch.zeros(2, 1, 2, 2))
    rows = posterior_metrics(posterior) | start_metrics(z0)
    assert [
        rows[key]
        for key in (
            "mu/abs_mean",
            "mu/rms",
            "std/min",
            "std/max",
            "std/mean",
            "logvar/mean",
            "z_init/mean",
            "z_init/var",
        )
    ] == (pytest.approx([2, 2, 0.5, 2, 1.25, 0, 2, 0]))
    path = sample_path(
        torch.full((2,), 0.5), torch.ones(2, 1, 2, 2), 3 * torch.ones(2, 1, 2, 2), 0.0
    )
    rows = scale_metrics(path)
    assert [
        rows[f"scale/{name}"] for name in ("z0_norm", "z1_norm", "xt_norm", "v_norm", "ratio")
    ] == pytest.approx([2, 6, 4, 4, 3])


def test_psnr() -> None:
    a = torch.zeros(1, 3, 4, 4)
    assert psnr(a, a + 0.02) == pytest.approx(40.0, abs=1e-3)  # peak 2, error 0.02
    assert psnr(a + 5, a + 9) > 100  # both clamp to 1
