"""The pictures of shards, decoded."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import numpy as np

from flowray.config.errors import InputError
from flowray.data.decode import EXTENSIONS, picture_of, picture_size
from flowray.data.prepare import AS_THEY_ARE, Filtered, Preparation, Refused
from flowray.data.reader import ShardReader


def decode_image(reader: ShardReader, index: int, prepare: Preparation = AS_THEY_ARE) -> np.ndarray:
    """The picture of a sample, uint8 (H, W, 3), as `prepare` has it; InputError names shard and
    sample where it does not decode, Refused or Filtered where it is not to be used.
    """
    extension = picture_of(reader.extensions(index))
    if extension is None:
        raise InputError(f"{reader.label(index)}: no picture (.{', .'.join(EXTENSIONS)})")
    try:
        return prepare(reader.read(index, extension))
    except Refused as error:
        raise type(error)(f"{reader.label(index)}: {error}", error.cause) from error
    except ValueError as error:
        label = reader.label(index)
        raise InputError(f"{label}: .{extension} does not decode: {error}") from error


def filtered(reader: ShardReader, prepare: Preparation) -> set[int]:
    """The samples that `prepare` leaves out, by the headers of their pictures."""
    if not prepare.config.filters:
        return set()
    return {i for i in range(len(reader)) if _is_filtered(reader, i, prepare)}


def _is_filtered(reader: ShardReader, index: int, prepare: Preparation) -> bool:
    extension = picture_of(reader.extensions(index))
    try:
        if extension is not None:
            prepare.refuse(*picture_size(reader.read(index, extension)))
    except Filtered:
        return True
    except ValueError:  # no picture, which whoever decodes it is told
        return False
    return False


def pictures_also_in(
    reader: ShardReader, other: ShardReader, among: np.ndarray | None = None
) -> set[int]:
    """The places of the samples, of all or those `among` (N,), whose picture is, byte for byte, one
    of another reader's, whatever extension each has.

    Of the other only pictures that have the size of one of these are read: few, as a rule.
    """
    sizes, others = picture_bytes(reader), picture_bytes(other)
    if among is not None:
        sizes = np.where(np.isin(np.arange(len(sizes)), among), sizes, -1)
    both = np.intersect1d(sizes[sizes >= 0], others)
    known = {_digest(other, i) for i in _places(others, both)}
    return {i for i in _places(sizes, both) if _digest(reader, i) in known}


def equal_pictures(reader: ShardReader, among: np.ndarray) -> list[list[int]]:
    """The samples `among` (N,) whose pictures are byte for byte equal, in groups of two or more,
    the largest first. Only pictures that share their size with another one are read.
    """
    sizes = picture_bytes(reader)[among]
    known, counts = np.unique(sizes[sizes >= 0], return_counts=True)
    groups: dict[bytes, list[int]] = {}
    for i in among[_places(sizes, known[counts > 1])].tolist():
        groups.setdefault(_digest(reader, i), []).append(i)
    return sorted((group for group in groups.values() if len(group) > 1), key=len, reverse=True)


def picture_bytes(reader: ShardReader) -> np.ndarray:
    """The size of every sample's picture file in bytes, int64 (len,); -1 where it has none."""
    found = np.full(len(reader), -1)
    for extension in EXTENSIONS:
        sizes = reader.sizes(extension)
        found = np.where(found < 0, sizes, found)
    return found


def _places(sizes: np.ndarray, wanted: np.ndarray) -> list[int]:
    return [int(i) for i in np.flatnonzero(np.isin(sizes, wanted))]


def _digest(reader: ShardReader, index: int) -> bytes:
    extension = picture_of(reader.extensions(index))
    return hashlib.sha256(reader.read(index, str(extension))).digest()


def decode_sized(
    reader: ShardReader, index: int, size: tuple[int, int], prepare: Preparation = AS_THEY_ARE
) -> np.ndarray:
    """`decode_image` where all pictures have this (height, width) in px; InputError where one has
    not.
    """
    picture = decode_image(reader, index, prepare)
    if picture.shape[:2] != size:
        (h, w), (height, width) = picture.shape[:2], size
        raise InputError(
            f"{reader.label(index)}: {w} x {h} px among pictures of {width} x {height} px; bring"
            " them to one size by data.prepare.resize=lanczos in a recipe, --size PX on a command"
            " line"
        )
    return picture


def one_size(
    readers: Iterable[ShardReader], what: str, prepare: Preparation = AS_THEY_ARE
) -> tuple[int, int]:
    """(height, width) in px of the pictures of sets, by the first, the middle and the last of each
    that `prepare` does not leave out.

    InputError, which begins with `what`, where these are of several sizes, or all left out.
    """
    sizes: dict[tuple[int, int], str] = {}
    none = InputError(f"{what}: no pictures")
    for reader in readers:
        for index in sorted({0, len(reader) // 2, len(reader) - 1}):
            try:
                picture = decode_image(reader, index, prepare)
            except Filtered as error:
                none = InputError(f"{what}: pictures are left out, {error}")
            else:
                sizes.setdefault(picture.shape[:2], reader.label(index))
    if not sizes:
        raise none
    size, *others = sizes
    if others:
        told = "; ".join(f"{w} x {h} px: {label}" for (h, w), label in sizes.items())
        raise InputError(
            f"{what}: pictures are of several sizes, {told}; bring them to one by"
            " data.prepare.resize=lanczos in a recipe, --size PX on a command line"
        )
    return size
