"""Checkpoints sent to a bucket beside training."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Collection
from contextlib import suppress
from pathlib import Path

from flowray.data.remote import plain
from flowray.store.checkpoint import STATE, step_of
from flowray.store.remote_run import RemoteRun
from flowray.train.state import Halted

_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 1.0, 60.0  # between tries, each of which asks several times


class Uploader:
    """Sends the checkpoints of a run in a thread; keeps the newest `keep` there and the best one.

    Where it falls behind a newer checkpoint takes the place of those that wait. Where the bucket
    fails training goes on for `patience_s` from the checkpoint that could not be sent; say: hears
    of the first such try in a row. A context manager: its end waits for what is to be sent, so long
    at most, and raises Halted where it is not, but for a run that goes on elsewhere (`leave`).
    """

    def __init__(self, remote: RemoteRun, keep: int, patience_s: float, say: Callable[[str], None]):
        self._remote, self._keep, self._patience_s, self._say = remote, keep, patience_s, say
        self._changed = threading.Condition()  # of all below
        self._last: Path | None = None
        self._waiting: Path | None = None
        self._sending: Path | None = None
        self._best: frozenset[int] = frozenset()
        self._behind_since = 0.0
        self._why: str | None = None  # of the last try, where it failed
        self._left = self._given_up = self._elsewhere = False
        self._thread = threading.Thread(target=self._work, name="upload", daemon=True)

    def take(self, checkpoint: Path) -> None:
        """Have a checkpoint sent."""
        with self._changed:
            self._waiting = self._last = checkpoint
            self._changed.notify_all()

    def spare(self, best: Collection[int]) -> None:
        """From the next one on those of the steps `best` stay beside the newest."""
        with self._changed:
            self._best = frozenset(best)

    def needed(self) -> set[int]:
        """The steps of the checkpoints that are to stay on disk for it."""
        with self._changed:
            return {step_of(each) for each in (self._waiting, self._sending) if each}

    def check(self) -> None:
        """Halted where the bucket has failed for longer than its patience, or is another's now."""
        if lost := self._remote.lock.lost:
            raise Halted(lost)
        with self._changed:
            if self._why is None or self._sending is None:
                return
            if time.monotonic() - self._behind_since > self._patience_s:
                self._given_up = True
                self._changed.notify_all()
                if self._elsewhere:
                    return
                raise Halted(
                    f"step {step_of(self._sending)}: {self._why}; no checkpoint could be sent for"
                    f" train.checkpoint_patience_s={self._patience_s:g} s, those of"
                    f" {self._sending.parent} are kept"
                )

    def leave(self) -> None:
        """The run goes on elsewhere, from what is on disk, and sends it then: a bucket that fails
        is no reason to end it.
        """
        with self._changed:
            self._elsewhere = True

    def __enter__(self) -> Uploader:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        with self._changed:
            self._left = True
            # what ended the run says more than one more failure
            self._given_up |= kind is not None
            self._changed.notify_all()
        if kind is None or issubclass(kind, Exception):
            while self._thread.is_alive() and not (self._elsewhere and self._given_up):
                self._thread.join(0.1)
                if kind is None:
                    self.check()
            if kind is None:
                self.check()

    def _work(self) -> None:
        pause = _FIRST_PAUSE_S
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._sending or self._left)
                if self._waiting:  # what failed before it is sent no more
                    self._sending, self._waiting = self._waiting, None
                if self._sending is None:
                    if self._given_up or self._last is None:
                        return
                    last, best = self._last, self._best
                    break
                if self._why is None:
                    self._behind_since = time.monotonic()
                sending, best = self._sending, self._best
            why = self._try(sending, best)
            if why and self._why is None:
                self._warn(
                    f"step {step_of(sending)}: {why}; training goes on, it is tried again for"
                    f" {self._patience_s:g} s"
                )
            with self._changed:
                self._why = why
                if why is None:
                    self._sending, pause = None, _FIRST_PAUSE_S
                    continue
                self._changed.wait_for(lambda: self._waiting or self._given_up, pause)
                if self._given_up:
                    return
                pause = min(2 * pause, _LONGEST_PAUSE_S)
        # probe rows, and so the best one, come after their checkpoints
        if why := self._try(last, best, rows=True):
            self._warn(f"{why}; the last rows are on disk alone")

    def _warn(self, text: str) -> None:
        """A console that is gone, or a full disk behind it, is no reason to send no more."""
        with suppress(Exception):
            self._say(f"warning: {text}")

    def _try(self, checkpoint: Path, best: Collection[int], *, rows: bool = False) -> str | None:
        """Send it, and the best one where that is lacking there; what went wrong.

        rows: send them once more, which go with a checkpoint that is not there yet.
        """
        remote, step = self._remote, step_of(checkpoint)
        try:
            remote.send(checkpoint)
            for other in best:
                if other != step:
                    self._send_best(checkpoint.with_name(f"step_{other:06d}"))
            if rows:
                remote.send_rows()
            remote.rotate(step, self._keep, best)
        except Exception as error:
            return plain(error)
        return None

    def _send_best(self, checkpoint: Path) -> None:
        """Where it is not the best one any more it may go from the disk meanwhile."""
        try:
            if (checkpoint / STATE).exists():
                self._remote.send(checkpoint)
        except FileNotFoundError:
            if (checkpoint / STATE).exists():
                raise
