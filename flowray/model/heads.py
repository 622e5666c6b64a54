"""Heads: tokens (B, N, width) -> (mu, logvar), each of the latent's shape (B, C, H, W)."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from flowray.config.base import LatentSpec
from flowray.config.model import ConvHead, GridHead, HeadConfig, PooledHead, TransEncoderHead
from flowray.model.latent import LatentMap
from flowray.model.layers import attention, pool, positions_2d, small_init
from flowray.model.text import TextTokens
from flowray.model.transencoder import TransEncoder


class Pooled(nn.Module):
    """Pooled tokens through a 3-layer MLP."""

    def __init__(self, config: PooledHead, width: int, tokens: int, latent: LatentSpec):
        super().__init__()
        self.latent = latent
        sizes = [width] + [config.hidden] * (config.layers - 1)
        hidden = [m for a, b in pairwise(sizes) for m in (nn.Linear(a, b), nn.GELU())]
        self.net = nn.Sequential(
            nn.LayerNorm(width), *hidden, small_init(nn.Linear(sizes[-1], 2 * latent.dims))
        )

    def forward(self, tokens: TextTokens) -> tuple[Tensor, Tensor]:
        c, h, w = self.latent.shape
        mu, logvar = rearrange(
            self.net(pool(*tokens)), "b (two c h w) -> two b c h w", two=2, c=c, h=h, w=w
        )
        return mu, logvar


class GridLayer(nn.Module):
    """Cross-attention of the grid cells to the tokens, then an MLP; pre-norm."""

    def __init__(self, hidden: int, heads: int):
        super().__init__()
        self.heads = heads
        self.norm, self.norm_mlp = nn.LayerNorm(hidden), nn.LayerNorm(hidden)
        self.query, self.key_value = nn.Linear(hidden, hidden), nn.Linear(hidden, 2 * hidden)
        self.out = nn.Linear(hidden, hidden)
        self.mlp = nn.Sequential(
            nn.Linear(hidden, 2 * hidden), nn.GELU(), nn.Linear(2 * hidden, hidden)
        )

    def forward(self, cells: Tensor, tokens: Tensor, mask: Tensor) -> Tensor:
        key, value = self.key_value(tokens).chunk(2, dim=-1)
        cells = cells + self.out(
            attention(self.query(self.norm(cells)), key, value, self.heads, mask)
        )
        return cells + self.mlp(self.norm_mlp(cells))


class Grid(nn.Module):
    """A learnable query per latent cell, so that z0 has a place for every part of the picture."""

    def __init__(self, config: GridHead, width: int, tokens: int, latent: LatentSpec):
        super().__init__()
        self.latent = latent
        hidden = config.hidden
        self.embed = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, hidden))
        self.cells = nn.Parameter(torch.randn(latent.height * latent.width, hidden) * 0.02)
        self.positions: Tensor
        self.register_buffer(
            "positions", positions_2d(latent.height, latent.width, hidden), persistent=False
        )
        self.layers = nn.ModuleList(GridLayer(hidden, config.heads) for _ in range(config.layers))
        self.convs = nn.ModuleList(
            nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden) for _ in range(config.convs)
        )
        self.out = nn.Sequential(
            nn.LayerNorm(hidden), small_init(nn.Linear(hidden, 2 * latent.channels))
        )

    def forward(self, tokens: TextTokens) -> tuple[Tensor, Tensor]:
        h, w = self.latent.height, self.latent.width
        text = self.embed(tokens.values)
        cells = (self.cells + self.positions).expand(len(text), -1, -1)
        for layer in self.layers:
            cells = layer(cells, text, tokens.mask)
        image = rearrange(cells, "b (h w) d -> b d h w", h=h, w=w)
        for conv in self.convs:
            image = image + F.gelu(conv(image))
        mu, logvar = rearrange(
            self.out(rearrange(image, "b d h w -> b h w d")), "b h w (two c) -> two b c h w", two=2
        )
        return mu, logvar


class Conv(nn.Module):
    """Pooled tokens -> MLP -> (hidden, H, W) -> 3x3 convolutions with group norm."""

    def __init__(self, config: ConvHead, width: int, tokens: int, latent: LatentSpec):
        super().__init__()
        self.latent, self.hidden = latent, config.hidden
        cells = config.hidden * latent.height * latent.width
        self.mlp = nn.Sequential(
            nn.LayerNorm(width),
            nn.Linear(width, config.mlp),
            nn.GELU(),
            nn.Linear(config.mlp, cells),
        )
        self.convs = nn.ModuleList(
            nn.Sequential(
                nn.GroupNorm(1, config.hidden),
                nn.Conv2d(config.hidden, config.hidden, 3, padding=1),
                nn.GELU(),
            )
            for _ in range(config.layers)
        )
        self.out = small_init(nn.Conv2d(config.hidden, 2 * latent.channels, 3, padding=1))

    def forward(self, tokens: TextTokens) -> tuple[Tensor, Tensor]:
        image = self.mlp(pool(*tokens)).unflatten(
            1, (self.hidden, self.latent.height, self.latent.width)
        )
        for conv in self.convs:
            image = image + conv(image)
        mu, logvar = self.out(image).chunk(2, dim=1)
        return mu, logvar


class Mapped(nn.Module):
    """A head whose own shape is not the latent's, and the map between them."""

    def __init__(self, head: nn.Module, made: LatentSpec, latent: LatentSpec):
        super().__init__()
        self.head, self.map = head, LatentMap(made, latent)

    def forward(self, tokens: TextTokens) -> tuple[Tensor, Tensor]:
        return self.map(*self.head(tokens))


_HEADS: dict[type, Callable[[Any, int, int, LatentSpec], nn.Module]] = {
    PooledHead: Pooled,
    GridHead: Grid,
    ConvHead: Conv,
    TransEncoderHead: TransEncoder,
}


def build_head(config: HeadConfig, width: int, tokens: int, latent: LatentSpec) -> nn.Module:
    """The head of a config, reading at most `tokens` tokens of `width`; it makes the latent's
    shape, whatever `config.shape`.
    """
    made = config.shape or latent
    head = _HEADS[type(config)](config, width, tokens, made)
    return head if made == latent else Mapped(head, made, latent)
