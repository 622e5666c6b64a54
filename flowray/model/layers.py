"""Small pieces that heads and velocity networks share."""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional as F


def attention(query: Tensor, key: Tensor, value: Tensor, heads: int, mask: Tensor | None = None) -> Tensor:
    """Multi-head attention: query (B, N, D), key and value (B, M, D) -> (B, N, D); mask (B, M) bool, True = may be read."""
    q, k, v = (rearrange(x, "b n (h d) -> b h n d", h=heads) for x in (query, key, value))
    attended = F.scaled_dot_product_attention(q, k, v, attn_mask=None if mask is None else mask[:, None, None, :])
    return rearrange(attended, "b h n d -> b n (h d)")


def sinusoid(values: Tensor, dim: int, max_period: float = 10_000.0) -> Tensor:
    """Cosines and sines (N, dim) of values (N,) at geometric frequencies 1 to 1 / max_period."""
    frequencies = torch.exp(-torch.arange(dim // 2, device=values.device).float() * (torch.log(torch.tensor(max_period)) / (dim // 2)))
    angles = values.float()[:, None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


def positions_2d(height: int, width: int, dim: int) -> Tensor:
    """Fixed 2-D sine-cosine positions (height * width, dim): half the dims for the row, half for the column."""
    rows = sinusoid(torch.arange(height).float(), dim // 2)
    columns = sinusoid(torch.arange(width).float(), dim // 2)
    grid = torch.cat([rows[:, None].expand(-1, width, -1), columns[None].expand(height, -1, -1)], dim=-1)
    return grid.reshape(height * width, dim)
