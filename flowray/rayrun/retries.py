"""Which failures of a run count against max_failures: those in a row, with no new checkpoint
between them. On a spot cluster a long run loses nodes again and again.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from typing import Any

from ray.exceptions import RayActorError
from ray.train import WorkerGroupError

from flowray.cluster.ray_private import HealthCheckFailed
from flowray.store.checkpoint import list_checkpoints, step_of
from flowray.store.run import RunDirectory

LOOK_S = 1.0  # between two looks at the checkpoints of trials that have failed


def newest_step(run: RunDirectory) -> int:
    """The step of the run's newest checkpoint, 0 without one."""
    found = list_checkpoints(run.checkpoints)
    return step_of(found[-1]) if found else 0


def should_retry(error: WorkerGroupError, before: int, after: int) -> bool:
    """Whether a run that Ray Train gave up is started again: workers were lost, and since its start
    at step `before` it has reached a later checkpoint, `after`.

    An error that a worker raised would come again, so max_failures is the end of it.
    """
    return after > before and any(_lost(failure) for failure in error.worker_failures.values())


def _lost(failure: Exception) -> bool:
    if isinstance(failure, HealthCheckFailed):
        failure = failure.health_check_failure
    return isinstance(failure, RayActorError)


class FailureReset:
    """Sets Ray Tune's count of a trial's failures back to 0 once the trial has made progress since
    the last one.

    progress: checkpointed steps of the trial of a number.
    """

    def __init__(self, progress: Callable[[int], int]):
        self._progress = progress
        self._failed_at: dict[int, int] = {}
        self._next_look = 0.0

    def on_failure(self, trial: Any) -> None:
        """A Tune trial failed, and starts again."""
        number = trial.config["number"]
        self._failed_at[number] = self._progress(number)

    def update(self, trials: Iterable[Any]) -> None:
        """To be called about once a second."""
        if not self._failed_at or time.monotonic() < self._next_look:
            return
        self._next_look = time.monotonic() + LOOK_S
        for trial in trials:
            number = trial.config["number"]
            if number in self._failed_at and self._progress(number) > self._failed_at[number]:
                del self._failed_at[number]
                trial.run_metadata.num_failures = 0
