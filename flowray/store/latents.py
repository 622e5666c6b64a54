"""Latents of a shard set, encoded once into shards of their own and keyed by what made them.

A latent shard holds, for every sample, `moments.npy` (raw mean and log-variance stacked on
channels, (2C, H, W), as `data.moments` has it: fp16, fp32, or bf16's bits as uint16) and the
sample's `json`/`txt`; its index also has the captions. A split is a
folder with a manifest that names its latent shards, in the order of the pictures' shards, and keeps
the scale, so training needs no autoencoder; samples left out as bad stand beside it in
`bad_samples.jsonl`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flowray.config.base import LatentSpec
from flowray.config.buckets import Size, sizes_of
from flowray.config.cache import cache_dir
from flowray.config.errors import InputError
from flowray.config.keys import INF, describe
from flowray.config.model import AutoencoderConfig, TextConfig
from flowray.config.partial import parse_part
from flowray.config.prepare import AS_DECODED, PrepareConfig
from flowray.config.progress import SILENT, Progress
from flowray.config.recipe import Recipe
from flowray.config.train import DataConfig
from flowray.data.emoji import made_emoji
from flowray.data.make import ensure_embedded, unmade_samples
from flowray.data.order import evenly
from flowray.data.reader import ShardReader
from flowray.data.remote import RemoteCache, is_here, shown
from flowray.data.shards import EMBEDDED, FETCHED, MANIFEST, find_shards, lacking
from flowray.model.latent import LatentScale, Moments
from flowray.store.apart import apart
from flowray.store.encode import Encoding, Fleet, encode
from flowray.store.fingerprints import autoencoder_fingerprint
from flowray.store.latent_shards import LatentShards, sources
from flowray.store.moments import as_fp32
from flowray.store.partial import encoded_part, shards_of
from flowray.store.splits import BAD_SAMPLES, BUCKETS, Split, held_out_warning, look_at, write_split
from flowray.store.sums import Sums
from flowray.store.variance import squares, variance_per_dim

CAPTIONED = 256  # samples whose captions are looked at before a run


@dataclass(frozen=True)
class LatentSet:
    """A cached split: moments and captions by index, and the latent scale."""

    reader: ShardReader
    scale: LatentScale
    pictures: tuple[Path, ...]  # the image shards these latents were made from
    captioned_by: np.ndarray | None = None  # (len,) whose captions each sample has; None: its own
    skipped: tuple[int, ...] = ()  # samples of the image shards that have no latent
    prepare: PrepareConfig = AS_DECODED  # how these were made of the image shards' pictures
    sizes: tuple[Size, ...] = ()  # (height, width) of the latents of each bucket, own size first
    buckets: np.ndarray | None = None  # (len,) uint8 bucket of each sample; None: all of one size
    rounding: float | None = None  # the largest of the samples' `rounding_errors`; None: not known

    def __len__(self) -> int:
        return len(self.reader)

    def told(self) -> dict[str, Any]:
        """What a checkpoint notes of the data: how many samples, and a hash of the content of their
        shards, of their keys and their order. It does not hang on where they lie.
        """
        return {"samples": len(self), "fingerprint": self.reader.fingerprint()}

    @cached_property
    def variance(self) -> float:
        """Of z1, per dim, about the set's mean latent: what errors are divided by, so that this
        mean scores 1.
        """
        return variance_per_dim(self)

    def moments(self, indices: np.ndarray) -> Moments:
        """Raw moments (B, C, H, W) fp32 of the samples, which are of one bucket."""
        mean, logvar = as_fp32(self.reader.gather(indices, "moments.npy")).chunk(2, dim=1)
        return Moments(mean, logvar)

    def captions(self, index: int) -> list[str]:
        """All captions of one sample, at least one."""
        return self.reader.captions(
            index if self.captioned_by is None else int(self.captioned_by[index])
        )

    def chosen_captions(self, indices: np.ndarray, u: Sequence[float]) -> list[str]:
        """Of each sample's captions number int(u * count), u in [0, 1) for each of `indices`."""
        whose = indices if self.captioned_by is None else self.captioned_by[indices]
        return self.reader.chosen_captions(whose, u)

    def size(self, index: int) -> Size | None:
        """(height, width) of a sample's latent; None: the model's own."""
        return None if self.buckets is None else self.sizes[self.buckets[index]]

    def of_one_size(self, indices: np.ndarray) -> list[np.ndarray]:
        """The samples `indices` (B,), apart by bucket."""
        if self.buckets is None:
            return [indices]
        of = self.buckets[indices]
        return [indices[of == bucket] for bucket in np.unique(of)]

    def of_own_size(self) -> LatentSet | None:
        """The samples whose latents have the model's own size, as a set of their own; None where
        there are none.
        """
        if self.buckets is None:
            return self
        others = np.flatnonzero(self.buckets)
        if len(others) == len(self):
            return None
        away = self.reader.places(others.tolist())
        own, whose = np.flatnonzero(self.buckets == 0), self.captioned_by
        return replace(
            self,
            captioned_by=None if whose is None else np.searchsorted(own, whose[own]),
            reader=ShardReader(self.reader.paths, self.reader.limit, away, self.reader.caption_key),
            skipped=tuple(sorted({*self.skipped, *self.places()[others].tolist()})),
            sizes=(),
            buckets=None,
        )

    def picture_reader(self) -> ShardReader:
        """The samples that the latents were made from: the first ones are those of this set, in
        its order.
        """
        key = self.reader.caption_key
        return ShardReader(self.pictures, without=self.skipped, caption_key=key)

    def places(self) -> np.ndarray:
        """The place in the pictures' shards of every sample, (len,) int64."""
        count = len(self) + len(self.skipped)
        return np.setdiff1d(np.arange(count), self.skipped)[: len(self)]


def split_shards(data: DataConfig, progress: Progress = SILENT) -> dict[str, tuple[Path, ...]]:
    """Image shards of `train` and `val` (and `unseen` for shapes and emoji), of `train` those that
    `data.partial` names; the embedded sets are made on first use, the fetched ones are there or
    InputError says what makes them.
    """
    splits = _all_shards(data, progress)
    if isinstance(data.partial, str):
        sums = Sums(cache_dir(data.cache))
        splits["train"] = shards_of(data.partial, splits["train"], sums)
    return splits


def _all_shards(data: DataConfig, progress: Progress) -> dict[str, tuple[Path, ...]]:
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


def _latent_shards(
    data: DataConfig,
    autoencoder: AutoencoderConfig,
    latent: LatentSpec,
    sizes: tuple[Size, ...] = (),
) -> LatentShards:
    # pictures of another size than these latents need are left out, so it is part of the name
    made_of = f"{autoencoder_fingerprint(autoencoder)}-{latent.height}x{latent.width}"
    if tag := data.prepare.tag:
        made_of += f"-{tag}"
    if (key := data.caption_key) is not None:  # by which samples are told to have captions
        made_of += f"-{hashlib.sha256(key.encode()).hexdigest()[:8]}-captions"
    if data.moments != "fp16":
        made_of += f"-{data.moments}"
    if sizes:
        told = " ".join(f"{height}x{width}" for height, width in sizes)
        made_of += f"-{hashlib.sha256(told.encode()).hexdigest()[:8]}-buckets"
    folder = cache_dir(data.cache) / f"latents-{made_of}" / "shards"
    return LatentShards(folder, data.prepare, data.caption_key, sizes, data.moments)


def _caches(
    data: DataConfig, autoencoder: AutoencoderConfig, latent: LatentSpec, splits: Iterable[str]
) -> dict[str, LatentShards]:
    """split -> its cache. Training pictures alone are in buckets: held-out ones, which probes and
    evaluation compare with each other, are of the model's own size, and their latents those of
    runs without buckets.
    """
    sizes = sizes_of(data, latent)
    plain = _latent_shards(data, autoencoder, latent)
    caches = dict.fromkeys(splits, plain)
    if len(sizes) > 1:
        caches["train"] = _latent_shards(data, autoencoder, latent, sizes)
    return caches


def with_part(recipe: Recipe, progress: Progress = SILENT) -> Recipe:
    """The recipe with `data.partial: true` as the shards that are encoded now, which it then names
    for good; any other recipe as it is. InputError where there are none.
    """
    made_of = recipe.data, recipe.model.autoencoder, recipe.model.latent
    return recipe.model_copy(update={"data": _with_part(*made_of, progress)})


def _with_part(
    data: DataConfig,
    autoencoder: AutoencoderConfig,
    latent: LatentSpec,
    progress: Progress = SILENT,
) -> DataConfig:
    if data.partial is not True:
        return data
    shards = split_shards(data, progress)["train"]
    cache = _caches(data, autoencoder, latent, ("train",))["train"]
    part = encoded_part(shards, cache, Sums(cache_dir(data.cache)), progress)
    return data.model_copy(update={"partial": str(part)})


def ensure_latents(
    data: DataConfig,
    autoencoder: AutoencoderConfig,
    latent: LatentSpec,
    progress: Progress = SILENT,
    text: TextConfig | None = None,
    fleet: Fleet | None = None,
) -> dict[str, Path]:
    """split -> its folder, for `load_latents`; shards that are not in the cache are encoded now.

    text: the text model that is to train on them. fleet: what encodes; None: this process. Of
    `train` only the shards are encoded that `data.limit` needs, or that `data.partial` names: with
    `true` none, held-out ones as ever. InputError before anything is encoded where the text model
    cannot tell captions apart or a shard cannot be read; beyond `data.max_bad`, after which whole
    shards stay in the cache.
    """
    data = _with_part(data, autoencoder, latent, progress)
    folders: dict[str, Path] = {}
    splits, every = split_shards(data, progress), list[Split]()
    for split, cache in _caches(data, autoencoder, latent, splits).items():
        shards = splits[split]
        _say_lacking(data, split, shards, progress)
        with progress.task(f"looking through the {split} shards"):
            # a fleet's processes read what is to be read, each its part
            looked = look_at(data, cache, split, shards, progress, reading=fleet is None)
        if missing := looked.missing():
            with progress.task(f"looking through the {split} samples"):
                paths = [source.path for source in looked.sources]
                reader = ShardReader(_at_hand(paths), caption_key=data.caption_key)
            if text and not folders:
                _check_captions(text, reader, progress)
            count, budget = looked.pictures(missing), looked.budget(data.max_bad)
            made_of = autoencoder, latent, budget, cache_dir(data.cache)
            encode(Encoding(tuple(missing), count, cache, *made_of), fleet, progress)
            looked = look_at(data, cache, split, shards)
        every.append(looked)
        told = looked.budget(data.max_bad).told()
        folders[split] = write_split(looked)
        if told:
            progress.say(f"{told}; {folders[split] / BAD_SAMPLES} names them")
        if isinstance(data.partial, str) and split == "train":
            part, found = parse_part(data.partial), filter(None, looked.found)
            samples = sum(row.samples for row in found)
            progress.say(f"{part.told}, {samples:,} samples: data.partial={part}")
        if missing and (warning := channel_warning(channel_metrics(load_latents(folders[split])))):
            progress.say(warning)
    if warning := held_out_warning(every):
        progress.say(warning)
    return folders


def _say_lacking(data: DataConfig, split: str, shards: Sequence[Path], progress: Progress) -> None:
    if split == "train" and isinstance(data.partial, str):
        return  # these are named, and held against their content
    if gone := lacking(str(data.shards if split == "train" else data.val_shards), shards):
        progress.say(
            f"warning: {len(gone)} {split} shard(s) that {MANIFEST} names are not there, first"
            f" {shown(gone[0])}; the others are used"
        )


def _at_hand(paths: Sequence[Path]) -> Sequence[Path]:
    """Those that need not be fetched, or else the first."""
    return [path for path in paths if is_here(path)] or paths[:1]


def ensure_latents_apart(
    recipe: Recipe, progress: Progress = SILENT, fleet: Fleet | None = None
) -> None:
    """`ensure_latents` for a process that starts others: those get the GPU to themselves, as what
    this machine encodes on one is encoded in a process that then ends.
    """
    work = partial(_ensure, recipe, fleet)
    made_of = recipe.data, recipe.model.autoencoder, recipe.model.latent
    if fleet is None and torch.cuda.is_available() and unencoded(*made_of):
        apart(work, progress)
    else:
        work(progress)


def _ensure(recipe: Recipe, fleet: Fleet | None, progress: Progress) -> None:
    made_of = recipe.data, recipe.model.autoencoder, recipe.model.latent
    ensure_latents(*made_of, progress, recipe.model.text, fleet)


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
    chosen = evenly(len(samples), CAPTIONED)
    found = list[str]()
    for index in chosen.tolist():
        with suppress(InputError):
            found += samples.captions(index)
    return found


def unencoded(data: DataConfig, autoencoder: AutoencoderConfig, latent: LatentSpec) -> int:
    """How many pictures `ensure_latents` would have to encode."""
    if data.shards in EMBEDDED and (unmade := unmade_samples(data.shards, cache_dir(data.cache))):
        return unmade
    data = _with_part(data, autoencoder, latent)
    splits = split_shards(data)
    caches = _caches(data, autoencoder, latent, splits)
    looked = [look_at(data, cache, split, splits[split]) for split, cache in caches.items()]
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
    data = _with_part(data, autoencoder, latent)
    splits, found = split_shards(data), {}
    for split, cache in _caches(data, autoencoder, latent, splits).items():
        looked = look_at(data, cache, split, splits[split])
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
    reader = ShardReader(tars, limit, caption_key=meta.get("caption_key"))
    buckets = _buckets(folder, len(reader)) if "sizes" in meta else None
    captioned_by = None if shuffle is None else _others_alike(len(reader), buckets, shuffle)
    return LatentSet(
        reader,
        LatentScale(scale, shift, meta["deterministic"]),
        pictures,
        captioned_by,
        skipped,
        PrepareConfig.model_validate(meta.get("prepare", {})),
        tuple((height, width) for height, width in meta.get("sizes", ())),
        buckets,
        meta.get("rounding"),
    )


def _buckets(folder: Path, samples: int) -> np.ndarray:
    """Of the first samples of a split, (samples,) uint8, mapped."""
    try:
        found: np.ndarray = np.load(folder / BUCKETS, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise InputError(
            f"{folder / BUCKETS}: cannot be read: {error}; remove {folder} and start again"
        ) from error
    return found[:samples]


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


def _others_alike(count: int, buckets: np.ndarray | None, seed: int) -> np.ndarray:
    """`others`, each of the same bucket, so that a batch's captions too are of one bucket."""
    if buckets is None:
        return others(count, seed)
    partner = np.empty(count, dtype=np.int64)
    for bucket in np.unique(buckets):
        own = np.flatnonzero(buckets == bucket)
        partner[own] = own[others(len(own), seed)]
    return partner


def channel_statistics(latents: LatentSet) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation (C,) of z1, posterior noise included, in fp64; each channel
    should be about N(0, 1).

    Over at most STATISTICS samples, spread evenly over the set.
    """
    sums, count = [], 0
    for z, square in squares(latents):
        sums.append(torch.stack([z.mean((2, 3)).sum(0), square.mean((2, 3)).sum(0)]))
        count += len(z)
    mean, square = torch.stack(sums).sum(0) / count
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
