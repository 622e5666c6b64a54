"""DiMR: a velocity network of several resolutions (Liu et al., arXiv 2406.09416, as CrossFlow
trains it).

A transformer stage at the lowest resolution, ConvNeXt stages above it, each twice as fine; every
stage reads x_t by patches of its own size and predicts a velocity of its own resolution. Time
enters through the norms alone, the null indicator as one token.
"""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from flowray.config.base import LatentSpec
from flowray.config.model import DiMRVelocity
from flowray.model.condition import CaptionAttention, CaptionTokens, told
from flowray.model.layers import attention, resized
from flowray.model.levels import TokenBlocks, VelocityNet, checked, refuse_route, run_block
from flowray.model.text import TextTokens


class TimeVector(nn.Module):
    """A vector that depends on tau = time code / 4: p1 + sigmoid(w tau + b) (p0 - p1), each of
    size (width,); at first `start`.
    """

    def __init__(self, width: int, start: float):
        super().__init__()
        self.p0, self.p1 = (
            nn.Parameter(torch.full((width,), start)),
            nn.Parameter(torch.full((width,), start)),
        )
        self.w, self.b = nn.Parameter(torch.ones(width)), nn.Parameter(torch.zeros(width))

    def forward(self, tau: Tensor, like: Tensor) -> Tensor:
        """tau (B,) -> (B, 1, ..., 1, width), with as many dims as `like`."""
        moved: Tensor = self.p1 + torch.sigmoid(tau[:, None] * self.w + self.b) * (
            self.p0 - self.p1
        )
        return moved.view(len(tau), *[1] * (like.ndim - 2), -1)


class TDRMSNorm(nn.Module):
    """RMS norm with a time-dependent scale."""

    EPS = 1e-6

    def __init__(self, width: int):
        super().__init__()
        self.scale = TimeVector(width, 1.0)

    def forward(self, x: Tensor, tau: Tensor) -> Tensor:
        """x (B, ..., width), tau (B,) -> x's shape, fp32."""
        wide = x.float()
        normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.EPS)
        return normed * self.scale(tau, x)


class TDLayerNorm(nn.Module):
    """LayerNorm with a time-dependent scale and shift; the norms between the stages and before
    the velocities are of this kind.
    """

    EPS = 1e-5

    def __init__(self, width: int):
        super().__init__()
        self.scale, self.shift = TimeVector(width, 1.0), TimeVector(width, 0.0)

    def forward(self, x: Tensor, tau: Tensor) -> Tensor:
        """x (B, ..., width), tau (B,) -> x's shape, fp32."""
        normed = F.layer_norm(x.float(), x.shape[-1:], eps=self.EPS)
        return normed * self.scale(tau, x) + self.shift(tau, x)


class GatedMLP(nn.Module):
    """Time-dependent norm, then (GELU(w0 x) * w1 x) w2."""

    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.norm = TDRMSNorm(width)
        self.w0, self.w1, self.w2 = (
            nn.Linear(width, hidden),
            nn.Linear(width, hidden),
            nn.Linear(hidden, width),
        )

    def forward(self, x: Tensor, tau: Tensor) -> Tensor:
        x = self.norm(x, tau)
        return self.w2(F.gelu(self.w0(x)) * self.w1(x))


class TransformerBlock(nn.Module):
    """Self-attention and gated MLP on tokens (B, N, width), pre-norm. reads: between them it reads
    the caption's tokens.
    """

    def __init__(self, width: int, hidden: int, heads: int, *, reads: bool = False):
        super().__init__()
        self.heads = heads
        self.norm = TDRMSNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width)
        self.mlp = GatedMLP(width, hidden)
        self.caption = CaptionAttention(width, heads) if reads else None

    def forward(self, x: Tensor, tau: Tensor, *caption: Tensor) -> Tensor:
        query, key, value = self.qkv(self.norm(x, tau)).chunk(3, dim=-1)
        x = x + self.out(attention(query, key, value, self.heads))
        if self.caption is not None:
            x = x + self.caption(x, *caption)
        return x + self.mlp(x, tau)


class ConvNeXtBlock(nn.Module):
    """Depthwise convolution and gated MLP on an image (B, H, W, width)."""

    def __init__(self, width: int, hidden: int, kernel: int):
        super().__init__()
        self.depthwise = nn.Conv2d(width, width, kernel, padding=kernel // 2, groups=width)
        self.mlp = GatedMLP(width, hidden)

    def forward(self, x: Tensor, tau: Tensor) -> Tensor:
        x = x + self.depthwise(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        return x + self.mlp(x, tau)


class NullToken(nn.Module):
    """One token (B, 1, width) that says whether a sample is null: a learned scalar each, at first
    -1 null and 1 not, over all channels.

    An RMS norm leaves such a token its sign; a LayerNorm would make nothing of it.
    """

    def __init__(self, width: int):
        super().__init__()
        self.width = width
        self.value = nn.Parameter(torch.tensor([1.0, -1.0]))

    def forward(self, null: Tensor) -> Tensor:
        return self.value[null.long()][:, None, None].expand(-1, 1, self.width)


class Upsample(nn.Module):
    """All states of the stage below, (B, h, w, below) -> (B, 2h, 2w, width): norm, linear pixel
    shuffle, norm.
    """

    def __init__(self, below: int, width: int):
        super().__init__()
        self.norm_in, self.norm_out = TDLayerNorm(below), TDLayerNorm(width)
        self.linear = nn.Linear(below, 4 * width)

    def forward(self, states: Tensor, tau: Tensor) -> Tensor:
        pixels = self.linear(self.norm_in(states, tau))
        return self.norm_out(rearrange(pixels, "b h w (p q d) -> b (h p) (w q) d", p=2, q=2), tau)


class Stage(nn.Module):
    """One resolution: patches in, a U of blocks (half in, one in the middle, half out with long
    skips), a velocity out.

    below: width of the lower stage's states; None for the lowest stage, which is the transformer
    and takes the null token.
    """

    def __init__(
        self,
        config: DiMRVelocity,
        level: int,
        latent: LatentSpec,
        below: int | None,
        text_width: int,
    ):
        super().__init__()
        reads = below is None and config.condition.kind == "cross_attention"
        width, depth, self.patch = config.widths[level], config.depths[level], config.patch >> level
        self.again = config.gradient_checkpointing
        hidden = int(width * config.mlp_ratio)
        self.patch_in = nn.Linear(latent.channels * self.patch**2, width)
        self.positions = nn.Parameter(
            torch.randn(latent.height // self.patch, latent.width // self.patch, width) * 0.02
        )
        self.upsample = None if below is None else Upsample(below, width)
        self.null = NullToken(width) if below is None else None
        self.blocks = nn.ModuleList(
            TransformerBlock(width, hidden, config.heads, reads=reads)
            if below is None
            else ConvNeXtBlock(width, hidden, config.kernel)
            for _ in range(depth)
        )
        self.caption = CaptionTokens(text_width, width) if reads else None
        self.skips = nn.ModuleList(nn.Linear(2 * width, width) for _ in range(depth // 2))
        self.norm_out = TDLayerNorm(width)
        self.out = nn.Conv2d(width, latent.channels, 3, padding=1)
        for p in self.out.parameters():
            nn.init.zeros_(p)

    def forward(
        self,
        x: Tensor,
        tau: Tensor,
        null: Tensor,
        below: list[Tensor] | None,
        text: TextTokens | None = None,
    ) -> tuple[Tensor, list[Tensor]]:
        """x (B, C, H, W) -> velocity (B, C, H/p, W/p) and all states, depth + 1 of (B, H/p, W/p,
        width); below: the lower stage's.
        """
        h = self.patch_in(
            rearrange(x, "b c (h p) (w q) -> b h w (c p q)", p=self.patch, q=self.patch)
        )
        rows, columns = h.shape[1:3]
        # learnt at the model's own size; for another one interpolated, as ViTs' tables are
        table = resized(self.positions.permute(2, 0, 1)[None], (rows, columns), "bicubic")
        h = h + table[0].permute(1, 2, 0)
        if self.upsample is not None and below is not None:
            h = h + self.upsample(torch.cat(below, dim=-1), tau)
        if self.null is not None:
            h = torch.cat([self.null(null).to(h.dtype), h.flatten(1, 2)], dim=1)
        caption = () if self.caption is None else self.caption(told(text), null)
        states = self._blocks(h, tau, *caption)
        if self.null is not None:
            states = [state[:, 1:].unflatten(1, (rows, columns)) for state in states]
        return self.out(self.norm_out(states[-1], tau).permute(0, 3, 1, 2)), states

    def _blocks(self, h: Tensor, tau: Tensor, *caption: Tensor) -> list[Tensor]:
        """The input and every block's output, in order."""
        half, states = len(self.blocks) // 2, [h]
        kept: list[Tensor] = []
        for index, block in enumerate(self.blocks):
            if index > half:
                h = self.skips[index - half - 1](torch.cat([h, kept.pop()], dim=-1))
            h = run_block(block, h, tau, *caption, again=self.again)
            states.append(h)
            if index < half:
                kept.append(h)
        return states


class DiMR(VelocityNet):
    """The stages, lowest resolution first: `transformer`, `convnext_1`, `convnext_2`, ..."""

    last_layers = r"(?:transformer|convnext_\d+)\.out"

    def __init__(self, config: DiMRVelocity, latent: LatentSpec, text_width: int):
        super().__init__()
        self.config, self.level_weights = config, config.level_weights
        self.conditioned = config.condition.kind != "none"
        below = None
        for level, (width, depth) in enumerate(zip(config.widths, config.depths, strict=True)):
            self.add_module(
                f"convnext_{level}" if level else "transformer",
                Stage(config, level, latent, below, text_width),
            )
            below = width * (depth + 1)

    def token_blocks(self) -> TokenBlocks:
        """The transformer stage's."""
        lowest = next(stage for stage in self.children() if isinstance(stage, Stage))
        return TokenBlocks(lowest.blocks, self.config.widths[0], self.config.patch)

    def blocks_in_order(self) -> list[nn.Module]:
        """Every stage's."""
        stages = (stage for stage in self.children() if isinstance(stage, Stage))
        return [block for stage in stages for block in stage.blocks]

    def levels(
        self,
        x: Tensor,
        time_code: Tensor,
        null: Tensor,
        text: TextTokens | None = None,
        kept: Tensor | None = None,
    ) -> tuple[Tensor, ...]:
        """Velocities (B, C, H/k, W/k), lowest resolution first, the last of the latent's shape."""
        refuse_route(kept)
        tau, states, velocities = checked(time_code).float() / 4, None, []
        for stage in self.children():
            velocity, states = stage(x, tau, null, states, text)
            velocities.append(velocity)
        return tuple(velocities)
