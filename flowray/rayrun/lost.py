"""That workers of a run were lost, told to whoever watches it: what the driver of Ray Train does
not hear of.
"""

from __future__ import annotations

import json
import socket
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from ray.exceptions import RayActorError
from ray.train import UserCallback

from flowray.cluster.ray_private import HealthCheckFailed
from flowray.config.errors import last_line
from flowray.rayrun.failures import failure_file, out_of_memory, write_failure
from flowray.rayrun.retries import newest_step
from flowray.store.rows import add_row
from flowray.store.run import RunDirectory


class LossTold(UserCallback):
    """A row of times.jsonl, {step, lost, why, at}, and a line in `run.doing`, for each time that
    ranks of the run were lost. Ray Train calls it in its controller.

    kernel: the kernel's counters, of which `oom_kill` is told where it has risen on this host.
    """

    def __init__(self, run_dir: Path, kernel: Path = Path("/proc/vmstat")):
        self._run, self._kernel = RunDirectory(run_dir), kernel
        self._host, self._killed = socket.gethostname(), _oom_kills(kernel)

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
        if self._host == socket.gethostname() and (now := _oom_kills(self._kernel)) > self._killed:
            # of which process it does not say: the run goes on
            self._killed, why = now, f"{why}, and the kernel has ended one for lack of memory"
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
