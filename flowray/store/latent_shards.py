"""The cache of latent shards: for each shard of pictures one tar of latents, its index with the
captions as a column, and a JSON that says what is in it. All are named by what made them: the
autoencoder's folder, the shard's sha256, and the way its pictures are decoded where they are not
plain. Where the shard lies plays no part.
"""

from __future__ import annotations

import json
import os
import time
import uuid
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from flowray.config.buckets import Size
from flowray.config.cache import unwritable
from flowray.config.errors import InputError
from flowray.config.jsons import parse_json
from flowray.config.prepare import AS_DECODED, PrepareConfig
from flowray.config.progress import SILENT, Progress
from flowray.config.train import MomentsKind
from flowray.config.writing import write_whole
from flowray.data import decode
from flowray.data.captions import captions_in
from flowray.data.folders import sync
from flowray.data.index import IndexFile, TarIndex, load_index
from flowray.data.shards import are_plain
from flowray.store.sums import Sums

if TYPE_CHECKING:
    from webdataset.writer import TarWriter

_FIRST = ord("0")  # the letter of bucket 0; with 64 buckets the last one is "o"
_ABANDONED_S = 3600.0  # a writer adds to its hidden file much more often


@dataclass(frozen=True)
class Bad:
    """A sample that is left out. index: its place in its shard; key: "" of a whole shard; message:
    without shard and key.
    """

    index: int
    key: str
    cause: str
    message: str


@dataclass(frozen=True)
class Encoded:
    """What the JSON beside a latent tar says.

    samples: in the tar; bytes: of the tar; values, total, squares: over all numbers of z1 their
    count, sum, and sum of expected squares, posterior noise included; bad: samples of the pictures'
    shard that are not in the tar; buckets: a character for each sample of the tar, as `letters` has
    them, "" where there are no buckets; rounding: the largest of the samples' `rounding_errors`,
    None in caches of before.
    """

    samples: int
    bytes: int
    values: int
    total: float
    squares: float
    scale: float | Sequence[float]
    shift: float | Sequence[float]
    deterministic: bool
    bad: tuple[Bad, ...] = ()
    buckets: str = ""
    rounding: float | None = None


@dataclass(frozen=True)
class Source:
    """A shard of pictures and what its latent shard is called; key: None where that is not known
    yet, as nobody has read the shard for its sha256.
    """

    path: Path
    key: str | None

    @property
    def tar(self) -> str:
        return f"{self.key}.tar"

    def named(self, sums: Sums) -> Source:
        """The same with its key; InputError where the shard cannot be read."""
        return sources([self.path], sums)[0] if self.key is None else self


def sources(paths: Sequence[Path], sums: Sums, progress: Progress = SILENT) -> list[Source]:
    """The shards with their keys; InputError where one cannot be read."""
    return _sources(paths, sums.of(paths, progress))


def known_sources(paths: Sequence[Path], sums: Sums) -> list[Source]:
    """The same, but none is read: those whose sha256 is not remembered have no key."""
    return _sources(paths, [sums.known(path) for path in paths])


def _sources(paths: Sequence[Path], found: Sequence[str | None]) -> list[Source]:
    version = f"-decoded{decode.VERSION}"
    return [
        Source(path, None if sha is None else sha[:32] + ("" if plain else version))
        for path, sha, plain in zip(paths, found, are_plain(paths), strict=True)
    ]


@dataclass(frozen=True)
class LatentShards:
    """The latent shards of one autoencoder, in a folder; several processes may use and fill it.

    preparing, caption_key, moments: of the recipe; the folder's name stands for them too. sizes:
    (height, width) of the latents of each bucket, of which the first is the model's own; ()
    without.
    """

    folder: Path
    preparing: PrepareConfig = AS_DECODED
    caption_key: str | None = None
    sizes: tuple[Size, ...] = ()
    moments: MomentsKind = "fp16"

    def find(self, source: Source) -> Encoded | None:
        """What the cache holds of a shard; None where it is not whole, or has no key yet. An index
        of it that lacks the captions, as caches of before have it, is made anew.
        """
        if source.key is None:
            return None
        try:
            row = parse_json((self.folder / f"{source.key}.json").read_text(encoding="utf-8"))
            found = Encoded(**row | {"bad": tuple(Bad(**bad) for bad in row["bad"])})
            whole = (self.folder / source.tar).stat().st_size == found.bytes
            return found if whole and self._indexed(source).samples == found.samples else None
        except (OSError, ValueError, TypeError, KeyError, AttributeError, InputError):
            return None

    @contextmanager
    def writing(self, source: Source) -> Iterator[TarWriter]:
        """The tar, hidden while it is written; it takes its place, on disk, at the end of the
        block, and is removed on any exception.
        """
        from webdataset.writer import TarWriter  # slow to import, and reading needs none of it

        partial = self.folder / f".{source.tar}.{uuid.uuid4().hex[:12]}"
        try:
            # ustar's names are too short for some keys
            with (
                partial.open("wb") as file,
                TarWriter(file, encoder=False, mtime=0, format="GNU_FORMAT") as tar,
            ):
                yield tar
            sync(partial)
            os.replace(partial, self.folder / source.tar)
        finally:
            with suppress(OSError):
                partial.unlink(missing_ok=True)

    def _indexed(self, source: Source) -> TarIndex | IndexFile:
        """The index of a tar with the column of its captions, made where there is none; InputError
        where the tar is broken.
        """
        captions_of = partial(captions_in, key=self.caption_key)
        return load_index(self.folder / source.tar, captions_of)

    def keep(self, source: Source, row: Encoded) -> None:
        """Index a tar that has its place and say what is in it: from then on it is found."""
        self._indexed(source)
        said = asdict(row)
        if not row.buckets:
            del said["buckets"]
        text = json.dumps(said, indent=1) + "\n"
        write_whole(self.folder / f"{source.key}.json", text, durable=True, shared=True)

    def prepare(self) -> None:
        """Make the folder and clear it of what writers left that were killed."""
        if reason := unwritable(self.folder):
            raise InputError(
                f"{self.folder}: cannot be written: {reason}; set data.cache or FLOWRAY_CACHE to a"
                " writable folder"
            )
        for left in self.folder.glob(".*.????????????"):
            with suppress(OSError):
                if time.time() - left.stat().st_mtime > _ABANDONED_S:
                    left.unlink()


def letters(buckets: Iterable[int]) -> str:
    """Numbers of buckets as text, one character each: 0 to 9, then on in ASCII's order."""
    return "".join(chr(_FIRST + bucket) for bucket in buckets)


def numbers(buckets: str) -> np.ndarray:
    """The numbers of `letters`, (samples,) uint8."""
    return np.frombuffer(buckets.encode("ascii"), np.uint8) - np.uint8(_FIRST)


def bad_row(path: Path, bad: Bad) -> dict[str, str]:
    """A row of `bad_samples.jsonl`."""
    return {"shard": str(path), "key": bad.key, "cause": bad.cause, "message": bad.message}


def label(path: Path, bad: Bad) -> str:
    """A bad sample as a line says it."""
    where = f"shard {path}, sample {bad.key!r}" if bad.key else f"shard {path}"
    return f"{where}: {bad.message}"
