"""What pictures are compared by: pixels, latents, networks in folders of transformers."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support import PICTURE, assert_refused, tiny_recipe
from transformers import Dinov2Config, Dinov2Model, SiglipVisionConfig, SiglipVisionModel

from flowray.config.errors import InputError
from flowray.data.pixels import to_pictures
from flowray.model.autoencoder import load_autoencoder
from flowray.sample import judges
from flowray.sample.judges import BATCH, LATENTS, PIXELS, Judge, open_judge

CPU = torch.device("cpu")
NETS: dict[str, Any] = {
    "dinov2": (Dinov2Model, Dinov2Config, {"mlp_ratio": 2}),
    "siglip": (SiglipVisionModel, SiglipVisionConfig, {"intermediate_size": 32}),
}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("judges")


def judge(place: Path, name: str) -> Judge:
    model = tiny_recipe(place).model
    return open_judge(
        name, load_autoencoder(model.autoencoder, model.latent), model.autoencoder, CPU
    )


def pictures(count: int, side: int = PICTURE) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return list(rng.integers(0, 256, (count, side, side, 3), dtype=np.uint8))


def test_pixels_are_averages_over_areas(place: Path) -> None:
    found = judge(place, PIXELS).look(pictures(3, 64))
    assert found.shape == (3, 3 * 32 * 32)
    whole = to_pictures(pictures(3, 64)).numpy()
    by_hand = whole.reshape(3, 3, 32, 2, 32, 2).mean((3, 5)).reshape(3, -1)
    assert found == pytest.approx(by_hand, abs=1e-5)
    small = judge(place, PIXELS).look(pictures(3))
    assert small == pytest.approx(to_pictures(pictures(3)).flatten(1).numpy())


def test_latents_are_the_mean_ones_that_a_run_is_trained_on(place: Path) -> None:
    model = tiny_recipe(place).model
    autoencoder = load_autoencoder(model.autoencoder, model.latent)
    moments = autoencoder.encode_moments(to_pictures(pictures(3)))
    scaled = autoencoder.scale.sample(moments, torch.zeros_like(moments.mean)).flatten(1)
    found = judge(place, LATENTS)
    assert found.look(pictures(3)) == pytest.approx(scaled.numpy(), abs=1e-5)
    many = pictures(2 * BATCH + 1)
    assert found.look_at(many) == pytest.approx(found.look(many), abs=1e-4)


def test_features_made_in_another_way_are_others(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = judge(place, LATENTS).fingerprint
    assert judge(place, LATENTS).fingerprint == before
    monkeypatch.setattr(judges, "MADE", judges.MADE + 1)
    assert judge(place, LATENTS).fingerprint != before


def test_a_gpu_looks_at_more_at_once(place: Path) -> None:
    on_cpu = judge(place, PIXELS)
    assert on_cpu.batch == BATCH
    assert replace(on_cpu, device=torch.device("cuda")).batch > BATCH


@pytest.mark.parametrize("kind", list(NETS))
def test_a_network_s_pooled_features_have_one_length(place: Path, kind: str) -> None:
    net_class, config_class, more = NETS[kind]
    torch.manual_seed(0)
    dims = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = config_class(**dims, image_size=16, patch_size=8, **more)
    net_class(config).save_pretrained(place / kind)
    found = judge(place, str(place / kind))
    features = found.look(pictures(4))
    assert features.shape == (4, 16)
    assert np.linalg.norm(features, axis=1) == pytest.approx(np.full(4, 4.0), rel=1e-4)
    assert np.abs(features[0] - features[1]).max() > 1e-3
    before = found.fingerprint
    torch.manual_seed(1)
    net_class(config).save_pretrained(place / kind)
    assert judge(place, str(place / kind)).fingerprint != before


def test_what_is_no_network_is_refused(place: Path) -> None:
    assert_refused(lambda: judge(place, "resnet"), InputError, "--features: 'resnet': want pixels")
    assert_refused(lambda: judge(place, str(place / "text")), InputError, "--features: .*")
