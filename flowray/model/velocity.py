"""Velocity networks u(x_t, time code, null): (B, C, H, W), (B,), (B,) bool -> (B, C, H, W)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from einops import rearrange
from torch import Tensor, nn

from flowray.config.base import LatentSpec
from flowray.config.model import DiTVelocity, VelocityConfig
from flowray.model.layers import attention, positions_2d, sinusoid


class TimeEmbedding(nn.Module):
    """Bounded embedding of the 1-D time code: sinusoid, MLP, LayerNorm (the logs warn of its amplitude)."""

    FREQUENCIES = 128

    def __init__(self, width: int):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(self.FREQUENCIES, width), nn.SiLU(), nn.Linear(width, width))
        self.norm = nn.LayerNorm(width)

    def forward(self, time_code: Tensor) -> Tensor:
        """(B,) in [-4, 4] -> (B, width)."""
        if time_code.ndim != 1:
            raise ValueError(f"the time code must be 1-D (B,), got shape {tuple(time_code.shape)}")
        # The sinusoid's frequencies lie in [1e-4, 1]: stretch [-4, 4] so that the fastest turns many times.
        return self.norm(self.mlp(sinusoid(time_code * 25.0, self.FREQUENCIES)))


class DiTBlock(nn.Module):
    """Transformer block whose shifts, scales and gates come from the condition; the gates start at zero (adaLN-zero)."""

    def __init__(self, width: int, heads: int, mlp_ratio: float):
        super().__init__()
        self.heads = heads
        self.norm_attention = nn.LayerNorm(width, elementwise_affine=False)
        self.norm_mlp = nn.LayerNorm(width, elementwise_affine=False)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        hidden = int(width * mlp_ratio)
        self.mlp = nn.Sequential(nn.Linear(width, hidden), nn.GELU(approximate="tanh"), nn.Linear(hidden, width))
        self.modulation = zero_init(nn.Linear(width, 6 * width))

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = self.modulation(condition).unsqueeze(1).chunk(6, dim=-1)
        query, key, value = self.qkv(self.norm_attention(x) * (1 + scale_a) + shift_a).chunk(3, dim=-1)
        x = x + gate_a * self.out(attention(query, key, value, self.heads))
        return x + gate_m * self.mlp(self.norm_mlp(x) * (1 + scale_m) + shift_m)


def zero_init(layer: nn.Linear) -> nn.Linear:
    """Weights and bias at zero, so that the layer starts as nothing."""
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


class DiT(nn.Module):
    """Diffusion transformer on latent patches (arXiv 2212.09748), conditioned on the time code and the null indicator alone.

    The caption is in x itself: x starts as the text latent.
    """

    def __init__(self, config: DiTVelocity, latent: LatentSpec):
        super().__init__()
        self.config, self.latent = config, latent
        rows, columns = latent.height // config.patch, latent.width // config.patch
        self.patch_in = nn.Linear(latent.channels * config.patch**2, config.width)
        self.positions: Tensor
        self.register_buffer("positions", positions_2d(rows, columns, config.width), persistent=False)
        self.time = TimeEmbedding(config.width)
        self.null = nn.Embedding(2, config.width)
        nn.init.normal_(self.null.weight, std=0.02)
        self.blocks = nn.ModuleList(DiTBlock(config.width, config.heads, config.mlp_ratio) for _ in range(config.depth))
        self.norm = nn.LayerNorm(config.width, elementwise_affine=False)
        self.modulation = zero_init(nn.Linear(config.width, 2 * config.width))
        self.patch_out = zero_init(nn.Linear(config.width, latent.channels * config.patch**2))

    def forward(self, x: Tensor, time_code: Tensor, null: Tensor) -> Tensor:
        p, rows = self.config.patch, self.latent.height // self.config.patch
        tokens = self.patch_in(rearrange(x, "b c (h p) (w q) -> b (h w) (c p q)", p=p, q=p)) + self.positions
        condition = nn.functional.silu(self.time(time_code) + self.null(null.long()))
        for block in self.blocks:
            tokens = block(tokens, condition)
        shift, scale = self.modulation(condition).unsqueeze(1).chunk(2, dim=-1)
        patches = self.patch_out(self.norm(tokens) * (1 + scale) + shift)
        return rearrange(patches, "b (h w) (c p q) -> b c (h p) (w q)", h=rows, p=p, q=p)


_VELOCITIES: dict[type, Callable[[Any, LatentSpec], nn.Module]] = {DiTVelocity: DiT}


def build_velocity(config: VelocityConfig, latent: LatentSpec) -> nn.Module:
    """The velocity network of a config."""
    return _VELOCITIES[type(config)](config, latent)


def count_parameters(module: nn.Module) -> int:
    """Parameters of a module, trainable or not."""
    return sum(p.numel() for p in module.parameters())
