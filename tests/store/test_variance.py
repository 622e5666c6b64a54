"""The unit of shoot/nmse: the variance about the mean latent, whatever the channels' means."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from flowray.data.shards import write_shards
from flowray.flow.path import sample_path
from flowray.probes.field import nmse
from flowray.probes.rollout import shoot_metrics
from flowray.store.latents import LatentSet, load_latents

# SD-VAE's raw latents over ImageNet, per channel (Karras et al., arXiv 2312.02696)
SD_MEAN, SD_STD = (5.81, 3.25, 0.12, -2.15), (4.17, 4.62, 3.71, 3.28)
COUNT, SCALE = 4000, 0.18215


def latent_set(folder: Path, mean: np.ndarray, logvar: float | None = None) -> LatentSet:
    """Latents of these raw means (N, C, H, W); the manifest has the variance about one mean, as
    the encoder writes it.
    """

    def sample(i: int, row: np.ndarray) -> dict[str, Any]:
        buffer = io.BytesIO()
        np.save(buffer, np.concatenate([row, np.full_like(row, logvar or 0.0)]))
        return {"__key__": f"{i:05d}", "moments.npy": buffer.getvalue(), "txt": b"a"}

    noise = 0.0 if logvar is None else np.exp(logvar) * SCALE**2
    meta = {"scale": SCALE, "shift": 0.0, "deterministic": logvar is None, "pictures": []}
    meta["variance"] = float((mean * SCALE).var() + noise)
    write_shards(folder, (sample(i, row) for i, row in enumerate(mean)), meta=meta)
    return load_latents(folder)


def sd_like() -> np.ndarray:
    drawn = np.random.default_rng(0).standard_normal((COUNT, 4, 2, 2))
    mean, std = (np.array(each)[:, None, None] for each in (SD_MEAN, SD_STD))
    return (mean + std * drawn).astype(np.float32)


@pytest.fixture(scope="module")
def latents(tmp_path_factory: pytest.TempPathFactory) -> LatentSet:
    return latent_set(tmp_path_factory.mktemp("sd") / "latents", sd_like())


def test_a_constant_latent_scores_one_with_the_channel_means_of_sd(latents: LatentSet) -> None:
    z1 = torch.from_numpy(sd_like() * SCALE)
    z0 = torch.randn(z1.shape, generator=torch.Generator().manual_seed(0))
    mean, others = z1.mean(0).expand_as(z1), torch.arange(COUNT).roll(1)
    rows = shoot_metrics(mean, z0, z1, others, latents.variance)
    assert rows["shoot/nmse"] == pytest.approx(1.0, rel=1e-5)
    about_one_mean = float(z1.var(correction=0))
    rows = shoot_metrics(mean, z0, z1, others, about_one_mean)
    assert rows["shoot/nmse"] == pytest.approx(0.633, abs=0.01)  # what older versions said


def test_places_have_means_of_their_own_too(tmp_path: Path) -> None:
    tilted = sd_like() + np.linspace(-9, 9, 16, dtype=np.float32).reshape(4, 2, 2)
    z = tilted.astype(np.float64) * SCALE
    wanted = float(z.var(0).mean())
    assert latent_set(tmp_path / "a", tilted).variance == pytest.approx(wanted, rel=1e-5)
    noisy = latent_set(tmp_path / "b", tilted, logvar=1.0).variance
    assert noisy == pytest.approx(wanted + np.e * SCALE**2, rel=1e-5)


def test_a_latent_that_is_not_finite_does_not_take_the_unit_with_it(tmp_path: Path) -> None:
    broken = sd_like()
    broken[7, 0, 0, 0] = np.nan
    wanted = latent_set(tmp_path / "a", np.delete(sd_like(), 7, axis=0)).variance
    assert latent_set(tmp_path / "b", broken).variance == pytest.approx(wanted, rel=1e-6)
    alike = np.ones((3, 4, 2, 2), np.float32)
    assert 0 < latent_set(tmp_path / "c", alike).variance < 1e-6


def test_predicting_no_velocity_scores_one_whatever_the_means_are(latents: LatentSet) -> None:
    """Its unit is v*'s mean square, as gains and k, c have it; a constant velocity is below 1."""
    z1 = torch.from_numpy(sd_like() * SCALE)
    z0 = torch.randn(z1.shape, generator=torch.Generator().manual_seed(0))
    v = sample_path(torch.full((COUNT,), 0.5), z0, z1, 0.0).v_target
    assert float(nmse(torch.zeros_like(v), v)) == pytest.approx(1.0)
    assert float(nmse(v.mean(0).expand_as(v), v)) == pytest.approx(0.785, abs=0.01)
