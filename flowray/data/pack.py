"""A folder of pictures and captions, packed into shards."""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from flowray.config.errors import InputError
from flowray.config.paths import is_folder, no_such
from flowray.config.progress import SILENT, Progress, counted
from flowray.data.captions import captions_of
from flowray.data.decode import EXTENSIONS, UNREAD, decode_rgb, unread
from flowray.data.folders import is_clutter
from flowray.data.make import png
from flowray.data.shards import fill_folder, whole_set

SUFFIXES = tuple(f".{extension}" for extension in EXTENSIONS)
LARGEST = 4096  # px a side; no published text-to-image model makes larger ones
_SHOWN = 5  # faults named in the one line


@dataclass
class Packed:
    """What was packed: split -> samples (`all` without a held-out share), and a line for every
    file left out.

    unread: a line about pictures of kinds that are not read, "" without any.
    """

    samples: dict[str, int] = field(default_factory=dict)
    left_out: list[str] = field(default_factory=list)
    unread: str = ""


def pack_folder(
    images: Path,
    out: Path | str,
    size: int | None,
    *,
    val: float = 0.0,
    skip_bad: bool = False,
    per_shard: int = 1000,
    progress: Progress = SILENT,
) -> Packed:
    """Pack the pictures under `images` (at any depth, hidden ones apart) into shards in `out`.

    Captions: lists, `captions.jsonl` with {"image": path from the list's folder, "caption": text or
    "captions": [text, ...]} a line, `metadata.jsonl` with {"file_name", "text"}, the same as one
    JSON list or with these columns as .csv, a picture's captions in one entry or in several;
    without a list, a .txt of the same name beside each picture, one caption a line.
    size: side in px, at most LARGEST, to which pictures are centre-cropped and resized; None keeps
    them. All become RGB PNG.
    val: share in [0, 1) that goes to `out/val`, the rest to `out/train`; 0: everything to `out`. A
    sample's key, and so its side, depends on its path alone: files added later move no other.
    skip_bad: leave out what has no caption or does not decode.
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
    files = _files(images)
    pictures = [path for path in files if path.suffix.lower() in SUFFIXES]
    kinds = (path.suffix.lower().removeprefix(".") for path in files)
    others = Counter(kind for kind in kinds if kind in UNREAD)
    passed_over = unread(others) if others else ""
    if not pictures:
        why = f", but {passed_over}" if others else f"; looked for {', '.join(SUFFIXES)}"
        raise InputError(f"{images}: no picture in it{why}")
    faults: list[str] = []
    captions = captions_of(pictures, files, faults)
    captioned = [path for path in pictures if path in captions]
    if faults and (not skip_bad or not captioned):
        raise _nothing_packed(faults, skip_bad)
    packed = Packed(left_out=faults, unread=passed_over)
    splits = _splits(images, captioned, val)

    def samples(paths: Iterable[Path]) -> Iterator[dict[str, Any]]:
        for path in paths:
            try:
                data = png(load_rgb(path, size))
            except (OSError, ValueError) as error:
                packed.left_out.append(f"{path}: does not decode ({error})")
                if not skip_bad:
                    raise _nothing_packed(packed.left_out, skip_bad) from error
                continue
            name, text = path.relative_to(images).as_posix(), captions[path]
            row = json.dumps({"captions": text, "source": name}).encode()
            yield {"__key__": key_of(name), "png": data, "txt": text[0].encode(), "json": row}

    with whole_set(out) as (partial, take):
        for split, paths in splits.items():
            folder = partial / split if val else partial
            folder.mkdir(exist_ok=True)
            meta = {"source": images.name, "size": size, "split": split, "val": val}
            with progress.task(f"packing {split} pictures", len(paths)) as advance:
                told = counted(paths, advance)
                count = fill_folder(
                    folder, samples(told), per_shard=per_shard, meta=meta, take=take
                )
            if not count:
                raise _nothing_packed(packed.left_out, skip_bad)
            packed.samples[split] = count
    return packed


def key_of(name: str) -> str:
    """The key of the sample whose picture has this path in its folder: 16 hex digits, evenly
    spread.
    """
    return hashlib.sha256(name.encode()).hexdigest()[:16]


def load_rgb(path: Path, size: int | None) -> np.ndarray:
    """A picture as `decode_rgb` has it, uint8 (H, W, 3); centre-cropped and resized to (size,
    size) when `size` is given.
    """
    rgb = decode_rgb(path.read_bytes())
    if size is None or rgb.shape[:2] == (size, size):
        return rgb
    fitted = ImageOps.fit(Image.fromarray(rgb), (size, size), Image.Resampling.LANCZOS)
    return np.asarray(fitted)


def _files(images: Path) -> list[Path]:
    """The files of a folder at any depth, sorted."""
    if not is_folder(images):
        what = no_such(images)
        raise InputError(f"{images}: {what}; give a folder of pictures ({', '.join(SUFFIXES)})")

    return sorted(
        path
        for path in images.rglob("*")
        if not is_clutter(path.relative_to(images)) and path.is_file()
    )


def _splits(images: Path, pictures: list[Path], val: float) -> dict[str, list[Path]]:
    """split -> pictures; `val` gets those whose keys lie in the first `val` of all keys."""
    if not val:
        return {"all": pictures}
    place = {
        path: int(key_of(path.relative_to(images).as_posix()), 16) / 16**16 for path in pictures
    }
    if val <= (first := min(place.values())):  # few pictures: by chance none lies that low
        least = math.ceil(first * 1000 + 1) / 1000
        raise InputError(
            f"val {val}: of {len(pictures)} pictures none would go to val; the least share that"
            f" holds one out is {least:g}"
        )
    if val > (last := max(place.values())):
        most = math.floor(last * 1000) / 1000
        raise InputError(
            f"val {val}: of {len(pictures)} pictures none would go to train; the greatest share"
            f" that leaves one is {most:g}"
        )
    return {
        "train": [path for path in pictures if place[path] >= val],
        "val": [path for path in pictures if place[path] < val],
    }


def _nothing_packed(faults: list[str], skip_bad: bool) -> InputError:
    shown = "; ".join(faults[:_SHOWN])
    more = f"; and {len(faults) - _SHOWN} more" if len(faults) > _SHOWN else ""
    hint = "" if skip_bad else "; --skip-bad leaves such files out"
    return InputError(f"nothing packed, {len(faults)} fault(s): {shown}{more}{hint}")
