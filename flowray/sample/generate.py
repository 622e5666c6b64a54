"""Pictures from prompts, exactly the way training defined the path: z0 ~ posterior, integrate
from t = 0 to 1, decode x.

A picture is a function of seed, caption and number (the how manieth of that caption), to the last
bit on one machine: its noise hangs on nothing else, and all is computed in batches of one shape.
"""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from flowray.config.errors import InputError
from flowray.config.flow import SampleConfig
from flowray.config.progress import Advance
from flowray.config.writing import write_whole
from flowray.data.pixels import from_pictures
from flowray.flow.draws import Draws
from flowray.flow.guidance import guided, is_off, with_time_code
from flowray.flow.solver import Observer, integrate, time_grid
from flowray.model.assemble import FlowModel, Source
from flowray.model.autoencoder import Autoencoder
from flowray.model.layers import to_device
from flowray.model.text import TextTokens

DECODED = 2**18  # px of pictures that are decoded at once: one of 512 px, four of 256 px
NOISE = {"noise": "caption"}  # in a strip's PNG: how its pictures' noise was drawn

Field = Callable[[Tensor, Tensor, Tensor], Tensor]  # x, time code, null -> velocity


def numbers_of(prompts: Sequence[str]) -> list[int]:
    """How many equal prompts come before each one."""
    seen: Counter[str] = Counter()
    numbers = []
    for prompt in prompts:
        numbers.append(seen[prompt])
        seen[prompt] += 1
    return numbers


def source_noise(
    model: FlowModel,
    prompts: Sequence[str],
    seed: int,
    device: torch.device,
    size: tuple[int, int] | None = None,
    numbers: Sequence[int] | None = None,
) -> Tensor:
    """Noise of prompts (B, C, H, W); that of a prompt depends on seed, caption and number alone,
    and is the same on every device.

    size: (height, width) of another bucket than the model's own. numbers: `numbers_of` unless
    given.
    """
    shape = model.config.latent.channels, *(size or model.config.latent.shape[1:])
    host = torch.device("cpu")
    drawn = [
        Draws(seed, number, 1, slice(None), host).normal(f"sample/{prompt}", shape)
        for prompt, number in zip(prompts, numbers or numbers_of(prompts), strict=True)
    ]
    return to_device(torch.cat(drawn), device)


def integrated(
    config: SampleConfig, field: Field, z0: Tensor, observe: Observer | None = None
) -> Tensor:
    """Latents (B, C, H, W) where z0 ends in a field (x, time code, null), with guidance."""
    guidance = config.guidance_scale, config.guidance_interval, config.guidance_rescale
    velocity_fn = guided(with_time_code(field), *guidance)
    return integrate(config.solver, velocity_fn, z0, time_grid(config.grid, config.steps), observe)


@torch.no_grad()
def network_calls(
    model: FlowModel, prompts: Sequence[str], config: SampleConfig, seed: int
) -> float:
    """How often the velocity network is asked for each picture of the prompts, both halves of
    guidance counted; the model should be in eval mode.
    """
    noise, rows = source_noise(model, prompts, seed, next(model.velocity.parameters()).device), 0
    with in_precision(config, noise.device):
        source = model.source(prompts, noise)
        field = model.field(source)

        def counted(x: Tensor, time_code: Tensor, null: Tensor) -> Tensor:
            nonlocal rows
            rows += len(x)
            return field(x, time_code, null)

        integrated(config, counted, source.z0)
    return rows / len(noise)


def in_precision(config: SampleConfig, device: torch.device) -> AbstractContextManager[object]:
    """A block in which head and velocity network compute in `sample.precision`."""
    if config.precision == "fp32":  # within whatever autocast there is
        return nullcontext()
    return torch.autocast(device.type, torch.bfloat16)


@torch.no_grad()
def generate_latents(
    model: FlowModel,
    prompts: Sequence[str],
    config: SampleConfig,
    noise: Tensor,
    negative: str | None = None,
    observe: Observer | None = None,
) -> Tensor:
    """Integrated latents (B, C, H, W) of the prompts, in one batch as they are; the model should be
    in eval mode. negative, observe: as for `latent_batches`.
    """
    with in_precision(config, noise.device):
        source = model.source(prompts, noise)
        field = model.field(source)
        if negative is not None:
            check_negative(model, config)
            field = _away_from(model, source, model.source([negative] * len(prompts), noise))
        return integrated(config, field, source.z0, observe)


def check_negative(model: FlowModel, config: SampleConfig) -> None:
    """InputError where a run cannot be guided away from a prompt: its velocity network does not
    read captions, or guidance is off.
    """
    if not model.velocity.conditioned:
        why = "this run's velocity network reads no caption: model.velocity.condition.kind is none"
        raise InputError(f"a negative prompt: {why}")
    if is_off(config.guidance_scale):
        raise InputError("a negative prompt: guidance is off; type sample.guidance_scale=3")


def _away_from(model: FlowModel, source: Source, other: Source) -> Field:
    """The field whose null half is told the captions of `other` in place of none, on the paths of
    `source`.
    """
    twice = torch.arange(len(source.z0), device=source.z0.device).repeat(2)
    if source.text is None or other.text is None:
        raise ValueError("this velocity network reads no caption")
    text = TextTokens(
        torch.cat([source.text.values, other.text.values]),
        torch.cat([source.text.mask, other.text.mask]),
    )
    both = model.field(Source(source.posterior.rows(twice), source.z0[twice], text))
    alone = model.field(source)

    def field(x: Tensor, time_code: Tensor, null: Tensor) -> Tensor:
        here = alone if len(x) == len(source.z0) else both  # no guidance at this time
        return here(x, time_code, torch.zeros_like(null))

    return field


@torch.no_grad()
def latent_batches(
    model: FlowModel,
    prompts: Sequence[str],
    config: SampleConfig,
    seed: int,
    size: tuple[int, int] | None = None,
    *,
    numbers: Sequence[int] | None = None,
    negative: str | None = None,
    observe: Observer | None = None,
    compiled: bool = False,
) -> Iterator[Tensor]:
    """`generate_latents` of many prompts, at most `sample.batch_size` at a time, with the weights
    the model holds now. A latent is the same to the last bit whatever prompts are beside it.

    numbers: as for `source_noise`. negative: what guidance leads away from, in place of no caption;
    InputError where the run cannot do that. observe(k, t, x, v) is told every step of every batch,
    x and v (B, C, H, W) copies. compiled: the network's blocks run through torch.compile, which
    takes its time at the first batch and gives the same but for rounding.
    """
    was_training = model.training
    device = next(model.velocity.parameters()).device
    model.eval()
    try:
        for part in _parts(prompts, config.batch_size, numbers):
            filled = part.filled(config.batch_size)
            noise = source_noise(model, filled.prompts, seed, device, size, filled.numbers)
            watch = None if observe is None else _copies(observe, len(part.prompts))
            blocks = model.velocity.compiled() if compiled else nullcontext()
            with model.text.whole_length(), blocks:
                made = generate_latents(model, filled.prompts, config, noise, negative, watch)
            yield made[: len(part.prompts)]
    finally:
        model.train(was_training)


class _Part:
    """Some of the prompts, with their numbers."""

    def __init__(self, prompts: Sequence[str], numbers: Sequence[int]):
        self.prompts, self.numbers = list(prompts), list(numbers)

    def filled(self, size: int) -> _Part:
        """Of `size` prompts, the last one again and again."""
        lacking = size - len(self.prompts)
        more = self.prompts[-1:] * lacking, self.numbers[-1:] * lacking
        return _Part(self.prompts + more[0], self.numbers + more[1])


def _parts(prompts: Sequence[str], size: int, numbers: Sequence[int] | None) -> Iterator[_Part]:
    numbers = numbers_of(prompts) if numbers is None else numbers
    for start in range(0, len(prompts), size):
        part = slice(start, start + size)
        yield _Part(prompts[part], numbers[part])


def _copies(observe: Observer, count: int) -> Observer:
    """An observer of the first `count` samples that cannot change them."""
    return lambda k, t, x, v: observe(k, t, x[:count].clone(), v[:count].clone())


@torch.no_grad()
def source_latents(
    model: FlowModel, prompts: Sequence[str], config: SampleConfig, seed: int
) -> tuple[Tensor, Tensor]:
    """mu and the drawn z0 that `latent_batches` sets out from, each (B, C, H, W); the model should
    be in eval mode.
    """
    device = next(model.velocity.parameters()).device
    made = source_of(model, prompts, config, source_noise(model, prompts, seed, device))
    return made.posterior.mu, made.z0


@torch.no_grad()
def source_of(
    model: FlowModel, prompts: Sequence[str], config: SampleConfig, noise: Tensor
) -> Source:
    """The source of prompts, with noise (B, C, H, W), as `latent_batches` has it: in batches of
    `sample.batch_size`, each prompt's the same to the last bit whatever prompts are beside it. The
    model should be in eval mode.
    """
    size, made = config.batch_size, []
    for start in range(0, len(prompts), size):
        texts, own = list(prompts[start : start + size]), noise[start : start + size]
        with model.text.whole_length(), in_precision(config, noise.device):
            part = model.source(texts + texts[-1:] * (size - len(texts)), filled(own, size))
        made.append(part.rows(slice(len(texts))))
    return Source.joined(made)


def filled(rows: Tensor, size: int) -> Tensor:
    """Of `size` rows, the last one again and again; of one layout in memory, by which kernels are
    chosen.
    """
    return torch.cat([rows, rows[-1:].expand(size - len(rows), *rows.shape[1:])]).contiguous()


def encoded(autoencoder: Autoencoder, pictures: Tensor, most: int) -> Tensor:
    """Latents (B, C, H, W), the means of their posteriors, of pictures (B, 3, H, W) in [-1, 1], in
    pieces as `decoded` makes them.
    """
    size, latents = _at_once(pictures.shape[2] * pictures.shape[3], most), []
    for piece in pictures.split(size):
        moments = autoencoder.encode_moments(filled(piece, size))
        latents.append(autoencoder.sample(moments, torch.zeros_like(moments.mean))[: len(piece)])
    return torch.cat(latents)


def _at_once(pixels: int, most: int) -> int:
    """How many pictures of so many px an autoencoder is given at once."""
    return max(1, min(most, DECODED // pixels))


@torch.no_grad()
def decoded(autoencoder: Autoencoder, latents: Tensor, most: int) -> np.ndarray:
    """Pictures uint8 (B, H, W, 3) of latents (B, C, H, W), in pieces of one shape, at most `most`
    pictures and, but for larger ones alone, DECODED px.
    """
    cell = autoencoder.picture_size[0] // autoencoder.latent.height
    size = _at_once(cell**2 * latents.shape[2] * latents.shape[3], most)
    pictures = []
    for piece in latents.split(size):
        pictures.append(from_pictures(autoencoder.decode(filled(piece, size)))[: len(piece)])
    return np.concatenate(pictures)


def generate(
    model: FlowModel,
    autoencoder: Autoencoder,
    prompts: Sequence[str],
    config: SampleConfig,
    seed: int,
    advance: Advance | None = None,
    size: tuple[int, int] | None = None,
    numbers: Sequence[int] | None = None,
) -> np.ndarray:
    """Pictures uint8 (B, H, W, 3) of the prompts, with the weights the model holds now.

    advance: hears of every batch of pictures. size, numbers: as for `source_noise`. A latent that
    is not finite is a black picture here, as training shows it and goes on; see `check_finite`.
    """
    pictures = []
    for latents in latent_batches(model, prompts, config, seed, size, numbers=numbers):
        pictures.append(decoded(autoencoder, latents, config.batch_size))
        if advance:
            advance(len(latents))
    return np.concatenate(pictures)


def check_finite(latents: Tensor, prompts: Sequence[str]) -> None:
    """InputError where a prompt's latent is not finite: there is no picture of it."""
    finite = latents.isfinite().flatten(1).all(1).tolist()
    if bad := [prompt for prompt, good in zip(prompts, finite, strict=True) if not good]:
        also = f" and {len(bad) - 1} more" if len(bad) > 1 else ""
        try_ = "try a lower sample.guidance_scale, more sample.steps or sample.precision=fp32"
        raise InputError(f"{bad[0][:60]!r}{also}: the latent is not finite, no picture; {try_}")


def save_strip(pictures: np.ndarray, path: Path) -> None:
    """Pictures (B, H, W, 3) side by side in one PNG, written whole."""
    png, told = io.BytesIO(), PngInfo()
    for key, value in NOISE.items():
        told.add_text(key, value)
    side_by_side = Image.fromarray(np.concatenate(list(pictures), axis=1))
    side_by_side.save(png, format="png", pnginfo=told)
    write_whole(path, png.getvalue())
