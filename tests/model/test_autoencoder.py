"""The autoencoder wrapper: it owns the scale, takes moments, stays frozen, and refuses what does
not fit.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support import SCALE, SHIFT, SPEC, tiny_autoencoder
from torch import nn

from flowray.config.base import LatentSpec
from flowray.config.errors import InputError
from flowray.config.model import DCAutoencoder, KLAutoencoder
from flowray.config.paths import SHIPPED
from flowray.config.towers import DinoV2Net
from flowray.model.autoencoder import Autoencoder, load_autoencoder
from flowray.model.images import load_image_encoder
from flowray.model.latent import LatentScale, Moments
from flowray.model.local import find_place
from flowray.probes.vae import psnr

PICTURES = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
NOISE = torch.randn(2, 4, 4, 4, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def kl_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_autoencoder(tmp_path_factory.mktemp("ae") / "kl")


@pytest.fixture(scope="module")
def dc_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from diffusers import AutoencoderDC

    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("ae") / "dc"
    layers = {"encoder_layers_per_block": (1, 1), "decoder_layers_per_block": (1, 1)}
    scales = {"encoder_qkv_multiscales": ((), ()), "decoder_qkv_multiscales": ((), ())}
    sizes = {
        "encoder_block_out_channels": (8, 8),
        "decoder_block_out_channels": (8, 8),
        "attention_head_dim": 4,
    }
    AutoencoderDC(
        latent_channels=4, scaling_factor=0.41407, **layers, **scales, **sizes
    ).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def kl(kl_folder: Path) -> Autoencoder:
    return load_autoencoder(KLAutoencoder(path=str(kl_folder)), SPEC)


def test_moments_are_raw(kl: Autoencoder) -> None:
    mean, logvar = kl.encode_moments(PICTURES)
    reference = kl.net.encode(PICTURES).latent_dist
    assert mean.shape == logvar.shape == (2, *SPEC.shape)
    assert torch.allclose(mean, reference.mean, atol=1e-6)
    assert torch.allclose(logvar, reference.logvar, atol=1e-6)


def test_scale_is_applied_once_and_undone_once(kl: Autoencoder) -> None:
    moments = kl.encode_moments(PICTURES)
    raw = moments.mean + (moments.logvar / 2).exp() * NOISE
    z = kl.sample(moments, NOISE)
    assert z.dtype == torch.float32
    assert torch.allclose(z, (raw - SHIFT) * SCALE, atol=1e-6)
    assert torch.allclose(kl.decode(z), kl.net.decode(raw).sample, atol=1e-5)
    assert not torch.allclose(kl.decode(z), kl.net.decode(z).sample, atol=1e-3)  # the test can tell


def test_recipe_overrides_scale_and_shift(kl_folder: Path) -> None:
    net = load_autoencoder(
        KLAutoencoder(path=str(kl_folder), scaling_factor=0.2301, shift_factor=0.0), SPEC
    )
    assert net.scale == LatentScale(0.2301, 0.0, deterministic=False)


def test_sample_takes_moments_only(kl: Autoencoder) -> None:
    z = torch.zeros(2, *SPEC.shape)
    for latent in (z, (z, z)):
        with pytest.raises(TypeError, match="Moments"):
            kl.sample(latent, NOISE)  # type: ignore[arg-type]


def test_half_precision_moments_are_scaled_in_fp32() -> None:
    scale = LatentScale(0.18215, 0.1, deterministic=False)
    moments = Moments(NOISE.half(), NOISE.half() - 4)
    exact = (NOISE.half().float() + ((NOISE.half() - 4).float() / 2).exp() * NOISE - 0.1) * 0.18215
    assert torch.allclose(scale.sample(moments, NOISE), exact, atol=1e-6)
    assert torch.allclose(
        scale.unscale(scale.sample(Moments(NOISE, NOISE), 0 * NOISE)), NOISE, atol=1e-6
    )


def test_frozen_whatever_holds_it(kl: Autoencoder) -> None:
    holder = nn.ModuleDict({"autoencoder": kl, "other": nn.Linear(1, 1)})
    holder.train()
    assert holder["other"].training
    assert not any(module.training for module in kl.modules())
    assert not any(p.requires_grad for p in kl.parameters())
    z = torch.zeros(2, *SPEC.shape, requires_grad=True)
    assert not kl.decode(z).requires_grad
    pictures = kl.decode_with_grad(z)  # a perceptual loss needs the gradient in z
    assert torch.equal(pictures.detach(), kl.decode(z))
    pictures.sum().backward()
    assert z.grad is not None
    assert bool(z.grad.any())
    assert all(p.grad is None for p in kl.parameters())


def test_deterministic_autoencoder(dc_folder: Path) -> None:
    dc = load_autoencoder(DCAutoencoder(path=str(dc_folder)), SPEC)
    assert dc.scale == LatentScale(0.41407, 0.0, deterministic=True)
    moments = dc.encode_moments(PICTURES)
    assert torch.allclose(moments.mean, dc.net.encode(PICTURES).latent, atol=1e-6)
    assert torch.equal(dc.sample(moments, NOISE), dc.sample(moments, 0 * NOISE))
    assert float(moments.logvar.max()) < -20
    z = dc.sample(moments, NOISE)
    assert torch.allclose(z, 0.41407 * moments.mean)
    assert torch.allclose(dc.decode(z), dc.net.decode(moments.mean).sample, atol=1e-5)
    assert (
        load_autoencoder(DCAutoencoder(path=str(dc_folder), scaling_factor=2.0), SPEC).scale.scale
        == 2.0
    )


def test_wrong_latent_names_both_shapes(kl_folder: Path) -> None:
    net = load_autoencoder(
        KLAutoencoder(path=str(kl_folder)), LatentSpec(channels=4, height=8, width=8)
    )
    with pytest.raises(ValueError, match=r"\(4, 4, 4\).*\(4, 8, 8\)"):
        net.encode_moments(PICTURES)


def test_what_cannot_be_loaded_is_one_line(tmp_path: Path, kl_folder: Path) -> None:
    (tmp_path / "empty").mkdir()
    for config in (
        KLAutoencoder(path=str(tmp_path / "nowhere")),
        DCAutoencoder(path=str(tmp_path / "empty")),
    ):
        with pytest.raises(
            InputError, match=r"model\.autoencoder\.path: .*(no such folder|no config.json)"
        ):
            load_autoencoder(config, SPEC)


def test_the_wrong_kind_is_refused(kl_folder: Path, dc_folder: Path) -> None:
    with pytest.raises(InputError, match=r"model\.autoencoder"):
        load_autoencoder(DCAutoencoder(path=str(kl_folder)), SPEC)
    with pytest.raises(InputError, match=r"model\.autoencoder"):
        load_autoencoder(KLAutoencoder(path=str(dc_folder)), SPEC)


def test_the_shipped_autoencoder_of_drawings_brings_a_drawing_back() -> None:
    """A disc and a bar on white, which it was not trained on, at 64 and at 128 px."""
    for side in (64, 128):
        rows = torch.arange(side)[:, None] / side
        columns = torch.arange(side)[None] / side
        picture = torch.ones(1, 3, side, side)
        disc = (rows - 0.4) ** 2 + (columns - 0.45) ** 2 < 0.09
        bar = ((rows - 0.8).abs() < 0.08) & ((columns - 0.5).abs() < 0.3)
        picture[0, :, disc] = torch.tensor([0.9, 0.2, -0.6])[:, None]
        picture[0, :, bar] = torch.tensor([-0.7, -0.3, 0.5])[:, None]
        spec = LatentSpec(channels=4, height=side // 8, width=side // 8)
        net = load_autoencoder(KLAutoencoder(path="embedded_emoji"), spec)
        rebuilt = net.decode(net.sample(net.encode_moments(picture), torch.zeros(1, *spec.shape)))
        assert psnr(rebuilt, picture) > 26


def test_the_autoencoder_of_drawings_is_small_and_no_text_model() -> None:
    folder = find_place("embedded_emoji", "model.autoencoder.path", "autoencoder")
    assert sum(file.stat().st_size for file in folder.iterdir()) < 8e6
    with pytest.raises(InputError, match=r"model\.text\.path.*another kind.*'embedded'"):
        find_place("embedded_emoji", "model.text.path")


@pytest.mark.parametrize("path", SHIPPED)
def test_no_shipped_model_sees_pictures(path: str) -> None:
    for where, load in (
        (
            "loss.repa.teacher.path",
            lambda: load_image_encoder(DinoV2Net(path=path), "loss.repa.teacher", frozen=True),
        ),
        ("loss.lpips.vgg", lambda: find_place(path, "loss.lpips.vgg", "pictures")),
    ):
        with pytest.raises(
            InputError, match=rf"^{where}: '{path}' is another kind of model"
        ) as told:
            load()
        assert "none of this kind is shipped" in str(told.value)
