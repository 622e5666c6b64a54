"""Which failures of a run count: those in a row, with no new checkpoint between them. A spot
cluster may take a long run's node often.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from typing import Any

from ray.exceptions import RayActorError
from ray.train import WorkerGroupError
from ray.train.v2._internal.exceptions import WorkerHealthCheckFailedError

from flowray.store.checkpoint import list_checkpoints
from flowray.store.run import RunDirectory

LOOK_S = 1.0  # between two looks at the checkpoints of trials that have failed


def newest_step(run: RunDirectory) -> int:
    """The step of the run's newest checkpoint, 0 without one."""
    found = list_checkpoints(run.checkpoints)
    return int(found[-1].name.removeprefix("step_")) if found else 0


def goes_on(error: WorkerGroupError, before: int, after: int) -> bool:
    """Whether a run that Ray Train gave up is started again: workers were lost, and it came on
    since its start, `before`, in between.

    An error that a worker raised would come again, so max_failures is the end of it.
    """
    return after > before and any(_lost(failure) for failure in error.worker_failures.values())


def _lost(failure: Exception) -> bool:
    if isinstance(failure, WorkerHealthCheckFailedError):
        failure = failure.health_check_failure
    return isinstance(failure, RayActorError)


class Pardons:
    """Sets the failures that Ray Tune has counted of a trial back to none once the trial has come
    on since the last one.

    come: how far the trial of a number has come, by its checkpoints.
    """

    def __init__(self, come: Callable[[int], int]):
        self._come = come
        self._failed_at: dict[int, int] = {}
        self._next_look = 0.0

    def failed(self, trial: Any) -> None:
        """A Tune trial failed, and starts again."""
        number = trial.config["number"]
        self._failed_at[number] = self._come(number)

    def look(self, trials: Iterable[Any]) -> None:
        """Called often."""
        if not self._failed_at or time.monotonic() < self._next_look:
            return
        self._next_look = time.monotonic() + LOOK_S
        for trial in trials:
            number = trial.config["number"]
            if number in self._failed_at and self._come(number) > self._failed_at[number]:
                del self._failed_at[number]
                trial.run_metadata.num_failures = 0
