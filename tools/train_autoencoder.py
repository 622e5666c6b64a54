"""Train the small AutoencoderKL that flowray ships, on the embedded pictures (`tools.assets
autoencoder`).
"""

from __future__ import annotations

import dataclasses
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

from flowray.data import digits, shapes
from flowray.data.pixels import to_pictures
from flowray.train.autoencoder import Design, Fit, fresh, held_out_psnr, set_statistics

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
    _fit(net, steps, seed, decoder_alone=False)
    shown = [image for image, _, _ in shapes.samples(512, "train", seed=1)]
    set_statistics(net, iter([to_pictures(shown)]))
    return _finish(net.eval(), out, seed)


def train_decoder(out: Path, steps: int, seed: int = 0) -> dict[str, float]:
    """Train the decoder of the autoencoder in `out` further, on latents with noise, and save it
    there; the encoder and its latents stay. Returns the figures.
    """
    torch.manual_seed(seed)
    net: Any = AutoencoderKL.from_config(AutoencoderKL.load_config(out))
    net.load_state_dict(load_file(out / "diffusion_pytorch_model.safetensors"))
    for part in (net.encoder, net.quant_conv):
        part.requires_grad_(False)
    _fit(net, steps, seed, decoder_alone=True)
    return _finish(net.eval(), out, seed)


def _fit(net: Any, steps: int, seed: int, *, decoder_alone: bool) -> None:
    """Train what trains of the net on the stream."""
    design = dataclasses.replace(DESIGN, seed=seed)
    fit = Fit(net, steps, DESIGN.lr / (1 + decoder_alone), decoder_alone, design)
    began = time.monotonic()
    for pictures in islice(DataLoader(_Stream(seed + decoder_alone), batch_size=None), steps):
        loss = fit(pictures)
        if fit.step % 250 == 1:
            told = f"loss {loss:.4f}  {time.monotonic() - began:.0f} s"
            print(f"step {fit.step}/{steps}  {told}", flush=True)


def _finish(net: Any, out: Path, seed: int) -> dict[str, float]:
    """Save, and measure on pictures that were not trained on."""
    net.save_pretrained(out)
    held_out = {
        "shapes_val": [image for image, _, _ in shapes.samples(256, "val", seed=2)],
        "shapes_unseen": [image for image, _, _ in shapes.samples(256, "unseen", seed=2)],
        "digits_val": [image for image, _, _ in digits.samples("val")],
    }
    figures = {}
    for name, images in held_out.items():
        parts = (to_pictures(images[i : i + 32]) for i in range(0, len(images), 32))
        figures[f"psnr_{name}"] = held_out_psnr(out, parts, seed, torch.device("cpu"))
    return figures
