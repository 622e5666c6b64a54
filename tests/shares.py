"""Threads that write a checkpoint together, as ranks do."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

from flowray.store.checkpoint import save_checkpoint

T = TypeVar("T")


class Meeting:
    """Threads as ranks."""

    def __init__(self, rank: int, held: list[Any], barrier: threading.Barrier):
        self.rank, self.world, self._held, self._barrier = rank, len(held), held, barrier

    def gathered(self, value: T) -> list[T]:
        self._held[self.rank] = value
        self._barrier.wait()
        of_all = list(self._held)
        self._barrier.wait()
        return of_all


def save_shares(folder: Path, step: int, shares: list[Any]) -> list[Path | OSError]:
    """What each of the writers comes to."""
    held: list[Any] = [None] * len(shares)
    barrier = threading.Barrier(len(shares), timeout=60)

    def write(rank: int) -> Path | OSError:
        try:
            writers = Meeting(rank, held, barrier)
            state = {"seed": 3 if rank == 0 else 4}
            return save_checkpoint(folder, step, shares[rank], state, 2, (), writers)
        except OSError as error:
            return error

    with ThreadPoolExecutor(len(shares)) as threads:
        return list(threads.map(write, range(len(shares))))
