"""Latents of a shard set, encoded once into shards of their own and keyed by what made them.

A latent shard holds, for every sample, `moments.npy` (fp16, raw mean and log-variance stacked on
channels, (2C, H, W)) and the sample's `json`/`txt`. The manifest keeps the scale, so training needs
no autoencoder.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from flowray.config.base import LatentSpec
from flowray.config.cache import cache_dir
from flowray.config.errors import InputError
from flowray.config.keys import INF, describe
from flowray.config.model import AutoencoderConfig, TextConfig
from flowray.config.paths import is_hub_name
from flowray.config.progress import SILENT, Advance, Progress
from flowray.config.recipe import Recipe
from flowray.config.train import DataConfig
from flowray.data import decode
from flowray.data.emoji import made_emoji
from flowray.data.make import ensure_embedded, unmade_samples
from flowray.data.pictures import decode_image
from flowray.data.pixels import to_pictures
from flowray.data.reader import ShardReader
from flowray.data.shards import (
    EMBEDDED,
    FETCHED,
    MANIFEST,
    find_shards,
    only_plain,
    sha256,
    write_shards,
)
from flowray.model.files import CONFIG, ModelFiles, open_autoencoder
from flowray.model.latent import LatentScale, Moments, over_channels
from flowray.store.apart import apart

if TYPE_CHECKING:
    from flowray.model.autoencoder import Autoencoder

ENCODE_BATCH = 32
STATISTICS = 4096  # samples that channel_statistics reads at most
CAPTIONED = 256  # samples whose captions are looked at before a run


@dataclass(frozen=True)
class LatentSet:
    """A cached split: moments and captions by index, the latent scale, and the variance of z1
    per dim over the whole set.
    """

    reader: ShardReader
    scale: LatentScale
    variance: float
    pictures: tuple[Path, ...]  # the image shards these latents were made from
    captioned_by: np.ndarray | None = None  # (len,) whose captions each sample has; None: its own

    def __len__(self) -> int:
        return len(self.reader)

    def moments(self, indices: np.ndarray) -> Moments:
        """Raw moments (B, C, H, W) fp32 of the samples."""
        mean, logvar = (
            torch.from_numpy(self.reader.gather(indices, "moments.npy")).float().chunk(2, dim=1)
        )
        return Moments(mean, logvar)

    def captions(self, index: int) -> list[str]:
        """All captions of one sample, at least one."""
        return self.reader.captions(
            index if self.captioned_by is None else int(self.captioned_by[index])
        )


def _decode_batch(reader: ShardReader, indices: range) -> Tensor:
    """Pictures (B, 3, H, W) in [-1, 1] of one size; InputError names the first that differs."""
    images = [decode_image(reader, i) for i in indices]
    for i, image in zip(indices, images, strict=True):
        if image.shape != images[0].shape:
            got, want = (f"{a.shape[1]} x {a.shape[0]}" for a in (image, images[0]))
            raise InputError(
                f"{reader.label(i)}: the picture is {got} px, others are {want}; `flowray.data"
                " pack` makes one size"
            )
    return to_pictures(images)


def split_shards(data: DataConfig, progress: Progress = SILENT) -> dict[str, tuple[Path, ...]]:
    """Image shards of `train` and `val` (and `unseen` for shapes and emoji); the embedded sets are
    made on first use, the fetched ones are there or InputError says what makes them.
    """
    if data.shards in EMBEDDED:
        place = cache_dir(data.cache)
        folders = ensure_embedded(data.shards, place, progress)  # type: ignore[arg-type]
        return {split: find_shards(str(folder)) for split, folder in folders.items()}
    if data.shards in FETCHED:
        folders = made_emoji(data.shards, cache_dir(data.cache))
        return {split: find_shards(str(folder)) for split, folder in folders.items()}
    train = find_shards(data.shards)  # first: of a misspelt set nothing is held out either
    if data.val_shards is None:
        raise InputError(
            "data.val_shards: not given; probes need held-out shards beside data.shards"
        )
    return {"train": train, "val": find_shards(data.val_shards)}


def pictures_fingerprint(reader: ShardReader) -> str:
    """Short hash of the samples' keys, of where the shards lie, of their content (small sets) or
    sizes and times, and of how their pictures are decoded, where that is not plain.
    """
    digest = hashlib.sha256(reader.fingerprint().encode())
    small = sum(path.stat().st_size for path in reader.paths) < 2**28
    for path in reader.paths:
        # The manifest of the latents names the pictures by their place, so a set that has moved is
        # another set.
        digest.update(
            f"{path.absolute()} {sha256(path) if small else path.stat().st_mtime_ns}".encode()
        )
    # Looking into every picture takes too long; what was made or packed here is plain for sure.
    if not only_plain(reader.paths):
        digest.update(f"decoded {decode.VERSION}".encode())
    return digest.hexdigest()[:12]


def autoencoder_fingerprint(config: AutoencoderConfig) -> str:
    """Short hash of the config and of the files that are read: their names and contents, or sizes
    and times where they are large.

    A hub name stands for itself. InputError where the path holds no autoencoder.
    """
    digest = hashlib.sha256(config.model_dump_json().encode())
    for file in () if is_hub_name(config.path) else _files(open_autoencoder(config.path)):
        content = (
            file.read_bytes()
            if file.stat().st_size < 2**25
            else f"{file.stat().st_size} {file.stat().st_mtime_ns}".encode()
        )
        digest.update(file.name.encode() + content)
    return digest.hexdigest()[:12]


def _files(found: ModelFiles | Path) -> tuple[Path, ...]:
    return (found,) if isinstance(found, Path) else (found.folder / CONFIG, *found.weights)


def ensure_latents(
    data: DataConfig,
    autoencoder: AutoencoderConfig,
    latent: LatentSpec,
    progress: Progress = SILENT,
    text: TextConfig | None = None,
) -> dict[str, Path]:
    """split -> folder of latent shards, encoded now where they are not in the cache.

    text: the text model that is to train on them. InputError before anything is encoded where it
    cannot tell captions apart.
    """
    folders: dict[str, Path] = {}
    for split, shards in split_shards(data, progress).items():
        with progress.task(f"looking through the {split} shards"):
            reader = ShardReader(shards)
            folder = _folder(data, autoencoder, reader, split)
        if not (folder / MANIFEST).is_file():
            if text and not folders:
                _check_captions(text, reader, progress)
            with progress.task("loading the autoencoder"):
                encoder = _encoder(autoencoder, latent)
            with progress.task(f"encoding {split} pictures", len(reader)) as advance:
                _encode(reader, folder, encoder, advance)
            if warning := channel_warning(channel_metrics(load_latents(folder))):
                progress.say(warning)
        folders[split] = folder
    return folders


def ensure_latents_apart(recipe: Recipe, progress: Progress = SILENT) -> None:
    """`ensure_latents` for a process that starts others: those get the GPU to themselves, as what
    is to be encoded on one is encoded in a process that then ends.
    """
    work = partial(_ensure, recipe)
    if torch.cuda.is_available() and unencoded(recipe.data, recipe.model.autoencoder):
        apart(work, progress)
    else:
        work(progress)


def _ensure(recipe: Recipe, progress: Progress) -> None:
    made_of = recipe.data, recipe.model.autoencoder, recipe.model.latent
    ensure_latents(*made_of, progress, recipe.model.text)


def _check_captions(text: TextConfig, reader: ShardReader, progress: Progress) -> None:
    with progress.task("reading the tokenizer"):
        # transformers takes seconds to import
        from flowray.model.prompts import check_captions, load_tokenizer

        warning = check_captions(load_tokenizer(text), some_captions(reader))
    if warning:
        progress.say(warning)


def some_captions(samples: ShardReader | LatentSet) -> list[str]:
    """All captions of at most CAPTIONED samples, spread evenly over the set."""
    chosen = np.linspace(0, len(samples) - 1, min(len(samples), CAPTIONED)).round().astype(int)
    return [caption for index in chosen.tolist() for caption in samples.captions(index)]


def unencoded(data: DataConfig, autoencoder: AutoencoderConfig) -> int:
    """How many pictures `ensure_latents` would have to encode."""
    if data.shards in EMBEDDED and (unmade := unmade_samples(data.shards, cache_dir(data.cache))):
        return unmade
    readers = {split: ShardReader(shards) for split, shards in split_shards(data).items()}
    folders = {
        split: _folder(data, autoencoder, reader, split) for split, reader in readers.items()
    }
    return sum(
        len(readers[split]) for split, at in folders.items() if not (at / MANIFEST).is_file()
    )


def _folder(
    data: DataConfig, autoencoder: AutoencoderConfig, reader: ShardReader, split: str
) -> Path:
    made_of = f"{autoencoder_fingerprint(autoencoder)}-{pictures_fingerprint(reader)}"
    return cache_dir(data.cache) / f"latents-{made_of}" / split


def _encoder(config: AutoencoderConfig, latent: LatentSpec) -> Autoencoder:
    # diffusers takes seconds to import; a cached run never needs it
    from flowray.model.autoencoder import load_autoencoder

    return load_autoencoder(config, latent).to("cuda" if torch.cuda.is_available() else "cpu")


def _encode(reader: ShardReader, folder: Path, autoencoder: Autoencoder, advance: Advance) -> None:
    device, scale = next(autoencoder.parameters()).device, autoencoder.scale
    # One shared dict: the writer puts it into the manifest after the last sample, when the
    # statistics are known.
    meta: dict[str, Any] = {
        "scale": scale.scale,
        "shift": scale.shift,
        "deterministic": scale.deterministic,
    }
    meta["pictures"] = [str(path.absolute()) for path in reader.paths]
    total, squares, count = 0.0, 0.0, 0

    anew = len(set(reader.keys)) < len(reader)  # keys that begin anew in each shard

    def samples() -> Iterator[dict[str, Any]]:
        nonlocal total, squares, count
        for start in range(0, len(reader), ENCODE_BATCH):
            indices = range(start, min(start + ENCODE_BATCH, len(reader)))
            pictures = _decode_batch(reader, indices).to(device)
            try:
                moments = autoencoder.encode_moments(pictures)
            except ValueError as error:
                raise InputError(f"model.latent: {error}, first {reader.label(start)}") from error
            z = scale.sample(moments, torch.zeros_like(moments.mean)).double()
            total += float(z.sum())
            squares += float((z.square() + _posterior_variance(moments, scale)).sum())
            count += z.numel()
            rows = torch.cat([moments.mean, moments.logvar], dim=1).half().cpu().numpy()
            for i, row in zip(indices, rows, strict=True):
                buffer = io.BytesIO()
                np.save(buffer, row)
                kept: dict[str, Any] = {
                    e: reader.read(i, e) for e in ("json", "txt") if e in reader.extensions(i)
                }
                key = f"{i}/{reader.keys[i]}" if anew else reader.keys[i]
                yield {"__key__": key, "moments.npy": buffer.getvalue(), **kept}
            advance(len(indices))
        meta["mean"] = total / count
        meta["variance"] = squares / count - (total / count) ** 2

    try:
        write_shards(folder, samples(), meta=meta)
    except InputError:
        # else another process encoded the same split meanwhile
        if not (folder / MANIFEST).is_file():
            raise


def load_latents(
    folder: Path, limit: int | None = None, *, shuffle: int | None = None
) -> LatentSet:
    """Open a cached split.

    shuffle: a seed, by which every sample gets the captions of another one.
    """
    meta = json.loads((folder / MANIFEST).read_text())["meta"]
    scale, shift = (
        tuple(value) if isinstance(value, list) else value
        for value in (meta["scale"], meta["shift"])
    )
    pictures = tuple(Path(path) for path in meta["pictures"])
    reader = ShardReader(find_shards(str(folder)), limit)
    captioned_by = None if shuffle is None else others(len(reader), shuffle)
    return LatentSet(
        reader,
        LatentScale(scale, shift, meta["deterministic"]),
        meta["variance"],
        pictures,
        captioned_by,
    )


def load_training(folder: Path, recipe: Recipe) -> LatentSet:
    """The split as a recipe trains on it: `data.limit` and `data.shuffle_captions` applied."""
    return load_latents(
        folder, recipe.data.limit, shuffle=recipe.seed if recipe.data.shuffle_captions else None
    )


def others(count: int, seed: int) -> np.ndarray:
    """For every sample another one, (count,) int64: one random cycle through all of them. A lone
    sample has but itself.
    """
    cycle = np.random.default_rng(seed).permutation(count)
    partner = np.empty(count, dtype=np.int64)
    partner[cycle] = np.roll(cycle, 1)
    return partner


def _posterior_variance(moments: Moments, scale: LatentScale) -> float | Tensor:
    """Variance of a drawn z1 about its mean, fp32, 0 for a deterministic autoencoder."""
    return (
        0.0
        if scale.deterministic
        else moments.logvar.exp() * over_channels(scale.scale, moments.logvar) ** 2
    )


def channel_statistics(latents: LatentSet) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation (C,) of z1, posterior noise included, in fp64; each channel
    should be about N(0, 1).

    Over at most STATISTICS samples, spread evenly over the set.
    """
    chosen = (
        np.linspace(0, len(latents) - 1, min(len(latents), STATISTICS)).round().astype(np.int64)
    )
    sums = []
    for indices in np.array_split(chosen, -(-len(chosen) // ENCODE_BATCH)):
        moments = latents.moments(indices)
        z = latents.scale.sample(moments, torch.zeros_like(moments.mean)).double()
        squares = z.square() + _posterior_variance(moments, latents.scale)
        sums.append(torch.stack([z.mean((2, 3)).sum(0), squares.mean((2, 3)).sum(0)]))
    mean, square = torch.stack(sums).sum(0) / len(chosen)
    return mean, (square - mean.square()).clamp_min(0).sqrt()


def channel_metrics(latents: LatentSet) -> dict[str, float]:
    """latent/channel_*: how far the channels of z1 are from N(0, 1)."""
    mean, std = channel_statistics(latents)
    return {
        "latent/channel_mean_max": float(mean.abs().max()),
        "latent/channel_std_min": float(std.min()),
        "latent/channel_std_max": float(std.max()),
    }


def channel_warning(metrics: dict[str, float]) -> str | None:
    """One line where a channel statistic leaves the range its key calls good."""
    for name, value in metrics.items():
        key = describe(name)
        low, high = key.good if key and key.good else (-INF, INF)
        if not low <= value <= high:
            return (
                f"warning: {name} is {value:.3g}, good is {low:g} to {high:g}: channels of z1 are"
                " far from N(0, 1); check model.autoencoder.scaling_factor and shift_factor"
            )
    return None
