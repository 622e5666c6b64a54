"""sha256 of large files, each computed once and remembered in the cache."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

from flowray.config.errors import InputError
from flowray.config.progress import SILENT, Progress
from flowray.config.rows import read_rows
from flowray.data.folders import shard_stat
from flowray.data.remote import remote_of
from flowray.data.shards import sha256

REMEMBERED = "shard-sums.jsonl"
_READERS = 4  # files read at a time: a network disk gives one reader a part of what it can


class Sums:
    """The sha256 of files, remembered in `folder` by absolute path, size, mtime and inode.

    Several processes may add to it at once: a row is one append, and of a path the last row holds.
    """

    def __init__(self, folder: Path):
        self._file = folder / REMEMBERED
        self._known = dict(filter(None, map(_remembered, read_rows(self._file))))

    def of(self, paths: Sequence[Path], progress: Progress = SILENT) -> list[str]:
        """The sha256 of every file, in hex; InputError where one cannot be read. Of a remote shard
        what stands for its content, without fetching it: the sha256 where its manifest has it.
        """
        remotes = [remote_of(path) for path in paths]
        local = iter(
            self._of([path for path, r in zip(paths, remotes, strict=True) if not r], progress)
        )
        return [remote.content if remote else next(local) for remote in remotes]

    def known(self, path: Path) -> str | None:
        """What `of` says of a file without reading it; None where it would have to be read."""
        remote = remote_of(path)
        return remote.content if remote else self._known.get(_stamp(path))

    def _of(self, paths: Sequence[Path], progress: Progress) -> list[str]:
        stamps = [_stamp(path) for path in paths]
        new = sorted({stamp for stamp in stamps if stamp not in self._known})
        if new:
            what = "reading shards for their sha256"
            with (
                progress.task(what, len(new)) as advance,
                ThreadPoolExecutor(min(_READERS, len(new))) as pool,
            ):
                for stamp, found in zip(new, pool.map(_sum, new), strict=True):
                    self._known[stamp] = found
                    if _stamp(Path(stamp[0])) == stamp:  # nobody has written to it meanwhile
                        self._remember(stamp, found)
                    advance()
        return [str(self._known[stamp]) for stamp in stamps]

    def _remember(self, stamp: tuple[Any, ...], found: str) -> None:
        path, *rest = stamp
        # the line before may have been torn by a kill
        row = f"\n{json.dumps({'path': path, 'stamp': rest, 'sha256': found})}\n".encode()
        with suppress(OSError):  # a full disk: it is computed again another time
            handle = os.open(self._file, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
            try:
                os.write(handle, row)
            finally:
                os.close(handle)


def _remembered(row: dict[str, Any]) -> tuple[tuple[Any, ...], str] | None:
    """(stamp, sha256) of a row of the file; None of one that is damaged."""
    path, stamp, found = row.get("path"), row.get("stamp"), row.get("sha256")
    if isinstance(path, str) and isinstance(stamp, list) and isinstance(found, str):
        return ((path, *stamp), found) if all(type(each) is int for each in stamp) else None
    return None


def _stamp(path: Path) -> tuple[Any, ...]:
    stat = shard_stat(path)
    return str(path.absolute()), stat.st_size, stat.st_mtime_ns, stat.st_ino


def _sum(stamp: tuple[Any, ...]) -> str:
    try:
        return sha256(Path(stamp[0]))
    except OSError as error:
        raise InputError(f"shard {stamp[0]}: cannot be read: {error.strerror}") from error
