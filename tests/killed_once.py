"""Work that kills its own process midway, once."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from flowray.config.progress import Advance, Progress


class KilledOnce:
    """Work that is killed once so many are done of the task that begins with a word, where the mark
    is not there yet.
    """

    def __init__(self, work: Callable[[Progress], Any], mark: Path, word: str, left: int):
        self.work, self.mark, self.word, self.left = work, mark, word, left

    def say(self, text: str) -> None:
        pass

    @contextmanager
    def task(self, what: str, total: int | None = None, done: int = 0) -> Iterator[Advance]:
        with self.progress.task(what, total, done) as advance:

            def tell(count: int = 1, note: str = "") -> None:
                advance(count, note)
                self.left -= count if what.startswith(self.word) else 0
                if self.left <= 0 and not self.mark.exists():
                    self.mark.touch()
                    os.kill(os.getpid(), signal.SIGKILL)

            yield tell

    def __call__(self, progress: Progress) -> Any:
        self.progress = progress
        return self.work(self)
