"""Train the small AutoencoderKL that flowray ships, on the embedded pictures (`tools.assets
autoencoder`).
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL
from safetensors.torch import load_file
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from flowray.config.base import LatentSpec
from flowray.config.model import KLAutoencoder
from flowray.data import digits, shapes
from flowray.data.pixels import to_pictures
from flowray.model.autoencoder import load_autoencoder
from flowray.probes.vae import psnr
from flowray.train.autoencoder import Design, Loss, decoder_loss, fresh, joint_loss, set_statistics

BATCH = 8
DESIGN = Design(channels=(16, 32, 48, 64), batch_size=BATCH, noise=0.4)


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


def train(out: Path, steps: int, seed: int = 0) -> dict[str, float]:
    """Train, measure on held-out pictures, save to `out` with the latent scale and shift in the
    config; returns the figures.
    """
    torch.manual_seed(seed)
    net = fresh(DESIGN, 64)
    _fit(net, steps, seed, lr=2e-3, loss=joint_loss(DESIGN))
    shown = [image for image, _, _ in shapes.samples(512, "train", seed=1)]
    set_statistics(net, iter([to_pictures(shown)]))
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
    _fit(net, steps, seed + 1, lr=1e-3, loss=decoder_loss(DESIGN))
    return _finish(net.eval(), out)


def _fit(net: Any, steps: int, seed: int, lr: float, loss: Loss) -> None:
    """AdamW over what trains of the net, one cycle of the learning rate."""
    parameters = [p for p in net.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=lr, betas=(0.9, 0.99), weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=lr, total_steps=steps, pct_start=0.05
    )
    began = time.monotonic()
    for step, pictures in enumerate(islice(DataLoader(_Stream(seed), batch_size=None), steps)):
        value = loss(net, pictures)
        optimizer.zero_grad(set_to_none=True)
        value.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        if step % 250 == 0:
            told = f"loss {float(value.detach()):.4f}  {time.monotonic() - began:.0f} s"
            print(f"step {step}/{steps}  {told}", flush=True)


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
