"""Batches made one step ahead, in a thread beside the step that trains."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

import torch

from flowray.losses.total import Batch


class BatchesAhead:
    """`make(step)` of a rank's device, asked for once the step before it has begun. A context
    manager: its end waits for what is being made.

    A batch is a function of its step, so that what is made too early is made right. An error of
    `make` is raised at the step that needs the batch.
    """

    def __init__(self, make: Callable[[int], Batch], last: int, device: torch.device):
        self._make, self._last = make, last
        # a thread begins on the first GPU, where pinned memory of every rank would open a context
        chosen = (
            (torch.cuda.set_device, (_number(device),)) if device.type == "cuda" else (None, ())
        )
        self._thread = ThreadPoolExecutor(1, "batches", *chosen)
        self._begun: dict[int, Future[Batch]] = {}

    def __call__(self, step: int) -> Batch:
        """The batch of `step`; that of the next step, up to `last`, is begun."""
        begun = self._begun.pop(step, None) or self._thread.submit(self._make, step)
        batch = begun.result()
        if step + 1 < self._last:
            self._begun = {step + 1: self._thread.submit(self._make, step + 1)}
        return batch

    def __enter__(self) -> BatchesAhead:
        return self

    def __exit__(self, *_: object) -> None:
        self._thread.shutdown(cancel_futures=True)


def _number(gpu: torch.device) -> int:
    """The GPU's number; a plain `cuda` is the one in use here."""
    return torch.cuda.current_device() if gpu.index is None else gpu.index
