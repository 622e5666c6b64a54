"""Files mapped into memory without staying open: a set may have more shards than a process may
have files.
"""

from __future__ import annotations

import ctypes
import mmap
import os
from typing import IO

import numpy as np

_LIBC = ctypes.CDLL(None, use_errno=True)
_LIBC.mmap.restype = ctypes.c_void_p
_LIBC.mmap.argtypes = (
    *(ctypes.c_void_p, ctypes.c_size_t),
    *(ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long),
)
_LIBC.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
_FAILED = ctypes.c_void_p(-1).value


class _Map:
    """A mapping as numpy's array interface, for as long as an array or a view of one needs it."""

    _unmap = _LIBC.munmap  # still there when the interpreter ends

    def __init__(self, descriptor: int, size: int):
        # Python's own mmap keeps a descriptor of each, until 3.13's `trackfd`
        self._address = _LIBC.mmap(None, size, mmap.PROT_READ, mmap.MAP_SHARED, descriptor, 0)
        if self._address == _FAILED:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
        self._size = size
        self.__array_interface__ = {
            "version": 3,
            "typestr": "|u1",
            "shape": (size,),
            "data": (self._address, True),  # read-only
        }

    def __del__(self) -> None:
        if hasattr(self, "_size"):
            self._unmap(self._address, self._size)


def mapped(file: IO[bytes]) -> np.ndarray:
    """The bytes of an open file, uint8, read-only; it may be closed. OSError where they cannot be
    mapped, as of an empty one.
    """
    descriptor = file.fileno()
    return np.asarray(_Map(descriptor, os.fstat(descriptor).st_size))
