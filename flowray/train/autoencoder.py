"""Training of an autoencoder on pictures: diffusers' AutoencoderKL, first whole, then its decoder
alone on latents with noise.
"""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL
from safetensors import SafetensorError
from torch import Tensor
from torch.nn import functional as F

from flowray.config.base import LatentSpec
from flowray.config.errors import InputError
from flowray.config.model import KLAutoencoder
from flowray.config.progress import SILENT, Progress
from flowray.config.train import CosineLR
from flowray.data.pictures import decode_image
from flowray.data.prepare import AS_THEY_ARE, Preparation
from flowray.data.reader import ShardReader
from flowray.data.shards import left_partials, refuse_occupied, whole_folder
from flowray.model.autoencoder import load_autoencoder
from flowray.model.files import content_of, open_autoencoder
from flowray.probes.vae import psnr
from flowray.store.checkpoint import (
    load_state,
    load_tensors,
    newest_checkpoint,
    save_checkpoint,
    step_of,
)
from flowray.store.run import RunDirectory, RunLock
from flowray.train.autoencoder_pictures import batches, in_order
from flowray.train.optim import lr_at

STATISTICS = 2048  # training pictures that the latents' mean and std are taken over, at most
# of an AutoencoderKL's config: what its weights belong to, and the scale of its latents
_LAYERS = (
    *("latent_channels", "block_out_channels", "layers_per_block", "norm_num_groups"),
    *("down_block_types", "up_block_types", "mid_block_add_attention"),
)
_SCALE = ("latents_mean", "latents_std", "scaling_factor", "shift_factor")
Loss = Callable[[Any, Tensor], Tensor]
Complete = Callable[[Path, float], None]


@dataclass(frozen=True)
class Design:
    """What is trained, and how long.

    channels: of each level; every level but the last halves the side. kl: weight on the mean KL
    per latent value in nats; more of it leaves noise in z1 that no caption decides. preview: weight
    of the latents' likeness to the picture in small. noise: most noise on the latents that the
    decoder alone is shown, in their standard deviations. start: path of an autoencoder of the same
    levels whose weights training begins with. prepare: what is done to every picture.
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
    start: str | None = None
    prepare: Preparation = AS_THEY_ARE

    @property
    def factor(self) -> int:
        """Pixels of a latent cell's side."""
        return int(2 ** (len(self.channels) - 1))


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


def refuse_other_start(design: Design, side: int) -> None:
    """InputError, one line, where `start` is none or of other layers than this design's."""
    if not design.start:
        return
    try:
        files = open_autoencoder(design.start, weights=False)
    except InputError as error:
        raise InputError(f"--start: {error}") from error
    has = {} if isinstance(files, Path) else files.config
    with torch.device("meta"):
        wanted = json.loads(fresh(design, side).to_json_string())
    for key in _LAYERS:
        if has.get(key) != wanted[key]:
            raise InputError(
                f"--start {design.start}: {key} is {has.get(key)}, and this design's is"
                f" {wanted[key]}"
            )


def _initial_net(design: Design, side: int) -> Any:
    """The AutoencoderKL that training begins with; where its encoder is not to train, with the
    latents' scale that it has.
    """
    net = fresh(design, side)
    if design.start:
        refuse_other_start(design, side)
        latent = LatentSpec(channels=design.latent_channels, height=1, width=1)
        start = load_autoencoder(KLAutoencoder(path=design.start), latent).net
        net.load_state_dict(start.state_dict())
        if not design.steps:
            net.register_to_config(**{key: start.config[key] for key in _SCALE})
    return net


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
        small = preview(pictures, design.factor)[:, : design.latent_channels]
        drawn = F.mse_loss(mean[:, :3], small)
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
        """One step; its loss. Its noise is a function of seed and step.

        InputError, with the net as it was, where loss or gradient is not finite.
        """
        torch.manual_seed(self.seed * 10**7 + self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = lr_at(self.schedule, self.lr, self.step, self.steps)
        value = self.loss(self.net, pictures)
        self.optimizer.zero_grad(set_to_none=True)
        value.backward()
        norm = float(torch.nn.utils.clip_grad_norm_(self.parameters, 1.0))
        loss = float(value.detach())
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise InputError(
                f"training diverged at step {self.total_step}: loss {loss:.4g}, norm of the"
                f" gradient {norm:.4g}; take a lower --lr than {self.design.lr:g}"
            )
        self.optimizer.step()
        self.step += 1
        return loss

    @property
    def total_step(self) -> int:
        """Steps done, those of the whole autoencoder before the decoder's."""
        return self.step + self.decoder_alone * self.design.steps

    def save(self, folder: Path, made_of: Any, seconds: float) -> None:
        """All that `restore` needs, as the newest checkpoint in `folder`; seconds: of training."""
        tensors = {f"net/{name}": value for name, value in self.net.state_dict().items()}
        for i, kept in self.optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer/{i}/{name}": value for name, value in kept.items()}
        state = {"made_of": made_of, "decoder_alone": self.decoder_alone, "seconds": seconds}
        if self.decoder_alone:
            names = ("latents_mean", "latents_std")
            state["statistics"] = {name: list(self.net.config[name]) for name in names}
        save_checkpoint(folder, self.total_step, {"fit": tensors}, state, keep=1)

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
def held_out_psnr(
    folder: Path, pictures: Iterator[Tensor], seed: int, device: torch.device
) -> float:
    """Mean over pictures (batches (B, 3, H, W)) of the PSNR in dB of encode, sample, decode by the
    autoencoder that lies in `folder`.
    """
    config = AutoencoderKL.load_config(folder)
    side = config["sample_size"] // 2 ** (len(config["block_out_channels"]) - 1)
    latent = LatentSpec(channels=config["latent_channels"], height=side, width=side)
    wrapped = load_autoencoder(KLAutoencoder(path=str(folder)), latent).to(device)
    generator, figures = torch.Generator().manual_seed(seed), []
    for part in (batch.to(device) for batch in pictures):
        moments = wrapped.encode_moments(part)
        noise = torch.randn(moments.mean.shape, generator=generator).to(device)
        rebuilt = wrapped.decode(wrapped.sample(moments, noise))
        figures += [psnr(a, b) for a, b in zip(rebuilt, part, strict=True)]
    return float(np.mean(figures))


def left_over(reader: ShardReader, design: Design, out: Path) -> tuple[Path | None, dict[str, Any]]:
    """The newest checkpoint of a run into `out` that was ended, and its state; that is empty where
    the run had another design or other pictures.
    """
    newest = newest_checkpoint(_kept(out))
    state = load_state(newest) if newest else {}
    return newest, state if state.get("made_of") == _made_of(reader, design) else {}


def _made_of(reader: ShardReader, design: Design) -> Any:
    made = dataclasses.asdict(design)
    del made["prepare"]
    if tag := design.prepare.tag:
        made["prepare"] = tag
    if start := made.pop("start"):
        files = open_autoencoder(start)
        made["start"] = content_of(*([files] if isinstance(files, Path) else files.weights))
    return json.loads(json.dumps([made, reader.fingerprint()]))


def _kept(out: Path) -> Path:
    return out.with_name(f".{out.name}.training")


def _nothing_else(partial: Path, seconds: float) -> None:
    pass


def train_autoencoder(
    reader: ShardReader,
    design: Design,
    out: Path,
    *,
    device: torch.device,
    workers: int = 0,
    save_every: int = 500,
    half: bool = False,
    progress: Progress = SILENT,
    complete: Complete = _nothing_else,
) -> None:
    """Train on the reader's pictures, which `design.prepare` leaves all in and brings to one size,
    and save diffusers' folder `out`, its latents' mean and std in the config.

    A run that was ended goes on from what it last saved, beside `out`, if it had the same design
    and pictures; what another one saved is removed first, and all of it once `out` is whole.
    half: saves the weights in fp16. complete: writes what else belongs into the folder, given its
    hidden place and the seconds of training, all parts of it.
    InputError, one line: the training diverged, the folder cannot be written, another process
    trains into it.
    """
    kept = _kept(out)
    # other kernels of cudnn sum in whatever order comes
    deterministic = torch.backends.cudnn.flags(enabled=True, deterministic=True)
    with _one_line(out), _held(kept), deterministic:
        refuse_occupied(out)
        for left in left_partials(out):
            shutil.rmtree(left, ignore_errors=True)  # of a process killed while it saved or judged
        torch.manual_seed(design.seed)
        side = decode_image(reader, 0, design.prepare).shape[0]
        net = _initial_net(design, side).to(device)
        newest, state = left_over(reader, design, out)
        if newest and not state:
            progress.say(f"removing {newest}, of another design or other pictures")
            # a run begins at lower steps, and only the highest is kept
            for old in kept.glob("step_*"):
                shutil.rmtree(old)
            newest = None
        if newest:
            total = design.steps + design.decoder_steps
            progress.say(f"going on from step {state['step']} of {total}")
        run = _Run(reader, design, kept, device, workers, save_every, progress)
        seconds = run(net, newest, state)
        with whole_folder(out) as partial, _one_line(out):
            (net.half() if half else net).eval().save_pretrained(partial)
            complete(partial, seconds)
        shutil.rmtree(kept, ignore_errors=True)


@contextmanager
def _one_line(out: Path) -> Iterator[None]:
    """What the disk refuses, as an InputError that says what is left."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        newest = newest_checkpoint(_kept(out))
        left = f"; typed again, it goes on from step {step_of(newest)}" if newest else ""
        why = getattr(error, "strerror", None) or error
        raise InputError(f"{out}: cannot be written: {why}{left}") from error


@contextmanager
def _held(kept: Path) -> Iterator[None]:
    """Within the block no other process trains there; the folder goes with it where it is empty."""
    kept.mkdir(parents=True, exist_ok=True)
    try:
        with RunLock(RunDirectory(kept)):
            yield
    finally:
        with suppress(OSError):  # it has a checkpoint, or another process's lock
            kept.rmdir()


@dataclass
class _Run:
    """Both parts of a training, with checkpoints in `kept`."""

    reader: ShardReader
    design: Design
    kept: Path
    device: torch.device
    workers: int
    save_every: int
    progress: Progress

    def __call__(self, net: Any, newest: Path | None, state: dict[str, Any]) -> float:
        """Train the net, on from a checkpoint and its state if there is one; the seconds of all
        sessions.
        """
        design, began = self.design, time.monotonic() - state.get("seconds", 0.0)
        for decoder_alone, steps in ((False, design.steps), (True, design.decoder_steps)):
            if newest and state["decoder_alone"] > decoder_alone:
                continue
            if decoder_alone:
                self._settle_latents(net, state.get("statistics") if newest else None)
            fit = Fit(net.train(), steps, design.lr / (1 + decoder_alone), decoder_alone, design)
            if newest:
                done = state["step"] - decoder_alone * design.steps
                fit.restore(load_tensors(newest, "fit"), done)
                newest = None
            self._go_on(fit, began)
        return time.monotonic() - began

    def _settle_latents(self, net: Any, statistics: dict[str, Any] | None) -> None:
        """Set the latents' mean and std, measured unless given or the start's, and freeze what
        makes them.
        """
        if not self.design.steps and net.config.latents_std:
            pass  # every latent made by this encoder stays as it is
        elif statistics:
            net.register_to_config(scaling_factor=1.0, **statistics)
        else:
            with self.progress.task("measuring the latents"):
                shown = (
                    part.to(self.device)
                    for part in in_order(self.reader, STATISTICS, self.design.prepare)
                )
                set_statistics(net.eval(), shown)
        for part in (net.encoder, net.quant_conv):
            part.requires_grad_(False)

    def _go_on(self, fit: Fit, began: float) -> None:
        made_of = _made_of(self.reader, self.design)
        what = f"training the {'decoder' if fit.decoder_alone else 'autoencoder'}"
        places = fit.step, fit.steps, self.workers
        size, prepare = self.design.batch_size, self.design.prepare
        with self.progress.task(what, fit.steps, fit.step) as advance:
            for pictures in batches(self.reader, size, fit.seed, *places, prepare=prepare):
                value = fit(pictures.to(self.device))
                advance(1, f"loss {value:.4f}")
                if fit.step % self.save_every == 0 or fit.step == fit.steps:
                    fit.save(self.kept, made_of, time.monotonic() - began)
