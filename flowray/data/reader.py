"""Random access to webdataset tars: an index per shard, then memory-mapped reads.

Sequential streaming cannot resume in the middle of an epoch without skipping; an index can, and
order.py then decides the order.
"""

from __future__ import annotations

import hashlib
import io
import mmap
import threading
from bisect import bisect_right
from collections.abc import Collection, Iterator, Sequence
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from flowray.config.errors import InputError
from flowray.data.captions import captions_in
from flowray.data.index import BLOCK, IndexFile, TarIndex, is_indexed, load_index
from flowray.data.remote import ahead, opened, remote_of

OPEN_SHARDS = 128  # mapped at a time: each holds two file descriptors
OPEN_REMOTE = 4  # where shards are fetched: one that has made room takes room while it is mapped


class ShardReader:
    """The samples of several tars as one sequence, in tar order. A sample is its place in it, or
    its shard and key: keys may begin anew in each shard.

    limit: use only the first `limit` samples; without: places of samples that are left out of
    these. In memory there is next to nothing a sample: indexes lie in files, which are mapped.
    Pickles as its paths, so it is cheap to hand to another process.
    """

    def __init__(
        self, paths: Sequence[Path], limit: int | None = None, without: Collection[int] = ()
    ):
        self.paths, self.limit = tuple(Path(path) for path in paths), limit
        self.without = frozenset(int(place) for place in without)
        self._indexes: list[TarIndex | IndexFile] = []
        self._opened: dict[int, tuple[np.ndarray, TarIndex]] = {}
        self._sound = set[int]()
        self._most = OPEN_REMOTE if any(map(remote_of, self.paths)) else OPEN_SHARDS
        self._opening = threading.Lock()
        count = 0
        every = iter(self.paths)
        if limit is None:
            every = ahead(self.paths, lambda path: not is_indexed(path))
        for path in every:
            if limit is not None and count >= limit:
                break
            self._indexes.append(load_index(path))
            count += self._indexes[-1].samples
        count = count if limit is None else min(count, limit)
        if not count:
            raise InputError(
                f"no samples in {len(self.paths)} shard(s), first"
                f" {self.paths[0] if self.paths else 'none'}"
            )
        self._ends = list(accumulate(index.samples for index in self._indexes))
        self._edges = np.array([0, *self._ends])
        self._kept: np.ndarray | range = range(count)
        if self.without:
            self._kept = np.setdiff1d(np.arange(count), list(self.without))
            if not len(self._kept):
                raise InputError(f"no samples left of {self.paths[0]}: all are left out")

    def __len__(self) -> int:
        return len(self._kept)

    def __reduce__(self) -> tuple[Any, ...]:
        return ShardReader, (self.paths, self.limit, self.without)

    def _places(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(shard, row in its index) of samples, (B,) each; IndexError where one is not there."""
        if isinstance(self._kept, np.ndarray):
            places = self._kept[indices]
        elif len(indices) and not (indices.min() >= 0 and indices.max() < len(self)):
            raise IndexError(f"{len(self)} samples, asked for {indices.min()} to {indices.max()}")
        else:
            places = indices
        shards = np.searchsorted(self._edges[1:], places, side="right")
        return shards, places - self._edges[shards]

    def _place(self, i: int) -> tuple[int, int]:
        """`_places` of one sample, some times faster."""
        place = int(self._kept[i])
        shard = bisect_right(self._ends, place)
        return shard, place - (self._ends[shard - 1] if shard else 0)

    def _each(self) -> Iterator[tuple[TarIndex, np.ndarray]]:
        """Every shard's index and the rows of it that are in use. None stays open."""
        start = 0
        for index, end in zip(self._indexes, self._ends, strict=True):
            if isinstance(self._kept, np.ndarray):
                first, last = np.searchsorted(self._kept, [start, end])
                yield index.open(), self._kept[first:last] - start
            else:
                yield index.open(), np.arange(min(end, len(self._kept)) - start)
            start = end

    @cached_property
    def keys(self) -> list[str]:
        """The key of every sample; `key` has one without making them all."""
        return [index.key(row) for index, rows in self._each() for row in rows.tolist()]

    def key(self, i: int) -> str:
        """The key of sample i, unique in its shard."""
        shard, row = self._place(i)
        return self._open(shard)[1].key(row)

    def places(self, samples: Collection[int]) -> list[int]:
        """Where samples are among all those of the shards: the places that `without` takes."""
        return [int(self._kept[i]) for i in samples]

    def label(self, i: int) -> str:
        return f"shard {self.paths[self._place(i)[0]]}, sample {self.key(i)!r}"

    def extensions(self, i: int) -> list[str]:
        """The extensions that sample i has, sorted."""
        shard, row = self._place(i)
        members = self._open(shard)[1].members
        return sorted(extension for extension, table in members.items() if table[row, 0] >= 0)

    def _missing(self, i: int, extension: str) -> NoReturn:
        raise InputError(
            f"{self.label(i)}: no .{extension} member; it has"
            f" {', '.join('.' + e for e in self.extensions(i))}"
        )

    def _open(self, shard: int) -> tuple[np.ndarray, TarIndex]:
        """One shard's bytes, uint8 (size,), read-only, and its index."""
        # batches are made in a thread beside whoever examines the run
        with self._opening:
            opened = self._opened.get(shard)
            if opened is None:
                if len(self._opened) >= self._most:
                    self._opened.pop(next(iter(self._opened)), None)
                path, index = self.paths[shard], self._indexes[shard].open()
                if shard not in self._sound:
                    _refuse_unfit(path, index)
                    self._sound.add(shard)
                opened = self._opened[shard] = _mapped(path, index.size), index
            return opened

    def sizes(self, extension: str) -> np.ndarray:
        """The bytes of every sample's member, int64 (len,); -1 where it has none. It reads none."""
        return np.concatenate(
            [
                np.full(len(rows), -1) if table is None else table[rows, 1]
                for index, rows in self._each()
                for table in [index.members.get(extension)]
            ]
        )

    def read(self, i: int, extension: str) -> bytes:
        """The bytes of one member; InputError where the sample has none."""
        data = self._find(i, extension)
        return self._missing(i, extension) if data is None else data

    def _find(self, i: int, extension: str) -> bytes | None:
        shard, row = self._place(i)
        view, index = self._open(shard)
        table = index.members.get(extension)
        if table is None or table[row, 0] < 0:
            return None
        offset, size = table[row]
        return view[offset : offset + size].tobytes()

    def captions(self, i: int) -> list[str]:
        """The captions of sample i, as `captions_in` has them; never empty."""
        try:
            return captions_in(self._find(i, "json"), self._find(i, "txt"))
        except ValueError as error:
            raise InputError(f"{self.label(i)}: {error}") from error

    def gather(self, indices: np.ndarray, extension: str) -> np.ndarray:
        """The .npy members of the samples `indices` (B,), stacked: (B, *shape); one shape and
        dtype for all of them.
        """
        indices = np.asarray(indices, dtype=np.int64)
        if indices.ndim != 1 or not indices.size:
            raise ValueError(f"indices must be 1-D and not empty, got shape {indices.shape}")
        stacked = self._gather_equal(indices, extension)
        return self._gather_one_by_one(indices, extension) if stacked is None else stacked

    def _gather_equal(self, indices: np.ndarray, extension: str) -> np.ndarray | None:
        """`gather` where all members begin with the same header; None where they do not."""
        shards, places = self._places(indices)
        size, rows = -1, np.empty((0, 0, 0), dtype=np.uint8)
        for shard in np.unique(shards):
            here = np.flatnonzero(shards == shard)
            view, index = self._open(int(shard))
            table = index.members.get(extension)
            found = np.full((len(here), 2), -1) if table is None else table[places[here]]
            if (missing := found[:, 0] < 0).any():
                self._missing(int(indices[here[np.argmax(missing)]]), extension)
            if size < 0:
                size = int(found[0, 1])
                rows = np.empty((len(indices), -(-size // BLOCK), BLOCK), dtype=np.uint8)
            if (found[:, 1] != size).any():
                return None
            whole = view[: len(view) // BLOCK * BLOCK].reshape(-1, BLOCK)
            rows[here] = whole[found[:, :1] // BLOCK + np.arange(rows.shape[1])]
        return _unpack_equal(rows.reshape(len(indices), -1), size)

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
        """A short hash of the shard names and sizes and of which samples are in use, by their keys
        and places; it reads none.
        """
        digest = hashlib.sha256()
        for path, index in zip(self.paths, self._indexes, strict=False):
            digest.update(f"{path.name}\0{index.size}\0".encode())
        digest.update("".join(f"{place}\0" for place in sorted(self.without)).encode())
        between = ""
        for index, rows in self._each():
            if len(rows):
                keys = "\0".join(map(index.key, rows.tolist()))
                digest.update((between + keys).encode())
                between = "\0"
        return digest.hexdigest()[:16]


def _refuse_unfit(path: Path, index: TarIndex) -> None:
    if any((table.sum(axis=1) > index.size).any() for table in index.members.values()):
        raise InputError(f"shard {path}: its index does not fit it; remove {path.name}.index")


def _mapped(path: Path, size: int) -> np.ndarray:
    try:
        with opened(path) as file:
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
