"""Ranks that watch each other. One that hangs, behind a dead network or in a frozen process, would
leave the others in a collective for ever.
"""

from __future__ import annotations

import faulthandler
import json
import os
import socket
import sys
import threading
import time
import uuid
from contextlib import suppress
from typing import Any

import torch.distributed as dist

from flowray.config.writing import write_whole
from flowray.store.run import RunDirectory
from flowray.train.group import WAITS, Group

BEATS = 10  # within the limit
SLOWEST_S = 15.0  # between two beats
TELLING_S = 10.0  # to say why this process ends, where the disk may hang as well
# places of a rank; those in a step count up from 0, two for each
APART, LEFT = -1, -2


class Watch:
    """Ends this process, with exit code 1 and one line that says where and for which ranks, where
    the run has not come on for `limit_s`: a rank has given no sign of life for so long, or all have
    stood in one step.

    A thread of each rank beats into the group's store, and reads there while its own rank does not
    come on. What is done between steps, or before the first, may take as long as it likes: one rank
    that is at it, and beats, holds the watch of all; torch's own limit is lifted. A context
    manager; does nothing on a single rank.
    """

    def __init__(self, run: RunDirectory, group: Group, limit_s: float):
        self._run, self._group, self._limit_s = run, group, limit_s
        self._pause_s = min(SLOWEST_S, limit_s / BEATS)
        self._me = f"process {os.getpid()} on {socket.gethostname()}"
        self._left = threading.Event()
        self._place = APART
        self._unanswered: float | None = None  # since when the store says nothing
        self._heard: dict[int, _Beat] = {}
        self._beats: threading.Thread | None = None

    def fetches(self, step: int) -> None:
        """The step after `step` begins; this rank does not have its batch yet."""
        self._place = 2 * step

    def steps(self) -> None:
        """It has the batch, and goes through the step, where all meet."""
        self._place += 1

    def apart(self) -> None:
        """The step is over: probes, checkpoints and the like may follow."""
        self._place = APART

    def __enter__(self) -> Watch:
        if self._group.world > 1:
            world: Any = dist.group.WORLD
            world.set_timeout(WAITS)
            store, name = world.get_group_store().clone(), uuid.uuid4().hex
            if self._group.lead:
                self._run.stuck.unlink(missing_ok=True)  # of the start before
                # so that all are there to be read
                for rank in range(self._group.world):
                    store.set(f"{name}/{rank}", "")
            name = self._group.share(name)
            self._beats = _started(self._beat, store, name)
            _started(self._judge)
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """A rank that has left well is not waited for; one that failed is, while its process
        lives.
        """
        if kind is None:
            self._place = LEFT
        self._left.set()
        if self._beats:
            self._beats.join(self._pause_s)

    def _beat(self, store: Any, name: str) -> None:
        others = [rank for rank in range(self._group.world) if rank != self._group.rank]
        before, count, left = LEFT, 0, False
        while not left:
            left = self._left.wait(self._pause_s if count else 0.0)
            place, count = self._place, count + 1
            if left and place != LEFT:
                return
            self._unanswered = self._unanswered or time.monotonic()
            with suppress(RuntimeError):  # the lead has gone with it
                beat = json.dumps([count, place, self._me])
                store.set(f"{name}/{self._group.rank}", beat)
                if place != before:  # so have all others come on
                    self._heard = {}
                else:
                    self._hear(others, store.multi_get([f"{name}/{rank}" for rank in others]))
                self._unanswered = None
            before = place

    def _hear(self, ranks: list[int], texts: list[bytes]) -> None:
        now = time.monotonic()
        fresh = {rank: _Beat(text, now) for rank, text in zip(ranks, texts, strict=True)}
        for rank, beat in self._heard.items():
            if beat.text == fresh[rank].text:
                fresh[rank] = beat
        self._heard = fresh

    def _judge(self) -> None:
        looked = since = time.monotonic()
        places: dict[int, int] = {}
        while not self._left.wait(self._pause_s / 2):
            now, heard, unanswered = time.monotonic(), self._heard, self._unanswered
            seen = {rank: beat.place for rank, beat in heard.items()}
            seen[self._group.rank] = self._place
            silent = [rank for rank, beat in heard.items() if now - beat.since > self._limit_s]
            silent = [rank for rank in silent if seen[rank] != LEFT]
            if now - looked > self._limit_s / 2:  # this process was frozen, perhaps with others
                self._heard, self._unanswered, since = {}, None, now
            elif unanswered is not None and now - unanswered > self._limit_s:
                self._strike([0], "it keeps the ranks' store, which does not answer")
            elif silent:
                self._strike(silent, f"no sign of life from {heard[silent[0]].who}")
            elif not heard or seen != places or min(seen.values()) < 0:
                since = now
            elif now - since > self._limit_s:
                late = sorted(rank for rank in seen if seen[rank] < max(seen.values()))
                why = "waits for its batch"
                if not late:
                    fetching = self._place % 2 == 0
                    why = "all wait" if fetching else "all are there: the network between hangs"
                    why += " for their batches: the data's storage hangs" if fetching else ""
                self._strike(late or sorted(seen), why)
            looked, places = now, seen

    def _strike(self, ranks: list[int], why: str) -> None:
        """Say it, leave it for whoever starts the run again, and end this process."""
        where = f"in step {self._place // 2 + 1}" if self._place >= 0 else "between steps"
        told = f"stuck {where} for {self._limit_s:g} s (resources.stuck_after_s): {why}"
        _started(self._tell, ranks, told).join(TELLING_S)
        os._exit(1)  # the main thread hears of nothing: it is in a collective

    def _tell(self, ranks: list[int], told: str) -> None:
        with suppress(OSError):
            content = json.dumps({"ranks": ranks, "why": told})
            write_whole(self._run.stuck, content, shared=True)  # every rank may
        who = f"rank {', '.join(map(str, ranks))}"
        print(f"{who}: {told}; rank {self._group.rank} ends", file=sys.stderr, flush=True)
        if sys.__stderr__:  # Ray's log of the worker
            faulthandler.dump_traceback(sys.__stderr__)


class _Beat:
    """What was last heard of a rank, and since when."""

    def __init__(self, text: bytes, since: float):
        self.text, self.since = text, since
        _, self.place, self.who = json.loads(text or '[0, -1, "one that has yet to begin"]')


def _started(work: Any, *args: Any) -> threading.Thread:
    thread = threading.Thread(target=work, args=args, name="watch", daemon=True)
    thread.start()
    return thread
