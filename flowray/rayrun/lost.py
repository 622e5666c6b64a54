"""That workers of a run were lost, told to whoever watches it: what the driver of Ray Train does
not hear of.
"""

from __future__ import annotations

import json
import socket
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ray.exceptions import RayActorError
from ray.train import UserCallback

from flowray.cluster.ray_private import HealthCheckFailed
from flowray.config.errors import last_line
from flowray.rayrun.failures import OutOfMemory, failure_file, out_of_memory, write_failure
from flowray.rayrun.retries import newest_step
from flowray.store.rows import add_row, read_rows
from flowray.store.run import RunDirectory

_NODE_DIED = "node has died"  # Ray's words


class LossTold(UserCallback):
    """A row of times.jsonl, {step, lost, why, at}, and a line in `run.doing`, for each time that
    ranks of the run were lost. Ray Train calls it in its controller. Where a worker is killed for
    the third time at one place, or for the second one and the kernel says that memory ran out, the
    run ends: it would be again.

    kernel: the kernel's counters, of which `oom_kill` is told where it has risen on this host.
    """

    def __init__(self, run_dir: Path, kernel: Path = Path("/proc/vmstat")):
        self._run, self._kernel = RunDirectory(run_dir), kernel
        self._host, self._killed = socket.gethostname(), _oom_kills(kernel)
        self._last: _Place | None = None
        self._again = 0  # how often in a row a kill came at the place of the one before

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        if failure_file(self._run).exists():  # of the run itself: it is not started again
            return
        if told := next(filter(None, map(out_of_memory, worker_exceptions.values())), None):
            write_failure(self._run, told)
            return
        step, ranks = newest_step(self._run), sorted(worker_exceptions)
        why = _why(worker_exceptions[ranks[0]])
        if stuck := self._stuck():  # those that say so have ended, and not those that are meant
            ranks, why = stuck["ranks"], stuck["why"]
        for_memory = False  # as the kernel says, which does not say of which process
        if self._host == socket.gethostname() and (now := _oom_kills(self._kernel)) > self._killed:
            self._killed, for_memory = now, True
            why = f"{why}, and the kernel has ended one for lack of memory"
        if not stuck and any(map(_killed, worker_exceptions.values())):
            before, self._last = self._last, _Place.of(self._run, step, for_memory)
            self._again = self._again + 1 if before and self._last.is_again(before) else 0
            if self._again >= (1 if for_memory else 2):
                times = "twice" if self._again == 1 else "three times"
                said = f"a worker was killed {times} {self._last}, with no step gained"
                told = OutOfMemory(f"{said}: so does the kernel where memory runs out")
                write_failure(self._run, told)
        row = {"step": step, "lost": ranks, "why": why, "at": time.time()}
        add_row(self._run.times, row)
        with suppress(OSError):
            self._run.doing.write_text(f"starting again from step {step}", encoding="utf-8")

    def _stuck(self) -> dict[str, Any] | None:
        """What ranks have left that ended as the run came no further."""
        try:
            told: dict[str, Any] = json.loads(self._run.stuck.read_text(encoding="utf-8"))
            self._run.stuck.unlink()
        except OSError:
            return None
        return told


@dataclass(frozen=True)
class _Place:
    """Where a start of the run was cut off.

    checkpoint: the newest step that is kept; starts: those that were ready for a step so far;
    reached: the last step that this start has logged; for_memory: as the kernel says.
    """

    checkpoint: int
    starts: int
    reached: int
    for_memory: bool

    @classmethod
    def of(cls, run: RunDirectory, checkpoint: int, for_memory: bool) -> _Place:
        starts, reached = 0, 0
        for row in read_rows(run.times):
            starts += row.get("what") == "ready"
            if "start" in row:
                reached = row["step"]
        return cls(checkpoint, starts, reached, for_memory)

    def is_again(self, before: _Place) -> bool:
        """Whether it is the place of before, after another start; one that was killed while it
        loaded counts where both were for memory.
        """
        same = (self.checkpoint, self.reached) == (before.checkpoint, before.reached)
        for_memory = self.for_memory and before.for_memory
        return same and (self.starts > before.starts or for_memory)

    def __str__(self) -> str:
        return f"after step {self.reached}" if self.starts else "before its first step"


def _killed(error: Exception) -> bool:
    """Whether a worker's process ended, and not with its node."""
    if isinstance(error, HealthCheckFailed):
        error = error.health_check_failure
    gone = _NODE_DIED in str(error)
    return isinstance(error, RayActorError) and not error.preempted and not gone


def _oom_kills(kernel: Path) -> int:
    """Processes that this host's kernel has ended for lack of memory; 0 where it does not say."""
    try:
        lines = kernel.read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith("oom_kill ")), 0)


def _why(error: Exception) -> str:
    """On one line."""
    if isinstance(error, HealthCheckFailed):
        error = error.health_check_failure
    if isinstance(error, RayActorError):
        return "its node went away" if error.preempted else "its process ended"
    return last_line(str(error)) or type(error).__name__
