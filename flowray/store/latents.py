"""Latents of a shard set, encoded once into shards of their own and keyed by what made them.

A latent shard holds, for every sample, `moments.npy` (fp16, raw mean and log-variance stacked on
channels, (2C, H, W)) and the sample's `json`/`txt`. A split is a folder with a manifest that names
its latent shards, in the order of the pictures' shards, and keeps the scale, so training needs no
autoencoder; samples left out as bad stand beside it in `bad_samples.jsonl`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flowray.config.base import LatentSpec
from flowray.config.cache import cache_dir
from flowray.config.errors import InputError
from flowray.config.keys import INF, describe
from flowray.config.model import AutoencoderConfig, TextConfig
from flowray.config.paths import is_hub_name
from flowray.config.progress import SILENT, Progress
from flowray.config.recipe import Recipe
from flowray.config.train import DataConfig
from flowray.data import decode
from flowray.data.emoji import made_emoji
from flowray.data.make import ensure_embedded, unmade_samples
from flowray.data.reader import ShardReader
from flowray.data.remote import RemoteCache, is_here
from flowray.data.shards import EMBEDDED, FETCHED, MANIFEST, are_plain, find_shards
from flowray.model.files import CONFIG, ModelFiles, open_autoencoder
from flowray.model.latent import LatentScale, Moments
from flowray.store.apart import apart
from flowray.store.encode import ENCODE_BATCH, Encoding, encode, posterior_variance
from flowray.store.latent_shards import LatentShards, sources
from flowray.store.splits import BAD_SAMPLES, folder_of, look_at, write_split
from flowray.store.sums import Sums

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
    skipped: tuple[int, ...] = ()  # samples of the image shards that have no latent

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

    def picture_reader(self) -> ShardReader:
        """The samples that the latents were made from: the first ones are those of this set, in
        its order.
        """
        return ShardReader(self.pictures, without=self.skipped)

    def places(self) -> np.ndarray:
        """The place in the pictures' shards of every sample, (len,) int64."""
        count = len(self) + len(self.skipped)
        return np.setdiff1d(np.arange(count), self.skipped)[: len(self)]


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
    remote = RemoteCache.of(data)
    train = find_shards(data.shards, remote)  # first: of a misspelt set nothing is held out either
    if data.val_shards is None:
        raise InputError(
            "data.val_shards: not given; probes need held-out shards beside data.shards"
        )
    return {"train": train, "val": find_shards(data.val_shards, remote)}


def pictures_fingerprint(reader: ShardReader, sums: Sums) -> str:
    """Short hash of the samples' keys, of what is left out, of their shards' content, and of how
    their pictures are decoded, where that is not plain.
    """
    digest = hashlib.sha256("\0".join(reader.keys).encode())
    if reader.without:  # keys may be the same in several shards
        digest.update(f"without {sorted(reader.without)}".encode())
    digest.update(" ".join(sums.of(reader.paths)).encode())
    # Looking into every picture takes too long; what was made or packed here is plain for sure.
    if not all(are_plain(reader.paths)):
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


def _latent_shards(
    data: DataConfig, autoencoder: AutoencoderConfig, latent: LatentSpec
) -> LatentShards:
    # pictures of another size than these latents need are left out, so it is part of the name
    made_of = f"{autoencoder_fingerprint(autoencoder)}-{latent.height}x{latent.width}"
    return LatentShards(cache_dir(data.cache) / f"latents-{made_of}" / "shards")


def ensure_latents(
    data: DataConfig,
    autoencoder: AutoencoderConfig,
    latent: LatentSpec,
    progress: Progress = SILENT,
    text: TextConfig | None = None,
    processes: int = 1,
) -> dict[str, Path]:
    """split -> its folder, for `load_latents`; shards that are not in the cache are encoded now.

    text: the text model that is to train on them. processes: how many encode. Of `train` only the
    shards are encoded that `data.limit` needs. InputError before anything is encoded where the text
    model cannot tell captions apart or a shard cannot be read; beyond `data.max_bad`, after which
    whole shards stay in the cache.
    """
    folders: dict[str, Path] = {}
    cache = _latent_shards(data, autoencoder, latent)
    for split, shards in split_shards(data, progress).items():
        with progress.task(f"looking through the {split} shards"):
            looked = look_at(data, cache, split, shards, progress)
        if missing := looked.missing():
            with progress.task(f"looking through the {split} samples"):
                reader = ShardReader(_at_hand([source.path for source in looked.sources]))
            if text and not folders:
                _check_captions(text, reader, progress)
            count, budget = looked.pictures(missing), looked.budget(data.max_bad)
            made_of = autoencoder, latent, budget
            encode(Encoding(tuple(missing), count, cache, *made_of), processes, progress)
            looked = look_at(data, cache, split, shards)
        if told := looked.budget(data.max_bad).told():
            progress.say(f"{told}; {folder_of(looked) / BAD_SAMPLES} names them")
        folders[split] = write_split(looked)
        if missing and (warning := channel_warning(channel_metrics(load_latents(folders[split])))):
            progress.say(warning)
    return folders


def _at_hand(paths: Sequence[Path]) -> Sequence[Path]:
    """Those that need not be fetched, or else the first."""
    return [path for path in paths if is_here(path)] or paths[:1]


def ensure_latents_apart(recipe: Recipe, progress: Progress = SILENT) -> None:
    """`ensure_latents` for a process that starts others: those get the GPU to themselves, as what
    is to be encoded on one is encoded in a process that then ends.
    """
    work = partial(_ensure, recipe)
    made_of = recipe.data, recipe.model.autoencoder, recipe.model.latent
    if torch.cuda.is_available() and unencoded(*made_of):
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

        # where none can be read, encoding says so
        captions = some_captions(reader)
        warning = check_captions(load_tokenizer(text), captions) if captions else None
    if warning:
        progress.say(warning)


def some_captions(samples: ShardReader | LatentSet) -> list[str]:
    """All captions of at most CAPTIONED samples, spread evenly over the set; samples without are
    passed over.
    """
    chosen = np.linspace(0, len(samples) - 1, min(len(samples), CAPTIONED)).round().astype(int)
    found = list[str]()
    for index in chosen.tolist():
        with suppress(InputError):
            found += samples.captions(index)
    return found


def unencoded(data: DataConfig, autoencoder: AutoencoderConfig, latent: LatentSpec) -> int:
    """How many pictures `ensure_latents` would have to encode."""
    if data.shards in EMBEDDED and (unmade := unmade_samples(data.shards, cache_dir(data.cache))):
        return unmade
    cache = _latent_shards(data, autoencoder, latent)
    looked = [look_at(data, cache, *split) for split in split_shards(data).items()]
    return sum(split.pictures(split.missing()) for split in looked)


def are_encoded(data: DataConfig, autoencoder: AutoencoderConfig, latent: LatentSpec) -> bool:
    """Whether all shards of all splits have their latents; none is opened."""
    cache, sums = _latent_shards(data, autoencoder, latent), Sums(cache_dir(data.cache))
    splits = split_shards(data).values()
    return all(cache.find(source) for shards in splits for source in sources(shards, sums))


def skipped_places(
    data: DataConfig, autoencoder: AutoencoderConfig, latent: LatentSpec
) -> dict[str, frozenset[int]]:
    """split -> the places of its samples that have no latents, as far as it is encoded."""
    cache, found = _latent_shards(data, autoencoder, latent), {}
    for split, shards in split_shards(data).items():
        looked = look_at(data, cache, split, shards)
        found[split] = frozenset(place for place, _, _ in looked.bad())
    return found


def load_latents(
    folder: Path, limit: int | None = None, *, shuffle: int | None = None
) -> LatentSet:
    """Open a cached split.

    limit: only of the first `limit` samples of the pictures' shards, of which some may be skipped.
    shuffle: a seed, by which every sample gets the captions of another one.
    """
    manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    meta: dict[str, Any] = manifest["meta"]
    skipped = tuple(meta.get("skipped", ()))
    if limit is not None:
        limit -= sum(place < limit for place in skipped)
    scale, shift = (
        tuple(value) if isinstance(value, list) else value
        for value in (meta["scale"], meta["shift"])
    )
    pictures = tuple(Path(path) for path in meta["pictures"])
    tars = [folder / row["name"] for row in manifest["shards"]]
    reader = ShardReader(tars, limit)
    captioned_by = None if shuffle is None else others(len(reader), shuffle)
    return LatentSet(
        reader,
        LatentScale(scale, shift, meta["deterministic"]),
        meta["variance"],
        pictures,
        captioned_by,
        skipped,
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
        squares = z.square() + posterior_variance(moments, latents.scale)
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
