"""Wall time of steps that the host does not wait for one by one."""

from __future__ import annotations

import time


class Clock:
    """perf/step_s and perf/data_wait_s, means over the steps since the last logged row: that row's
    numbers are fetched when the device has done them all, so that a single step's time would be
    that of them all.

    A step goes from `start` over `waited`, when its batch is there, to `stepped`; what lies between
    steps, such as a probe, does not count.
    """

    def __init__(self) -> None:
        self._steps, self._wait, self._spent, self._mark = 0, 0.0, 0.0, 0.0

    def start(self) -> None:
        self._mark = time.perf_counter()

    def waited(self) -> None:
        self._wait += time.perf_counter() - self._mark

    def stepped(self) -> None:
        self._lap()
        self._steps += 1

    def row(self) -> dict[str, float]:
        """The means, the fetch since `stepped` included; they begin anew."""
        self._lap()
        steps = max(self._steps, 1)
        row = {"perf/data_wait_s": self._wait / steps, "perf/step_s": self._spent / steps}
        self._steps, self._wait, self._spent = 0, 0.0, 0.0
        return row

    def _lap(self) -> None:
        now = time.perf_counter()
        self._spent, self._mark = self._spent + now - self._mark, now
