"""One wrapper around diffusers' autoencoders that owns the latent scale.

The scale is applied once, in `sample`, and undone once, in `decode`; nothing outside multiplies by
it.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderDC, AutoencoderKL
from torch import Tensor, nn

from flowray.config.base import LatentSpec
from flowray.config.errors import InputError
from flowray.config.model import AutoencoderConfig, DCAutoencoder, KLAutoencoder
from flowray.model.files import AUTOENCODER, ModelFiles, beside, open_autoencoder, refused
from flowray.model.latent import LatentScale, Moments, PerChannel
from flowray.model.local import local_place
from flowray.model.pretrained import loading
from flowray.model.singlefile import (
    ldm_config,
    load_single_file,
    read_single_file,
    refuse_bare_file,
)

SANA_FACTOR = 0.41407  # of DC-AE f32c32 for SANA (diffusers' conversion script, SANA's configs)
DETERMINISTIC_LOGVAR = -30.0  # exp(0.5 * -30) = 3e-7: a point, in the form of a gaussian
PIECE = 2**20  # px: 4 pictures of 512 px, 64 of 128
_NETS: dict[type[KLAutoencoder | DCAutoencoder], Any] = {
    KLAutoencoder: AutoencoderKL,
    DCAutoencoder: AutoencoderDC,
}


class Autoencoder(nn.Module):
    """A frozen autoencoder with the scale inside. Pictures are float (B, 3, H, W) in [-1, 1].

    It stays in eval mode and without gradients on its parameters, whatever module holds it;
    `decode_with_grad` lets gradients flow into z.
    """

    def __init__(self, net: Any, latent: LatentSpec, scale: LatentScale):
        super().__init__()
        self.net: Any = net.eval().requires_grad_(False)
        self.latent, self.scale = latent, scale

    @property
    def picture_size(self) -> tuple[int, int]:
        """(height, width) in px of the pictures that become its latents."""
        _, cell = compression(self.net.config) or (0, 1)
        return self.latent.height * cell, self.latent.width * cell

    def of_size(self, size: tuple[int, int]) -> Autoencoder:
        """The same network and scale for latents of another (height, width)."""
        height, width = size
        latent = LatentSpec(channels=self.latent.channels, height=height, width=width)
        return Autoencoder(self.net, latent, self.scale)

    def train(self, mode: bool = True) -> Autoencoder:
        """Stay in eval mode: a frozen autoencoder has no other."""
        return super().train(False)

    @torch.no_grad()
    def encode_moments(self, pictures: Tensor) -> Moments:
        """Raw moments of pictures (B, 3, H, W) in [-1, 1]; neither sampled nor scaled."""
        encoded = self.net.encode(pictures)
        if self.scale.deterministic:
            moments = Moments(encoded.latent, torch.full_like(encoded.latent, DETERMINISTIC_LOGVAR))
        else:
            mean, logvar = encoded.latent_dist.parameters.chunk(2, dim=1)
            moments = Moments(mean, logvar.clamp(-30.0, 20.0))
        if moments.mean.shape[1:] != self.latent.shape:
            raise ValueError(
                f"the autoencoder made latents of shape {tuple(moments.mean.shape[1:])} from"
                f" pictures of {tuple(pictures.shape[1:])}, but model.latent says"
                f" {self.latent.shape}"
            )
        return moments

    def sample(self, moments: Moments, noise: Tensor) -> Tensor:
        """Scaled latent z1; see LatentScale.sample."""
        return self.scale.sample(moments, noise)

    @torch.no_grad()
    def decode(self, z: Tensor) -> Tensor:
        """Pictures (B, 3, H, W), about [-1, 1], from scaled latents (B, C, H, W); never with a
        gradient, and in `pieces`.
        """
        cell = self.picture_size[0] // self.latent.height
        return torch.cat(list(map(self.decode_with_grad, pieces(z, cell))))

    def decode_with_grad(self, z: Tensor) -> Tensor:
        """The same pictures with the gradient kept into z, for losses on decoded latents; the
        weights never get one.
        """
        return self.net.decode(self.scale.unscale(z)).sample


def pieces(pictures: Tensor, cell: int = 1) -> tuple[Tensor, ...]:
    """Of pictures, or latents with cells of `cell` px, (B, C, H, W), parts of at most PIECE px or
    one picture: so what an autoencoder takes, 0.75 GiB for one of 512 px, does not grow with B.
    """
    height, width = pictures.shape[2:]
    return pictures.split(max(1, PIECE // (height * width * cell**2)))


def load_autoencoder(config: AutoencoderConfig, latent: LatentSpec) -> Autoencoder:
    """Load the weights and settle the scale: the recipe's, else the one in the model's own config.

    InputError, one line: nothing there, another kind of autoencoder, weights missing, or other
    channels than `latent` has.
    """
    net = _load(config)
    if isinstance(config, DCAutoencoder):
        scale = LatentScale(config.scaling_factor or _dc_factor(net), 0.0, deterministic=True)
    else:
        scale = _kl_scale(net, config)
    channels = net.config.latent_channels
    if channels != latent.channels:
        raise InputError(
            f"model.latent.channels: got {latent.channels}, but the autoencoder in {config.path!r}"
            f" makes {channels}"
        )
    return Autoencoder(net, latent, scale)


def _load(config: AutoencoderConfig) -> Any:
    files, model_class = open_autoencoder(config.path), _NETS[type(config)]
    if isinstance(files, Path):
        return load_single_file(files, config, AUTOENCODER)
    _refuse_other_kind(files, model_class)
    with loading(AUTOENCODER, files.folder):
        # low_cpu_mem_usage: without accelerate True warns at length
        net, report = model_class.from_pretrained(
            files.folder,
            variant=files.variant,
            use_safetensors=files.weights[0].suffix == ".safetensors",
            torch_dtype=torch.float32,
            low_cpu_mem_usage=False,
            output_loading_info=True,
            local_files_only=True,
        )
    if lacking := sorted(report["missing_keys"]):
        what = f"{len(lacking)} weights, such as {lacking[0]}"
        raise refused(AUTOENCODER, files.folder, f"lacks {what}")
    return net


def check_autoencoder(config: AutoencoderConfig) -> None:
    """InputError for files that `load_autoencoder` refuses at once; nothing is loaded."""
    files = open_autoencoder(config.path)
    if isinstance(files, Path):
        refuse_bare_file(files, config, AUTOENCODER)
    else:
        _refuse_other_kind(files, _NETS[type(config)])


def _refuse_other_kind(files: ModelFiles, model_class: Any) -> None:
    """InputError where the folder's config is not that of `model_class`."""
    kind = files.config.get("_class_name", files.config.get("model_type", model_class.__name__))
    if kind != model_class.__name__:
        named = [other for other, net in _NETS.items() if net.__name__ == kind]
        kinds = (other.model_fields["kind"].default for other in named)
        hint = "".join(f"; type model.autoencoder.kind={name}" for name in kinds)
        hint = hint or beside(files.folder, "vae", AUTOENCODER)
        raise refused(AUTOENCODER, files.folder, f"holds {kind}, not {model_class.__name__}{hint}")


def _dc_factor(net: Any) -> float:
    """The config's factor; SANA's where an f32c32 states none, for diffusers then reads 1.0, as
    SANA and OpenUni also do.
    """
    factor = float(net.config.scaling_factor or 1.0)
    sana = net.config.latent_channels == 32 and net.spatial_compression_ratio == 32
    return SANA_FACTOR if factor == 1.0 and sana else factor


def _kl_scale(net: Any, config: KLAutoencoder) -> LatentScale:
    """(raw - mean) * factor / std with the config's statistics per channel where it has them,
    else (raw - shift) * factor.
    """
    factor = config.scaling_factor or float(net.config.scaling_factor)
    mean, std = net.config.latents_mean, net.config.latents_std
    scale: PerChannel = tuple(factor / float(s) for s in std) if std else factor
    shift: PerChannel = tuple(map(float, mean)) if mean else float(net.config.shift_factor or 0.0)
    return LatentScale(
        scale,
        config.shift_factor if config.shift_factor is not None else shift,
        deterministic=False,
    )


def compression(config: Mapping[str, Any]) -> tuple[int, int] | None:
    """(channels, px a cell) of the latents, by the config.json of an AutoencoderKL or
    AutoencoderDC; None of another.
    """
    blocks = config.get("encoder_block_out_channels") or config.get("block_out_channels")
    channels = config.get("latent_channels")
    return (int(channels), 2 ** (len(blocks) - 1)) if blocks and channels else None


def planned_compression(config: AutoencoderConfig) -> tuple[int, int] | None:
    """`compression` of the recipe's autoencoder; None where it is not on this machine."""
    if local_place(config.path, "autoencoder") is None:
        return None
    files = open_autoencoder(config.path, weights=False)
    own = (
        ldm_config(read_single_file(files, AUTOENCODER))
        if isinstance(files, Path)
        else files.config
    )
    return compression(own)


def planned_picture_size(config: AutoencoderConfig, latent: LatentSpec) -> tuple[int, int] | None:
    """`Autoencoder.picture_size` of a recipe's; None where it is not on this machine."""
    found = planned_compression(config)
    return None if found is None else (latent.height * found[1], latent.width * found[1])


def planned_autoencoder(config: AutoencoderConfig) -> int | None:
    """Parameters of the autoencoder, from its own config where that is on this machine, else as the
    recipe says; None if neither knows.
    """
    if local_place(config.path, "autoencoder") is None:
        return config.parameters
    files, model_class = open_autoencoder(config.path, weights=False), _NETS[type(config)]
    if isinstance(files, Path):
        return config.parameters
    _refuse_other_kind(files, model_class)
    with torch.device("meta"), loading(AUTOENCODER, files.folder):
        net = model_class.from_config(model_class.load_config(files.folder))
        return sum(p.numel() for p in net.parameters())
