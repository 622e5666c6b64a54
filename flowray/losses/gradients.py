"""Each loss's own gradient of one forward pass, their Gramian, and the precision of that pass:
what training and its probes share.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Literal

import torch
from torch import Tensor, nn

from flowray.config.recipe import Recipe
from flowray.flow import expect

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
# what lies before z0 and every loss reaches, by the start of a parameter's name
SOURCE = ("text.", "head.")
Parameters = Mapping[str, nn.Parameter]


def autocast(recipe: Recipe, device: torch.device) -> AbstractContextManager[object]:
    """bf16 or fp16 autocast where the recipe asks for it; the weights, the path, the losses and
    the solver state stay fp32.
    """
    dtype = DTYPES.get(recipe.train.precision)
    return nullcontext() if dtype is None else torch.autocast(device.type, dtype)


@contextmanager
def products(recipe: Recipe) -> Iterator[None]:
    """A block in which a GPU multiplies fp32 numbers in TF32 (10 bits of mantissa, sums in fp32)
    where the recipe asks for it; every other processor as before.
    """
    kinds: tuple[Any, ...] = (torch.backends.cuda.matmul, torch.backends.cudnn)
    before = [kind.allow_tf32 for kind in kinds]
    for kind in kinds:
        kind.allow_tf32 |= recipe.train.precision == "tf32"
    try:
        yield
    finally:
        for kind, allowed in zip(kinds, before, strict=True):
            kind.allow_tf32 = allowed


def loss_gradients(
    losses: Sequence[Tensor], parameters: Sequence[nn.Parameter], into: Tensor | None = None
) -> Tensor:
    """Each loss's gradient as a row, (losses, numbers) fp32; zeros where a loss does not reach a
    parameter. `.grad` is not touched.

    into: rows to add them to, in place. Beside the rows it takes the memory of one gradient, and
    the last loss's graph is freed.
    """
    sizes = [p.numel() for p in parameters]
    rows = parameters[0].new_zeros(len(losses), sum(sizes)) if into is None else into
    for i, (loss, row) in enumerate(zip(losses, rows, strict=True)):
        pieces = torch.autograd.grad(
            loss, parameters, retain_graph=i + 1 < len(losses), allow_unused=True
        )
        for place, piece in zip(row.split(sizes), pieces, strict=True):
            if piece is not None:
                place += piece.detach().flatten()
        del pieces  # before the next loss's are made
    return rows


def blocks(gradients: Tensor, parameters: Parameters) -> dict[str, Tensor]:
    """The columns (..., numbers) of every parameter, by name. ValueError for another number."""
    sizes = [p.numel() for p in parameters.values()]
    expect.floating("gradients", gradients, "(..., numbers)")
    if gradients.shape[-1] != sum(sizes):
        wanted, got = sum(sizes), tuple(gradients.shape)
        raise ValueError(f"gradients: want {wanted} columns, as the parameters have, got {got}")
    return dict(zip(parameters, gradients.split(sizes, dim=-1), strict=True))


def gramian(gradients: Tensor, parameters: Parameters, over: Literal["all", "source"]) -> Tensor:
    """Inner products of the rows of `gradients`, (L, L) fp64 on the CPU, over all parameters or
    those of the `source` side.
    """
    expect.one_of("over", over, ("all", "source"))
    expect.floating("gradients", gradients, "(losses, numbers)", 2)
    total = gradients.new_zeros(len(gradients), len(gradients), dtype=torch.float64)
    for name, block in blocks(gradients, parameters).items():
        if over == "all" or name.startswith(SOURCE):
            total += (block @ block.T).double()
    return total.cpu()
