"""How a velocity network reads the caption beside x_t: pooled tokens for adaLN, or all of them by
cross-attention.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from flowray.model.layers import attention, pool, zero_init
from flowray.model.text import TextTokens


def told(text: TextTokens | None) -> TextTokens:
    """The tokens as they are; ValueError where there are none."""
    if text is None:
        raise ValueError("this velocity network reads the caption: give it the text tokens")
    return text


class PooledCaption(nn.Module):
    """Pooled tokens -> (B, width), to be added to the time's embedding; 0 where null.

    The LayerNorm makes tokens of any text model alike in size.
    """

    def __init__(self, text_width: int, width: int):
        super().__init__()
        self.net = nn.Sequential(
            nn.LayerNorm(text_width),
            nn.Linear(text_width, width),
            nn.SiLU(),
            nn.Linear(width, width),
        )

    def forward(self, text: TextTokens, null: Tensor) -> Tensor:
        """values (B, N, text_width), mask (B, N), null (B,) bool -> (B, width)."""
        made: Tensor = self.net(pool(*text))
        return made.masked_fill(null[:, None], 0.0)


class CaptionTokens(nn.Module):
    """All tokens in the network's width; of a null sample each is the same learnt token."""

    def __init__(self, text_width: int, width: int):
        super().__init__()
        self.embed = nn.Sequential(nn.LayerNorm(text_width), nn.Linear(text_width, width))
        self.null = nn.Parameter(torch.randn(width) * 0.02)

    def forward(self, text: TextTokens, null: Tensor) -> tuple[Tensor, Tensor]:
        """values (B, N, text_width), mask (B, N), null (B,) bool -> (B, N, width) and the mask."""
        embedded: Tensor = self.embed(text.values)
        known = torch.where(null[:, None, None], self.null.to(embedded.dtype), embedded)
        return known, text.mask


class CaptionAttention(nn.Module):
    """What a block's tokens read of the caption's; nothing at first (a zero last layer)."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(width)
        self.query, self.key_value = nn.Linear(width, width), nn.Linear(width, 2 * width)
        self.out = zero_init(nn.Linear(width, width))

    def forward(self, x: Tensor, caption: Tensor, mask: Tensor) -> Tensor:
        """x (B, N, width), caption (B, M, width), mask (B, M) bool -> (B, N, width)."""
        key, value = self.key_value(caption).chunk(2, dim=-1)
        read: Tensor = self.out(attention(self.query(self.norm(x)), key, value, self.heads, mask))
        return read
