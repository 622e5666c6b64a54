"""The embedded sets as webdataset shards, made on first use and kept in a cache that cannot go
stale.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, Protocol

import numpy as np
from PIL import Image

from flowray.config.errors import InputError
from flowray.config.progress import SILENT, Progress, counted
from flowray.data import digits, open_shapes, shapes
from flowray.data.folders import locked
from flowray.data.shards import MANIFEST, left_partials, refuse_occupied, write_shards

SCANS = 1797  # of digits, both splits
EmbeddedName = Literal["shapes", "shapes_closed", "digits"]


class MadeSet(Protocol):
    """A set of pictures that this program makes, as shards of several splits."""

    @property
    def name(self) -> str:
        """As `data.shards` has it."""

    @property
    def splits(self) -> tuple[str, ...]:
        """Its splits, `train` first."""

    @property
    def drawn_by(self) -> tuple[ModuleType, ...]:
        """The modules that decide what the samples are, this one apart."""

    def arguments(self) -> dict[str, Any]:
        """What tells two sets of one name apart, as JSON."""

    def prepare(self, cache: Path, progress: Progress) -> None:
        """Have what the samples are drawn from; InputError where that cannot be had."""

    def count(self, split: str) -> int | None:
        """How many samples a split has, None where that is not known before; after `prepare`."""

    def samples(self, split: str) -> Iterator[dict[str, Any]]:
        """The samples of a split, as `write_shards` takes them; after `prepare`."""


class _DrawnHere:
    """What the sets share that need nothing but their own source."""

    def arguments(self) -> dict[str, Any]:
        return asdict(self)  # type: ignore[call-overload]

    def prepare(self, cache: Path, progress: Progress) -> None:
        """Nothing."""


@dataclass(frozen=True)
class ShapesSet(_DrawnHere):
    """How many shapes samples of each split, from which seed; two_share: share of two-object
    scenes, in [0, 1]; closed: captions name all of their picture, else a part of it.
    """

    train: int = 12_000
    val: int = 1_000
    unseen: int = 500
    two_share: float = 0.2
    seed: int = 0
    closed: bool = False

    splits = ("train", "val", "unseen")
    drawn_by = (shapes, open_shapes)

    @property
    def name(self) -> str:
        return "shapes_closed" if self.closed else "shapes"

    def count(self, split: str) -> int:
        return int(getattr(self, split))

    def samples(self, split: Any) -> Iterator[dict[str, Any]]:
        draw = shapes.samples if self.closed else open_shapes.samples
        drawn = draw(getattr(self, split), split, self.seed, self.two_share)
        for i, (picture, captions, scene) in enumerate(drawn):
            extra = {"scene": scene.as_json()}
            yield sample(f"{split}-{i:06d}", png(picture), captions, extra)


@dataclass(frozen=True)
class DigitsSet(_DrawnHere):
    """All 1797 scans; the split is fixed."""

    name = "digits"
    splits = ("train", "val")
    drawn_by = (digits,)

    def count(self, split: str) -> None:
        """Few, and known once they are read."""

    def samples(self, split: str) -> Iterator[dict[str, Any]]:
        for i, (picture, captions, label) in enumerate(digits.samples(split)):
            yield sample(f"{split}-{i:06d}", png(picture), captions, {"label": label})


EmbeddedSet = ShapesSet | DigitsSet
_DEFAULTS: dict[str, EmbeddedSet] = {
    "shapes": ShapesSet(),
    "shapes_closed": ShapesSet(closed=True),
    "digits": DigitsSet(),
}


def png(picture: np.ndarray) -> bytes:
    """uint8 (H, W, 3) -> PNG bytes; lightly compressed, because tiny pictures gain nothing from
    more.
    """
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, format="png", compress_level=1)
    return buffer.getvalue()


def sample(key: str, picture: bytes, captions: list[str], extra: dict[str, Any]) -> dict[str, Any]:
    """One sample for `write_shards`; picture: as PNG. extra: what its .json says besides."""
    row = json.dumps({"captions": captions, **extra})
    return {"__key__": key, "png": picture, "txt": captions[0].encode(), "json": row.encode()}


def write_set(what: MadeSet, root: Path, progress: Progress = SILENT) -> dict[str, Path]:
    """Write every split of a set, which is prepared, as `root/<split>`, leaving those that are
    whole already; split -> folder.
    """
    for split in what.splits:
        if not (root / split / MANIFEST).is_file():
            meta = {"set": what.name, "split": split, **what.arguments()}
            with progress.task(f"making {split} {what.name}", what.count(split)) as advance:
                write_shards(root / split, counted(what.samples(split), advance), meta=meta)
    return {split: root / split for split in what.splits}


def fingerprint(what: MadeSet) -> str:
    """A short hash of a set's arguments and of the source that draws and writes it."""
    digest = hashlib.sha256(json.dumps(what.arguments()).encode())
    for source in (*(module.__file__ for module in what.drawn_by), __file__):
        digest.update(Path(str(source)).read_bytes())
    return digest.hexdigest()[:12]


def set_folders(what: MadeSet, cache: Path) -> dict[str, Path]:
    """split -> the folder of a set under `cache`, there or not.

    Its name carries the fingerprint, so a change of arguments or of the generator can never meet
    old pictures.
    """
    root = cache / f"{what.name}-{fingerprint(what)}"
    return {split: root / split for split in what.splits}


def is_made(folders: Iterable[Path]) -> bool:
    """Whether all the folders of a set's splits are whole."""
    return all((folder / MANIFEST).is_file() for folder in folders)


def ensure_set(what: MadeSet, cache: Path, progress: Progress = SILENT) -> dict[str, Path]:
    """The split folders of a set under `cache`, written now if they are not there; several
    processes may ask at once.
    """
    folders = set_folders(what, cache)
    if is_made(folders.values()):
        return folders
    root = folders["train"].parent
    try:
        root.mkdir(parents=True, exist_ok=True)
        with (root / ".lock").open("w") as lock:
            if locked(lock):
                _remove_partials(what, root)
            what.prepare(cache, progress)
            return write_set(what, root, progress)
    except OSError as error:
        raise InputError(
            f"{root}: cannot write there: {error.strerror}; set data.cache or FLOWRAY_CACHE to a"
            " writable folder"
        ) from error


def make_set(
    what: MadeSet, root: Path, cache: Path, progress: Progress = SILENT
) -> dict[str, Path]:
    """Prepare a set and write it into `root`, not there or empty but for what a killed process
    left of such a set, which is removed; split -> folder.

    cache: for what `prepare` fetches. InputError where something else is there.
    """
    _refuse_others(what, root)
    what.prepare(cache, progress)
    try:
        root.mkdir(parents=True, exist_ok=True)
        held = os.open(root, os.O_RDONLY)
        try:
            if locked(held):  # nobody else writes there
                _remove_partials(what, root)
            _refuse_others(what, root)  # another one was first
            return write_set(what, root, progress)
        finally:
            os.close(held)
    except OSError as error:
        raise InputError(f"{root}: cannot be written: {error.strerror or error}") from error


def _partials(what: MadeSet, root: Path) -> list[Path]:
    return [left for split in what.splits for left in left_partials(root / split)]


def _remove_partials(what: MadeSet, root: Path) -> None:
    """Remove what killed writers left; the caller holds the lock, so nobody else writes."""
    for left in _partials(what, root):
        shutil.rmtree(left, ignore_errors=True)


def _refuse_others(what: MadeSet, root: Path) -> None:
    """InputError where there is anything but what killed writers left."""
    if not root.is_dir() or set(root.iterdir()) - set(_partials(what, root)):
        refuse_occupied(root)


def ensure_embedded(
    name: EmbeddedName, cache: Path, progress: Progress = SILENT
) -> dict[str, Path]:
    """split -> shard folder of an embedded set in its standard size: shapes and shapes_closed
    (train, val, unseen) or digits (train, val).
    """
    return ensure_set(_DEFAULTS[name], cache, progress)


def picture_side(name: str) -> int:
    """The side of an embedded set's pictures, in px."""
    return digits.IMAGE_SIZE if name == "digits" else shapes.IMAGE_SIZE


def unmade_samples(name: str, cache: Path) -> int:
    """How many samples `ensure_embedded` would make; 0 where the set is there."""
    what = _DEFAULTS[name]
    missing = [split for split, at in set_folders(what, cache).items() if not is_made([at])]
    return sum(what.count(split) or SCANS for split in missing)
