"""Folders that appear whole, also where a mount can do less than a disk."""

from __future__ import annotations

import errno
import fcntl
import os
from pathlib import Path
from typing import IO, Any

NO_SUCH_THING = (errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL, errno.ENOLCK)
"""How file systems say that they do not know an operation at all: network disks have no fsync of
folders, some clusters' have no locks."""


def put_in_place(partial: Path, folder: Path, last: str) -> None:
    """Rename `partial` to `folder`, which does not exist or is empty.

    Mounted buckets rename no folders. There its files are renamed one by one, the one named `last`
    at the end: a reader who asks for that one first sees all of the folder or nothing. OSError
    where neither can be done, or `folder` has files.
    """
    try:
        os.replace(partial, folder)
    except OSError:
        folder.mkdir(exist_ok=True)
        if any(folder.iterdir()):
            raise
        for file in sorted(partial.iterdir(), key=lambda file: file.name == last):
            os.replace(file, folder / file.name)
        partial.rmdir()


def sync(path: Path) -> None:
    """Have a file's content, or a folder's names, on disk; OSError where that fails."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if not (path.is_dir() and error.errno in NO_SUCH_THING):
            raise
    finally:
        os.close(handle)


def locked(file: IO[Any] | int) -> bool:
    """Wait for the lock on an open file or folder, which the kernel lets go when its holder dies.

    False on a disk without such locks, where two writers at once then both write.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX)
    except OSError as error:
        if error.errno not in NO_SUCH_THING:
            raise
        return False
    return True
