"""Folders that appear whole, also where a mount can do less than a disk."""

from __future__ import annotations

import errno
import fcntl
import os
import stat
from pathlib import Path, PurePath
from typing import IO, Any, BinaryIO

from flowray.config.errors import InputError
from flowray.config.paths import no_such

NO_SUCH_THING = (errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL, errno.ENOLCK)
"""How file systems say that they do not know an operation at all: network disks have no fsync of
folders, some clusters' have no locks."""

# folders and files that systems leave among files: archives of macOS, Synology's and Windows'
_CLUTTER = {"__macosx", "@eadir", "#recycle", "$recycle.bin", "thumbs.db", "desktop.ini"}


def is_clutter(path: PurePath) -> bool:
    """Whether a file, by its path from the folder or the tar it is in, is hidden or a system's own,
    as is macOS's `._NAME` beside every file.
    """
    return any(
        part.lower() in _CLUTTER or (part.startswith(".") and part not in (".", ".."))
        for part in path.parts
    )


def shard_stat(path: Path) -> os.stat_result:
    """Of a shard, links followed; InputError where nothing can be read there. A pipe would be
    waited for, and a device has no end.
    """
    try:
        found = path.stat()
    except OSError as error:
        raise InputError(f"shard {path}: cannot be read: {error.strerror}") from error
    if not stat.S_ISREG(found.st_mode):
        raise InputError(f"shard {path}: {no_such(path)}")
    return found


def open_own(path: Path) -> BinaryIO:
    """Open a file that flowray wrote among those of others; OSError where it is a link, a pipe or
    anything else that it never writes.
    """
    handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    file = os.fdopen(handle, "rb")
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        file.close()
        raise OSError(errno.EINVAL, "not a file", str(path))
    return file


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
