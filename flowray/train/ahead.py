"""Batches made some steps ahead, in a thread beside the step that trains."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

import torch

from flowray.losses.total import Batch


class BatchesAhead:
    """`make(step)` of a rank's device, begun up to `depth` steps before it is asked for, in the
    order of the steps; 0: when it is asked for. A context manager: its end waits for what is being
    made.

    A batch is a function of its step, so that what is made too early is made right. At most
    `depth` batches are held beside the one in use. An error of `make` is raised at the step that
    needs the batch. One thread, so that `make` may keep what it likes without a lock.
    """

    def __init__(
        self, make: Callable[[int], Batch], last: int, device: torch.device, depth: int = 1
    ):
        self._make, self._last, self._depth = make, last, depth
        # a thread begins on the first GPU, where pinned memory of every rank would open a context
        chosen = (
            (torch.cuda.set_device, (_number(device),)) if device.type == "cuda" else (None, ())
        )
        self._thread = ThreadPoolExecutor(1, "batches", *chosen)
        self._begun: dict[int, Future[Batch]] = {}

    def __call__(self, step: int) -> Batch:
        """The batch of `step`; those of the next steps, before `last`, are begun."""
        if not self._depth:
            return self._make(step)
        wanted = [step, *range(step + 1, min(step + self._depth + 1, self._last))]
        for other in self._begun.keys() - set(wanted):
            self._begun.pop(other).cancel()
        for each in wanted:
            if each not in self._begun:
                self._begun[each] = self._thread.submit(self._make, each)
        return self._begun.pop(step).result()

    def __enter__(self) -> BatchesAhead:
        return self

    def __exit__(self, *_: object) -> None:
        self._thread.shutdown(cancel_futures=True)


def _number(gpu: torch.device) -> int:
    """The GPU's number; a plain `cuda` is the one in use here."""
    return torch.cuda.current_device() if gpu.index is None else gpu.index
