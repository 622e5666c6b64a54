"""Muon for the matrices of the velocity network's blocks, beside AdamW for all else."""

from __future__ import annotations

import re
from collections.abc import MutableMapping
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor

from flowray.config.train import MuonMatrices

# layers of the blocks that make several things at once -> how many, one above the other in the
# weight: as one matrix their updates would be tied to each other (arXiv 2608.02502)
_STACKED = {"qkv": 3, "key_value": 2, "modulation": 6}
_IN_BLOCK = re.compile(r"velocity\.(?:.+\.)?blocks\.\d+\.")


def in_block(name: str) -> bool:
    """Whether a parameter belongs to a block of the velocity network: neither to what embeds its
    inputs nor to its last layers, where Muon is not at home.
    """
    return _IN_BLOCK.match(name) is not None


def stacked(name: str) -> int:
    """How many matrices of as many rows a block's weight holds."""
    return _STACKED.get(name.split(".")[-2], 1)


class PiecewiseMuon(torch.optim.Muon):
    """torch's Muon, to which each matrix that a weight stacks is one of its own.

    A group's `pieces` says how many each of its parameters stacks. The state is kept by parameter,
    as AdamW's is. Matrices of which every rank holds a part are gathered for the step, all at once:
    an update is of the whole matrix.
    """

    _gathered: list[tuple[DTensor, Tensor]]

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One step; every rank makes the update of every matrix."""
        self._gathered = []
        super().step()
        for part, whole in self._gathered:
            mine = distribute_tensor(whole, part.device_mesh, part.placements, src_data_rank=None)
            part.copy_(mine)
        self._gathered = []

    def _init_group(
        self,
        group: MutableMapping[str, Any],
        params_with_grad: list[Tensor],
        grads: list[Tensor],
        muon_momentum_bufs: list[Tensor],
    ) -> bool:
        lists = params_with_grad, grads, muon_momentum_bufs
        has_complex: bool = super()._init_group(group, *lists)
        pairs = zip(group["params"], group["pieces"], strict=True)
        pieces = [count for p, count in pairs if p.grad is not None]
        for tensors in lists:
            tensors[:] = [
                piece
                for tensor, count in zip(tensors, pieces, strict=True)
                for piece in self._whole(tensor, changes=tensors is not grads).chunk(count)
            ]
        return has_complex

    def _whole(self, tensor: Tensor, *, changes: bool) -> Tensor:
        if not isinstance(tensor, DTensor):
            return tensor
        whole = tensor.full_tensor()
        if changes:
            self._gathered.append((tensor, whole))
        return whole


class AdamWAndMuon(torch.optim.Optimizer):
    """Both as one optimiser: one list of groups and one state by parameter. Muon takes the groups
    that have `pieces`.
    """

    def __init__(
        self,
        groups: list[dict[str, Any]],
        lr: float,
        betas: tuple[float, float],
        config: MuonMatrices,
    ):
        adamw = torch.optim.AdamW(
            [group for group in groups if "pieces" not in group], lr=lr, betas=betas, fused=True
        )
        muon = PiecewiseMuon(
            [group for group in groups if "pieces" in group],
            lr=lr,
            momentum=config.momentum,
            nesterov=config.nesterov,
            ns_steps=config.iterations,
            adjust_lr_fn=config.adjust,
        )
        # the groups are theirs, not copies: what is set in one here is set there
        super().__init__([*adamw.param_groups, *muon.param_groups], {})
        self.state = muon.state = adamw.state
        self._both = adamw, muon

    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One step of both; none where `found_inf`, as the fused AdamW has it, is set and not 0.
        Muon has no kernel that reads the flag on the device, so that the host waits for it.
        """
        if bool(getattr(self, "found_inf", False)):
            return
        for optimizer in self._both:
            optimizer.step()
