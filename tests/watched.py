"""What the doctor may not change, and which code runs while it looks."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import CodeType, FrameType

import numpy as np
import torch
from torch import Tensor

import flowray.probes
from flowray.model.autoencoder import Autoencoder
from flowray.train.state import TrainState


def snapshot(state: TrainState, autoencoder: Autoencoder) -> dict[str, Tensor]:
    """Everything that a probe could change, as copies."""
    model, nets = state.model, (state.model, autoencoder.net)
    tensors = {
        f"{i} {name}": x
        for i, net in enumerate(nets)
        for name, x in (*net.named_parameters(), *net.named_buffers())
    }
    modules = [module for net in nets for module in net.modules()]
    slots = {name: state.optimizer.state[p] for name, p in state.parameters.items()}
    numpy_rng = np.asarray(np.random.get_state()[1])  # type: ignore[index]
    kept = {
        **{f"tensor {name}": x.detach() for name, x in tensors.items()},
        **{f"grad {name}": p.grad for name, p in state.parameters.items() if p.grad is not None},
        **{
            f"optimiser {name}/{slot}": x
            for name, held in slots.items()
            for slot, x in held.items()
        },
        **{f"EMA {name}": x for name, x in state.ema.average.items()},
        "requires_grad": torch.tensor([x.requires_grad for x in tensors.values()]),
        "modes": torch.tensor([module.training for module in modules]),
        "hooks": torch.tensor([len(module._forward_hooks) for module in modules]),
        "lr": torch.tensor([group["lr"] for group in state.optimizer.param_groups]),
        "grad enabled": torch.tensor(torch.is_grad_enabled()),
        "torch RNG": torch.get_rng_state(),
        "numpy RNG": torch.from_numpy(numpy_rng.astype(np.int64)),
        "python RNG": torch.tensor(random.getstate()[1]),
    }
    assert model.semantic.dino is not None
    assert model.semantic.dino._seen == []
    assert "levels" not in vars(model.velocity)
    return {name: x.clone() for name, x in kept.items()}


def public_probes() -> dict[str, CodeType]:
    """Every public function of flowray.probes by name."""
    found = {}
    for info in pkgutil.iter_modules(flowray.probes.__path__):
        module = importlib.import_module(f"flowray.probes.{info.name}")
        for name, value in vars(module).items():
            if (
                inspect.isfunction(value)
                and value.__module__ == module.__name__
                and not name.startswith("_")
            ):
                found[f"{info.name}.{name}"] = inspect.unwrap(value).__code__
    return found


@contextmanager
def recorded() -> Iterator[set[CodeType]]:
    """Within the block, the set receives the code of every Python function that runs."""
    ran: set[CodeType] = set()

    def note(frame: FrameType, event: str, arg: object) -> None:
        if event == "call":
            ran.add(frame.f_code)

    before = sys.getprofile()
    sys.setprofile(note)
    try:
        yield ran
    finally:
        sys.setprofile(before)
