"""Autoencoders of the published shapes, in the formats that diffusers saves, loaded back by
path: SD's 8x and SANA's f32c32.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from flowray.config.base import LatentSpec
from flowray.config.errors import InputError
from flowray.config.model import AutoencoderConfig, DCAutoencoder, KLAutoencoder
from flowray.model.autoencoder import SANA_FACTOR, Autoencoder, load_autoencoder
from flowray.model.latent import LatentScale

SD_256, DC_256, DC_512 = (
    LatentSpec(channels=c, height=n, width=n) for c, n in ((4, 32), (32, 8), (32, 16))
)
WEIGHTS = "diffusion_pytorch_model.safetensors"


def pictures(side: int) -> torch.Tensor:
    return torch.rand(1, 3, side, side, generator=torch.Generator().manual_seed(0)) * 2 - 1


@pytest.fixture(scope="module")
def sd(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SD's layout: four down blocks (8x), attention in the middle, 4 channels, no shift."""
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    down, up = ("DownEncoderBlock2D",) * 4, ("UpDecoderBlock2D",) * 4
    net = AutoencoderKL(
        down_block_types=down,
        up_block_types=up,
        block_out_channels=(4, 4, 4, 8),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=2,
    )
    path = tmp_path_factory.mktemp("sd")
    net.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def dc(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SANA's layout: six stages (32x), the last three with linear attention, 32 channels; its
    config states no factor.
    """
    from diffusers import AutoencoderDC

    torch.manual_seed(0)
    widths, blocks = (4, 4, 4, 8, 16, 32), ("ResBlock",) * 3 + ("EfficientViTBlock",) * 3
    net = AutoencoderDC(
        latent_channels=32,
        attention_head_dim=4,
        encoder_block_types=blocks,
        decoder_block_types=blocks,
        encoder_block_out_channels=widths,
        decoder_block_out_channels=widths,
        encoder_layers_per_block=(1,) * 6,
        decoder_layers_per_block=(1,) * 6,
    )
    path = tmp_path_factory.mktemp("dc")
    net.save_pretrained(path)
    return path


def copy_with(path: Path, folder: Path, **changes: Any) -> str:
    """The checkpoint again with other entries in its config; None takes one out."""
    folder.mkdir()
    config = json.loads((path / "config.json").read_text()) | changes
    (folder / "config.json").write_text(
        json.dumps({key: value for key, value in config.items() if value is not None})
    )
    (folder / WEIGHTS).symlink_to(path / WEIGHTS)
    return str(folder)


def round_trip(net: Autoencoder, side: int) -> torch.Tensor:
    moments = net.encode_moments(pictures(side))
    z = net.sample(moments, torch.zeros_like(moments.mean))
    assert net.decode(z).shape == (1, 3, side, side)
    return z


def test_sd_at_256(sd: Path) -> None:
    net = load_autoencoder(KLAutoencoder(path=str(sd)), SD_256)
    assert net.scale == LatentScale(0.18215, 0.0, deterministic=False)
    z = round_trip(net, 256)
    assert torch.allclose(z, 0.18215 * net.net.encode(pictures(256)).latent_dist.mean, atol=1e-6)
    crossflow = load_autoencoder(KLAutoencoder(path=str(sd), scaling_factor=0.2301), SD_256)
    assert torch.allclose(round_trip(crossflow, 256), z * 0.2301 / 0.18215, atol=1e-6)
    saved = load_file(sd / WEIGHTS)
    assert all(torch.equal(saved[key], value) for key, value in net.net.state_dict().items())


@pytest.mark.parametrize(("side", "latent"), [(256, DC_256), (512, DC_512)])
def test_dc_at_256_and_512(dc: Path, side: int, latent: LatentSpec) -> None:
    net = load_autoencoder(DCAutoencoder(path=str(dc)), latent)
    z = round_trip(net, side)
    assert z.shape == (1, *latent.shape)
    assert torch.allclose(z, 0.41407 * net.net.encode(pictures(side)).latent, rtol=1e-4)


@pytest.mark.parametrize("stated", [None, 1.0, 0.3189])
def test_dc_factor(dc: Path, tmp_path: Path, stated: float | None) -> None:
    """None stated, or diffusers' default written out: SANA's; another model's own is kept, and
    the recipe's is above all.
    """
    path = copy_with(dc, tmp_path / "dc", scaling_factor=stated)
    assert load_autoencoder(DCAutoencoder(path=path), DC_256).scale.scale == (
        stated if stated == 0.3189 else SANA_FACTOR
    )
    assert load_autoencoder(DCAutoencoder(path=path, scaling_factor=1.0), DC_256).scale.scale == 1.0


def test_other_dcs_keep_a_factor_of_one(tmp_path: Path) -> None:
    from diffusers import AutoencoderDC

    layers = {f"{part}_layers_per_block": (1, 1) for part in ("encoder", "decoder")}
    sizes = {f"{part}_block_out_channels": (8, 8) for part in ("encoder", "decoder")}
    scales = {f"{part}_qkv_multiscales": ((), ()) for part in ("encoder", "decoder")}
    AutoencoderDC(
        latent_channels=4, attention_head_dim=4, **layers, **sizes, **scales
    ).save_pretrained(tmp_path)
    assert load_autoencoder(DCAutoencoder(path=str(tmp_path)), LatentSpec()).scale.scale == 1.0


def test_statistics_per_channel(sd: Path, tmp_path: Path) -> None:
    """diffusers' rule where a config has them: (raw - mean) * factor / std, undone by decode."""
    mean, std = [0.5, -1.0, 0.25, 2.0], [1.0, 2.0, 0.5, 4.0]
    net = load_autoencoder(
        KLAutoencoder(
            path=copy_with(
                sd, tmp_path / "sd", latents_mean=mean, latents_std=std, scaling_factor=0.5
            )
        ),
        SD_256,
    )
    raw = net.net.encode(pictures(256)).latent_dist.mean
    m, s = (torch.tensor(values)[:, None, None] for values in (mean, std))
    z = round_trip(net, 256)
    assert torch.allclose(z, (raw - m) * 0.5 / s, atol=1e-6)
    assert torch.allclose(net.decode(z), net.net.decode(raw).sample, atol=1e-3)


def test_shift_factor(sd: Path, tmp_path: Path) -> None:
    path = copy_with(sd, tmp_path / "sd", shift_factor=0.1159, scaling_factor=0.3611)
    assert load_autoencoder(KLAutoencoder(path=path), SD_256).scale == LatentScale(
        0.3611, 0.1159, deterministic=False
    )
    assert load_autoencoder(KLAutoencoder(path=path, shift_factor=0.0), SD_256).scale.shift == 0.0


def test_checkpoints_with_the_old_names_of_attention(sd: Path, tmp_path: Path) -> None:
    """sd-vae-ft-mse and other early VAEs call to_q, to_k, to_v, to_out.0: query, key, value,
    proj_attn.
    """
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}

    def name(key: str) -> str:
        for new, before in old.items():
            key = key.replace(f".{new}.", f".{before}.")
        return key

    (tmp_path / "config.json").write_text((sd / "config.json").read_text())
    weights = load_file(sd / WEIGHTS)
    renamed = {name(key): value for key, value in weights.items()}
    assert renamed.keys() != weights.keys()
    save_file(renamed, tmp_path / WEIGHTS, metadata={"format": "pt"})
    now, before = (
        load_autoencoder(KLAutoencoder(path=str(path)), SD_256).net.state_dict()
        for path in (sd, tmp_path)
    )
    assert all(torch.equal(now[key], before[key]) for key in now)


def test_frozen_and_in_eval_mode(sd: Path, dc: Path) -> None:
    for config, latent in (
        (KLAutoencoder(path=str(sd)), SD_256),
        (DCAutoencoder(path=str(dc)), DC_256),
    ):
        net = load_autoencoder(config, latent)
        net.train()
        assert not any(module.training for module in net.modules())
        assert not any(p.requires_grad for p in net.parameters())
        x = pictures(256).requires_grad_()
        z = net.sample(net.encode_moments(x), torch.zeros(1, *latent.shape)).requires_grad_()
        assert not net.encode_moments(x).mean.requires_grad
        assert not net.decode(z).requires_grad
        net.double()
        z = z.detach().double().requires_grad_()
        (gradient,) = torch.autograd.grad(net.decode_with_grad(z).square().sum(), z)
        step = 1e-4 * torch.randn(z.shape, generator=torch.Generator().manual_seed(0))
        rise = (net.decode(z + step).square().sum() - net.decode(z - step).square().sum()) / 2
        # linear attention works in fp32
        assert torch.allclose(rise, (gradient * step).sum(), rtol=0.02)
        assert all(p.grad is None for p in net.parameters())


def one_line(config: AutoencoderConfig, latent: LatentSpec) -> str:
    with pytest.raises(InputError) as caught:
        load_autoencoder(config, latent)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_what_does_not_fit_is_one_line(sd: Path, dc: Path, tmp_path: Path) -> None:
    assert "holds AutoencoderKL, not AutoencoderDC; type model.autoencoder.kind=kl" in one_line(
        DCAutoencoder(path=str(sd)), SD_256
    )
    assert "holds AutoencoderDC, not AutoencoderKL; type model.autoencoder.kind=dc" in one_line(
        KLAutoencoder(path=str(dc)), DC_256
    )
    assert "model.latent.channels: got 32, but the autoencoder" in one_line(
        KLAutoencoder(path=str(sd)), DC_256
    )
    assert "no such folder" in one_line(KLAutoencoder(path=str(tmp_path / "nowhere")), SD_256)
    (tmp_path / "config.json").write_text((sd / "config.json").read_text())
    weights = load_file(sd / WEIGHTS)
    del weights["decoder.conv_out.weight"]
    save_file(weights, tmp_path / WEIGHTS, metadata={"format": "pt"})
    assert "lacks 1 weights, such as decoder.conv_out.weight" in one_line(
        KLAutoencoder(path=str(tmp_path)), SD_256
    )
