"""What a set of pictures with captions is like, in figures, and some of its pictures to look at."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from flowray.config.errors import InputError
from flowray.config.progress import SILENT, Progress, counted
from flowray.data.decode import decode_rgb, picture_of, picture_size
from flowray.data.order import evenly
from flowray.data.pictures import equal_pictures
from flowray.data.reader import ShardReader
from flowray.data.remote import stat_of

LOOKED_AT = 20_000  # samples, at most, that the figures are taken of
BINS, LISTED = 8, 10  # of a histogram; examples of what a set has many of
# width : height
RATIOS = ("1:2", "9:16", "2:3", "3:4", "1:1", "4:3", "3:2", "16:9", "2:1")
SIDE, COLUMNS, GAP, LINE = 128, 8, 8, 14  # of the sheet: px of a picture, pictures, px, px


@dataclass(frozen=True)
class Histogram:
    """How many values lie from each of `starts` to the next one; the last bin has no end.

    least, median, greatest: of all values.
    """

    starts: list[int]
    counts: list[int]
    least: int
    median: float
    greatest: int


@dataclass(frozen=True)
class Survey:
    """Figures of a set; all but samples, shards, bytes and extensions are of the `looked_at`
    samples, evenly spread.

    extensions: extension -> samples that have one. without_caption, without_picture, broken: how
    many samples; broken: the picture's header cannot be read. sizes: "W x H" in px -> pictures,
    the most frequent first; aspects: the nearest of RATIOS -> pictures; shorter_side: px.
    captions, distinct_captions: of all samples together, the latter compared as they stand.
    words: split at spaces. shared: captions of several samples and of how many, the most frequent
    first. duplicates: pictures that are byte for byte an earlier one; equal: keys, the largest
    groups first.
    """

    samples: int
    looked_at: int
    shards: int
    bytes: int
    extensions: dict[str, int]
    without_picture: int
    without_caption: int
    broken: int
    sizes: dict[str, int]
    shorter_side: Histogram | None
    aspects: dict[str, int]
    captions: int
    distinct_captions: int
    characters: Histogram | None
    words: Histogram | None
    shared: dict[str, int]
    duplicates: int
    equal: list[list[str]]

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Shown:
    """A sample to look at. picture: uint8 (H, W, 3), at most SIDE px a side; None, and why not."""

    key: str
    captions: list[str]
    picture: np.ndarray | None
    why: str = ""


def survey(reader: ShardReader, progress: Progress = SILENT) -> Survey:
    """The figures of a set; no pixel is decoded, and what is broken is counted."""
    looked_at = evenly(len(reader), LOOKED_AT)
    extensions = {extension for i in looked_at for extension in reader.extensions(int(i))}
    has = {extension: int((reader.sizes(extension) >= 0).sum()) for extension in extensions}
    sizes, captions, broken, pictures = list[tuple[int, int]](), list[list[str]](), 0, 0
    with progress.task("looking at the samples", len(looked_at)) as advance:
        for i in counted(looked_at.tolist(), advance):
            captions.append(captions_of(reader, i))
            if (extension := picture_of(reader.extensions(i))) is None:
                continue
            pictures += 1
            try:
                sizes.append(picture_size(reader.read(i, extension)))
            except ValueError:
                broken += 1
    with progress.task("looking for equal pictures"):
        equal = equal_pictures(reader, looked_at)
    every = [caption for own in captions for caption in own]
    shared = Counter(caption for own in captions for caption in set(own))
    return Survey(
        samples=len(reader),
        looked_at=len(looked_at),
        shards=len(reader.paths),
        bytes=sum(stat_of(path)[0] for path in reader.paths),
        extensions=dict(sorted(has.items())),
        without_picture=len(looked_at) - pictures,
        without_caption=sum(not own for own in captions),
        broken=broken,
        sizes=dict(Counter(f"{width} x {height}" for width, height in sizes).most_common()),
        shorter_side=histogram(min(size) for size in sizes),
        aspects=_aspects(sizes),
        captions=len(every),
        distinct_captions=len(shared),
        characters=histogram(map(len, every)),
        words=histogram(len(caption.split()) for caption in every),
        shared={text: count for text, count in shared.most_common(LISTED) if count > 1},
        duplicates=sum(len(group) - 1 for group in equal),
        equal=[[reader.key(i) for i in group[:LISTED]] for group in equal[:LISTED]],
    )


def captions_of(reader: ShardReader, index: int) -> list[str]:
    """The captions of a sample; [] where it has none or they cannot be read."""
    with suppress(InputError):
        return reader.captions(index)
    return []


def histogram(values: Iterable[int]) -> Histogram | None:
    """Whole numbers in at most BINS bins of about one width, the last of which takes all from the
    99th percentile on; None of no values.
    """
    known = np.sort(np.fromiter(values, np.int64))
    if not len(known):
        return None
    # up to the 99th percentile: one caption of a thousand words leaves nothing else to be seen
    ends = np.linspace(known[0], np.percentile(known, 99), BINS)
    starts = np.unique(ends.astype(np.int64))
    places = np.searchsorted(known, [*starts, known[-1] + 1])
    return Histogram(
        starts.tolist(),
        np.diff(places).tolist(),
        int(known[0]),
        float(np.median(known)),
        int(known[-1]),
    )


def _aspects(sizes: Sequence[tuple[int, int]]) -> dict[str, int]:
    if not sizes:
        return {}
    sides = np.array(sizes, dtype=float)
    ratios = np.array([[float(side) for side in ratio.split(":")] for ratio in RATIOS])
    logs, wanted = np.log(sides[:, 0] / sides[:, 1]), np.log(ratios[:, 0] / ratios[:, 1])
    nearest = np.abs(logs[:, None] - wanted).argmin(1)
    return dict(zip(RATIOS, np.bincount(nearest, minlength=len(RATIOS)).tolist(), strict=True))


def show(reader: ShardReader, count: int) -> list[Shown]:
    """`count` samples, evenly spread, to look at."""
    return [_shown(reader, i) for i in evenly(len(reader), count).tolist()]


def _shown(reader: ShardReader, index: int) -> Shown:
    key, captions = reader.key(index), captions_of(reader, index)
    extension = picture_of(reader.extensions(index))
    if extension is None:
        return Shown(key, captions, None, "no picture")
    try:
        picture = Image.fromarray(decode_rgb(reader.read(index, extension)))
    except ValueError as error:
        return Shown(key, captions, None, f".{extension} does not decode: {error}")
    longer = max(picture.size)
    if longer > SIDE:
        picture.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
    elif (scale := SIDE // longer) > 1:
        wider = (scale * picture.width, scale * picture.height)
        picture = picture.resize(wider, Image.Resampling.NEAREST)
    return Shown(key, captions, np.asarray(picture))


def contact_sheet(shown: Sequence[Shown]) -> np.ndarray:
    """The pictures in rows of COLUMNS, each above its place among them, from 1, as uint8 (H, W, 3).

    Captions are left to a page: Pillow's own font has Latin letters alone.
    """
    columns = min(COLUMNS, len(shown))
    rows = -(-len(shown) // columns)
    size = (columns * (SIDE + GAP) + GAP, rows * (SIDE + LINE + GAP) + GAP)
    sheet = Image.new("RGB", size, "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(11)
    for place, each in enumerate(shown):
        left = GAP + place % columns * (SIDE + GAP)
        top = GAP + place // columns * (SIDE + LINE + GAP)
        if each.picture is None:
            draw.rectangle((left, top, left + SIDE - 1, top + SIDE - 1), "lightgrey")
        else:
            picture = Image.fromarray(each.picture)
            inset = ((SIDE - picture.width) // 2, (SIDE - picture.height) // 2)
            sheet.paste(picture, (left + inset[0], top + inset[1]))
        draw.text((left + SIDE / 2, top + SIDE + 1), str(place + 1), "black", font, "ma")
    return np.asarray(sheet)
