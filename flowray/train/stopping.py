"""Whether a run is to stop, asked after every step."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Literal, get_args

import torch
import torch.distributed as dist

from flowray.store.run import RunDirectory
from flowray.train.group import WAITS, Group

SHARE = 50  # looking takes at most one part in so many of the time: a mounted bucket answers slowly
# `preempted`: a rank's process or machine is about to be taken away; `failed`: a checkpoint
Stop = Literal["", "stopped", "preempted", "failed"]
STOPS: tuple[Stop, ...] = get_args(Stop)  # the later one wins where ranks differ


class StopRequests:
    """Whether `run.stop_request` is there, as the lead sees it, whether any rank is `told` that it
    goes, and whether any has `failed`.

    Ranks agree over the host, so that none waits for its GPU.
    """

    def __init__(
        self,
        run: RunDirectory,
        group: Group,
        told: Callable[[], bool] | None = None,
        failed: Callable[[], bool] = lambda: False,
    ):
        self._file, self._group, self._next_look = run.stop_request, group, 0.0
        self._told, self._failed = told, failed
        apart = group.world > 1 and dist.get_backend() != "gloo"
        self._hosts = dist.new_group(backend="gloo", timeout=WAITS) if apart else None

    def heard(self) -> Stop:
        """Whether training stops after this step, and why: the same on every rank, and to be asked
        by all of them together.
        """
        mine: Stop = "stopped" if self._group.lead and self._look() else ""
        if self._told is not None and self._told():
            mine = "preempted"
        if self._failed():
            mine = "failed"
        seen = torch.tensor(STOPS.index(mine))
        if self._group.world > 1:
            dist.all_reduce(seen, op=dist.ReduceOp.MAX, group=self._hosts)
        return STOPS[int(seen)]

    def _look(self) -> bool:
        began = time.perf_counter()
        if began < self._next_look:
            return False
        found = self._file.exists()
        ended = time.perf_counter()
        self._next_look = ended + SHARE * (ended - began)
        return found


class Sigterm:
    """A handler of SIGTERM that takes note of it and leaves the process alive.

    It is heard from any thread at once, also where the main thread is in C++ for seconds, as that
    of Ray's workers is: the signal writes to a pipe. `install` belongs into the main thread
    (ValueError elsewhere).
    """

    def __init__(self) -> None:
        self._came, (self._read, self._into) = False, os.pipe()
        for end in (self._read, self._into):
            os.set_blocking(end, False)

    def __call__(self, *_: object) -> None:
        self._came = True

    def install(self) -> None:
        signal.set_wakeup_fd(self._into, warn_on_full_buffer=False)
        signal.signal(signal.SIGTERM, self)

    def came(self) -> bool:
        """Whether one has come."""
        with suppress(OSError):  # nothing new
            self._came |= signal.SIGTERM in os.read(self._read, 4096)
        return self._came


@contextmanager
def sigterm_noted() -> Iterator[Callable[[], bool]]:
    """A block of the main thread in which SIGTERM is noted; what tells whether one has come. After
    it SIGTERM is what it was.
    """
    handler, before = Sigterm(), signal.getsignal(signal.SIGTERM)
    fd = signal.set_wakeup_fd(-1)
    handler.install()
    try:
        yield handler.came
    finally:
        signal.signal(signal.SIGTERM, before)
        signal.set_wakeup_fd(fd)
