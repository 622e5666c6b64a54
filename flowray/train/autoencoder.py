"""Training of an autoencoder on pictures: diffusers' AutoencoderKL, first whole, then its decoder
alone on latents with noise.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

from flowray.config.base import LatentSpec
from flowray.config.model import KLAutoencoder
from flowray.config.progress import SILENT, Progress
from flowray.config.train import CosineLR
from flowray.data.order import EpochOrder
from flowray.data.pictures import decode_image
from flowray.data.pixels import to_pictures
from flowray.data.reader import ShardReader
from flowray.data.shards import whole_folder
from flowray.model.autoencoder import load_autoencoder
from flowray.probes.vae import psnr
from flowray.store.checkpoint import load_state, load_tensors, newest_checkpoint, save_checkpoint
from flowray.train.optim import lr_at

BATCH = 32  # pictures of a measurement
STATISTICS = 2048  # training pictures that the latents' mean and std are taken over, at most
JUDGED = 1024  # held-out pictures
Loss = Callable[[Any, Tensor], Tensor]


@dataclass(frozen=True)
class Design:
    """What is trained, and how long.

    channels: of each level; every level but the last halves the side. kl: weight on the mean KL
    per latent value in nats; more of it leaves noise in z1 that no caption decides. preview: weight
    of the latents' likeness to the picture in small. noise: most noise on the latents that the
    decoder alone is shown, in their standard deviations.
    """

    channels: tuple[int, ...] = (32, 64, 96, 128)
    latent_channels: int = 4
    steps: int = 6000
    decoder_steps: int = 2000
    batch_size: int = 16
    lr: float = 2e-3
    kl: float = 1e-5
    preview: float = 0.1
    noise: float = 0.3
    seed: int = 0

    @property
    def factor(self) -> int:
        """Pixels of a latent cell's side."""
        return int(2 ** (len(self.channels) - 1))


class _Shuffled(Dataset[np.ndarray]):
    """The picture at a place of the training stream, mirrored at every other place of each."""

    def __init__(self, reader: ShardReader, seed: int):
        self.reader, self.order = reader, EpochOrder(len(reader), seed)
        self.seed = seed

    def __getitem__(self, position: int) -> np.ndarray:
        picture = decode_image(self.reader, int(self.order(np.array([position]))[0]))
        mirrored = np.random.default_rng([self.seed, position]).random() < 0.5
        return picture[:, ::-1] if mirrored else picture


def batches(
    reader: ShardReader, design: Design, seed: int, first: int, steps: int, workers: int
) -> Iterator[Tensor]:
    """Pictures (B, 3, H, W) in [-1, 1] of steps `first` to `steps`, by seed and step alone."""
    size = design.batch_size
    places = [list(range(size * step, size * (step + 1))) for step in range(first, steps)]
    yield from DataLoader(
        _Shuffled(reader, seed), batch_sampler=places, num_workers=workers, collate_fn=to_pictures
    )


def fresh(design: Design, side: int) -> Any:
    """An untrained AutoencoderKL for pictures of `side` px."""
    levels = len(design.channels)
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        block_out_channels=design.channels,
        layers_per_block=1,
        latent_channels=design.latent_channels,
        norm_num_groups=8,
        sample_size=side,
        mid_block_add_attention=False,
    )


def preview(pictures: Tensor, factor: int) -> Tensor:
    """What the first three latent channels are drawn to: (B, 3, H, W) in [-1, 1] to (B, 3, H /
    factor, W / factor), the picture in small.

    Its contrasts count for more than its mean, which every cell repeats: without this nearly all of
    a latent's variance is the background, an object's colour hides in the rest, and a velocity
    network that minimises a mean square learns it last.
    """
    small = F.avg_pool2d(pictures, factor)
    mean = small.mean((2, 3), keepdim=True)
    return 2.0 * (small - mean) + 0.6 * (mean - 0.2)


def distance(rebuilt: Tensor, pictures: Tensor) -> Tensor:
    """Between pictures: mean square, and a little of the absolute value, which keeps edges."""
    return F.mse_loss(rebuilt, pictures) + 0.2 * F.l1_loss(rebuilt, pictures)


def joint_loss(design: Design) -> Loss:
    """Of encoder and decoder: the pictures again, a little KL, and what the latents look like."""

    def loss(net: Any, pictures: Tensor) -> Tensor:
        with torch.autocast(pictures.device.type, torch.bfloat16):
            posterior = net.encode(pictures).latent_dist
            rebuilt = net.decode(posterior.sample()).sample.float()
        mean, logvar = posterior.mean.float(), posterior.logvar.float()
        kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
        drawn = F.mse_loss(mean[:, :3], preview(pictures, design.factor))
        return distance(rebuilt, pictures) + design.kl * kl + design.preview * drawn

    return loss


def decoder_loss(design: Design) -> Loss:
    """Of the decoder alone: the pictures from latents with noise on them. A velocity network's
    latents are never quite the encoder's, and a decoder that has only seen those paints textures.
    """

    def loss(net: Any, pictures: Tensor) -> Tensor:
        with torch.autocast(pictures.device.type, torch.bfloat16):
            with torch.no_grad():
                z = net.encode(pictures).latent_dist.mean.float()
            std = torch.tensor(net.config.latents_std, device=z.device)[:, None, None]
            strength = design.noise * torch.rand(len(z), 1, 1, 1, device=z.device)
            rebuilt = net.decode(z + strength * std * torch.randn_like(z)).sample.float()
        return distance(rebuilt, pictures)

    return loss


@dataclass
class Fit:
    """AdamW over what trains of a net, the learning rate warmed up and then half a cosine."""

    net: Any
    steps: int
    lr: float
    decoder_alone: bool
    design: Design
    step: int = 0

    def __post_init__(self) -> None:
        self.seed = 2 * self.design.seed + self.decoder_alone
        self.loss = (decoder_loss if self.decoder_alone else joint_loss)(self.design)
        self.parameters = [p for p in self.net.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(
            self.parameters, lr=self.lr, betas=(0.9, 0.99), weight_decay=1e-4
        )
        self.schedule = CosineLR(warmup=max(1, self.steps // 20))

    def __call__(self, pictures: Tensor) -> float:
        """One step; its loss. Its noise is a function of seed and step."""
        torch.manual_seed(self.seed * 10**7 + self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = lr_at(self.schedule, self.lr, self.step, self.steps)
        value = self.loss(self.net, pictures)
        self.optimizer.zero_grad(set_to_none=True)
        value.backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.step += 1
        return float(value.detach())

    def save(self, folder: Path, made_of: Any) -> None:
        """All that `restore` needs, as the newest checkpoint in `folder`."""
        tensors = {f"net/{name}": value for name, value in self.net.state_dict().items()}
        for i, kept in self.optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer/{i}/{name}": value for name, value in kept.items()}
        state = {"made_of": made_of, "decoder_alone": self.decoder_alone}
        if self.decoder_alone:
            names = ("latents_mean", "latents_std")
            state["statistics"] = {name: list(self.net.config[name]) for name in names}
        step = self.step + self.decoder_alone * self.design.steps
        save_checkpoint(folder, step, {"fit": tensors}, state, keep=1)

    def restore(self, tensors: dict[str, Tensor], step: int) -> None:
        """Go on from what was saved at this step."""
        net = {k.removeprefix("net/"): v for k, v in tensors.items() if k.startswith("net/")}
        self.net.load_state_dict(net)
        state: dict[int, dict[str, Tensor]] = {}
        for name, value in tensors.items():
            if name.startswith("optimizer/"):
                _, i, key = name.split("/")
                state.setdefault(int(i), {})[key] = value
        self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": state})
        self.step = step


@torch.no_grad()
def set_statistics(net: Any, pictures: Iterator[Tensor]) -> None:
    """Mean and std such that every channel of these pictures' latents has mean 0 and variance 1."""
    latents = torch.cat([net.encode(part).latent_dist.mean.float().cpu() for part in pictures])
    mean, std = latents.mean((0, 2, 3)), latents.std((0, 2, 3))
    statistics = {
        "latents_mean": [round(m, 5) for m in mean.tolist()],
        "latents_std": [round(s, 5) for s in std.tolist()],
    }
    net.register_to_config(scaling_factor=1.0, **statistics)


@torch.no_grad()
def held_out_psnr(folder: Path, pictures: Iterator[Tensor], seed: int) -> float:
    """Mean over pictures (batches (B, 3, H, W)) of the PSNR in dB of encode, sample, decode by the
    autoencoder that lies in `folder`.
    """
    config = AutoencoderKL.load_config(folder)
    side = config["sample_size"] // 2 ** (len(config["block_out_channels"]) - 1)
    latent = LatentSpec(channels=config["latent_channels"], height=side, width=side)
    wrapped = load_autoencoder(KLAutoencoder(path=str(folder)), latent)
    generator, figures = torch.Generator().manual_seed(seed), []
    for part in pictures:
        moments = wrapped.encode_moments(part)
        noise = torch.randn(moments.mean.shape, generator=generator)
        rebuilt = wrapped.decode(wrapped.sample(moments, noise))
        figures += [psnr(a, b) for a, b in zip(rebuilt, part, strict=True)]
    return float(np.mean(figures))


def in_order(reader: ShardReader, most: int) -> Iterator[Tensor]:
    """At most `most` pictures, spread evenly over the set, in batches (B, 3, H, W)."""
    chosen = np.linspace(0, len(reader) - 1, min(len(reader), most)).round().astype(int)
    for part in np.array_split(chosen, -(-len(chosen) // BATCH)):
        yield to_pictures([decode_image(reader, int(i)) for i in part])


def train_autoencoder(
    reader: ShardReader,
    design: Design,
    out: Path,
    *,
    device: torch.device,
    workers: int = 0,
    save_every: int = 500,
    progress: Progress = SILENT,
) -> None:
    """Train on the reader's pictures, of one size, and save diffusers' folder `out`, its latents'
    mean and std in the config.

    A run that was ended goes on from what it last saved, beside `out`, if it had the same design
    and pictures; that is removed at the end.
    """
    kept, side = out.with_name(f".{out.name}.training"), decode_image(reader, 0).shape[0]
    made_of = [dataclasses.asdict(design), reader.fingerprint()]
    torch.manual_seed(design.seed)
    net = fresh(design, side).to(device)
    newest = newest_checkpoint(kept)
    state = load_state(newest) if newest else {}
    if state.get("made_of") != json.loads(json.dumps(made_of)):
        state = {}
    if newest and state:
        progress.say(f"going on from step {state['step']} of {design.steps + design.decoder_steps}")
    for decoder_alone, steps in ((False, design.steps), (True, design.decoder_steps)):
        if state and state["decoder_alone"] > decoder_alone:
            continue
        if decoder_alone:
            if state:
                net.register_to_config(scaling_factor=1.0, **state["statistics"])
            else:
                with progress.task("measuring the latents"):
                    shown = (part.to(device) for part in in_order(reader, STATISTICS))
                    set_statistics(net.eval(), shown)
            for part in (net.encoder, net.quant_conv):
                part.requires_grad_(False)
        fit = Fit(net.train(), steps, design.lr / (1 + decoder_alone), decoder_alone, design)
        if newest and state:
            fit.restore(load_tensors(newest, "fit"), state["step"] - decoder_alone * design.steps)
            state = {}
        what = f"training the {'decoder' if decoder_alone else 'autoencoder'}"
        with progress.task(what, steps, fit.step) as advance:
            for pictures in batches(reader, design, fit.seed, fit.step, steps, workers):
                value = fit(pictures.to(device))
                advance(1, f"loss {value:.4f}")
                if fit.step % save_every == 0 or fit.step == steps:
                    fit.save(kept, made_of)
    with whole_folder(out) as partial:
        net.eval().save_pretrained(partial)
    shutil.rmtree(kept, ignore_errors=True)
