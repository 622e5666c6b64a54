"""Where everything in a tar lies: found once by reading its headers, then kept in a file that is
mapped, so that a sample of a large set takes no memory and every process of a node shares it.
"""

from __future__ import annotations

import io
import json
import mmap
import re
import tarfile
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from safetensors.numpy import save

from flowray.config.errors import InputError
from flowray.config.writing import write_whole
from flowray.data.folders import is_clutter
from flowray.data.remote import opened, remote_of, stat_of

BLOCK = 512  # tar members start and are padded at multiples of this, bytes
SUFFIX = ".index"  # of the file beside a tar
_VERSION = "1"  # rises where a tar is indexed otherwise than before
# webdataset's rule: a key ends at the first dot after the last slash
_NAME = re.compile(r"((?:.*/|)[^.]+)[.]([^/]*)")
_GZIP = b"\x1f\x8b"


@dataclass(frozen=True)
class TarIndex:
    """Where everything in one tar lies.

    size: of the tar in bytes; names: all keys in UTF-8 end to end, uint8; ends: of each key in
    these, (samples,) int64; members: extension -> (samples, 2) int64 of (offset of the first byte,
    size), (-1, -1) where a sample lacks it.
    """

    size: int
    names: np.ndarray
    ends: np.ndarray
    members: dict[str, np.ndarray]

    @property
    def samples(self) -> int:
        return len(self.ends)

    def key(self, row: int) -> str:
        start = self.ends[row - 1] if row else 0
        return self.names[start : self.ends[row]].tobytes().decode("utf-8")

    @cached_property
    def keys(self) -> list[str]:
        return [self.key(row) for row in range(self.samples)]

    def open(self) -> TarIndex:
        return self


@dataclass(frozen=True)
class IndexFile:
    """An index on disk: a safetensors file, of which only the header has been read.

    arrays: name -> (dtype, shape, first byte); size, samples: as TarIndex has them.
    """

    path: Path
    size: int
    samples: int
    arrays: dict[str, tuple[np.dtype[Any], tuple[int, ...], int]]

    def open(self) -> TarIndex:
        """Map it; InputError where it does not fit its tar."""
        tar = str(self.path).removesuffix(SUFFIX)
        try:
            with self.path.open("rb") as file:
                held = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            found = {
                name: np.frombuffer(held, dtype, int(np.prod(shape)), start).reshape(shape)
                for name, (dtype, shape, start) in self.arrays.items()
            }
        except (OSError, ValueError) as error:
            raise InputError(f"shard {tar}: its index cannot be read: {error}") from error
        names, ends = found.pop("names"), found.pop("ends")
        members = {name.removeprefix("."): table for name, table in found.items()}
        return TarIndex(self.size, names, ends, members)


def scan_tar(path: Path) -> TarIndex:
    """Index a tar by reading its headers, members of one key wherever they lie; InputError where
    it is truncated or corrupt, or a member comes twice.
    """
    rows: dict[str, dict[str, tuple[int, int]]] = {}
    key = ""
    try:
        with opened(path) as file:
            size = file.seek(0, io.SEEK_END)
            if not size:
                return _index(0, rows)
            file.seek(0)
            if file.read(len(_GZIP)) == _GZIP:
                raise InputError(f"shard {path}: compressed; gunzip it, members are read by place")
            file.seek(0)
            with tarfile.open(
                fileobj=file, mode="r:", encoding="utf-8", errors="backslashreplace"
            ) as tar:
                for name, member in _files(tar):
                    key, extension = name
                    if extension in rows.setdefault(key, {}):
                        raise InputError(
                            f"shard {path}: sample {key!r} comes twice ({member.name}); keys must"
                            " be unique in a shard"
                        )
                    if member.issparse():
                        raise InputError(
                            f"shard {path}: {member.name} is stored sparse; write the tar without"
                            " --sparse"
                        )
                    rows[key][extension] = (member.offset_data, member.size)
                # tarfile takes a broken header for the end of the archive; only a block of zeros is
                # the end.
                file.seek(tar.offset)
                whole = file.read(BLOCK) == bytes(BLOCK)
    except (tarfile.TarError, OSError, ValueError) as error:
        raise InputError(
            f"shard {path}: truncated or not a plain tar{_near(key)}: {error}; write or copy it"
            " again"
        ) from error
    if not whole:
        raise InputError(f"shard {path}: truncated or corrupt{_near(key)}; write or copy it again")
    return _index(size, rows)


def _files(tar: tarfile.TarFile) -> Iterator[tuple[tuple[str, str], tarfile.TarInfo]]:
    """((key, extension), header) of the plain files that belong to samples."""
    while (member := tar.next()) is not None:
        tar.members = []  # type: ignore[attr-defined]  # else it keeps every header
        match = _NAME.fullmatch(member.name)
        if (
            member.isreg()
            and match
            and not re.match(r"__[^/]*__($|/)", member.name)
            and not is_clutter(PurePosixPath(member.name))
        ):
            yield (match[1], match[2].lower()), member


def _index(size: int, rows: dict[str, dict[str, tuple[int, int]]]) -> TarIndex:
    keys = [key.encode() for key in rows]
    members = {
        extension: np.array(
            [row.get(extension, (-1, -1)) for row in rows.values()], dtype=np.int64
        ).reshape(-1, 2)
        for extension in sorted({extension for row in rows.values() for extension in row})
    }
    names = np.frombuffer(b"".join(keys), dtype=np.uint8)
    return TarIndex(size, names, np.cumsum([len(key) for key in keys], dtype=np.int64), members)


def _near(key: str) -> str:
    return f" at or just after sample {key!r}" if key else ""


def load_index(path: Path) -> TarIndex | IndexFile:
    """The index of a tar, kept beside it as `NAME.tar.index` and made anew when the tar's size or
    mtime has changed; in memory where that folder cannot be written.
    """
    beside, stamp, size = _beside(path)
    if (kept := _kept(beside, stamp, size)) is not None:
        return kept
    index = scan_tar(path)
    # with their dots, so that no extension is taken for `names` or `ends`
    tables = {f".{extension}": table for extension, table in index.members.items()}
    arrays = {"names": index.names, "ends": index.ends, **tables}
    with suppress(OSError):
        write_whole(beside, save(arrays, metadata=stamp), shared=True)
    return _kept(beside, stamp, size) or index


def is_indexed(path: Path) -> bool:
    """Whether `load_index` finds an index of the tar as it is."""
    return _kept(*_beside(path)) is not None


def samples_in(path: Path) -> int:
    """How many samples a tar has; of a remote one its manifest may know, so that it need not be
    fetched.
    """
    remote = remote_of(path)
    known = remote.samples if remote else None
    return load_index(path).samples if known is None else known


def _beside(path: Path) -> tuple[Path, dict[str, str], int]:
    """The file of a tar's index, what it says of the tar, and the tar's size."""
    try:
        size, mtime_ns = stat_of(path)
    except OSError as error:
        raise InputError(f"shard {path}: cannot be read: {error.strerror}") from error
    stamp = {"tar": f"{_VERSION} {size} {mtime_ns}"}
    return path.with_name(path.name + SUFFIX), stamp, size


def _kept(beside: Path, stamp: dict[str, str], tar_size: int) -> IndexFile | None:
    """The index file where it is whole and of this tar."""
    try:
        with beside.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            size = file.seek(0, io.SEEK_END)
            if length > size:
                return None
            file.seek(8)
            header = json.loads(file.read(length))
        if header.pop("__metadata__") != stamp:
            return None
        arrays, end = {}, length + 8
        for name, row in header.items():
            dtype = np.dtype({"U8": np.uint8, "I64": np.int64}[row["dtype"]])
            first, last = row["data_offsets"]
            if (last - first) != dtype.itemsize * int(np.prod(row["shape"])):
                return None
            arrays[name] = dtype, tuple(row["shape"]), length + 8 + first
            end = max(end, length + 8 + last)
        (samples,) = arrays["ends"][1]
        plain = all(
            shape == (samples, 2) for name, (_, shape, _) in arrays.items() if name[0] == "."
        )
        if not plain or end != size or "names" not in arrays:
            return None
        return IndexFile(beside, tar_size, samples, arrays)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError):
        return None
