"""A split of a shard set as the latent cache has it: which of its shards are encoded, what was
left out of them, and the folder with the manifest that `load_latents` opens.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from flowray.config.cache import cache_dir
from flowray.config.errors import InputError
from flowray.config.progress import SILENT, Progress
from flowray.config.train import DataConfig
from flowray.config.writing import write_whole
from flowray.data.index import samples_in
from flowray.data.remote import shown, stat_of
from flowray.data.shards import MANIFEST
from flowray.store.encode import Budget
from flowray.store.latent_shards import (
    Bad,
    Encoded,
    LatentShards,
    Source,
    bad_row,
    known_sources,
    label,
    numbers,
    sources,
)
from flowray.store.sums import Sums

NO_BYTES = Bad(0, "", "0 bytes", "0 bytes; was it copied whole?")
BAD_SAMPLES = "bad_samples.jsonl"
BUCKETS = "buckets.npy"  # the bucket of each sample of a split, (samples,) uint8


@dataclass(frozen=True)
class Split:
    """The shards of a split that are needed, and what the cache holds of each.

    samples: of each, bad ones included; shards without samples are left out.
    """

    name: str
    cache: LatentShards
    sources: tuple[Source, ...]
    samples: tuple[int, ...]
    found: tuple[Encoded | None, ...]
    no_bytes: tuple[Path, ...] = ()  # shards of 0 bytes, each of which counts as a bad sample

    def missing(self) -> list[Source]:
        """What is to be encoded; shards of the same bytes are so once, where that is known."""
        by_key = {
            source.key or source.path: source
            for source, found in zip(self.sources, self.found, strict=True)
            if found is None
        }
        return list(by_key.values())

    def pictures(self, chosen: Sequence[Source]) -> int:
        """How many samples these shards have."""
        counts = dict(zip(self.sources, self.samples, strict=True))
        return sum(counts[source] for source in chosen)

    def bad(self) -> list[tuple[int, Path, Bad]]:
        """The known bad samples, each with its place in the split and its shard."""
        starts = np.cumsum([0, *self.samples]).tolist()
        return [
            (start + bad.index, source.path, bad)
            for start, source, found in zip(starts, self.sources, self.found, strict=False)
            for bad in (found.bad if found else ())
        ]

    def budget(self, max_bad: float) -> Budget:
        """What may be bad; InputError where the cached shards have more."""
        budget = Budget(self.name, sum(self.samples) + len(self.no_bytes), max_bad)
        for path in self.no_bytes:
            budget.add(path, [NO_BYTES])
        for _, path, bad in self.bad():
            budget.add(path, [bad])
        return budget


def look_at(
    data: DataConfig,
    cache: LatentShards,
    split: str,
    shards: Sequence[Path],
    progress: Progress = SILENT,
    *,
    reading: bool = True,
) -> Split:
    """InputError where a shard cannot be read, or there is no sample. reading: shards whose sha256
    is not remembered are read for it; else they are taken to be missing.
    """
    if data.limit is not None and split == "train":
        shards = _first(shards, data.limit)
    kept, no_bytes, sums = [], list[Path](), Sums(cache_dir(data.cache))
    for source in sources(shards, sums, progress) if reading else known_sources(shards, sums):
        found = cache.find(source)
        samples = found.samples + len(found.bad) if found else samples_in(source.path)
        if samples:
            kept.append((source, samples, found))
        elif not stat_of(source.path)[0]:
            no_bytes.append(source.path)
    if not kept:
        raise InputError(f"no samples in {len(shards)} shard(s), first {shards[0]}")
    chosen, counts, rows = zip(*kept, strict=True)
    return Split(split, cache, chosen, counts, rows, tuple(no_bytes))


def _first(shards: Sequence[Path], limit: int) -> Sequence[Path]:
    """The first shards, up to the one with sample number `limit`."""
    samples = 0
    for number, shard in enumerate(shards, 1):
        samples += samples_in(shard)
        if samples >= limit:
            return shards[:number]
    return shards


def folder_of(split: Split) -> Path:
    """Where the split is to be: its name stands for the shards and their places."""
    places = (f"{source.key} {source.path.absolute()}" for source in split.sources)
    digest = hashlib.sha256("\n".join(places).encode()).hexdigest()[:12]
    return split.cache.folder.parent / f"{split.name}-{digest}"


def write_split(split: Split) -> Path:
    """The split's folder, written unless it is there already."""
    folder = folder_of(split)
    rows = [found for found in split.found if found is not None]
    if len(rows) < len(split.found):
        raise InputError(f"{split.cache.folder}: latents were removed meanwhile; start again")
    count = sum(row.values for row in rows)
    bad = split.bad()
    if not count:
        _, path, first = bad[0]
        raise InputError(
            f"{split.name}: all {sum(split.samples)} samples are bad or left out by data.prepare:"
            f" {split.budget(1).told()}; first {label(path, first)}"
        )
    mean = sum(row.total for row in rows) / count
    meta: dict[str, Any] = {
        "scale": rows[0].scale,
        "shift": rows[0].shift,
        "deterministic": rows[0].deterministic,
        "mean": mean,
        "variance": sum(row.squares for row in rows) / count - mean**2,
        "pictures": [str(source.path.absolute()) for source in split.sources],
        "skipped": [place for place, _, _ in bad],
    }
    if known := [row.rounding for row in rows if row.rounding is not None]:
        meta["rounding"] = max(known)
    if split.cache.preparing.tag:
        meta["prepare"] = split.cache.preparing.model_dump(exclude_defaults=True)
    if split.cache.caption_key is not None:
        meta["caption_key"] = split.cache.caption_key
    if split.cache.sizes:
        meta["sizes"] = split.cache.sizes
        column = io.BytesIO()
        np.save(column, np.concatenate([numbers(row.buckets) for row in rows]))
        _write(folder / BUCKETS, column.getvalue())
    shards = [
        {"name": os.path.relpath(split.cache.folder / source.tar, folder), "samples": row.samples}
        for source, row in zip(split.sources, rows, strict=True)
    ]
    rows_of_bad = [(path, NO_BYTES) for path in split.no_bytes] + [each[1:] for each in bad]
    named = "".join(
        json.dumps({"split": split.name, **bad_row(*each)}) + "\n" for each in rows_of_bad
    )
    manifest = {"meta": meta, "samples": sum(row.samples for row in rows), "shards": shards}
    _write(folder / BAD_SAMPLES, named.encode())
    _write(folder / MANIFEST, f"{json.dumps(manifest, indent=1)}\n".encode())
    return folder


def held_out_warning(splits: Iterable[Split]) -> str | None:
    """One line where shards of another split have the bytes of training shards, wherever they lie:
    what is measured on their samples says nothing of pictures that were not trained on.
    """
    train, *others = splits  # all sources have their keys
    trained = {_content(source) for source in train.sources}
    for other in others:
        if twice := [source for source in other.sources if _content(source) in trained]:
            return (
                f"warning: {other.pictures(twice)} of {sum(other.samples)} {other.name} samples are"
                f" in training shards too, first {shown(twice[0].path)}: what is measured on them"
                " is not held out; give others as data.val_shards"
            )
    return None


def _content(source: Source) -> str:
    """The part of its key that hangs on the shard's bytes alone."""
    return str(source.key).partition("-")[0]


def bad_samples(folders: Iterable[Path]) -> str:
    """The rows of samples that were left out of splits, as text; "" for none."""
    files = (folder / BAD_SAMPLES for folder in folders)
    return "".join(file.read_text(encoding="utf-8") for file in files if file.is_file())


def _write(file: Path, data: bytes) -> None:
    """The file, unless it has these bytes already; an empty one is not made."""
    try:
        if (file.read_bytes() if file.is_file() else b"") != data:
            file.parent.mkdir(exist_ok=True)
            write_whole(file, data, shared=True)
    except OSError as error:
        raise InputError(f"{file}: cannot be written: {error.strerror}") from error
