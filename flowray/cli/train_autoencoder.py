"""Train the small AutoencoderKL that flowray ships, on the embedded pictures (`flowray assets autoencoder`)."""

from __future__ import annotations

import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, IterableDataset

from flowray.config.base import LatentSpec
from flowray.data import digits, shapes
from flowray.model.autoencoder import Autoencoder
from flowray.model.latent import LatentScale
from flowray.probes.vae import psnr
from flowray.store.latents import to_pictures

CHANNELS = (16, 32, 48, 64)
BATCH = 8


class _Stream(IterableDataset[Tensor]):
    """Endless batches: seven parts training shapes to one part training digits."""

    def __init__(self, seed: int, *, false_colours: bool):
        self.seed, self.false_colours = seed, false_colours

    def __iter__(self) -> Iterator[Tensor]:
        rng = np.random.default_rng(self.seed)
        scans = [image for image, _, _ in digits.samples("train")]
        drawn = shapes.samples(10**9, "train", self.seed)
        while True:
            pictures = [image for image, _, _ in islice(drawn, BATCH * 7 // 8)]
            pictures += [scans[i] for i in rng.integers(len(scans), size=BATCH - len(pictures))]
            # Half of them in false colours: six fixed hues alone would be learnt as categories, and confused.
            for i in range(0, len(pictures), 2) if self.false_colours else ():
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


def train(
    out: Path, steps: int, seed: int = 0, start: Path | None = None, *, kl_weight: float = 2e-3, false_colours: bool = False
) -> dict[str, float]:
    """Train, measure on held-out pictures, save to `out` with the latent scale and shift in the config; returns the figures.

    start: a folder to continue from, with a schedule of its own. kl_weight: on the mean KL per dim in nats; it sets how much noise the
    decoder must bear (2e-3: a standard deviation of about 0.2 of a latent's), which is what makes a nearly right latent decode to a
    nearly right picture. false_colours: half of the pictures with permuted or inverted channels.
    """
    torch.manual_seed(seed)
    net = _fresh() if start is None else AutoencoderKL.from_pretrained(start, low_cpu_mem_usage=False).train()
    optimizer = torch.optim.AdamW(net.parameters(), lr=2e-3, betas=(0.9, 0.99), weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=2e-3, total_steps=steps, pct_start=0.05)
    began = time.monotonic()
    for step, pictures in enumerate(islice(DataLoader(_Stream(seed, false_colours=false_colours), batch_size=None), steps)):
        posterior = net.encode(pictures).latent_dist
        rebuilt = net.decode(posterior.sample()).sample
        mean, logvar = posterior.mean, posterior.logvar
        kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
        loss = F.mse_loss(rebuilt, pictures) + 0.2 * F.l1_loss(rebuilt, pictures) + kl_weight * kl
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 250 == 0:
            quality, seconds = psnr(rebuilt.detach(), pictures), time.monotonic() - began
            print(f"step {step}/{steps}  psnr {quality:.2f} dB  kl {float(kl.detach()):.3f}  {seconds:.0f} s", flush=True)
    return _finish(net.eval(), out)


@torch.no_grad()
def _finish(net: Any, out: Path) -> dict[str, float]:
    """Set scale and shift so that training latents have mean 0 and variance 1; save; measure."""
    train_pictures = to_pictures([image for image, _, _ in shapes.samples(512, "train", seed=1)])
    latents = net.encode(train_pictures).latent_dist.mean
    net.register_to_config(scaling_factor=round(1 / float(latents.std()), 5), shift_factor=round(float(latents.mean()), 5))
    net.save_pretrained(out)
    scale = LatentScale(net.config.scaling_factor, net.config.shift_factor, deterministic=False)
    wrapped = Autoencoder(net, LatentSpec(), scale)
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
