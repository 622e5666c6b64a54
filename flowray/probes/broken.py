"""What was not finite in a forward pass."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from flowray.losses.terms import Forward
from flowray.losses.total import Batch


@contextmanager
def first_bad_module(model: nn.Module) -> Iterator[list[str]]:
    """Within the block, the list receives the names of modules whose output is not finite, in
    the order in which they ran.
    """
    bad: list[str] = []

    def listen(name: str) -> Any:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            if isinstance(output, Tensor) and not bool(output.isfinite().all()):
                bad.append(name)

        return hook

    leaves = [
        (name, module)
        for name, module in model.named_modules()
        if not any(True for _ in module.children())
    ]
    hooks = [module.register_forward_hook(listen(name)) for name, module in leaves]
    try:
        yield bad
    finally:
        for hook in hooks:
            hook.remove()


def broken_rows(forward: Forward, batch: Batch) -> list[int]:
    """The samples of a batch whose latents or velocity are not finite; none where all are: then no
    sample is to blame.
    """
    whole = [
        x.detach().flatten(1).isfinite().all(dim=1)
        for x in (forward.z0, batch.z1, batch.target, forward.v_pred)
    ]
    broken: list[int] = (~torch.stack(whole).all(dim=0)).nonzero().flatten().tolist()
    return broken if len(broken) < len(batch.t) else []
