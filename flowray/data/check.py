"""Validates a shard set by the reader that training has: raw bytes only, nothing unpickled."""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, Literal

import numpy as np

from flowray.config.errors import InputError
from flowray.config.jsons import parse_json
from flowray.config.progress import SILENT, Progress
from flowray.data.arrays import read_npy
from flowray.data.captions import captions_in
from flowray.data.decode import EXTENSIONS, UNREAD, decode_rgb, picture_of, picture_size, unread
from flowray.data.prepare import Filtered, Preparation
from flowray.data.reader import ShardReader
from flowray.data.remote import ahead, is_here, opened, shown, stat_of
from flowray.data.shards import MANIFEST, SPLITS, find_shards, lacking, sha256

PICKLES = ("pkl", "pyd", "pickle", "pth", "pt")
_READ = ("json", "txt", *EXTENSIONS)


@dataclass(frozen=True)
class Problem:
    """One finding. `bad` must be mended; `info` is worth knowing. sample: "" where it concerns
    the whole shard.
    """

    severity: Literal["info", "bad"]
    shard: str
    sample: str
    what: str


@dataclass
class ShardCheck:
    """What a shard set holds and what is wrong with it.

    sizes: "WxH" or the array's shape -> samples.
    """

    shards: int = 0
    samples: int = 0
    bytes: int = 0
    captions: int = 0
    duplicates: int = 0
    sizes: dict[str, int] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)

    @property
    def good(self) -> bool:
        return not any(problem.severity == "bad" for problem in self.problems)

    def as_json(self) -> dict[str, Any]:
        return {"good": self.good, **asdict(self)}


def check_shards(
    *specs: str,
    progress: Progress = SILENT,
    caption_key: str | None = None,
    prepare: Preparation | None = None,
) -> ShardCheck:
    """Read every sample of a shard set (folders, globs or tars); InputError only where there is
    nothing to read.

    caption_key: as `captions_in` has it. prepare: what a recipe does to the pictures, by which one
    of another size than it wants is bad; without it sizes that differ are only told.
    """
    by_spec = {spec: [path.absolute() for path in find_shards(spec)] for spec in specs}
    found = list(dict.fromkeys(path for paths in by_spec.values() for path in paths))
    gone = {path for spec, paths in by_spec.items() for path in lacking(spec, paths)}
    folder = Path(os.path.commonpath([path.parent for path in found]))
    checker = _Checker(folder, caption_key, prepare)
    with progress.task("checking shards", len(found)) as advance:
        for path in ahead(found):
            checker.shard(path)
            advance()
    for path in sorted(gone):
        checker.bad(checker.name(path), "", f"in {MANIFEST}, but not there")
    return checker.finish()


class _Checker:
    """Sees shard after shard, each named by its path in `folder`; keeps one hash per image."""

    def __init__(self, folder: Path, caption_key: str | None, prepare: Preparation | None) -> None:
        self.folder, self.result = folder, ShardCheck()
        self.caption_key, self.prepare = caption_key, prepare
        self.first_with: dict[bytes, tuple[str, str]] = {}  # image hash -> shard, key
        self.pictures: Counter[str] = Counter()  # folder -> its pictures
        # (folder, that of an equal picture before) -> pictures, where one of them is a split
        self.across: Counter[tuple[str, str]] = Counter()
        self.unread: Counter[str] = Counter()  # extensions of pictures that are not read
        self.sizes: Counter[str] = Counter()  # of pictures
        self.arrays: Counter[str] = Counter()
        self.left_out: Counter[str] = Counter()  # cause -> pictures that `prepare` leaves out
        self.first_of_size: dict[str, tuple[str, str]] = {}
        self.twin = ""
        self.several: list[str] = []  # samples with several pictures

    def bad(self, shard: str, sample: str, what: str) -> None:
        self.result.problems.append(Problem("bad", shard, sample, what))

    def name(self, path: Path) -> str:
        return path.relative_to(self.folder).as_posix()

    def shard(self, path: Path) -> None:
        name = self.name(path)
        self.result.shards += 1
        try:
            size, _ = stat_of(path)
            self.result.bytes += size
            if not is_here(path):
                opened(path).close()
            _compare_with_manifest(path, self)
            if not size:
                self.bad(name, "", "0 bytes; was it copied whole?")
                return
            reader = ShardReader([path])
            for i in range(len(reader)):
                self.result.samples += 1
                if fault := reader.fault(i):
                    self.bad(name, reader.key(i), fault.message)
                    continue
                has = reader.extensions(i)
                read = {e: reader.read(i, e) for e in has if e in _READ or e.endswith("npy")}
                self.sample(name, reader.key(i), has, read)
        except InputError as error:
            what = str(error).removeprefix(f"shard {path}: ").removeprefix(f"shard {shown(path)}: ")
            if what != str(error):
                self.bad(name, "", what)
            # else it has no samples

    def sample(self, shard: str, key: str, extensions: list[str], sample: dict[str, bytes]) -> None:
        """extensions: all; sample: the bytes of those that are looked into, as others may be
        large.
        """
        self.unread.update(extension for extension in extensions if extension in UNREAD)
        unsafe = [extension for extension in extensions if extension.rpartition(".")[2] in PICKLES]
        if unsafe:
            self.bad(
                shard,
                key,
                f".{unsafe[0]} is a pickle: other readers run code from it; keep arrays as .npy",
            )
        self._captions(shard, key, sample)
        self._picture(shard, key, sample)

    def _captions(self, shard: str, key: str, sample: dict[str, bytes]) -> None:
        try:
            texts = sample.get("json"), sample.get("txt")
            self.result.captions += len(captions_in(*texts, self.caption_key))
        except ValueError as error:
            self.bad(shard, key, str(error))

    def _picture(self, shard: str, key: str, sample: dict[str, bytes]) -> None:
        extension = picture_of(sample) or next((e for e in sample if e.endswith("npy")), None)
        if extension is None:
            self.bad(shard, key, f"no image (.{', .'.join(EXTENSIONS)}) and no .npy latents")
            return
        if len(pictures := [e for e in EXTENSIONS if e in sample]) > 1:
            self.several.append(f"{shard}:{key} (.{', .'.join(pictures)})")
        try:
            if extension.endswith("npy"):
                size, sizes = _array_size(sample[extension]), self.arrays
            else:
                size, sizes = self._size(shard, key, sample[extension]), self.sizes
        except Exception as error:  # numpy raises many kinds on the bytes of a broken .npy
            self.bad(shard, key, f".{extension} does not decode: {error}")
            return
        sizes[size] += 1
        self.first_of_size.setdefault(size, (shard, key))
        digest = hashlib.sha256(sample[extension]).digest()[:16]
        first = self.first_with.setdefault(digest, (shard, key))
        here, there = PurePosixPath(shard).parent, PurePosixPath(first[0]).parent
        self.pictures[str(here)] += 1
        if first != (shard, key):
            self.result.duplicates += 1
            self.twin = self.twin or f"{':'.join(first)} = {shard}:{key}"
            if here != there and {here.name.lower(), there.name.lower()} & set(SPLITS):
                self.across[str(here), str(there)] += 1

    def _size(self, shard: str, key: str, data: bytes) -> str:
        """The size of a picture as it is stored; what `prepare` makes of it is looked at here."""
        if self.prepare is None:
            height, width, _ = decode_rgb(data).shape
            return f"{width}x{height}"
        try:
            height, width, _ = self.prepare(data).shape
        except Filtered as error:
            self.left_out[error.cause] += 1
        else:
            wanted = self.prepare.size, *self.prepare.others
            if self.prepare.size and (height, width) not in wanted:
                told = "{1}x{0}".format(*self.prepare.size)
                self.bad(
                    shard,
                    key,
                    f"{width}x{height} px, the recipe wants {told}; data.prepare.resize=lanczos"
                    " brings it to that",
                )
        return "{}x{}".format(*picture_size(data))

    def finish(self) -> ShardCheck:
        result, sizes = self.result, self.sizes.most_common()
        result.sizes = dict((self.sizes + self.arrays).most_common())
        arrays = self.arrays.most_common()
        for size, count in arrays[1:]:
            self.bad(
                *self.first_of_size[size],
                f"{count} sample(s) are {size}, the most ({arrays[0][1]}) are {arrays[0][0]}; all"
                " must be alike",
            )
        if self.prepare is None and len(sizes) > 1:
            (most, count), (other, _) = sizes[:2]
            what = (
                f"pictures of {len(sizes)} sizes, most ({count}) {most}, the first of another"
                f" {':'.join(self.first_of_size[other])} ({other}): data.prepare.resize=lanczos in"
                " a recipe trains on all, without it one takes those of its own size alone"
                " (--recipe RECIPE says which)"
            )
            result.problems.append(Problem("info", "", "", what))
        if self.left_out:
            causes = ", ".join(f"{cause} {count}" for cause, count in self.left_out.items())
            what = (
                f"{sum(self.left_out.values())} picture(s) are left out by data.prepare: {causes}"
            )
            result.problems.append(Problem("info", "", "", what))
        if result.duplicates:
            what = (
                f"{result.duplicates} of {result.samples} images are byte for byte those of an"
                f" earlier sample, first {self.twin}"
            )
            result.problems.append(Problem("info", "", "", what))
        for (here, there), count in self.across.items():
            whole = count >= min(self.pictures[here], self.pictures[there])
            what = (
                f"{count} picture(s) of {here} are byte for byte in {there} too: where one is"
                " trained on, nothing measured on the other is held out"
            )
            result.problems.append(Problem("bad" if whole else "info", here, "", what))
        if self.several:
            what = (
                f"{len(self.several)} sample(s) have several pictures, first {self.several[0]}: of"
                " each the first is read"
            )
            result.problems.append(Problem("info", "", "", what))
        if self.unread:
            result.problems.append(Problem("info", "", "", unread(self.unread)))
        return result


def _compare_with_manifest(path: Path, checker: _Checker) -> None:
    manifest = path.parent / MANIFEST
    if not manifest.is_file():
        return
    try:
        rows = {
            row["name"]: row for row in parse_json(manifest.read_text(encoding="utf-8"))["shards"]
        }
        row = rows.get(path.name)
        if row is None:
            checker.bad(checker.name(path), "", f"not in {MANIFEST}")
        elif row["bytes"] != stat_of(path)[0]:
            checker.bad(
                checker.name(path),
                "",
                f"{stat_of(path)[0]} bytes, but {MANIFEST} says {row['bytes']}",
            )
        elif row["sha256"] != sha256(path):
            checker.bad(
                checker.name(path),
                "",
                f"its bytes are not those {MANIFEST} was written for (sha256)",
            )
    except (OSError, ValueError, KeyError, TypeError) as error:
        checker.bad(checker.name(path), "", f"{MANIFEST} cannot be read: {error}")


def _array_size(data: bytes) -> str:
    array = read_npy(data)
    if not np.isfinite(array).all():
        raise ValueError("it holds NaN or infinity")
    return f"{array.dtype}{list(array.shape)}"
