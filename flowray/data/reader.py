"""Random access to webdataset tars: a one-pass index per shard, then memory-mapped reads.

Sequential streaming cannot resume in the middle of an epoch without skipping; an index can, and
order.py then decides the order.
"""

from __future__ import annotations

import hashlib
import io
import json
import mmap
import re
import tarfile
import threading
from collections.abc import Collection, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from flowray.config.errors import InputError
from flowray.config.writing import write_whole

BLOCK = 512  # tar members start and are padded at multiples of this, bytes
OPEN_SHARDS = 128  # mapped at a time: each holds a file descriptor
# webdataset's rule: a key ends at the first dot after the last slash
_NAME = re.compile(r"((?:.*/|)[^.]+)[.]([^/]*)")


@dataclass(frozen=True)
class TarIndex:
    """Where everything in one tar lies.

    members: extension -> (len(keys), 2) int64 of (offset of the first byte, size), (-1, -1) where a
    sample lacks it.
    """

    size: int
    keys: list[str]
    members: dict[str, np.ndarray]


def scan_tar(path: Path) -> TarIndex:
    """Index a tar by reading its headers; InputError where it is truncated or corrupt, or a key
    comes twice.
    """
    rows: dict[str, dict[str, tuple[int, int]]] = {}
    key = ""
    try:
        with path.open("rb") as file, tarfile.open(fileobj=file, mode="r:") as tar:
            for member in tar:
                match = _NAME.fullmatch(member.name)
                if not member.isreg() or match is None or re.match(r"__[^/]*__($|/)", member.name):
                    continue
                extension, before, key = match[2].lower(), key, match[1]
                if (key in rows and key != before) or extension in rows.get(key, {}):
                    raise InputError(
                        f"shard {path}: sample {key!r} comes twice ({member.name}); keys must be"
                        " unique and their files adjacent"
                    )
                rows.setdefault(key, {})[extension] = (member.offset_data, member.size)
            # tarfile takes a broken header for the end of the archive; only a block of zeros is the
            # end.
            file.seek(tar.offset)
            whole = file.read(BLOCK) == bytes(BLOCK)
            size = file.seek(0, io.SEEK_END)
    except (tarfile.TarError, OSError, ValueError) as error:
        raise InputError(
            f"shard {path}: truncated or not a plain tar{_near(key)}: {error}; write or copy it"
            " again"
        ) from error
    if not whole:
        raise InputError(f"shard {path}: truncated or corrupt{_near(key)}; write or copy it again")
    keys = list(rows)
    members = {
        extension: np.array([rows[key].get(extension, (-1, -1)) for key in keys], dtype=np.int64)
        for extension in sorted({extension for row in rows.values() for extension in row})
    }
    return TarIndex(size, keys, members)


def _near(key: str) -> str:
    return f" at or just after sample {key!r}" if key else ""


def load_index(path: Path) -> TarIndex:
    """The index of a tar, kept beside it as `NAME.tar.index.json` and made anew when the tar's
    size or mtime has changed.
    """
    beside = path.with_name(path.name + ".index.json")
    try:
        stat = path.stat()
    except OSError as error:
        raise InputError(f"shard {path}: cannot be read: {error.strerror}") from error
    stamp = {"size": stat.st_size, "mtime_ns": stat.st_mtime_ns}
    kept = _kept_index(beside, stamp)
    if kept is not None:
        return kept
    index = scan_tar(path)
    row = {
        **stamp,
        "keys": index.keys,
        "members": {extension: table.tolist() for extension, table in index.members.items()},
    }
    with suppress(OSError):  # a read-only or full disk: the index stays in memory
        write_whole(beside, json.dumps(row, separators=(",", ":")), shared=True)
    return index


def _kept_index(beside: Path, stamp: dict[str, int]) -> TarIndex | None:
    try:
        row = json.loads(beside.read_text(encoding="utf-8"))
        if {name: row[name] for name in stamp} != stamp:
            return None
        members = {
            extension: np.array(table, dtype=np.int64).reshape(len(row["keys"]), 2)
            for extension, table in row["members"].items()
        }
        if any((table.sum(axis=1) > stamp["size"]).any() for table in members.values()):
            return None
        return TarIndex(stamp["size"], [str(key) for key in row["keys"]], members)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


class ShardReader:
    """The samples of several tars as one sequence, in tar order; `keys` names them.

    limit: use only the first `limit` samples; without: keys of samples that are left out of these.
    Pickles as its paths, so it is cheap to hand to another process.
    """

    def __init__(
        self, paths: Sequence[Path], limit: int | None = None, without: Collection[str] = ()
    ):
        self.paths, self.limit = tuple(Path(path) for path in paths), limit
        self.without = frozenset(without)
        self.keys: list[str] = []
        self._sizes: list[int] = []
        self._maps: dict[int, np.ndarray] = {}
        self._opening = threading.Lock()
        indexes: list[TarIndex] = []
        for path in self.paths:
            if limit is not None and len(self.keys) >= limit:
                break
            indexes.append(load_index(path))
            self._sizes.append(indexes[-1].size)
            self.keys.extend(indexes[-1].keys)
        self._shard = np.repeat(np.arange(len(indexes)), [len(index.keys) for index in indexes])[
            :limit
        ]
        del self.keys[len(self._shard) :]
        if not self.keys:
            raise InputError(
                f"no samples in {len(self.paths)} shard(s), first"
                f" {self.paths[0] if self.paths else 'none'}"
            )
        self._refuse_repeats()
        self._members = {
            extension: np.concatenate(
                [
                    index.members.get(extension, np.full((len(index.keys), 2), -1))
                    for index in indexes
                ]
            )[:limit]
            for extension in sorted({extension for index in indexes for extension in index.members})
        }
        if self.without:
            self._leave_out()

    def _leave_out(self) -> None:
        kept = np.array([key not in self.without for key in self.keys])
        if not kept.any():
            raise InputError(f"no samples left of {self.paths[0]}: all are left out")
        self.keys = [key for key in self.keys if key not in self.without]
        self._shard = self._shard[kept]
        self._members = {extension: table[kept] for extension, table in self._members.items()}

    def _refuse_repeats(self) -> None:
        if len(set(self.keys)) == len(self.keys):
            return
        seen: dict[str, int] = {}
        for i, key in enumerate(self.keys):
            if key in seen:
                raise InputError(
                    f"{self.label(i)}: the same key is in {self.paths[self._shard[seen[key]]]};"
                    " keys must differ over all shards"
                )
            seen[key] = i

    def __len__(self) -> int:
        return len(self.keys)

    def __reduce__(self) -> tuple[Any, ...]:
        return ShardReader, (self.paths, self.limit, self.without)

    def label(self, i: int) -> str:
        return f"shard {self.paths[self._shard[i]]}, sample {self.keys[i]!r}"

    def extensions(self, i: int) -> list[str]:
        """The extensions that sample i has, sorted."""
        return [extension for extension, table in self._members.items() if table[i, 0] >= 0]

    def _missing(self, i: int, extension: str) -> NoReturn:
        raise InputError(
            f"{self.label(i)}: no .{extension} member; it has"
            f" {', '.join('.' + e for e in self.extensions(i))}"
        )

    def _map(self, shard: int) -> np.ndarray:
        """One shard's bytes, uint8 (size,), read-only."""
        # batches are made in a thread beside whoever examines the run
        with self._opening:
            view = self._maps.get(shard)
            if view is None:
                if len(self._maps) >= OPEN_SHARDS:
                    self._maps.pop(next(iter(self._maps)), None)
                view = self._maps[shard] = _mapped(self.paths[shard], self._sizes[shard])
            return view

    def sizes(self, extension: str) -> np.ndarray:
        """The bytes of every sample's member, int64 (len,); -1 where it has none. It reads none."""
        table = self._members.get(extension)
        return np.full(len(self), -1) if table is None else table[:, 1]

    def read(self, i: int, extension: str) -> bytes:
        """The bytes of one member; InputError where the sample has none."""
        table = self._members.get(extension)
        if table is None or table[i, 0] < 0:
            self._missing(i, extension)
        offset, size = table[i]
        return self._map(int(self._shard[i]))[offset : offset + size].tobytes()

    def captions(self, i: int) -> list[str]:
        """The captions of sample i: `captions` of its .json, else its .txt as one; never empty."""
        has = self.extensions(i)
        try:
            row = json.loads(self.read(i, "json")) if "json" in has else {}
            given = row.get("captions") if isinstance(row, dict) else None
            if given is None and "txt" in has:
                given = [self.read(i, "txt").decode("utf-8")]
        except ValueError as error:  # UnicodeDecodeError and JSONDecodeError are ValueErrors
            raise InputError(f"{self.label(i)}: caption cannot be read: {error}") from error
        if (
            not isinstance(given, list)
            or not given
            or not all(isinstance(caption, str) and caption.strip() for caption in given)
        ):
            raise InputError(
                f"{self.label(i)}: no caption; it needs a non-empty .txt, or .json with a list"
                " `captions` of non-empty strings"
            )
        return [caption.strip() for caption in given]

    def gather(self, indices: np.ndarray, extension: str) -> np.ndarray:
        """The .npy members of the samples `indices` (B,), stacked: (B, *shape); one shape and
        dtype for all of them.
        """
        indices = np.asarray(indices, dtype=np.int64)
        if indices.ndim != 1 or not indices.size:
            raise ValueError(f"indices must be 1-D and not empty, got shape {indices.shape}")
        table = self._members.get(extension)
        if table is None:
            self._missing(int(indices[0]), extension)
        places = table[indices]
        if (places[:, 0] < 0).any():
            self._missing(int(indices[np.argmax(places[:, 0] < 0)]), extension)
        if (places[:, 1] == places[0, 1]).all():
            stacked = _unpack_equal(
                self._rows(indices, places[:, 0], int(places[0, 1])), int(places[0, 1])
            )
            if stacked is not None:
                return stacked
        return self._gather_one_by_one(indices, extension)

    def _rows(self, indices: np.ndarray, offsets: np.ndarray, size: int) -> np.ndarray:
        """The members of `size` bytes at `offsets`, uint8 (B, size rounded up to blocks)."""
        blocks = -(-size // BLOCK)
        rows = np.empty((len(indices), blocks, BLOCK), dtype=np.uint8)
        shards = self._shard[indices]
        for shard in np.unique(shards):
            here = np.flatnonzero(shards == shard)
            view = self._map(int(shard))
            whole = view[: len(view) // BLOCK * BLOCK].reshape(-1, BLOCK)
            rows[here] = whole[offsets[here, None] // BLOCK + np.arange(blocks)]
        return rows.reshape(len(indices), blocks * BLOCK)

    def _gather_one_by_one(self, indices: np.ndarray, extension: str) -> np.ndarray:
        arrays: list[np.ndarray] = []
        for i in indices.tolist():
            try:
                arrays.append(np.load(io.BytesIO(self.read(i, extension)), allow_pickle=False))
            except (ValueError, EOFError) as error:
                raise InputError(
                    f"{self.label(i)}: .{extension} is not a plain .npy array: {error}"
                ) from error
            if (arrays[-1].shape, arrays[-1].dtype) != (arrays[0].shape, arrays[0].dtype):
                got, want = (f"{a.dtype} {a.shape}" for a in (arrays[-1], arrays[0]))
                raise InputError(
                    f"{self.label(i)}: .{extension} is {got}, others are {want}; all must be alike"
                )
        return np.stack(arrays)

    def fingerprint(self) -> str:
        """A short hash of the shard names and sizes and of the sample keys in use; it reads no
        sample.
        """
        digest = hashlib.sha256()
        for path, size in zip(self.paths, self._sizes, strict=False):
            digest.update(f"{path.name}\0{size}\0".encode())
        digest.update("\0".join(self.keys).encode())
        return digest.hexdigest()[:16]


def _mapped(path: Path, size: int) -> np.ndarray:
    try:
        with path.open("rb") as file:
            held = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except (OSError, ValueError) as error:
        raise InputError(f"shard {path}: cannot be read: {error}") from error
    if len(held) != size:
        raise InputError(
            f"shard {path}: was {size} bytes when indexed and is {len(held)} now; start again"
        )
    return np.frombuffer(held, dtype=np.uint8)


def _unpack_equal(rows: np.ndarray, size: int) -> np.ndarray | None:
    """.npy files of `size` bytes, one a row, as (B, *shape); None where their headers differ or
    are not plain C order.
    """
    first = io.BytesIO(rows[0, :size].tobytes())
    try:
        version = np.lib.format.read_magic(first)
        reading = (
            np.lib.format.read_array_header_1_0
            if version == (1, 0)
            else np.lib.format.read_array_header_2_0
        )
        shape, fortran, dtype = reading(first)
    except ValueError:
        return None
    start = first.tell()
    if (
        fortran
        or dtype.hasobject
        or start + dtype.itemsize * int(np.prod(shape)) != size
        or (rows[:, :start] != rows[0, :start]).any()
    ):
        return None
    return np.ascontiguousarray(rows[:, start:size]).view(dtype).reshape(len(rows), *shape)
