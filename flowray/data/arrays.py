"""Bytes of a .npy file to an array, without pickles and without memory that they do not fill."""

from __future__ import annotations

import io
import math
from typing import NamedTuple

import numpy as np


class Header(NamedTuple):
    """What a .npy says of itself; start: the first byte of its values."""

    start: int
    shape: tuple[int, ...]
    fortran: bool
    dtype: np.dtype


def npy_head(head: bytes) -> Header:
    """By what comes before the values alone. ValueError, one line, where it begins no .npy of plain
    numbers.
    """
    file = io.BytesIO(head)
    try:
        version = np.lib.format.read_magic(file)
        reading = (
            np.lib.format.read_array_header_1_0
            if version == (1, 0)
            else np.lib.format.read_array_header_2_0
        )
        shape, fortran, dtype = reading(file)
        header = Header(file.tell(), shape, fortran, dtype)
    except Exception as error:  # numpy parses the header as Python, which raises nearly anything
        raise ValueError(" ".join(str(error).split()) or type(error).__name__) from error
    if header.dtype.hasobject:
        raise ValueError("it holds objects, which are pickles")
    if min(header.shape, default=0) < 0:
        raise ValueError(f"its header says {list(header.shape)}")
    return header


def npy_header(data: bytes) -> Header:
    """ValueError, one line, where the bytes are no whole .npy of plain numbers."""
    header = npy_head(data)
    if len(data) != header.start + _bytes(header):  # numpy would take the memory first
        raise ValueError(
            f"{len(data) - header.start} bytes, but its header says {header.dtype}"
            f" {list(header.shape)}"
        )
    return header


def read_npy(data: bytes) -> np.ndarray:
    """The array, read-only; ValueError as `npy_header` has it."""
    start, shape, fortran, dtype = npy_header(data)
    return np.ndarray(shape, dtype, data, start, order="F" if fortran else "C")


def _bytes(header: Header) -> int:
    return header.dtype.itemsize * math.prod(header.shape)
