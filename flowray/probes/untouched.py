"""What lets a probe run the training path, and other weights, and leave everything as it was."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from flowray.model.assemble import FlowModel


@contextmanager
def untouched(model: FlowModel) -> Iterator[None]:
    """Within the block the model may be run in any mode; after it modes, RNG and the semantic
    networks' state are as before.

    The semantic networks are copied because a forward pass of theirs may write: the contrastive
    scale is capped in place. Gradients are the block's own affair: it takes them with
    `torch.autograd.grad`, which writes no `.grad`.
    """
    modes = [(module, module.training) for module in model.modules()]
    trained = [p for p in model.semantic.parameters() if p.requires_grad]
    held = [(x, x.detach().clone()) for x in (*trained, *model.semantic.buffers())]
    device = next(model.velocity.parameters()).device
    try:
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            yield
    finally:
        for module, mode in modes:
            module.training = mode
        with torch.no_grad():
            for x, before in held:
                if not torch.equal(x, before):
                    x.copy_(before)


@contextmanager
def holding(parameters: Mapping[str, nn.Parameter], values: Mapping[str, Tensor]) -> Iterator[None]:
    """Within the block the parameters hold `values`; after it, the very tensors that they held
    before.
    """
    before = {name: p.data for name, p in parameters.items()}
    try:
        for name, p in parameters.items():
            p.data = values[name].to(p.device, p.dtype)
        yield
    finally:
        for name, p in parameters.items():
            p.data = before[name]
