"""The weights of a step in one piece, as probes and pictures look at them."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass

from torch import Tensor
from torch.distributed.tensor import DTensor

from flowray.model.assemble import FlowModel
from flowray.probes.untouched import holding
from flowray.train.optim import delta_rms
from flowray.train.sharding import whole
from flowray.train.state import TrainState


@dataclass(frozen=True)
class View:
    """`model` with the raw weights (`plain`) or with their EMA (`averaged`).

    frozen: what else has to be lent to the model, of a text model in parts.
    """

    model: FlowModel
    weights: dict[str, Tensor]
    average: dict[str, Tensor]
    frozen: dict[str, Tensor]

    def plain(self) -> AbstractContextManager[None]:
        """Within the block the model holds the raw weights."""
        return self._holding(self.weights)

    def averaged(self) -> AbstractContextManager[None]:
        """Within the block the model holds the EMA."""
        return self._holding(self.average)

    def _holding(self, values: dict[str, Tensor]) -> AbstractContextManager[None]:
        lent = {**self.frozen, **values}
        named = dict(self.model.named_parameters())
        return holding({name: named[name] for name in lent}, lent)

    def delta_rms(self) -> float:
        """Root mean square of average minus weights, over all parameters."""
        return delta_rms(self.average, self.weights)


def view_of(state: TrainState) -> View | None:
    """What is to be seen of a state. Where ranks hold parts every rank has to call it, and all but
    the lead get None: the lead's CPU takes both sets of weights, and its device one of them while
    the model holds it.

    A copy on the lead, and not a pass of all ranks through their parts: so probes stay in fp32
    where blocks are gathered in half precision, one that fails leaves no rank waiting, and the
    numbers are those of a run without parts.
    """
    weights: dict[str, Tensor] = {name: p.detach() for name, p in state.parameters.items()}
    average = state.ema.average
    if state.shards is None:
        return View(state.model, weights, average, {})
    model = state.shards.whole
    keep = model is not None
    backbone = state.model.text.backbone.named_parameters(prefix="text.backbone")
    parts = {name: p for name, p in backbone if isinstance(p, DTensor)}
    gathered = [whole(each, keep=keep) for each in (weights, average, parts)]
    return None if model is None else View(model, *gathered)
