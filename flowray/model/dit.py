"""Diffusion transformer on latent patches."""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor, nn

from flowray.config.base import LatentSpec
from flowray.config.model import DiTVelocity
from flowray.model.condition import CaptionAttention, CaptionTokens, PooledCaption, told
from flowray.model.layers import attention, positions_2d, zero_init
from flowray.model.levels import TimeEmbedding, TokenBlocks, VelocityNet, refuse_route, run_block
from flowray.model.routing import put_back, take
from flowray.model.text import TextTokens


class DiTBlock(nn.Module):
    """Transformer block whose shifts, scales and gates come from the condition; the gates start
    at zero (adaLN-zero). reads: between attention and MLP it reads the caption's tokens.
    """

    def __init__(self, width: int, heads: int, mlp_ratio: float, *, reads: bool = False):
        super().__init__()
        self.heads = heads
        self.norm_attention = nn.LayerNorm(width, elementwise_affine=False)
        self.norm_mlp = nn.LayerNorm(width, elementwise_affine=False)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        hidden = int(width * mlp_ratio)
        self.mlp = nn.Sequential(
            nn.Linear(width, hidden), nn.GELU(approximate="tanh"), nn.Linear(hidden, width)
        )
        self.modulation = zero_init(nn.Linear(width, 6 * width))
        self.caption = CaptionAttention(width, heads) if reads else None

    def forward(self, x: Tensor, condition: Tensor, *caption: Tensor) -> Tensor:
        """x (B, N, width), condition (B, width); caption: its tokens (B, M, width) and mask."""
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = (
            self.modulation(condition).unsqueeze(1).chunk(6, dim=-1)
        )
        query, key, value = self.qkv(self.norm_attention(x) * (1 + scale_a) + shift_a).chunk(
            3, dim=-1
        )
        x = x + gate_a * self.out(attention(query, key, value, self.heads))
        if self.caption is not None:
            x = x + self.caption(x, *caption)
        return x + gate_m * self.mlp(self.norm_mlp(x) * (1 + scale_m) + shift_m)


class DiT(VelocityNet):
    """Diffusion transformer (arXiv 2212.09748), conditioned on the time code, the null indicator
    and, where `condition` says so, on the caption, which may be in x itself: as the text latent.
    """

    last_layers = "patch_out"

    def __init__(self, config: DiTVelocity, latent: LatentSpec, text_width: int):
        super().__init__()
        self.config, kind = config, config.condition.kind
        self.conditioned = kind != "none"
        rows, columns = latent.height // config.patch, latent.width // config.patch
        self.patch_in = nn.Linear(latent.channels * config.patch**2, config.width)
        self._grid = rows, columns
        self.positions: Tensor
        self.register_buffer(
            "positions", positions_2d(rows, columns, config.width), persistent=False
        )
        self.time = TimeEmbedding(config.time, config.width)
        self.null = nn.Embedding(2, config.width)
        nn.init.normal_(self.null.weight, std=0.02)
        self.blocks = nn.ModuleList(
            DiTBlock(config.width, config.heads, config.mlp_ratio, reads=kind == "cross_attention")
            for _ in range(config.depth)
        )
        self.pooled = PooledCaption(text_width, config.width) if kind == "adaln" else None
        self.caption = (
            CaptionTokens(text_width, config.width) if kind == "cross_attention" else None
        )
        self.norm = nn.LayerNorm(config.width, elementwise_affine=False)
        self.modulation = zero_init(nn.Linear(config.width, 2 * config.width))
        self.patch_out = zero_init(nn.Linear(config.width, latent.channels * config.patch**2))

    def token_blocks(self) -> TokenBlocks:
        return TokenBlocks(self.blocks, self.config.width, self.config.patch)

    def _positions(self, rows: int, columns: int) -> Tensor:
        """Of another grid than the latent's own they are made as its own are: by row and column."""
        if (rows, columns) == self._grid:
            return self.positions
        return positions_2d(rows, columns, self.config.width, self.positions.device)

    def levels(
        self,
        x: Tensor,
        time_code: Tensor,
        null: Tensor,
        text: TextTokens | None = None,
        kept: Tensor | None = None,
    ) -> tuple[Tensor, ...]:
        """One velocity, of the shape of x, whose sides are multiples of the patch."""
        p = self.config.patch
        rows, columns = (side // p for side in x.shape[2:])
        tokens = self.patch_in(
            rearrange(x, "b c (h p) (w q) -> b (h w) (c p q)", p=p, q=p)
        ) + self._positions(rows, columns)
        condition, indicator = self.time(time_code), self.null(null.long())
        if self.config.indicator == "token":
            tokens = torch.cat([indicator[:, None].to(tokens.dtype), tokens], dim=1)
        else:
            condition = condition + indicator
        if self.pooled is not None:
            condition = condition + self.pooled(told(text), null)
        condition = nn.functional.silu(condition)
        caption = () if self.caption is None else self.caption(told(text), null)
        tokens = self._through_blocks(tokens, kept, condition, *caption)
        tokens = tokens[:, 1:] if self.config.indicator == "token" else tokens
        shift, scale = self.modulation(condition).unsqueeze(1).chunk(2, dim=-1)
        patches = self.patch_out(self.norm(tokens) * (1 + scale) + shift)
        return (rearrange(patches, "b (h w) (c p q) -> b c (h p) (w q)", h=rows, p=p, q=p),)

    def _through_blocks(self, tokens: Tensor, kept: Tensor | None, *given: Tensor) -> Tensor:
        """tokens (B, N, width), among them the indicator's where it is one; all of it, or with
        `kept` a part of it, through the blocks.
        """
        routed, whole = self.config.routed, tokens
        if not routed:
            refuse_route(kept)
        if kept is not None and self.config.indicator == "token":
            kept = torch.cat([torch.zeros_like(kept[:, :1]), kept + 1], dim=1)
        for number, block in enumerate(self.blocks):
            if kept is not None and number == routed[0]:
                whole, tokens = tokens, take(tokens, kept)
            tokens = run_block(block, tokens, *given, again=self.config.gradient_checkpointing)
            if kept is not None and number == routed[-1]:
                tokens = put_back(whole, kept, tokens)
        return tokens
