"""What a loss needs of the ranks that train together: sums, and rows of the others that carry a
gradient home.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def rank_and_world() -> tuple[int, int]:
    """(0, 1) where torch.distributed has not been started."""
    return (
        (dist.get_rank(), dist.get_world_size())
        if dist.is_available() and dist.is_initialized()
        else (0, 1)
    )


def sum_over_ranks(x: Tensor) -> Tensor:
    """The sum, the same on every rank; no gradient."""
    if rank_and_world()[1] > 1:
        x = x.detach().clone()
        dist.all_reduce(x)
    return x


def gathered(x: Tensor) -> Tensor:
    """The whole of a tensor that the ranks hold parts of, on each of them; no gradient. Others as
    they are.
    """
    from torch.distributed.tensor import DTensor  # half a second that making pictures need not wait

    return (x.full_tensor() if isinstance(x, DTensor) else x).detach()


class _Gather(torch.autograd.Function):
    """Backward: a rank's rows get the sum of what every rank's loss makes of them.

    With DistributedDataParallel's mean over ranks that is the gradient of the mean of the ranks'
    losses.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        rank, world = rank_and_world()
        ctx.mine = slice(rank * len(x), (rank + 1) * len(x))
        rows = [torch.empty_like(x) for _ in range(world)]
        dist.all_gather(rows, x.contiguous())
        return torch.cat(rows)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return sum_over_ranks(grads[0].contiguous())[ctx.mine]


def gather_rows(x: Tensor) -> Tensor:
    """Rows (B, ...) of all ranks in their order, (world * B, ...), with gradient; every rank
    must hold B and call backward.
    """
    return x if rank_and_world()[1] == 1 else _Gather.apply(x)
