"""The weights of a step in one piece, as probes and pictures look at them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from flowray.model.assemble import FlowModel
from flowray.model.ranks import gathered
from flowray.probes.untouched import holding
from flowray.train.state import TrainState

Kind = Literal["ema", "raw"]


@dataclass(frozen=True)
class View:
    """`model`, to be shown with the raw weights or with their EMA.

    frozen: what else has to be lent to the model, of a text model in parts. room: where the whole
    of a tensor in parts comes to lie while the model holds it.
    """

    model: FlowModel
    weights: dict[Kind, dict[str, Tensor]]
    frozen: dict[str, Tensor]
    room: dict[str, Tensor]

    @contextmanager
    def showing(self, kind: Kind) -> Iterator[None]:
        """Within the block the model holds the raw weights or the EMA. Where ranks hold parts every
        rank has to enter it.
        """
        lent = {**self.frozen, **self.weights[kind]}
        for name, room in self.room.items():
            room.copy_(gathered(lent[name]))
        named = dict(self.model.named_parameters())
        with holding({name: named[name] for name in lent}, lent | self.room):
            yield


def view_of(state: TrainState) -> View:
    """What is to be seen of a state; no rank waits for another here. Where ranks hold parts each
    needs room for the whole weights on its device, which is made here: 4 bytes a parameter and
    twice the largest tensor, as long as the view lasts, at a time when no activations are held.

    A copy on every rank, and not a pass of all ranks through their parts: so probes stay in fp32
    where blocks are gathered in half precision, ranks may have unlike numbers of rows and steps,
    one that fails leaves no rank waiting, and the numbers are those of a run without parts.
    """
    weights: dict[str, Tensor] = {name: p.detach() for name, p in state.parameters.items()}
    shown: dict[Kind, dict[str, Tensor]] = {"ema": state.ema.average, "raw": weights}
    if state.shards is None:
        return View(state.model, shown, {}, {})
    backbone = state.model.text.backbone.named_parameters(prefix="text.backbone")
    frozen: dict[str, Tensor] = {name: p for name, p in backbone if isinstance(p, DTensor)}
    in_parts = {name for name, x in {**frozen, **weights}.items() if isinstance(x, DTensor)}
    model = state.shards.whole
    room = {
        name: torch.empty(p.shape, dtype=p.dtype, device=p.device)
        for name, p in model.named_parameters()
        if name in in_parts
    }
    # what a gather takes besides: a rank that lacks it says so here, and not in the midst of one
    largest = max(room.values(), key=lambda x: x.nbytes)
    torch.empty(2 * largest.numel(), dtype=largest.dtype, device=largest.device)
    return View(model, shown, frozen, room)
