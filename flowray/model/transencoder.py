"""CrossFlow's text variational encoder as a head: a transformer that narrows, then all tokens
flattened (arXiv 2412.15213).
"""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from flowray.config.base import LatentSpec
from flowray.config.errors import InputError
from flowray.config.model import TransEncoderHead
from flowray.model.layers import ConvAdaptor, attention, small_init
from flowray.model.text import TextTokens


class StdNorm(nn.Module):
    """(x - mean) / (std + 1e-5) over channels, with the unbiased std, then a gain and a bias;
    not quite nn.LayerNorm.
    """

    EPS = 1e-5

    def __init__(self, width: int):
        super().__init__()
        self.gain, self.bias = nn.Parameter(torch.ones(width)), nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        return (
            self.gain
            * (wide - wide.mean(-1, keepdim=True))
            / (wide.std(-1, keepdim=True) + self.EPS)
            + self.bias
        )


class PostNormLayer(nn.Module):
    """Self-attention and a ReLU MLP, each added and then normed; `narrow` ends it with a linear
    to half the width.
    """

    def __init__(self, width: int, config: TransEncoderHead, *, narrow: bool):
        super().__init__()
        self.heads, self.dropout = config.heads, config.dropout
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(
            nn.Linear(width, config.ffn),
            nn.ReLU(),
            nn.Dropout(config.dropout),
            nn.Linear(config.ffn, width),
        )
        self.norm_attention, self.norm_mlp = StdNorm(width), StdNorm(width)
        self.narrow = nn.Linear(width, width // 2) if narrow else nn.Identity()

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        query, key, value = self.qkv(x).chunk(3, dim=-1)
        dropout = self.dropout if self.training else 0.0
        x = self.norm_attention(
            x + self.out(attention(query, key, value, self.heads, mask, dropout))
        )
        return self.narrow(self.norm_mlp(x + self.mlp(x)))


class TransEncoder(nn.Module):
    """Tokens (B, N <= tokens, width) -> (mu, logvar), each (B, C, H, W).

    Positions beyond N and masked ones are zero where the tokens are flattened: nothing reads them,
    unless `read_padding` says so; no position attends to them in any case.
    """

    def __init__(self, config: TransEncoderHead, width: int, tokens: int, latent: LatentSpec):
        super().__init__()
        self.tokens, self.latent, self.reads = tokens, latent, config.read_padding
        start = config.compress or width
        narrowest = start >> (config.reductions - 1) if config.reductions else start
        if start % (1 << config.reductions) or narrowest % config.heads:
            raise InputError(
                f"model.head: {config.reductions} reductions halve the token width {start} to"
                f" {start / 2**config.reductions:g}, and {config.heads} heads must divide"
                f" {narrowest}; change reductions, heads or compress"
            )
        squeeze = (
            [nn.Linear(width, start), nn.LayerNorm(start), nn.ReLU(), nn.Linear(start, start)]
            if config.compress
            else []
        )
        self.compress = nn.Sequential(*squeeze)
        widths = [start] * config.layers + [start >> i for i in range(config.reductions)]
        self.layers = nn.ModuleList(
            PostNormLayer(w, config, narrow=i >= config.layers) for i, w in enumerate(widths)
        )
        flat = tokens * (start >> config.reductions)
        self.out: nn.Module
        if config.adaptor == "conv":
            self.out = ConvAdaptor(
                flat,
                config.hidden,
                (2 * latent.channels, latent.height, latent.width),
                config.planes,
            )
            small_init(self.out.last)
        else:
            self.out = nn.Sequential(
                small_init(nn.Linear(flat, 2 * latent.dims)),
                nn.Unflatten(1, (2 * latent.channels, *latent.shape[1:])),
            )

    def forward(self, tokens: TextTokens) -> tuple[Tensor, Tensor]:
        missing = self.tokens - tokens.values.shape[1]
        if missing < 0:
            raise ValueError(
                f"the head was built for {self.tokens} tokens, got {tokens.values.shape[1]}"
            )
        mask = F.pad(tokens.mask, (0, missing))
        keep = mask.unsqueeze(-1) | self.reads
        x = self.compress(F.pad(tokens.values, (0, 0, 0, missing)).masked_fill(~keep, 0.0))
        for layer in self.layers:
            x = layer(x, mask)
        both = self.out(rearrange(x.masked_fill(~keep, 0.0), "b n d -> b (n d)"))
        mu, logvar = both.chunk(2, dim=1)
        return mu, logvar
