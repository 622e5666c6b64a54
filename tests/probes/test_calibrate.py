"""Calibration, shots, interface and data probes against closed forms."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from support import captions
from torch import Tensor

from flowray.config.base import LatentSpec
from flowray.config.flow import AlphaTime, EulerSolver, FlowConfig, LogSNRTime
from flowray.flow.path import sample_path
from flowray.flow.solver import time_grid
from flowray.model.autoencoder import Autoencoder
from flowray.model.latent import LatentScale
from flowray.probes.agreement import (
    agreement_metrics,
    coverage_metrics,
    duplicate_share,
    time_shares,
)
from flowray.probes.calibrate import (
    aligned,
    code_metrics,
    fit_metrics,
    gain_metrics,
    null_metrics,
    variant_metrics,
    view_field,
)
from flowray.probes.interface import histogram, latent_fit, round_trips, same_pictures
from flowray.probes.shots import (
    falling,
    gain_shots,
    heun_metrics,
    shot_metrics,
    significant_bits,
    teacher_rows,
    trace_generation,
    trace_metrics,
)
from flowray.probes.vae import psnr

RHO = 1e-5


def noise(seed: int, n: int = 16) -> Tensor:
    return torch.randn((n, 4, 4, 4), generator=torch.Generator().manual_seed(seed))


TIMES = (
    torch.arange(10)[:, None] + torch.rand((10, 16), generator=torch.Generator().manual_seed(9))
) / 10
Z0, Z1, EPS = noise(0), 0.5 * noise(1), noise(2)
EPS = 0.6 * Z0 + 0.8 * EPS  # the source holds its noise


@pytest.mark.parametrize(
    ("u", "wanted"),
    [
        (Z1 - Z0, (1, -1)),
        (Z0 - Z1, (-1, 1)),
        (Z1, (1, 0)),
        (Z0, (0, 1)),
        (0.3 * (Z1 - Z0), (0.3, -0.3)),
    ],
    ids=["right", "flipped", "x1", "x0", "small"],
)
def test_fit_names_what_was_learnt(u: Tensor, wanted: tuple[float, float]) -> None:
    rows = fit_metrics(view_field(lambda x, t: u, Z0, Z1, EPS, TIMES, RHO))
    assert (rows["field/fit_x1"], rows["field/fit_x0"]) == pytest.approx(wanted, abs=1e-6)
    assert rows["field/fit_share"] == pytest.approx(1.0, abs=1e-9)
    assert rows["field/std"] == pytest.approx(float(u.square().mean().sqrt()), rel=1e-5)


def test_noise_as_target_is_told_from_z0() -> None:
    rows = fit_metrics(view_field(lambda x, t: EPS, Z0, Z1, EPS, TIMES, RHO))
    assert rows["field/cos_eps"] == pytest.approx(1.0)
    assert rows["field/cos_x0"] < 0.75
    assert rows["field/fit_share"] < 0.75


def test_gains() -> None:
    """u = k(t) v*: the least-squares and the median gain are 1 / k, and one gain per t mends it
    altogether.
    """
    view = view_field(
        lambda x, t: torch.where(t < 0.5, 0.25, 0.5).view(-1, 1, 1, 1) * (Z1 + (RHO - 1) * Z0),
        Z0,
        Z1,
        EPS,
        TIMES,
        RHO,
    )
    rows = gain_metrics(view)
    assert [rows[f"gain/ls_t{b}"] for b in range(10)] == pytest.approx(
        [4.0] * 5 + [2.0] * 5, rel=1e-4
    )
    assert [rows[f"gain/median_t{b}"] for b in range(10)] == pytest.approx(
        [4.0] * 5 + [2.0] * 5, rel=1e-4
    )
    assert rows["gain/nmse_none"] == pytest.approx((0.75**2 + 0.5**2) / 2, rel=1e-4)
    assert rows["gain/nmse_ls_t"] == pytest.approx(0.0, abs=1e-6)
    assert rows["gain/nmse_ls"] < rows["gain/nmse_none"]


def test_the_logs_gain_makes_its_field_worse() -> None:
    """log 0919: cosine 0.05, ratio 0.29.

    The median gain 1 / 0.29 takes nmse from 1.06 to 1.9; least squares gains next to nothing.
    """
    target = Z1 + (RHO - 1) * Z0
    other = noise(5)
    unit, flat = target.flatten(1) / target.flatten(1).norm(dim=1, keepdim=True), other.flatten(1)
    away = flat - (flat * unit).sum(1, keepdim=True) * unit
    away = away / away.norm(dim=1, keepdim=True)
    norm = target.flatten(1).norm(dim=1, keepdim=True)
    u = (0.29 * norm * (0.05 * unit + math.sqrt(1 - 0.05**2) * away)).view_as(target)
    rows = gain_metrics(view_field(lambda x, t: u, Z0, Z1, EPS, TIMES, RHO))
    assert rows["gain/median"] == pytest.approx(1 / 0.29, rel=1e-4)
    assert rows["gain/nmse_none"] == pytest.approx(1 + 0.29**2 - 2 * 0.29 * 0.05, rel=1e-3)
    assert rows["gain/nmse_median"] == pytest.approx(1.9, rel=1e-3)
    assert rows["gain/nmse_ls"] == pytest.approx(1 - 0.05**2, rel=1e-3)


def test_the_time_code_that_was_trained_scores_best() -> None:
    target = Z1 + (RHO - 1) * Z0

    def trained_on_reversed(x: Tensor, code: Tensor) -> Tensor:
        # right sign only for 8t - 4 where t > 1/2 and so on
        return (code / 4).view(-1, 1, 1, 1) * target

    view = view_field(lambda x, t: trained_on_reversed(x, 4 - 8 * t), Z0, Z1, EPS, TIMES, RHO)
    rows = code_metrics(trained_on_reversed, view)
    assert rows["time/cos_plain"] == pytest.approx(1.0, abs=1e-5)  # t is positive throughout
    assert rows["time/cos_reversed"] == pytest.approx(
        -float(torch.sign(4 - 8 * view.t).mean()), abs=1e-5
    )


def test_variants_of_the_velocity_call() -> None:
    view = view_field(lambda x, t: 0.5 * x, Z0, Z1, EPS, TIMES, RHO)
    rows = variant_metrics(lambda x, t: 0.5 * x, view, Z0, Z1, RHO)
    # no matrix product, so autocast changes nothing
    assert rows["variant/fp32_speed_ratio"] == rows["variant/bf16_speed_ratio"]
    wanted = float(
        (0.5 * view.xt.flatten(1).norm(dim=1) / view.v_target.flatten(1).norm(dim=1)).mean()
    )
    assert rows["variant/fp32_speed_ratio"] == pytest.approx(wanted, rel=1e-5)
    far = aligned(lambda x, t: x, Z0, Z1, RHO)(100 * Z0, torch.full((16,), 0.5))
    assert far.flatten(1).std(dim=1).tolist() == pytest.approx(
        [float(sample_path(torch.full((16,), 0.5), Z0, Z1, RHO).xt.std())] * 16
    )


def test_null_metrics() -> None:
    rows = null_metrics(2 * Z1, Z1, -Z1)
    assert (rows["guidance/gap"], rows["guidance/null_cos"]) == pytest.approx((0.5, -1.0))


def test_shots_of_a_constant_field() -> None:
    """u = v*: one dt scale arrives, s overshoots by (s - 1) v*; a gain does the same."""
    target = Z1 - Z0
    rows = shot_metrics(lambda x, t: target, Z0, Z1, 2.0, steps=10)
    energy = float(target.square().mean())
    assert [rows[f"shoot/nmse_dt{s}"] for s in (1, 2, 3)] == pytest.approx(
        [0, energy / 2, 4 * energy / 2], abs=1e-6
    )
    gained = gain_shots(lambda x, t: target, Z0, Z1, 2.0, 10, {"ls": 1.0, "median": 3.0})
    assert gained["gain/shoot_nmse_median"] == pytest.approx(rows["shoot/nmse_dt3"], rel=1e-5)
    # u = 2 t v* also arrives in exact midpoint steps; with time told backwards, 2 (1 - t) v*, too.
    # u = 3 t^2 v* only nearly
    both = shot_metrics(lambda x, t: 2 * t.view(-1, 1, 1, 1) * target, Z0, Z1, 2.0, steps=10)
    assert both["shoot/nmse_reversed"] == pytest.approx(0.0, abs=1e-9)


def test_heun_and_falling() -> None:
    end = Z0 * math.e
    heun = heun_metrics(lambda x, t: x, Z0, end)
    for k in (8, 64):
        factor = (1 + 1 / k + 1 / (2 * k * k)) ** k  # Heun on x' = x
        assert heun[f"flow/endpt_rmse_heun@{k}"] == pytest.approx(
            abs(factor - math.e) * float(Z0.square().mean().sqrt()), rel=2e-2
        )
    rows = falling(heun | {f"flow/endpt_rmse@{k}": float(k) for k in (8, 16, 32, 64)})
    assert rows["endpoint/falls_euler"] == 8.0
    assert rows["endpoint/falls_heun"] < 0.1


def test_trace() -> None:
    trace = trace_generation(
        lambda x, t: torch.full_like(x, 0.5),
        EulerSolver(),
        time_grid("uniform", 4),
        Z0,
        lambda z: z[:, :3],
        2,
    )
    rows = trace_metrics(trace)
    assert rows["trace/first_dz_rms"] == pytest.approx(0.125)
    assert torch.allclose(trace.z_end, Z0 + 0.5)
    assert rows["trace/init_std"] == pytest.approx(float(Z0.std()))
    assert trace.end_pictures.shape == (2, 3, 4, 4)


def test_bits_and_teacher_rows() -> None:
    assert [
        significant_bits(x)
        for x in (Z0, Z0.bfloat16(), Z0.bfloat16().float(), Z0.half().float(), Z0.double())
    ] == [24, 8, 8, 11, 24]
    assert teacher_rows(lambda n: Z1 + n, Z1, (5, 10), "teacher_native") == {
        "teacher_native/mse@5": pytest.approx(25, rel=1e-5),
        "teacher_native/mse@10": pytest.approx(100, rel=1e-5),
    }


def test_the_cache_is_a_line_of_a_fresh_encoding_or_another_autoencoders() -> None:
    rows = latent_fit(0.5 * noise(3) + 0.7, noise(3))
    assert rows["latent/fit_slope"] == pytest.approx(0.5)
    assert rows["latent/fit_residual"] < 1e-9
    assert latent_fit(noise(7), noise(8))["latent/fit_residual"] > 0.9


class Identity:
    """An autoencoder's network that keeps the picture, in the form diffusers gives it."""

    config: ClassVar[dict[str, Any]] = {}

    def encode(self, x: Tensor) -> Any:
        parameters = torch.cat([x, torch.full_like(x, -30.0)], dim=1)
        return SimpleNamespace(latent_dist=SimpleNamespace(parameters=parameters))

    def decode(self, z: Tensor) -> Any:
        return SimpleNamespace(sample=z)

    def eval(self) -> Identity:
        return self

    def requires_grad_(self, flag: bool) -> Identity:
        return self


def test_round_trips_and_what_a_scale_mishandled_makes_of_them() -> None:
    autoencoder = Autoencoder(
        Identity(),
        LatentSpec(channels=3, height=4, width=4),
        LatentScale(0.5, 0.0, deterministic=False),
    )
    pictures = noise(6, 4)[:, :3].clamp(-1, 1)
    rows, made = round_trips(
        autoencoder, pictures, autoencoder.encode_moments(pictures), torch.zeros_like(pictures), 2
    )
    assert rows["vae/psnr"] > 100
    assert torch.allclose(made["recon_direct"], 0.5 * pictures[:2])
    assert rows["vae/psnr_direct"] == pytest.approx(
        psnr(0.5 * pictures[:2], pictures[:2]), abs=1e-3
    )
    assert torch.allclose(made["recon_twice"], 2 * pictures[:2])
    assert rows["trivial/vae/psnr"] == pytest.approx(
        psnr(pictures.mean((2, 3), keepdim=True).expand_as(pictures), pictures)
    )


def test_same_pictures() -> None:
    a = np.full((2, 4, 4, 3), 100, np.uint8)
    assert same_pictures(a, a) == 99.0
    assert same_pictures(a, a + 10) == pytest.approx(20 * math.log10(25.5))


def test_histogram_is_a_density() -> None:
    rows = histogram({"z": noise(0, 512)}, np.linspace(-6, 6, 61).tolist())
    assert sum(rows["z"]) * 0.2 == pytest.approx(1.0, abs=1e-3)
    assert rows["z"][30] == pytest.approx(1 / math.sqrt(2 * math.pi), abs=0.03)


def test_duplicates() -> None:
    rows = np.random.default_rng(0).normal(size=(10, 4, 2))
    assert duplicate_share(rows) == 0
    assert duplicate_share(np.concatenate([rows, rows[:6]])) == pytest.approx(6 / 16)


def test_agreement_of_captions_and_latents() -> None:
    """Latents made from the words of the captions are told from the same latents in another
    order.
    """
    texts = captions(200)
    words = sorted({word for text in texts for word in text.split()})
    rng = np.random.default_rng(0)
    directions = {word: rng.normal(size=32) for word in words}
    latents = np.stack(
        [sum(directions[word] for word in text.split()) for text in texts]
    ) + rng.normal(size=(200, 32))
    right = agreement_metrics(texts, latents)
    mixed = agreement_metrics(texts, latents[rng.permutation(200)])
    assert right["data/agreement"] > 0.5
    assert right["data/agreement_z"] > 10
    assert abs(mixed["data/agreement_z"]) < 3.5
    assert agreement_metrics(["same"] * 20, rng.normal(size=(20, 8))) == {}


def test_coverage_of_time() -> None:
    assert coverage_metrics(time_shares(FlowConfig(), 100, 1000))[
        "time/coverage_min"
    ] == pytest.approx(1.0, abs=1e-3)
    bare = FlowConfig(time=AlphaTime(low=0.6, high=0.98, uniform_floor=0.0))
    shares = time_shares(bare, 100, 1000)
    assert shares[:6] == [0.0] * 6
    assert shares[6] == pytest.approx(0.1 / 0.38, abs=2e-3)
    assert coverage_metrics(shares)["time/coverage_min"] == 0
    floored = coverage_metrics(
        time_shares(FlowConfig(time=LogSNRTime(uniform_floor=0.2)), 100, 1000)
    )
    assert floored["time/coverage_min"] == pytest.approx(0.2, abs=0.01)
