"""Where everything in a tar lies: found once by reading its headers, then kept in a file that is
mapped, so that a sample of a large set takes no memory and every process of a node shares it.
"""

from __future__ import annotations

import io
import json
import math
import os
import re
import tarfile
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO, Any, BinaryIO, NamedTuple

import numpy as np
from safetensors.numpy import save

from flowray.config.errors import InputError
from flowray.config.jsons import parse_json
from flowray.config.writing import write_whole
from flowray.data.column import CaptionColumn, CaptionsOf, caption_arrays, column_of
from flowray.data.folders import is_clutter, open_own
from flowray.data.mapped import mapped
from flowray.data.remote import opened, remote_of, stat_of

BLOCK = 512  # tar members start and are padded at multiples of this, bytes
SUFFIX = ".index"  # of the file beside a tar
_VERSION = "2"  # rises where a tar is indexed otherwise than before
# webdataset's rule: a key ends at the first dot after the last slash
_NAME = re.compile(r"((?:.*/|)[^.]+)[.]([^/]*)")
# how compressed files begin, and what undoes it
_COMPRESSED = {
    b"\x1f\x8b": "gunzip",
    b"BZh91AY&SY": "bunzip2",
    b"\xfd7zXZ\0": "unxz",
    b"\x28\xb5\x2f\xfd": "unzstd",
}
_HEADER = 1 << 20  # bytes of a long name or a pax header, and of the header of an index
_CHUNK = 1 << 20  # bytes read at a time behind the end of an archive
_EXTENSIONS = 200  # in one tar: each takes 16 bytes a sample
_FAULTS = (
    "faults"  # (faults, 2) of (row, place among the metadata's), not there where there are none
)
_TAR = "tar"  # the one key of an index's metadata, as safetensors writes several in any order
# samples at fault in one tar whose member is named, so that the header of an index has room for
# what is said of them, and of a name so many letters
_NAMED, _NAMED_TO = 1000, 200
_Members = dict[str, tuple[int, int]]  # extension -> (offset of the first byte, size)


class Fault(NamedTuple):
    """What is wrong with a sample as the tar has it; message: without shard and key."""

    cause: str
    message: str


class _Headers:
    """A tar's file as tarfile reads headers from it: none is larger than headers are, whatever it
    says of itself, as tarfile takes the memory first.
    """

    def __init__(self, file: BinaryIO):
        self._file, self.seek, self.tell = file, file.seek, file.tell

    def read(self, size: int) -> bytes:
        if not 0 <= size <= _HEADER:
            raise tarfile.ReadError(f"a header of {size} bytes")
        return self._file.read(size)


@dataclass(frozen=True)
class TarIndex:
    """Where everything in one tar lies.

    size: of the tar in bytes; names: all keys in UTF-8 end to end, uint8; ends: of each key in
    these, (samples,) int64; members: extension -> (samples, 2) int64 of (offset of the first byte,
    size), (-1, -1) where a sample lacks it; faults: rows of samples that are not as they were
    written; captions: None where the index has no column of them.
    """

    size: int
    names: np.ndarray
    ends: np.ndarray
    members: dict[str, np.ndarray]
    faults: dict[int, Fault]
    captions: CaptionColumn | None = None

    @property
    def samples(self) -> int:
        return len(self.ends)

    def key(self, row: int) -> str:
        start = self.ends[row - 1] if row else 0
        return self.names[start : self.ends[row]].tobytes().decode("utf-8", "backslashreplace")

    def open(self) -> TarIndex:
        return self


@dataclass(frozen=True)
class IndexFile:
    """An index on disk: a safetensors file, of which only the header has been read.

    arrays: name -> (dtype, shape, first byte); size, samples, faults: as TarIndex has them; made:
    which file it was, by inode and mtime.
    """

    path: Path
    size: int
    samples: int
    arrays: dict[str, tuple[np.dtype[Any], tuple[int, ...], int]]
    faults: dict[int, Fault]
    made: tuple[int, int]

    def open(self) -> TarIndex:
        """Map it; InputError where it does not fit its tar."""
        tar = str(self.path).removesuffix(SUFFIX)
        try:
            with open_own(self.path) as file:
                if _made(file) != self.made:  # another process has written it since
                    return self._again(Path(tar))
                held = mapped(file)
            found = {
                name: np.frombuffer(held, dtype, math.prod(shape), start).reshape(shape)
                for name, (dtype, shape, start) in self.arrays.items()
            }
        except (OSError, ValueError) as error:
            raise InputError(f"shard {tar}: its index cannot be read: {error}") from error
        return _index_of(self.size, found, self.faults)

    def _again(self, tar: Path) -> TarIndex:
        index = load_index(tar)
        if (index.size, index.samples) != (self.size, self.samples):
            raise InputError(f"shard {tar}: changed since it was indexed; start again")
        return index.open()


def _made(file: IO[bytes]) -> tuple[int, int]:
    stat = os.fstat(file.fileno())
    return stat.st_ino, stat.st_mtime_ns


def _index_of(size: int, arrays: dict[str, np.ndarray], faults: dict[int, Fault]) -> TarIndex:
    members = {name[1:]: table for name, table in arrays.items() if name.startswith(".")}
    return TarIndex(size, arrays["names"], arrays["ends"], members, faults, column_of(arrays))


def scan_tar(path: Path) -> TarIndex:
    """Index a tar by reading its headers, members of one key wherever they lie. Of one that is
    truncated or corrupt there are the samples up to that place, the last of them at fault. What
    follows the end of an archive is the next one, as where tars are put together by `cat`.

    InputError where there are none, it is compressed or no tar, or names end in too many ways.
    """
    try:
        with opened(path) as file:
            size = file.seek(0, io.SEEK_END)
            file.seek(0)
            begins = file.read(BLOCK)
            if undo := next((_COMPRESSED[m] for m in _COMPRESSED if begins.startswith(m)), None):
                raise InputError(f"shard {path}: compressed; {undo} it, members are read by place")
            file.seek(0)
            found = _read(path, file, size) if size else _Found(path)
    # Overflow: of a size; Recursion: tarfile calls itself for each header of a header
    except (tarfile.TarError, OSError, ValueError, OverflowError, RecursionError) as error:
        raise InputError(
            f"shard {path}: truncated or not a plain tar: {error}; write or copy it again"
        ) from error
    return _index(size, found.rows, found.faults)


class _Found:
    """What a tar has: the samples by their keys, and the faults of some; key: the last one's."""

    def __init__(self, path: Path):
        self.path, self.key = path, ""
        self.rows, self.faults = dict[str, _Members](), dict[str, Fault]()
        self._extensions = set[str]()

    def take(self, key: str, extension: str, member: tarfile.TarInfo) -> None:
        """One file more; InputError where names end in too many ways."""
        self.key, row = key, self.rows.setdefault(key, {})
        if extension in row:
            self._fault("comes twice", member, "comes twice in its shard")
        elif member.issparse():
            self._fault("stored sparse", member, "is stored sparse; write the tar without --sparse")
        else:
            row[extension] = member.offset_data, member.size
            self._extensions.add(extension)
        if len(self._extensions) > _EXTENSIONS:
            raise InputError(
                f"shard {self.path}: more than {_EXTENSIONS} extensions, last .{extension} of"
                f" sample {key!r}; an extension begins at the first dot of a name, so names"
                " need others in place of dots"
            )

    def _fault(self, cause: str, member: tarfile.TarInfo, what: str) -> None:
        named = member.name[:_NAMED_TO] if len(self.faults) < _NAMED else "a member"
        self.faults.setdefault(self.key, Fault(cause, f"{named} {what}"))

    def cut_off(self, size: int) -> None:
        """The last sample is at fault, and members that go on behind `size` bytes are none."""
        if not self.rows:
            raise tarfile.ReadError("no sample in it is whole")
        members = self.rows[self.key].items()
        self.rows[self.key] = {name: found for name, found in members if sum(found) <= size}
        message = "the shard is truncated or corrupt here or just after; write or copy it again"
        self.faults[self.key] = Fault("cut off", message)


def _read(path: Path, file: BinaryIO, size: int) -> _Found:
    """What is in a tar, in one that `cat` made of several too; tarfile's errors where it ends
    before the first sample.
    """
    found, begins = _Found(path), 0
    while True:
        file.seek(begins)
        whole = False
        try:
            with tarfile.open(  # type: ignore[call-overload]
                fileobj=_Headers(file), mode="r:", encoding="utf-8", errors="backslashreplace"
            ) as tar:
                for (key, extension), member in _files(tar, begins):
                    found.take(key, extension, member)
                # tarfile takes a broken header for the end of the archive; only a block of zeros
                # is the end
                ends = tar.offset
            file.seek(ends)
            whole = file.read(BLOCK) == bytes(BLOCK)
        except (tarfile.TarError, ValueError, OverflowError, RecursionError):
            if not found.rows:
                raise
        if not whole:
            found.cut_off(size)
            return found
        behind = _not_zero(file, ends + BLOCK)
        if behind is None:
            return found
        begins = behind


def _not_zero(file: BinaryIO, start: int) -> int | None:
    """The first block from byte `start` on that is not all zeros; None where the file ends so."""
    file.seek(start)
    while chunk := file.read(_CHUNK):
        if rest := chunk.lstrip(b"\0"):
            return start + (len(chunk) - len(rest)) // BLOCK * BLOCK
        start += len(chunk)
    return None


def _files(tar: tarfile.TarFile, begins: int) -> Iterator[tuple[tuple[str, str], tarfile.TarInfo]]:
    """((key, extension), header) of the plain files that belong to samples."""
    last = begins
    while (member := tar.next()) is not None:
        tar.members = []  # type: ignore[attr-defined]  # else it keeps every header
        if tar.offset <= last:
            raise tarfile.ReadError("a size that leads back")
        last = tar.offset
        # NUL ends a name in the tars of latents
        match = _NAME.fullmatch(member.name.replace("\0", r"\x00"))
        if (
            member.isreg()
            and match
            and not re.match(r"__[^/]*__($|/)", member.name)
            and not is_clutter(PurePosixPath(member.name))
        ):
            yield (match[1], match[2].lower()), member


def _index(size: int, rows: dict[str, _Members], faults: dict[str, Fault]) -> TarIndex:
    keys = [key.encode() for key in rows]
    members = {
        extension: np.array(
            [row.get(extension, (-1, -1)) for row in rows.values()], dtype=np.int64
        ).reshape(-1, 2)
        for extension in sorted({extension for row in rows.values() for extension in row})
    }
    names = np.frombuffer(b"".join(keys), dtype=np.uint8)
    ends = np.cumsum([len(key) for key in keys], dtype=np.int64)
    numbered = {number: faults[key] for number, key in enumerate(rows) if key in faults}
    return TarIndex(size, names, ends, members, numbered)


def load_index(path: Path, captions_of: CaptionsOf | None = None) -> TarIndex | IndexFile:
    """The index of a tar, kept beside it as `NAME.tar.index` and made anew when the tar's size or
    mtime has changed; in memory where that folder cannot be written.

    captions_of: have a column of its captions too, made from the tar where the index has none.
    """
    beside, stamp, size = _beside(path)
    kept = _kept(beside, stamp, size)
    if kept is not None and (captions_of is None or "firsts" in kept.arrays):
        return kept
    index = scan_tar(path) if kept is None else kept.open()
    # with their dots, so that no extension is taken for `names` or `ends`
    tables = {f".{extension}": table for extension, table in index.members.items()}
    arrays = {"names": index.names, "ends": index.ends, **tables}
    if captions_of is not None:
        arrays |= _caption_arrays(path, index, captions_of)
    with suppress(OSError):
        kinds = {fault: number for number, fault in enumerate(dict.fromkeys(index.faults.values()))}
        rows = [(row, kinds[fault]) for row, fault in index.faults.items()]
        kept_faults = {_FAULTS: np.array(rows, np.int64)} if rows else {}
        told = json.dumps([stamp, list(kinds)])
        write_whole(beside, save(arrays | kept_faults, metadata={_TAR: told}), shared=True)
    return _kept(beside, stamp, size) or _index_of(index.size, arrays, index.faults)


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


def _beside(path: Path) -> tuple[Path, str, int]:
    """The file of a tar's index, what it says of the tar, and the tar's size."""
    size, mtime_ns = stat_of(path)
    return path.with_name(path.name + SUFFIX), f"{_VERSION} {size} {mtime_ns}", size


def _caption_arrays(path: Path, index: TarIndex, captions_of: CaptionsOf) -> dict[str, np.ndarray]:
    try:
        with opened(path) as file:
            return caption_arrays(file, index.samples, index.members, captions_of)
    except OSError as error:
        raise InputError(f"shard {path}: cannot be read: {error.strerror}") from error


def _kept(beside: Path, stamp: str, tar_size: int) -> IndexFile | None:
    """The index file where it is whole and of this tar."""
    try:
        with open_own(beside) as file:
            length = int.from_bytes(file.read(8), "little")
            size = file.seek(0, io.SEEK_END)
            if length > min(size, _HEADER):
                return None
            file.seek(8)
            header = parse_json(file.read(length))
            made_for, kinds = parse_json(header.pop("__metadata__")[_TAR])
            if made_for != stamp:
                return None
            arrays, end = {}, length + 8
            for name, row in header.items():
                dtype = np.dtype({"U8": np.uint8, "I64": np.int64}[row["dtype"]])
                first, last = row["data_offsets"]
                if (last - first) != dtype.itemsize * math.prod(row["shape"]):
                    return None
                arrays[name] = dtype, tuple(row["shape"]), length + 8 + first
                end = max(end, length + 8 + last)
            (samples,) = arrays["ends"][1]
            plain = all(
                shape == (samples, 2) for name, (_, shape, _) in arrays.items() if name[0] == "."
            )
            if not plain or end != size or "names" not in arrays:
                return None
            if "firsts" in arrays and not (
                arrays["firsts"][1] == (samples + 1,) and {"texts", "starts"} <= arrays.keys()
            ):
                return None
            _, shape, start = arrays.pop(_FAULTS, (None, (0, 2), 0))
            rows, two = shape
            # a member takes a block at least: so many faults fit into memory where the tar is real
            if two != 2 or rows > min(samples, tar_size // BLOCK) or bool(rows) != bool(kinds):
                return None
            file.seek(start)
            pairs = np.frombuffer(file.read(rows * 16), np.int64).reshape(rows, 2)
            if not all(0 <= row < samples and number >= 0 for row, number in pairs.tolist()):
                return None
            told = [Fault(*map(str, kind)) for kind in kinds]
            faults = {row: told[number] for row, number in pairs.tolist()}
            return IndexFile(beside, tar_size, samples, arrays, faults, _made(file))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError):
        return None
