"""What a sweep or a run waits for while the cluster has no room for it, said once a minute."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field

from flowray.cluster.capacity import present
from flowray.config.background import beside
from flowray.config.train import ResourceConfig
from flowray.store.doing import doing
from flowray.store.run import STALE_S, RunDirectory
from flowray.tune.plan import Cluster
from flowray.tune.room import asked_words

SAY_S = 60.0  # between two lines
LOOK_S = 1.0


@dataclass
class RoomWatch:
    """Says once a minute what trials or runs wait for.

    asked: what each of them asks for; now: a clock, in seconds; there: what the cluster has.
    """

    asked: ResourceConfig
    say: Callable[[str], None]
    now: Callable[[], float] = time.monotonic
    there: Callable[[], Cluster] = present
    _since: float | None = None
    _said: float = 0.0
    _looked: float = field(default=float("-inf"))

    def look(self, waiting: Callable[[], int]) -> None:
        """To be called about once a second. waiting: how many have been asked for and have not
        begun.
        """
        now = self.now()
        if now - self._looked < LOOK_S:
            return
        self._looked, count = now, waiting()
        if not count:
            self._since = None
        elif self._since is None:
            self._since = self._said = now
        elif now - self._said >= SAY_S:
            self._said = now
            asked = asked_words(self.asked)
            asked = f"{count} x ({asked})" if count > 1 else asked
            self.say(
                f"waiting for room for {now - self._since:.0f} s: asked {asked}; present"
                f" {self.there()}"
            )


def is_active(run: RunDirectory) -> bool:
    """Whether a worker of the run is at work, as far as its files tell."""
    try:
        return bool(doing(run)) or time.time() - run.lock.stat().st_mtime < STALE_S
    except OSError:
        return False


def told_of_waiting(
    asked: ResourceConfig, run: RunDirectory, say: Callable[[str], None]
) -> AbstractContextManager[None]:
    """While the block runs, a line a minute as long as none of the run's workers is at work."""
    watch = RoomWatch(asked, say)

    def look(over: threading.Event) -> None:
        while not over.wait(LOOK_S):
            watch.look(lambda: int(not is_active(run)))

    return beside(look, "room")
