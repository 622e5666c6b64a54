"""A folder of pictures and captions, packed into shards."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from flowray.config.errors import InputError
from flowray.data.make import png
from flowray.data.shards import write_shards

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
CAPTION_FILE = "captions.jsonl"
_SHOWN = 5  # faults named in the one line


def pack_folder(images: Path, out: Path, size: int | None, per_shard: int = 1000) -> int:
    """Pack the pictures under `images` (at any depth) into shards in `out`; returns how many.

    Captions: `images/captions.jsonl` with {"image": path relative to `images`, "caption": text or "captions": [text, ...]} a line,
    or beside each picture a .txt of the same name with one caption a line.
    size: side in px to which pictures are centre-cropped and resized; None keeps them as they are. All become RGB PNG.
    Everything is looked at before anything is written: InputError names the files without a caption or that do not decode.
    """
    if not images.is_dir():
        raise InputError(f"{images}: no such folder; give a folder of pictures ({', '.join(SUFFIXES)})")
    if size is not None and size < 1:
        raise InputError(f"size {size}: must be at least 1 px")
    pictures = sorted(path for path in images.rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file())
    if not pictures:
        raise InputError(f"{images}: no picture in it; looked for {', '.join(SUFFIXES)}")
    faults: list[str] = []
    listed = images / CAPTION_FILE
    captions = _from_list(listed, faults) if listed.is_file() else {path: _beside(path, faults) for path in pictures}
    faults += [f"{path}: no such picture ({listed})" for path in sorted(captions.keys() - set(pictures))]
    for path in pictures:
        if path not in captions:
            faults.append(f"{path}: no line in {listed}")
        try:
            load_rgb(path, size)
        except Exception as error:  # Pillow's decoders raise nearly anything on bad bytes
            faults.append(f"{path}: does not decode ({error})")
    if faults:
        more = f"; and {len(faults) - _SHOWN} more" if len(faults) > _SHOWN else ""
        raise InputError(f"nothing packed, {len(faults)} fault(s): {'; '.join(faults[:_SHOWN])}{more}")
    meta = {"source": images.name, "size": size}
    write_shards(out, _samples(images, pictures, captions, size), per_shard=per_shard, meta=meta)
    return len(pictures)


def load_rgb(path: Path, size: int | None) -> np.ndarray:
    """A picture upright and on white as uint8 (H, W, 3); centre-cropped and resized to (size, size) when `size` is given."""
    with Image.open(path) as opened:
        upright = ImageOps.exif_transpose(opened)
        if "A" in upright.getbands() or "transparency" in upright.info:
            layer = upright.convert("RGBA")
            upright = Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer)
        rgb = upright.convert("RGB")
    if size is not None and rgb.size != (size, size):
        rgb = ImageOps.fit(rgb, (size, size), Image.Resampling.LANCZOS)
    return np.asarray(rgb)


def _beside(picture: Path, faults: list[str]) -> list[str]:
    path = picture.with_suffix(".txt")
    try:
        found = [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except FileNotFoundError:
        faults.append(f"{picture}: no caption file {path.name}")
        return []
    except (OSError, UnicodeDecodeError) as error:
        faults.append(f"{path}: cannot be read as UTF-8 ({error})")
        return []
    if not found:
        faults.append(f"{path}: empty")
    return found


def _from_list(listed: Path, faults: list[str]) -> dict[Path, list[str]]:
    captions: dict[Path, list[str]] = {}
    for number, line in enumerate(listed.read_bytes().splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            path = listed.parent / row["image"]
            given = row["captions"] if "captions" in row else [row["caption"]]
            if not given or not isinstance(given, list) or not all(isinstance(c, str) and c.strip() for c in given):
                raise ValueError("empty caption")
        except (ValueError, KeyError, TypeError) as error:
            faults.append(f'{listed}:{number}: want {{"image": "a.png", "caption": "..."}} ({type(error).__name__}: {error})')
            continue
        if path in captions:
            faults.append(f"{listed}:{number}: {row['image']} is listed twice")
        captions[path] = [caption.strip() for caption in given]
    return captions


def _samples(images: Path, pictures: list[Path], captions: dict[Path, list[str]], size: int | None) -> Iterator[dict[str, Any]]:
    for i, path in enumerate(pictures):
        row = {"captions": captions[path], "source": path.relative_to(images).as_posix()}
        text = captions[path][0].encode()
        yield {"__key__": f"{i:08d}", "png": png(load_rgb(path, size)), "txt": text, "json": json.dumps(row).encode()}
