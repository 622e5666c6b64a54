"""Random access to webdataset tars: an index per shard, then memory-mapped reads.

Sequential streaming cannot resume in the middle of an epoch without skipping; an index can, and
order.py then decides the order.
"""

from __future__ import annotations

import hashlib
import math
import threading
from bisect import bisect_right
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import accumulate
from pathlib import Path
from typing import Any, NoReturn, cast

import numpy as np

from flowray.config.errors import InputError
from flowray.data.arrays import npy_head, read_npy
from flowray.data.captions import captions_in
from flowray.data.column import PAIR, CaptionColumn, chosen
from flowray.data.index import SUFFIX, Fault, IndexFile, TarIndex, is_indexed, load_index
from flowray.data.mapped import mapped
from flowray.data.remote import ahead, opened, remote_of

OPEN_SHARDS = 4096  # mapped at a time at most: the kernel allows 65530 maps in all
OPEN_REMOTE = 4  # where shards are fetched: one that has made room takes room while it is mapped
_HEAD = 2**16  # bytes of a .npy file's head at most, far more than numpy reads


@dataclass(frozen=True)
class _Shard:
    """A shard that is open: its bytes, read-only, its index, and of each extension the samples'
    (offset, size) one after the other; captions: the index's.
    """

    data: memoryview
    index: TarIndex
    tables: dict[str, memoryview]
    captions: CaptionColumn | None


class ShardReader:
    """The samples of several tars as one sequence, in tar order. A sample is its place in it, or
    its shard and key: keys may begin anew in each shard.

    limit: use only the first `limit` samples; without: places of samples that are left out of
    these; caption_key: as `captions_in` has it. In memory there is next to nothing a sample:
    indexes lie in files, which are mapped. Pickles as its paths, so it is cheap to hand to another
    process.
    """

    def __init__(
        self,
        paths: Sequence[Path],
        limit: int | None = None,
        without: Collection[int] = (),
        caption_key: str | None = None,
    ):
        self.paths, self.limit = tuple(Path(path) for path in paths), limit
        self.caption_key = caption_key
        self.without = frozenset(int(place) for place in without)
        self._indexes: list[TarIndex | IndexFile] = []
        self._opened: dict[int, _Shard] = {}
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
        return ShardReader, (self.paths, self.limit, self.without, self.caption_key)

    def _places(self, indices: np.ndarray) -> tuple[list[int], list[int]]:
        """(shard, row in its index) of samples, B each; IndexError where one is not there."""
        if isinstance(self._kept, np.ndarray):
            places = self._kept[indices]
        elif len(indices) and not (indices.min() >= 0 and indices.max() < len(self)):
            raise IndexError(f"{len(self)} samples, asked for {indices.min()} to {indices.max()}")
        else:
            places = indices
        shards = np.searchsorted(self._edges[1:], places, side="right")
        return shards.tolist(), (places - self._edges[shards]).tolist()

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
        return self._open(shard).index.key(row)

    def places(self, samples: Collection[int]) -> list[int]:
        """Where samples are among all those of the shards: the places that `without` takes."""
        return [int(self._kept[i]) for i in samples]

    def path(self, i: int) -> Path:
        """The shard of sample i."""
        return self.paths[self._place(i)[0]]

    def label(self, i: int) -> str:
        return f"shard {self.path(i)}, sample {self.key(i)!r}"

    def fault(self, i: int) -> Fault | None:
        """What is wrong with sample i, as its tar has it; whoever reads of it is refused."""
        shard, row = self._place(i)
        return self._open(shard).index.faults.get(row)

    def extensions(self, i: int) -> list[str]:
        """The extensions that sample i has, sorted."""
        shard, row = self._place(i)
        members = self._open(shard).index.members
        return sorted(extension for extension, table in members.items() if table[row, 0] >= 0)

    def _missing(self, i: int, extension: str) -> NoReturn:
        raise InputError(
            f"{self.label(i)}: no .{extension} member; it has"
            f" {', '.join('.' + e for e in self.extensions(i))}"
        )

    def _open(self, shard: int, *, checked: bool = True) -> _Shard:
        """checked: its whole index is held against it first, once; batches of training, which have
        many shards each, look at their own rows instead.
        """
        # batches are made in a thread beside whoever examines the run
        with self._opening:
            opened = self._opened.get(shard)
            if opened is None:
                if len(self._opened) >= self._most:
                    self._opened.pop(next(iter(self._opened)), None)
                path, index = self.paths[shard], self._indexes[shard].open()
                tables = {name: table.reshape(-1).data for name, table in index.members.items()}
                opened = _Shard(_mapped(path, index.size), index, tables, index.captions)
                self._opened[shard] = opened
            if checked and shard not in self._sound:
                _refuse_unfit(self.paths[shard], opened.index)
                self._sound.add(shard)
            return opened

    def sizes(self, extension: str) -> np.ndarray:
        """The bytes of every sample's member, int64 (len,); -1 where it has none or the sample is
        at fault. It reads none.
        """
        sizes = list[np.ndarray]()
        for index, rows in self._each():
            table = index.members.get(extension)
            sizes.append(np.full(len(rows), -1) if table is None else table[rows, 1])
            if index.faults:
                sizes[-1] = np.where(np.isin(rows, list(index.faults)), -1, sizes[-1])
        return np.concatenate(sizes)

    def read(self, i: int, extension: str) -> bytes:
        """The bytes of one member; InputError where the sample has none."""
        data = self._find(i, extension)
        return self._missing(i, extension) if data is None else data

    def _refuse_fault(self, index: TarIndex, row: int, i: int) -> None:
        if fault := index.faults.get(row):
            raise InputError(f"{self.label(i)}: {fault.message}")

    def _find(self, i: int, extension: str) -> bytes | None:
        shard, row = self._place(i)
        opened = self._open(shard)
        if opened.index.faults:
            self._refuse_fault(opened.index, row, i)
        table = opened.tables.get(extension)
        offset, size = (-1, -1) if table is None else PAIR(table, 16 * row)
        return None if offset < 0 else opened.data[offset : offset + size].tobytes()

    def captions(self, i: int) -> list[str]:
        """The captions of sample i, as `captions_in` has them; never empty."""
        shard, row = self._place(i)
        opened = self._open(shard)
        if opened.index.faults:
            self._refuse_fault(opened.index, row, i)
        column = opened.captions
        if column and (found := column.captions(row)):
            return found
        try:
            return captions_in(self._find(i, "json"), self._find(i, "txt"), self.caption_key)
        except ValueError as error:
            raise InputError(f"{self.label(i)}: {error}") from error

    def chosen_captions(self, indices: np.ndarray, u: Sequence[float]) -> list[str]:
        """One of the `captions` of each of the samples `indices` (B,): number int(u * count) of
        them, u (B,) in [0, 1).
        """
        held, shards, rows = self._of_batch(indices)
        columns = {number: shard.captions for number, shard in held.items()}
        found = chosen(columns, shards, rows, u)
        if None in found:
            for number, (i, x) in enumerate(zip(indices.tolist(), u, strict=True)):
                if found[number] is None:
                    texts = self.captions(i)
                    found[number] = texts[int(x * len(texts))]
        return cast("list[str]", found)

    def gather(self, indices: np.ndarray, extension: str) -> np.ndarray:
        """The .npy members of the samples `indices` (B,), stacked: (B, *shape), not always
        contiguous; one shape and dtype for all of them.
        """
        indices = np.asarray(indices, dtype=np.int64)
        if indices.ndim != 1 or not indices.size:
            raise ValueError(f"indices must be 1-D and not empty, got shape {indices.shape}")
        held, shards, rows = self._of_batch(indices)
        stacked = None
        if not any(extension not in s.tables or s.index.faults for s in held.values()):
            sources = {n: (shard.tables[extension], shard.data) for n, shard in held.items()}
            stacked = _stacked(_members(sources, shards, rows))
        # what is wrong with a sample is told by reading it alone
        return self._gather_one_by_one(indices, extension) if stacked is None else stacked

    def _of_batch(self, indices: np.ndarray) -> tuple[dict[int, _Shard], list[int], list[int]]:
        """The shards of samples (B,), open, and the shard and the row of each."""
        shards, rows = self._places(indices)
        known = self._opened.get
        held = {shard: known(shard) or self._open(shard, checked=False) for shard in set(shards)}
        return held, shards, rows

    def _gather_one_by_one(self, indices: np.ndarray, extension: str) -> np.ndarray:
        arrays: list[np.ndarray] = []
        for i in indices.tolist():
            try:
                arrays.append(read_npy(self.read(i, extension)))
            except ValueError as error:
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
    lengths = np.diff(index.ends, prepend=0)
    names_fit = (lengths > 0).all() and lengths.sum() == len(index.names)
    if not names_fit or not all(_fits(table, index.size) for table in index.members.values()):
        raise _unfit(path)


def _unfit(path: Path) -> InputError:
    return InputError(f"shard {path}: its index does not fit it; remove {path.name}{SUFFIX}")


def _fits(table: np.ndarray, size: int) -> bool:
    """Whether all members are in a tar of so many bytes, or said to be missing."""
    offset, length = table.T
    inside = (offset >= 0) & (length >= 0) & (offset <= size) & (length <= size - offset)
    return bool((inside | (table == -1).all(axis=1)).all())


def _mapped(path: Path, size: int) -> memoryview:
    try:
        with opened(path) as file:
            held = mapped(file)
    except OSError as error:
        raise InputError(f"shard {path}: cannot be read: {error}") from error
    if len(held) != size:
        raise InputError(
            f"shard {path}: was {size} bytes when indexed and is {len(held)} now; start again"
        )
    return held.data


def _members(
    sources: Mapping[int, tuple[memoryview, memoryview]], shards: Sequence[int], rows: Sequence[int]
) -> list[memoryview]:
    """The members of samples, by shard -> ((offset, size) of each row, bytes); other bytes than
    its member's, as many or fewer, where a sample has none or its index does not fit.
    """
    found = []
    # without calls of our own: every sample of every batch comes here
    for shard, row in zip(shards, rows, strict=True):
        table, data = sources[shard]
        offset, size = PAIR(table, 16 * row)
        found.append(data[offset : offset + size])
    return found


def _stacked(files: Sequence[memoryview]) -> np.ndarray | None:
    """.npy files as (B, *shape); None where their headers differ or are not plain C order."""
    size, head = len(files[0]), _head(files[0])
    made_of = _plain(head)
    if made_of is None or set(map(len, files)) != {size}:
        return None
    dtype, shape = made_of
    start = len(head)
    if start + dtype.itemsize * math.prod(shape) != size or start % dtype.itemsize:
        return None
    rows = np.frombuffer(bytearray().join(files), dtype=np.uint8).reshape(len(files), size)
    if (rows[:, :start] != rows[0, :start]).any():
        return None
    # a view: latents may be large, and whoever wants another type copies them anyway
    return rows[:, start:].view(dtype).reshape(len(files), *shape)


def _head(file: memoryview) -> bytes:
    """What comes before the numbers of a .npy file; where it is none, anything."""
    length = 2 if file[6:7].tobytes() == b"\1" else 4
    size = int.from_bytes(file[8 : 8 + length], "little")
    return file[: min(8 + length + size, _HEAD)].tobytes()


@lru_cache(maxsize=16)  # numpy takes longer over a header than over a batch
def _plain(head: bytes) -> tuple[np.dtype[Any], tuple[int, ...]] | None:
    """(dtype, shape) by the head of a .npy file, where it is one of plain C order."""
    try:
        _, shape, fortran, dtype = npy_head(head)
    except ValueError:
        return None
    return None if fortran else (dtype, shape)
