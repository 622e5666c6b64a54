"""What `flowray.init` sees of a set: pictures as a recipe would take them, captions, and what the
recipe has to say of them.
"""

from __future__ import annotations

import re
import shlex
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from flowray.config.errors import InputError
from flowray.config.jsons import parse_json
from flowray.config.paths import exists, no_such
from flowray.config.prepare import AS_DECODED, PrepareConfig
from flowray.config.sources import recipe_names
from flowray.data.captions import captions_in
from flowray.data.decode import picture_of, picture_size
from flowray.data.order import evenly
from flowray.data.pictures import decode_image, pictures_also_in
from flowray.data.prepare import Filtered, Preparation
from flowray.data.reader import ShardReader
from flowray.data.shards import NAMED, find_shards, tars
from flowray.data.sources import SUFFIXES

LOOKED_AT = 32  # pictures and captions, evenly spread over the set
MEASURED = 256  # pictures of a split whose headers are read, at most
FACTOR, PATCH = 8, 2  # px a latent's cell, and cells a patch of quickstart's network
SIDES = FACTOR * PATCH  # px that a picture's side is a multiple of
MOST = 256  # px a side where pictures are of several sizes and nobody asks for more
ALIKE = 0.9  # of the pictures that have one size, to which the others are then brought
TINY = 0.5  # of the median side: what is smaller is one of a few, or of another kind
LARGE_ENOUGH = 0.95  # of the other pictures, which the size chosen for them must not enlarge
_CAPTION_LIKE = re.compile("caption|text|prompt|descri|title", re.IGNORECASE)


@dataclass(frozen=True)
class Looked:
    """A set and some of its samples: pictures uint8 (H, W, 3) of one size, one caption each.

    data: what the recipe's `data` says beside the shards; notes: what is worth a line.
    """

    train: Path
    val: Path
    count: int
    held_out: int
    pictures: list[np.ndarray]
    captions: list[str]
    data: dict[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) in px."""
        height, width, _ = self.pictures[0].shape
        return height, width


def look(folder: Path, val: Path | None, size: int | None, caption: str | None) -> Looked:
    """Open the shards and a few samples; InputError with what to type where they are not ready
    for training.

    size: px a side that pictures are brought to; None: what they have, or what fits most of them.
    caption: the key of the `.json` that has the captions; None: the usual ones, or else the one
    whose name is like theirs.
    """
    train, val = _splits(folder, val)
    shards, held_out = find_shards(str(train)), ShardReader(find_shards(str(val)))
    reader = ShardReader(shards, caption_key=caption)
    chosen = evenly(len(reader), LOOKED_AT).tolist()
    said: dict[str, Any] = {}
    if caption is None:
        caption = _caption_key(train, reader, chosen)
    if caption is not None:
        said["caption_key"] = caption
        reader = ShardReader(shards, caption_key=caption)
    sizes = [each for split in (reader, held_out) for each in _sizes(split)]
    prepare = _preparation(train, sizes, size)
    if prepare.config != AS_DECODED:
        said["prepare"] = prepare.config.model_dump(exclude_defaults=True)
    pictures, captions, notes = _samples(train, reader, chosen, prepare)
    notes += _left_out(prepare, sizes) + _in_both(reader, held_out, val)
    if len(captions) > 1 and len(set(captions)) == 1:
        raise InputError(
            f"{train}: every caption looked at is {captions[0]!r}; a text-to-image model learns"
            " from captions that differ"
        )
    return Looked(train, val, len(reader), len(held_out), pictures, captions, said, notes)


def _splits(folder: Path, val: Path | None) -> tuple[Path, Path]:
    """The folders of the training shards and of held-out ones."""
    if str(folder) in NAMED and not exists(folder):
        recipe = str(folder)
        if recipe not in recipe_names():
            recipe = f"quickstart data.shards={folder}"
        raise InputError(
            f"--data {folder}: a set that needs no new recipe; type python -m flowray.train"
            f" {recipe}"
        )
    if not exists(folder):
        raise InputError(
            f"--data {folder}: {no_such(folder)}; give the folder of shards that pack made"
        )
    below = folder / "train"
    train = below if below.is_dir() and not tars(folder) else folder
    val = val or folder / "val"
    if not tars(train) and any(path.suffix.lower() in SUFFIXES for path in folder.rglob("*")):
        packing = (
            f"python -m flowray.data pack {shlex.quote(str(folder))} shards --size 64 --val 0.05"
        )
        raise InputError(
            f"--data {folder}: pictures, not shards; type {packing}, then --data shards"
        )
    find_shards(str(train))  # what is wrong with it comes before what lacks beside it
    if not val.is_dir():
        raise InputError(
            f"--data {folder}: no held-out shards in {val}; pack with --val 0.05, or give --val"
            " FOLDER"
        )
    if val.samefile(train):
        raise InputError(
            f"--val {val}: the training shards themselves; held-out ones must be others (pack with"
            " --val 0.05)"
        )
    return train, val


def _caption_key(train: Path, reader: ShardReader, chosen: Sequence[int]) -> str | None:
    """The key of the `.json` that has captions where the usual ones have none; None where those
    have, or where there are no others.
    """
    keys = Counter[str]()
    for index in chosen:
        with suppress(InputError):
            if reader.captions(index):
                return None
        keys.update(_keys_with_texts(reader, index))
    often = [key for key, count in keys.items() if 2 * count >= len(chosen)]
    like = [key for key in often if _CAPTION_LIKE.search(key)]
    if len(like) == 1:
        return like[0]
    if often:
        raise InputError(
            f"{train}: no captions where they usually stand; --caption KEY says which key of the"
            f" .json has them: {', '.join(sorted(like or often))}"
        )
    return None


def _keys_with_texts(reader: ShardReader, index: int) -> list[str]:
    """Those of a sample's `.json` that hold a text or a list of them."""
    try:
        row = reader.read(index, "json")
        read = parse_json(row)
    except (InputError, ValueError):
        return []
    found = []
    for key in read if isinstance(read, dict) else ():
        with suppress(ValueError):
            captions_in(row, None, key)
            found.append(key)
    return found


def _preparation(train: Path, sizes: Sequence[tuple[int, int]], size: int | None) -> Preparation:
    """What brings pictures of these (width, height) to one size whose sides are multiples of SIDES;
    nothing where they are of such a size.
    """
    if not sizes:
        return Preparation()  # whoever decodes one says what is wrong
    (usual, count), *others = Counter(sizes).most_common()
    fits = not any(side % SIDES for side in usual)
    if size is None and fits and count >= ALIKE * len(sizes):
        wanted = usual
    else:
        wanted = (size or _side(train, sizes),) * 2
    if not others and usual == wanted:
        return Preparation()
    width, height = wanted
    return Preparation(PrepareConfig(resize="lanczos"), (height, width))


def _side(train: Path, sizes: Sequence[tuple[int, int]]) -> int:
    """px of the squares that pictures of these (width, height) are made."""
    shorter = sorted(min(size) for size in sizes)
    usual = [side for side in shorter if side >= TINY * shorter[len(shorter) // 2]]
    held = usual[int((1 - LARGE_ENOUGH) * len(usual))]
    if held < SIDES:
        raise InputError(
            f"{train}: a picture in twenty has a side of {held} px or less; {SIDES} are needed"
        )
    return min(MOST, held // SIDES * SIDES)


def _sizes(reader: ShardReader) -> list[tuple[int, int]]:
    """(width, height) in px of pictures evenly spread over a split, by their headers."""
    found = []
    for index in evenly(len(reader), MEASURED).tolist():
        with suppress(InputError, ValueError):
            if (extension := picture_of(reader.extensions(index))) is not None:
                found.append(picture_size(reader.read(index, extension)))
    return found


def _left_out(prepare: Preparation, sizes: Sequence[tuple[int, int]]) -> tuple[str, ...]:
    """A note of the pictures of these (width, height) that are too small."""
    small = 0
    for size in sizes:
        try:
            prepare.refuse(*size)
        except Filtered:
            small += 1
    if not small:
        return ()
    return (
        f"{small} of {len(sizes)} pictures looked at are smaller and left out; --size PX says a"
        " smaller size, data.prepare.min_size=1 enlarges them",
    )


def _in_both(reader: ShardReader, held_out: ShardReader, val: Path) -> tuple[str, ...]:
    """A note where some of the held-out pictures that are looked at are training ones, byte for
    byte; InputError where all are.
    """
    chosen = evenly(len(held_out), LOOKED_AT)
    twice = pictures_also_in(held_out, reader, chosen)
    if twice and len(twice) == len(chosen):
        raise InputError(
            f"{val}: every held-out picture looked at is in the training shards too; held-out ones"
            " must be others (pack with --val 0.05)"
        )
    said = f"{len(twice)} of {len(chosen)} held-out pictures looked at are in the training shards"
    return (f"{said} too, so not held out",) if twice else ()


def _samples(
    train: Path, reader: ShardReader, chosen: Sequence[int], prepare: Preparation
) -> tuple[list[np.ndarray], list[str], tuple[str, ...]]:
    """Pictures, captions and notes of the `chosen` samples that are whole and not left out."""
    pictures, captions = list[np.ndarray](), list[str]()
    filtered, bad = list[Filtered](), list[InputError]()
    for index in chosen:
        try:
            caption, picture = reader.captions(index)[0], decode_image(reader, index, prepare)
        except Filtered as error:
            filtered.append(error)
        except InputError as error:
            bad.append(error)
        else:
            captions.append(caption)
            pictures.append(picture)
    if not pictures:
        raise (bad or filtered)[0]
    notes = []
    if prepare.size is not None:
        height, width = prepare.size
        notes.append(f"pictures are cropped and resized to {width} x {height} px (data.prepare)")
    if bad:
        notes.append(
            f"{len(bad)} of {len(chosen)} samples looked at are bad, first {bad[0]};"
            f" python -m flowray.data check {shlex.quote(str(train))} names all, data.max_bad is"
            " the share that a run leaves out"
        )
    sizes = {picture.shape for picture in pictures}
    if len(sizes) > 1:
        raise InputError(f"{train}: pictures of several sizes; --size PX brings them to one")
    return pictures, captions, tuple(notes)
