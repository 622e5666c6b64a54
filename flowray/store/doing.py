"""What a worker of a run is doing before its first step, in a file of the run for whoever
watches.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from flowray.config.background import beside
from flowray.config.progress import Advance
from flowray.store.run import RENEW_S, STALE_S, RunDirectory

WRITE_S = 1.0  # a count is written at most that often


def doing(run: RunDirectory) -> str:
    """What its worker is doing ("encoding train pictures 3200/12000"); '' where nothing tells.

    A worker renews the file every RENEW_S, so one that was killed tells nothing after STALE_S.
    """
    try:
        fresh = time.time() - run.doing.stat().st_mtime < STALE_S
        return run.doing.read_text(encoding="utf-8") if fresh else ""
    except OSError:
        return ""


class WrittenProgress:
    """Progress for a process that nobody sees: `run.doing` holds the task under way, and only
    then exists.
    """

    def __init__(self, run: RunDirectory):
        self._file = run.doing

    def say(self, text: str) -> None:
        """To the worker's own log."""
        print(text, file=sys.stderr)

    @contextmanager
    def task(self, what: str, total: int | None = None, done: int = 0) -> Iterator[Advance]:
        """Tasks do not lie in one another here."""
        written = 0.0

        def words() -> str:
            return f"{what} {done}/{total}" if total else what

        def advance(count: int = 1, note: str = "") -> None:
            nonlocal done, written
            done += count
            if time.monotonic() - written > WRITE_S:
                written = time.monotonic()
                self._write(words())

        def renew(over: threading.Event) -> None:
            while not over.wait(RENEW_S):
                self._write(words())

        advance(0)
        try:
            with beside(renew, "doing"):
                yield advance
        finally:
            with suppress(OSError):
                self._file.unlink(missing_ok=True)

    def _write(self, text: str) -> None:
        """A full disk is no reason to stop: the run says so where it matters."""
        with suppress(OSError):
            self._file.parent.mkdir(parents=True, exist_ok=True)
            self._file.write_text(text, encoding="utf-8")
