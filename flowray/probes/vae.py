"""The autoencoder's round trip on held-out pictures."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from flowray.data.pictures import decode_image
from flowray.data.pixels import to_pictures
from flowray.data.prepare import Preparation
from flowray.flow.draws import Draws
from flowray.model.autoencoder import Autoencoder, pieces
from flowray.model.latent import Moments
from flowray.store.latents import LatentSet


def psnr(a: Tensor, b: Tensor) -> float:
    """Peak signal-to-noise ratio in dB of pictures in [-1, 1], from the mean squared error over
    all of them.
    """
    return float(10 * torch.log10(4 / F.mse_loss(a.clamp(-1, 1), b.clamp(-1, 1)).clamp_min(1e-12)))


@torch.no_grad()
def round_trip(
    autoencoder: Autoencoder, pictures: Tensor, moments: Moments, noise: Tensor
) -> tuple[dict[str, float], Tensor]:
    """vae/psnr of sampling and decoding the moments of pictures (B, 3, H, W), beside the PSNR of
    each picture's mean colour; and the pictures that come back.
    """
    rebuilt = autoencoder.decode(autoencoder.sample(moments, noise))
    flat = pictures.mean(dim=(2, 3), keepdim=True).expand_as(pictures)
    return {"vae/psnr": psnr(rebuilt, pictures), "trivial/vae/psnr": psnr(flat, pictures)}, rebuilt


def vae_metrics(
    autoencoder: Autoencoder, held_out: LatentSet, count: int, seed: int
) -> dict[str, float]:
    """`round_trip` of the first held-out pictures."""
    reader = held_out.picture_reader()
    prepare = Preparation(held_out.prepare, autoencoder.picture_size)
    images = [decode_image(reader, i, prepare) for i in range(min(count, len(reader)))]
    device = next(autoencoder.parameters()).device
    pictures = to_pictures(images).to(device)
    moments = Moments(
        *map(torch.cat, zip(*map(autoencoder.encode_moments, pieces(pictures)), strict=True))
    )
    noise = Draws(seed, 0, len(images), slice(None), device).normal(
        "posterior", tuple(moments.mean.shape[1:])
    )
    return round_trip(autoencoder, pictures, moments, noise)[0]
