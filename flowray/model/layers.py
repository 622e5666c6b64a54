"""Small pieces that heads and velocity networks share."""

from __future__ import annotations

from typing import TypeVar

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

Layer = TypeVar("Layer", nn.Linear, nn.Conv2d)


def to_device(value: Tensor, device: torch.device) -> Tensor:
    """A tensor of the host on a device; the host does not wait for a GPU to have it."""
    if device.type != "cuda":
        return value.to(device)
    return value.pin_memory().to(device, non_blocking=True)


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    heads: int,
    mask: Tensor | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """Multi-head attention: query (B, N, D), key and value (B, M, D) -> (B, N, D); mask (B, M)
    bool, True = may be read.
    """
    q, k, v = (rearrange(x, "b n (h d) -> b h n d", h=heads) for x in (query, key, value))
    readable = None if mask is None else mask[:, None, None, :]
    if q.device.type == "cpu" and torch.is_autocast_enabled("cpu"):
        # the CPU's kernel takes ten times as long backward in half precision as in fp32
        with torch.autocast("cpu", enabled=False):
            full = q.float(), k.float(), v.float()
            attended = F.scaled_dot_product_attention(*full, attn_mask=readable, dropout_p=dropout)
    else:
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=readable, dropout_p=dropout)
    return rearrange(attended, "b h n d -> b n (h d)")


def pool(tokens: Tensor, mask: Tensor) -> Tensor:
    """Mean over the real tokens: (B, N, width), mask (B, N) bool -> (B, width)."""
    weight = mask.unsqueeze(-1).float()
    return (tokens * weight).sum(1) / weight.sum(1).clamp_min(1)


def sinusoid(values: Tensor, dim: int, max_period: float = 10_000.0) -> Tensor:
    """Cosines and sines (N, dim) of values (N,) at geometric frequencies 1 to 1 / max_period."""
    frequencies = torch.exp(
        -torch.arange(dim // 2, device=values.device).float()
        * (torch.log(torch.tensor(max_period)) / (dim // 2))
    )
    angles = values.float()[:, None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


def positions_2d(height: int, width: int, dim: int, device: torch.device | None = None) -> Tensor:
    """Fixed 2-D sine-cosine positions (height * width, dim): half the dims for the row, half for
    the column.
    """
    rows = sinusoid(torch.arange(height, device=device).float(), dim // 2)
    columns = sinusoid(torch.arange(width, device=device).float(), dim // 2)
    grid = torch.cat(
        [rows[:, None].expand(-1, width, -1), columns[None].expand(height, -1, -1)], dim=-1
    )
    return grid.reshape(height * width, dim)


def resized(x: Tensor, size: tuple[int, int], mode: str) -> Tensor:
    """Images (B, C, H, W) at another (height, width), interpolated, the outer edges aligned and not
    the outer cells' centres; those of that size as they are.
    """
    if x.shape[2:] == size:
        return x
    return F.interpolate(x.float(), size, mode=mode, align_corners=False)


def small_init(layer: Layer, std: float = 0.02) -> Layer:
    """Small weights and no bias: outputs near 0, so that a head starts at the prior (mu = 0,
    logvar = 0).
    """
    nn.init.normal_(layer.weight, std=std)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
    return layer


def zero_init(layer: nn.Linear) -> nn.Linear:
    """Weights and bias at zero, so that the layer starts as nothing."""
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


def boxes(x: Tensor, k: int) -> Tensor:
    """Sums over k x k boxes divided by k, (B, C, H, W) -> (B, C, H/k, W/k): white noise keeps its
    variance (DiMR).
    """
    return F.avg_pool2d(x, k) * k


class ConvAdaptor(nn.Module):
    """A flat vector (B, features) -> (B, C, H, W): two linear layers to `planes` images, then
    three convolutions (CrossFlow).
    """

    def __init__(self, features: int, hidden: int, shape: tuple[int, int, int], planes: int = 1):
        super().__init__()
        channels, height, width = shape
        cells = planes * height * width
        self.linear = nn.Sequential(
            nn.Linear(features, hidden),
            nn.LayerNorm(hidden),
            nn.ReLU(),
            nn.Linear(hidden, cells),
            nn.LayerNorm(cells),
            nn.ReLU(),
        )
        self.convs = nn.Sequential(
            nn.Unflatten(1, (planes, height, width)),
            nn.Conv2d(planes, 32, 3, padding=1),
            nn.LayerNorm([32, height, width]),
            nn.ReLU(),
            nn.Conv2d(32, 64, 3, padding=1),
            nn.LayerNorm([64, height, width]),
            nn.ReLU(),
        )
        self.last = nn.Conv2d(64, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.convs(self.linear(x)))
