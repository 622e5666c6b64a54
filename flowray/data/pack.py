"""Pictures with captions, packed into shards."""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from flowray.config.cores import usable_cores
from flowray.config.errors import InputError
from flowray.config.prepare import PrepareConfig
from flowray.config.progress import SILENT, Progress, counted
from flowray.data.make import png
from flowray.data.prepare import Filtered, Preparation
from flowray.data.shards import fill_folder, whole_set
from flowray.data.sources import Row, open_source

LARGEST = 4096  # px a side; no published text-to-image model makes larger ones
LEFT_OUT = "bad_samples.jsonl"
_BAD = "bad"
_SHOWN = 5  # faults named in the one line
_AHEAD = 2  # pictures a thread that are under way or wait to be written
T = TypeVar("T")
R = TypeVar("R")


@dataclass(frozen=True)
class Omitted:
    """A picture that is not packed. place: its file, or place in a table; cause: one of
    `prepare.FILTERED`, or "bad".
    """

    place: str
    cause: str
    message: str

    def __str__(self) -> str:
        return f"{self.place}: {self.message}"


@dataclass
class Packed:
    """What was packed: split -> samples (`all` without a held-out share), a line for every file
    left out because it is bad, and what the size and aspect filters left out.

    unread: a line about pictures that are passed over, "" without any.
    """

    samples: dict[str, int] = field(default_factory=dict)
    left_out: list[str] = field(default_factory=list)
    filtered: list[Omitted] = field(default_factory=list)
    unread: str = ""

    def told(self) -> str:
        """What the filters left out, in one line; "" for nothing."""
        if not self.filtered:
            return ""
        causes = Counter(each.cause for each in self.filtered).most_common()
        why = ", ".join(f"{cause} x{count}" for cause, count in causes)
        return f"{len(self.filtered)} picture(s) not packed: {why}"


def pack_folder(
    images: Path,
    out: Path | str,
    size: int | None,
    *,
    val: float = 0.0,
    skip_bad: bool = False,
    per_shard: int = 1000,
    prepare: PrepareConfig | None = None,
    caption_key: str | None = None,
    workers: int | None = None,
    progress: Progress = SILENT,
) -> Packed:
    """Pack the pictures of `images` into shards in `out`: a folder's at any depth, hidden ones
    apart, those in parquet files, or what `save_to_disk` of Hugging Face's `datasets` wrote.

    Captions of a folder: lists, `captions.jsonl` with {"image": path from the list's folder,
    "caption": text or "captions": [text, ...]} a line, `metadata.jsonl` with {"file_name", "text"},
    the same as one JSON list or with these columns as .csv, .tsv or .parquet, a picture's captions
    in one entry or in several; without a list, a .txt of the same name beside each picture, one
    caption a line. Tables have such a column. caption_key: another one.
    size: side in px, at most LARGEST, to which pictures are centre-cropped and resized; None keeps
    them. All become RGB PNG. prepare: how; by default Lanczos, on white, and what would have to be
    enlarged is left out.
    val: share in [0, 1) that goes to `out/val`, the rest to `out/train`; 0: everything to `out`. A
    sample's key, and so its side, depends on its path alone, or on its table and row: files added
    later move no other. Splits that the source has are kept; the share is one of its `train`.
    skip_bad: leave out what has no caption or does not decode. workers: threads, by default one a
    usable core; the shards are the same for any number.
    `out`, a folder or an address, is there whole or not at all. InputError, one line: no pictures,
    a split without samples, the first bad file.
    """
    if size is not None and not 1 <= size <= LARGEST:
        raise InputError(f"size {size}: want 1 to {LARGEST} px, the side of a picture")
    if not 0 <= val < 1:
        raise InputError(
            f"val {val}: the share of the pictures to hold out must be at least 0 and below 1, such"
            " as 0.05"
        )
    config = prepare or PrepareConfig(resize="lanczos")
    if size is not None and config.resize == "none":
        raise ValueError("a size, but no way to resize")
    prepared = Preparation(config, None if size is None else (size, size))
    source = open_source(images, caption_key)
    packed = Packed(left_out=source.faults, unread=source.unread)
    if packed.left_out and (not skip_bad or not source.rows):
        raise _nothing_packed(packed, skip_bad)
    splits = _splits(source.rows, val)
    load = _Load(images if images.is_dir() else images.parent, prepared)
    made_of = {"source": images.name, "size": size, "val": val, "prepare": config.model_dump()}
    with whole_set(out) as (partial, take):
        for split, rows in splits.items():
            folder = partial if split == "all" else partial / split
            folder.mkdir(exist_ok=True)
            meta = made_of | {"split": split}
            work = zip(rows, source.fetch(rows), strict=True)
            with (
                progress.task(f"packing {split} pictures", len(rows)) as advance,
                closing(in_order(load, work, workers or usable_cores())) as loaded,
            ):
                made = _samples(counted(loaded, advance), packed, skip_bad)
                count = fill_folder(folder, made, per_shard=per_shard, meta=meta, take=take)
            if not count:
                raise _nothing_packed(packed, skip_bad)
            packed.samples[split] = count
        _name_left_out(partial / LEFT_OUT, packed)
    return packed


@dataclass(frozen=True)
class _Load:
    """Makes PNGs of pictures; base: where the names of rows begin."""

    base: Path
    prepare: Preparation

    def __call__(self, work: tuple[Row, Callable[[], bytes]]) -> tuple[Row, bytes | Omitted]:
        row, read = work
        place = str(self.base / row.name)
        try:
            data = read()
        except (OSError, ValueError) as error:
            return row, Omitted(place, _BAD, f"cannot be read ({error})")
        try:
            return row, png(self.prepare(data))
        except Filtered as error:
            return row, Omitted(place, error.cause, str(error))
        except ValueError as error:
            return row, Omitted(place, _BAD, f"does not decode ({error})")


def _samples(
    loaded: Iterable[tuple[Row, bytes | Omitted]], packed: Packed, skip_bad: bool
) -> Iterator[dict[str, Any]]:
    """The samples of what was loaded; the rest is told in `packed`, or is InputError."""
    for row, found in loaded:
        if isinstance(found, bytes):
            said = json.dumps({"captions": row.captions, "source": row.name}).encode()
            text = row.captions[0].encode()
            yield {"__key__": key_of(row.name), "png": found, "txt": text, "json": said}
        elif found.cause != _BAD:
            packed.filtered.append(found)
        else:
            packed.left_out.append(str(found))
            if not skip_bad:
                raise _nothing_packed(packed, skip_bad)


def in_order(work: Callable[[T], R], items: Iterable[T], workers: int) -> Generator[R, None, None]:
    """What `work` makes of every item, in their order, by so many threads. At most _AHEAD items a
    thread are under way or wait to be taken.

    Pillow and zlib let go of the interpreter while they decode, resize and compress.
    """
    pool = ThreadPoolExecutor(workers, thread_name_prefix="pack")
    waiting = deque[Future[R]]()
    try:
        for item in items:
            waiting.append(pool.submit(work, item))
            if len(waiting) >= _AHEAD * workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def key_of(name: str) -> str:
    """The key of the sample whose picture has this path in its folder, or place in its table: 16
    hex digits, evenly spread.
    """
    return hashlib.sha256(name.encode()).hexdigest()[:16]


def _splits(rows: list[Row], val: float) -> dict[str, list[Row]]:
    """split -> rows, `all` of what has none; `val` gets those whose keys lie in the first `val` of
    all keys.
    """
    own: dict[str, list[Row]] = {}
    for row in rows:
        own.setdefault(row.split or "all", []).append(row)
    if not val:
        return own
    if "val" in own:
        raise InputError(f"val {val}: there is a split of held-out pictures already")
    shared = own.pop("all", None) or own.pop("train", None)
    if not shared:
        raise InputError(
            f"val {val}: no split `train` to hold pictures out of, but {', '.join(own)}"
        )
    place = {row.name: int(key_of(row.name), 16) / 16**16 for row in shared}
    if val <= (first := min(place.values())):  # few pictures: by chance none lies that low
        least = math.ceil(first * 1000 + 1) / 1000
        raise InputError(
            f"val {val}: of {len(shared)} pictures none would go to val; the least share that"
            f" holds one out is {least:g}"
        )
    if val > (last := max(place.values())):
        most = math.floor(last * 1000) / 1000
        raise InputError(
            f"val {val}: of {len(shared)} pictures none would go to train; the greatest share"
            f" that leaves one is {most:g}"
        )
    held_out = {
        "train": [row for row in shared if place[row.name] >= val],
        "val": [row for row in shared if place[row.name] < val],
    }
    return held_out | own


def _name_left_out(file: Path, packed: Packed) -> None:
    """A row for whatever was not packed; no file where all was."""
    bad = ((_BAD, line) for line in packed.left_out)
    filtered = ((each.cause, str(each)) for each in packed.filtered)
    rows = [{"cause": cause, "message": line} for cause, line in (*bad, *filtered)]
    if rows:
        text = "".join(json.dumps(row) + "\n" for row in rows)
        file.write_text(text, encoding="utf-8")


def _nothing_packed(packed: Packed, skip_bad: bool) -> InputError:
    faults = packed.left_out
    if not faults:
        first = packed.filtered[0] if packed.filtered else "no pictures in a split"
        return InputError(f"nothing packed; {packed.told()}, first {first}")
    shown = "; ".join(faults[:_SHOWN])
    more = f"; and {len(faults) - _SHOWN} more" if len(faults) > _SHOWN else ""
    hint = "" if skip_bad else "; --skip-bad leaves such files out"
    return InputError(f"nothing packed, {len(faults)} fault(s): {shown}{more}{hint}")
