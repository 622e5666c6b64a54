"""How long work tells what it does: the one interface for it; flowray/cli/progress.py shows it
to people.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol, TypeVar

T = TypeVar("T")
TRAINING = "training"  # the thread that trains while another one shows its progress


class Advance(Protocol):
    """Tells of a task under way that `count` more of its total are done; note: how it goes."""

    def __call__(self, count: int = 1, note: str = "") -> None: ...


class Progress(Protocol):
    """Where work tells what it does. Anything that may take over two seconds is a task."""

    def say(self, text: str) -> None:
        """A remark or a warning that stays to be read."""

    def task(
        self, what: str, total: int | None = None, done: int = 0
    ) -> AbstractContextManager[Advance]:
        """Within the block `what` ("encoding train pictures") is under way.

        total: how many there are to do, if that is known; done: how many of them are done already.
        """


def duration(seconds: float) -> str:
    """Seconds for people: "45 s", "3 min 20 s", "2 h 5 min"."""
    minutes, rest = divmod(round(seconds), 60)
    if minutes >= 60:
        return f"{minutes // 60} h {minutes % 60} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


class Silent:
    """Progress that nobody looks at."""

    def say(self, text: str) -> None:
        """Nothing."""

    @contextmanager
    def task(self, what: str, total: int | None = None, done: int = 0) -> Iterator[Advance]:
        """Nothing."""
        yield lambda count=1, note="": None


SILENT = Silent()


def counted(items: Iterable[T], advance: Advance) -> Iterator[T]:
    """The items, each told when the next one is asked for."""
    for item in items:
        yield item
        advance()
