"""What a run's wall time goes into, over all its starts: times.jsonl, from which the report takes
its goodput.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

from flowray.store.rows import add_row, read_rows
from flowray.store.run import RunDirectory

Spending = Literal["steps", "saving", "probes"]  # probes: pictures and the doctor's visits too


class Times:
    """The lead's account of one start. As a context manager it notes how the start ended.

    Rows {step, start, at, steps_s, saving_s, probes_s}: `start` counts from 1, `at` is the clock in
    seconds since 1970, the rest are seconds since the start was ready for its first step. Unlike
    metric rows none is dropped at a resume: they tell what was done twice. The first of a start has
    what: ready, `began` and `workers`, the last one of a start that was not killed how it `ended`.
    """

    def __init__(self, run: RunDirectory):
        self._path, self._start = run.times, 0
        self._began, self._mark = time.time(), time.monotonic()
        self._on: Spending = "steps"
        self._spent: dict[Spending, float] = {}
        self._step = 0

    def ready(self, step: int, workers: int) -> None:
        """Just before the first step, and behind what a bucket has of the starts before."""
        self._start = 1 + max((row.get("start", 0) for row in read_rows(self._path)), default=0)
        self._mark = time.monotonic()
        self._spent = {"steps": 0.0, "saving": 0.0, "probes": 0.0}
        self.row(step, what="ready", began=self._began, workers=workers)

    @contextmanager
    def on(self, what: Spending) -> Iterator[None]:
        """A block, or a function decorated with it, that is no step. Of blocks within blocks the
        inner one counts.
        """
        self._lap()
        before, self._on = self._on, what
        try:
            yield
        finally:
            self._lap()
            self._on = before

    def row(self, step: int, **more: Any) -> None:
        """Where the time has gone up to now. Before a checkpoint is begun, so that it is told of
        each that a resume may go on from.
        """
        self._lap()
        self._step = step
        spent = {f"{what}_s": round(seconds, 4) for what, seconds in self._spent.items()}
        row = {"step": step, "start": self._start, "at": time.time(), **spent, **more}
        add_row(self._path, row)

    def __enter__(self) -> Times:
        return self

    def ended(self, step: int, how: str) -> None:
        """The end of the last step; once."""
        self.row(step, ended=how)
        self._spent = {}

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None and self._spent:
            self.ended(self._step, "failed")

    def _lap(self) -> None:
        now = time.monotonic()
        if self._spent:
            self._spent[self._on] += now - self._mark
        self._mark = now
