"""The ranks that train together; alone by default, torch.distributed where it has been started."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel

from flowray.config.errors import InputError

Shared = TypeVar("Shared")
# torch's limit of a collective, which does not know of a lead that probes while others wait; how
# long a step may take is for `flowray.train.watch` to say
WAITS = timedelta(days=1)


@dataclass(frozen=True)
class Group:
    """rank of world, and the device this rank computes on.

    over: the process group that they meet by; None: torch's own.
    """

    rank: int
    world: int
    device: torch.device
    over: dist.ProcessGroup | None = None

    @classmethod
    def current(cls, device: str = "auto") -> Group:
        """From torch.distributed, if it is initialised."""
        live = dist.is_available() and dist.is_initialized()
        rank, world = (dist.get_rank(), dist.get_world_size()) if live else (0, 1)
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        return cls(
            rank,
            world,
            (
                torch.device(device, torch.cuda.current_device())
                if device == "cuda"
                else torch.device(device)
            ),
        )

    def require_gpus(self, wanted: float, device: str) -> None:
        """InputError where this rank was given `wanted` GPUs and torch can use none: `auto`
        would leave it on the CPU without a word.
        """
        if wanted and device == "auto" and self.device.type == "cpu":
            raise InputError(
                f"resources.gpus_per_worker={wanted:g}: torch {torch.__version__} can use no GPU on"
                f" {socket.gethostname()}; install its CUDA build, or mend the driver or the"
                " container's GPU access there, or type train.device=cpu to train on the CPU"
            )

    def apart(self) -> Group:
        """The same ranks on the host, for threads that meet beside training; every rank has to
        call it.
        """
        over = dist.new_group(backend="gloo", timeout=WAITS) if self.world > 1 else None
        return replace(self, device=torch.device("cpu"), over=over)

    @property
    def lead(self) -> bool:
        """Whether this rank writes the files."""
        return self.rank == 0

    def rows(self, batch: int) -> slice:
        """This rank's slice of a global batch. ValueError where ranks would get unlike shares."""
        share, left = divmod(batch, self.world)
        if left:
            raise ValueError(f"batch: want a multiple of the {self.world} ranks, got {batch}")
        return slice(self.rank * share, (self.rank + 1) * share)

    def wrap(self, module: nn.Module) -> nn.Module:
        """DistributedDataParallel where there are several ranks, each with all weights."""
        if self.world == 1 or isinstance(module, FSDPModule):
            return module
        return DistributedDataParallel(
            module, device_ids=[self.device.index] if self.device.type == "cuda" else None
        )

    def syncing(self, module: nn.Module, *, on: bool) -> AbstractContextManager[object]:
        """A block for a forward pass, whose backward pass averages the gradients over ranks where
        it is `on`, and else leaves them apart.
        """
        if isinstance(module, FSDPModule):
            module.set_requires_gradient_sync(on)
        return (
            module.no_sync()
            if isinstance(module, DistributedDataParallel) and not on
            else nullcontext()
        )

    @contextmanager
    def seeded(self, seed: int) -> Iterator[None]:
        """A block in which torch's own generators, those that dropout draws from, start from
        `seed`; after it they go on as before.
        """
        with torch.random.fork_rng(devices=[self.device] if self.device.type == "cuda" else []):
            torch.manual_seed(seed)
            yield

    def finish(self) -> None:
        """Wait until the device has done what it was given."""
        if self.device.type == "cuda":
            torch.cuda.current_stream(self.device).synchronize()

    def mean_(self, values: Tensor) -> Tensor:
        """Mean over ranks, in place."""
        if self.world > 1:
            dist.all_reduce(values, group=self.over)
            values /= self.world
        return values

    def mean(self, values: Tensor) -> Tensor:
        """Mean over ranks."""
        return self.mean_(values.clone()) if self.world > 1 else values

    def share(self, value: Shared) -> Shared:
        """The lead's value, on every rank; it is pickled on the way."""
        if self.world == 1:
            return value
        held = [value]
        dist.broadcast_object_list(held, 0, device=self.device, group=self.over)
        return held[0]

    def everywhere(self, flag: Tensor) -> Tensor:
        """Whether a flag, () bool, holds on every rank; it stays on the device."""
        if self.world == 1:
            return flag
        holds = flag.float()
        dist.all_reduce(holds, op=dist.ReduceOp.MIN, group=self.over)
        return holds > 0

    def gathered(self, value: Shared) -> list[Shared]:
        """Every rank's value, in the order of ranks, on every rank; it is pickled on the way."""
        if self.world == 1:
            return [value]
        of_ranks: list[Shared] = [value] * self.world
        dist.all_gather_object(of_ranks, value, group=self.over)
        return of_ranks

    def collected(self, value: Shared) -> list[Shared]:
        """Every rank's value, in the order of ranks, on the lead; [] on the others."""
        if self.world == 1:
            return [value]
        of_ranks: list[Shared] | None = [value] * self.world if self.lead else None
        dist.gather_object(value, of_ranks, group=self.over)
        return of_ranks or []

    def agree(self, flag: bool) -> bool:
        """The lead's flag, on every rank."""
        if self.world == 1:
            return flag
        shared = torch.tensor(int(flag), device=self.device)
        dist.broadcast(shared, 0, group=self.over)
        return bool(shared.item())
