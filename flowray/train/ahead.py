"""Batches made one step ahead, in a thread beside the step that trains."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

from flowray.losses.total import Batch


class BatchesAhead:
    """`make(step)`, asked for once the step before it has begun. A context manager: its end waits
    for what is being made.

    A batch is a function of its step, so that what is made too early is made right. An error of
    `make` is raised at the step that needs the batch.
    """

    def __init__(self, make: Callable[[int], Batch], last: int):
        self._make, self._last = make, last
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="batches")
        self._next: tuple[int, Future[Batch]] | None = None

    def __call__(self, step: int) -> Batch:
        """The batch of `step`; that of the next step, up to `last`, is begun."""
        made = self._next
        future = made[1] if made and made[0] == step else self._thread.submit(self._make, step)
        batch = future.result()
        following = step + 1
        ahead = self._thread.submit(self._make, following) if following < self._last else None
        self._next = (following, ahead) if ahead else None
        return batch

    def __enter__(self) -> BatchesAhead:
        return self

    def __exit__(self, *_: object) -> None:
        self._thread.shutdown(cancel_futures=True)
