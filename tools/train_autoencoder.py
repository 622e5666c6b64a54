"""Train the small AutoencoderKL that flowray ships, on the embedded pictures (`tools.assets
autoencoder`).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, IterableDataset

from flowray.config.base import LatentSpec
from flowray.config.model import KLAutoencoder
from flowray.data import digits, shapes
from flowray.data.pixels import to_pictures
from flowray.model.autoencoder import load_autoencoder
from flowray.probes.vae import psnr

CHANNELS = (16, 32, 48, 64)
BATCH = 8
KL_WEIGHT = 1e-5  # on the mean KL per dim in nats: thirty times this leaves noise in z1 to predict
NOISE = 0.4  # most noise on the latents that the decoder alone is shown, in standard deviations
PREVIEW_WEIGHT = 0.1
Loss = tuple[Tensor, str]  # the loss, and a line for the one who waits


class _Stream(IterableDataset[Tensor]):
    """Endless batches: seven parts training shapes to one part training digits, every other
    picture in false colours.
    """

    def __init__(self, seed: int):
        self.seed = seed

    def __iter__(self) -> Iterator[Tensor]:
        rng = np.random.default_rng(self.seed)
        scans = [image for image, _, _ in digits.samples("train")]
        # places between the cells, too
        drawn = shapes.samples(10**9, "train", self.seed, jitter=2 * shapes.JITTER)
        while True:
            pictures = [image for image, _, _ in islice(drawn, BATCH * 7 // 8)]
            pictures += [scans[i] for i in rng.integers(len(scans), size=BATCH - len(pictures))]
            # False colours: six fixed hues alone would be learnt as categories, and confused.
            for i in range(0, len(pictures), 2):
                pictures[i] = pictures[i][..., rng.permutation(3)] ^ np.uint8(255 * rng.integers(2))
            yield to_pictures(pictures)


def _fresh() -> Any:
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=CHANNELS,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=64,
        mid_block_add_attention=False,
    )


def preview(pictures: Tensor) -> Tensor:
    """What the first three latent channels are drawn to: (B, 3, 64, 64) in [-1, 1] to (B, 3, 8, 8),
    the picture in small.

    Its contrasts count for more than its mean, which every cell repeats: without this nearly all of
    a latent's variance is the background, an object's colour hides in the rest, and a velocity
    network that minimises a mean square learns it last.
    """
    small = F.avg_pool2d(pictures, 8)
    mean = small.mean((2, 3), keepdim=True)
    return 2.0 * (small - mean) + 0.6 * (mean - 0.2)


def train(out: Path, steps: int, seed: int = 0) -> dict[str, float]:
    """Train, measure on held-out pictures, save to `out` with the latent scale and shift in the
    config; returns the figures.
    """
    torch.manual_seed(seed)
    net = _fresh()
    _fit(net, steps, seed, lr=2e-3, loss=_joint_loss)
    _set_statistics(net)
    return _finish(net.eval(), out)


def train_decoder(out: Path, steps: int, seed: int = 0) -> dict[str, float]:
    """Train the decoder of the autoencoder in `out` further, on latents with noise, and save it
    there; the encoder and its latents stay. Returns the figures.
    """
    torch.manual_seed(seed)
    net: Any = AutoencoderKL.from_config(AutoencoderKL.load_config(out))
    net.load_state_dict(load_file(out / "diffusion_pytorch_model.safetensors"))
    for part in (net.encoder, net.quant_conv):
        part.requires_grad_(False)
    _fit(net, steps, seed + 1, lr=1e-3, loss=_decoder_loss)
    return _finish(net.eval(), out)


def _fit(net: Any, steps: int, seed: int, lr: float, loss: Callable[[Any, Tensor], Loss]) -> None:
    """AdamW over what trains of the net, one cycle of the learning rate."""
    parameters = [p for p in net.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=lr, betas=(0.9, 0.99), weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=lr, total_steps=steps, pct_start=0.05
    )
    began = time.monotonic()
    for step, pictures in enumerate(islice(DataLoader(_Stream(seed), batch_size=None), steps)):
        value, told = loss(net, pictures)
        optimizer.zero_grad(set_to_none=True)
        value.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        if step % 250 == 0:
            print(f"step {step}/{steps}  {told}  {time.monotonic() - began:.0f} s", flush=True)


def _joint_loss(net: Any, pictures: Tensor) -> Loss:
    """Of encoder and decoder: the pictures again, a little KL, and what the latents look like."""
    with torch.autocast("cpu", torch.bfloat16):
        posterior = net.encode(pictures).latent_dist
        rebuilt = net.decode(posterior.sample()).sample.float()
    mean, logvar = posterior.mean.float(), posterior.logvar.float()
    kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
    drawn = F.mse_loss(mean[:, :3], preview(pictures))
    told = f"psnr {psnr(rebuilt.detach(), pictures):.2f} dB  kl {float(kl.detach()):.3f}"
    total = _distance(rebuilt, pictures) + KL_WEIGHT * kl + PREVIEW_WEIGHT * drawn
    return total, f"{told}  preview {float(drawn.detach()):.4f}"


def _decoder_loss(net: Any, pictures: Tensor) -> Loss:
    """Of the decoder alone: the pictures from latents with noise on them. A velocity network's
    latents are never quite the encoder's, and a decoder that has only seen those paints textures.
    """
    with torch.autocast("cpu", torch.bfloat16):
        with torch.no_grad():
            z = net.encode(pictures).latent_dist.mean.float()
        std = torch.tensor(net.config.latents_std)[:, None, None]
        strength = NOISE * torch.rand(len(z), 1, 1, 1)
        rebuilt = net.decode(z + strength * std * torch.randn_like(z)).sample.float()
    told = f"psnr {psnr(rebuilt.detach(), pictures):.2f} dB of latents with noise"
    return _distance(rebuilt, pictures), told


def _distance(rebuilt: Tensor, pictures: Tensor) -> Tensor:
    return F.mse_loss(rebuilt, pictures) + 0.2 * F.l1_loss(rebuilt, pictures)


@torch.no_grad()
def _set_statistics(net: Any) -> None:
    """Mean and std such that every channel of training latents has mean 0 and variance 1."""
    pictures = to_pictures([image for image, _, _ in shapes.samples(512, "train", seed=1)])
    latents = net.encode(pictures).latent_dist.mean
    mean, std = latents.mean((0, 2, 3)), latents.std((0, 2, 3))
    statistics = {
        "latents_mean": [round(m, 5) for m in mean.tolist()],
        "latents_std": [round(s, 5) for s in std.tolist()],
    }
    net.register_to_config(scaling_factor=1.0, **statistics)


@torch.no_grad()
def _finish(net: Any, out: Path) -> dict[str, float]:
    """Save, and measure on pictures that were not trained on."""
    net.save_pretrained(out)
    wrapped = load_autoencoder(KLAutoencoder(path=str(out)), LatentSpec())
    held_out = {
        "shapes_val": [image for image, _, _ in shapes.samples(256, "val", seed=2)],
        "shapes_unseen": [image for image, _, _ in shapes.samples(256, "unseen", seed=2)],
        "digits_val": [image for image, _, _ in digits.samples("val")],
    }
    figures = {}
    for name, images in held_out.items():
        pictures = to_pictures(images)
        moments = wrapped.encode_moments(pictures)
        z = wrapped.sample(moments, torch.randn_like(moments.mean))
        figures[f"psnr_{name}"] = psnr(wrapped.decode(z), pictures)
    return figures
