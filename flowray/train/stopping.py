"""Whether a run is to stop, asked after every step."""

from __future__ import annotations

import time

import torch
import torch.distributed as dist

from flowray.store.run import RunDirectory
from flowray.train.group import Group

SHARE = 50  # looking takes at most one part in so many of the time: a mounted bucket answers slowly


class StopRequests:
    """Whether `run.stop_request` is there, as the lead sees it.

    Ranks agree over the host, so that none waits for its GPU.
    """

    def __init__(self, run: RunDirectory, group: Group):
        self._file, self._group, self._next_look = run.stop_request, group, 0.0
        apart = group.world > 1 and dist.get_backend() != "gloo"
        self._hosts = dist.new_group(backend="gloo") if apart else None

    def heard(self) -> bool:
        """Whether training stops after this step: the same on every rank, and to be asked by all
        of them together.
        """
        seen = torch.tensor(int(self._group.lead and self._look()))
        if self._group.world > 1:
            dist.broadcast(seen, 0, group=self._hosts)
        return bool(seen)

    def _look(self) -> bool:
        began = time.perf_counter()
        if began < self._next_look:
            return False
        found = self._file.exists()
        ended = time.perf_counter()
        self._next_look = ended + SHARE * (ended - began)
        return found
