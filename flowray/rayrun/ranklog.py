"""What each rank says, kept with the run: logs/rank_N.log. Ray's own logs stay as they are, on the
nodes' disks, for as long as these live.
"""

from __future__ import annotations

import os
import socket
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, suppress
from typing import Any, TextIO

from flowray.store.run import RunDirectory
from flowray.train.group import Group


class _Tee:
    """A stream of which `log` gets a copy; where that cannot be written it goes without."""

    def __init__(self, stream: TextIO, log: TextIO):
        self._stream, self._log = stream, log

    def write(self, text: str) -> int:
        with suppress(OSError, ValueError):  # ValueError: closed, of a thread that outlives it
            self._log.write(text)
        return self._stream.write(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextmanager
def rank_log(run: RunDirectory, group: Group) -> Iterator[None]:
    """Within the block what this process writes to sys.stderr, warnings among it, is also appended
    to the rank's log, between a header and how the block ended.

    What libraries write past Python, as NCCL does, is in Ray's logs alone.
    """
    try:
        run.rank_log(group.rank).parent.mkdir(exist_ok=True)
        log = run.rank_log(group.rank).open("a", encoding="utf-8", buffering=1)
    except OSError:
        yield
        return
    with log, redirect_stderr(_Tee(sys.stderr, log)):
        who = f"rank {group.rank} of {group.world}, process {os.getpid()} on {socket.gethostname()}"
        _note(log, f"--- {_now()} {who}, {group.device}")
        try:
            yield
        except BaseException:
            _note(log, f"{traceback.format_exc()}--- {_now()} failed")
            raise
        _note(log, f"--- {_now()} ended")


def _note(log: TextIO, text: str) -> None:
    with suppress(OSError):
        log.write(f"{text}\n")


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S%z")
