"""What every velocity network is: velocities of one or more resolutions, and the pieces that the
networks share.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from flowray.config.model import TimeEmbeddingConfig
from flowray.model.layers import sinusoid, small_init
from flowray.model.text import TextTokens


class TokenBlocks(NamedTuple):
    """A network's blocks on tokens (B, N, width), one per patch x patch cells and in their
    order, after any others.
    """

    blocks: nn.ModuleList
    width: int
    patch: int


class VelocityNet(nn.Module):
    """u(x_t, time code, null, text). The last level has the latent's resolution and is the
    velocity; the ones before it only add losses.

    conditioned: it reads the caption's tokens, `text`, which else are left out.
    level_weights: the loss weight of every level, lowest resolution first; the last is 1.
    last_layers: a pattern of the names, inside the network, of the layers that make the velocities;
    they are its head.
    """

    conditioned: bool = False
    level_weights: tuple[float, ...] = (1.0,)
    last_layers: str

    def levels(
        self,
        x: Tensor,
        time_code: Tensor,
        null: Tensor,
        text: TextTokens | None = None,
        kept: Tensor | None = None,
    ) -> tuple[Tensor, ...]:
        """(B, C, H, W), (B,) in [-4, 4], (B,) bool, tokens of B captions -> velocities (B, C, H/k,
        W/k), lowest resolution first.

        kept: the places (B, K) of the tokens that do not go past the blocks of the network's route;
        none go past without. ValueError where a conditioned network is given no caption, or one
        without a route is given places.
        """
        raise NotImplementedError

    def forward(
        self, x: Tensor, time_code: Tensor, null: Tensor, text: TextTokens | None = None
    ) -> Tensor:
        """The velocity, (B, C, H, W)."""
        return self.levels(x, time_code, null, text)[-1]

    def token_blocks(self) -> TokenBlocks:
        """Where a loss on hidden tokens listens."""
        raise NotImplementedError

    def blocks_in_order(self) -> list[nn.Module]:
        """The blocks that hold most of the weights, as a forward pass calls them."""
        return list(self.token_blocks().blocks)

    def compile_blocks(self) -> None:
        """Compile the blocks on tokens, one graph that serves them all, for training steps alone:
        probes and samples have other shapes, each of which would be compiled.
        """
        for block in self.token_blocks().blocks:
            block.forward = _compiled_in_training(block)

    @contextmanager
    def compiled(self) -> Iterator[None]:
        """A Python block in which the blocks on tokens run compiled, for sampling: a graph for the
        first batch, one more that serves all other sizes.
        """
        kept = [(block, vars(block).pop("forward", None)) for block in self.token_blocks().blocks]
        try:
            for block, _ in kept:  # torch finds the graphs of an earlier time again
                block.forward = torch.compile(block.forward, fullgraph=True)
            yield
        finally:
            for block, before in kept:
                vars(block).pop("forward", None)
                if before is not None:
                    block.forward = before


def checked(time_code: Tensor) -> Tensor:
    """The time code as it is; ValueError unless it is one number per sample."""
    if time_code.ndim != 1:
        raise ValueError(f"the time code must be 1-D (B,), got shape {tuple(time_code.shape)}")
    return time_code


def refuse_route(kept: Tensor | None) -> None:
    """ValueError where a network without a route is given places to keep."""
    if kept is not None:
        raise ValueError("this velocity network has no route: every token goes through every block")


def time_of(code: Tensor) -> Tensor:
    """t in [0, 1] of time codes 4 - 8 t."""
    return 0.5 - code / 8


def code_of(t: Tensor) -> Tensor:
    """The time codes of t in [0, 1]."""
    return 4 - 8 * t.float()


class TimeEmbedding(nn.Module):
    """Bounded embedding of the 1-D time code: sinusoid, MLP, then LayerNorm or a small last
    layer so that its amplitude stays bounded.
    """

    def __init__(self, config: TimeEmbeddingConfig, width: int):
        super().__init__()
        self.config = config
        self.mlp = nn.Sequential(
            nn.Linear(config.frequencies, width), nn.SiLU(), nn.Linear(width, width)
        )
        self.norm = nn.LayerNorm(width) if config.bound == "layer_norm" else nn.Identity()
        if config.bound == "small_init":
            for layer in self.mlp:
                if isinstance(layer, nn.Linear):
                    small_init(layer)

    def forward(self, time_code: Tensor) -> Tensor:
        """(B,) in [-4, 4] -> (B, width)."""
        code = checked(time_code)
        # The sinusoid's frequencies lie in [1e-4, 1]: stretch [-4, 4] so that the fastest turns
        # many times.
        value = code * 25.0 if self.config.of == "time_code" else time_of(code)
        return self.norm(self.mlp(sinusoid(value, self.config.frequencies)))


def _compiled_in_training(block: nn.Module) -> Callable[..., Tensor]:
    eager = block.forward
    compiled = torch.compile(eager, fullgraph=True, dynamic=False)

    def forward(*inputs: Tensor) -> Tensor:
        made: Tensor = (compiled if block.training and torch.is_grad_enabled() else eager)(*inputs)
        return made

    return forward


def run_block(block: nn.Module, *inputs: Tensor, again: bool) -> Tensor:
    """block(*inputs); with `again` its inner activations are computed anew in the backward pass
    instead of kept.
    """
    call: Callable[..., Tensor] = block
    if again and torch.is_grad_enabled():
        # no block here draws random numbers
        return checkpoint(call, *inputs, use_reentrant=False, preserve_rng_state=False)
    return call(*inputs)
