"""The connector: trainable bidirectional layers between a frozen text model and what reads its
tokens (OpenUni, arXiv 2505.23661).

No position table: meta queries are told apart by what they learnt, an encoder's tokens by the
encoder's own positions.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from flowray.config.model import ConnectorConfig
from flowray.model.layers import attention

EPS = 1e-6


class ConnectorLayer(nn.Module):
    """Pre-norm self-attention and MLP, as in SigLIP's encoder or in Qwen2's layers without their
    causal mask.
    """

    def __init__(self, config: ConnectorConfig):
        super().__init__()
        hidden, inner, self.heads = config.hidden, config.intermediate, config.heads
        self.gated = config.style == "qwen2"
        norm = nn.RMSNorm if self.gated else nn.LayerNorm
        bias = not self.gated
        self.norm_attention, self.norm_mlp = norm(hidden, eps=EPS), norm(hidden, eps=EPS)
        self.qkv, self.out = nn.Linear(hidden, 3 * hidden), nn.Linear(hidden, hidden, bias=bias)
        head = hidden // config.heads
        self.norm_q, self.norm_k = (
            norm(head, eps=EPS) if config.qk_norm else nn.Identity() for _ in range(2)
        )
        self.up, self.down = (
            nn.Linear(hidden, inner * (2 if self.gated else 1), bias=bias),
            nn.Linear(inner, hidden, bias=bias),
        )

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        query, key, value = self.qkv(self.norm_attention(x)).chunk(3, dim=-1)
        query, key = (
            norm(t.unflatten(-1, (self.heads, -1))).flatten(-2)
            for norm, t in ((self.norm_q, query), (self.norm_k, key))
        )
        x = x + self.out(attention(query, key, value, self.heads, mask))
        inner = self.up(self.norm_mlp(x))
        if self.gated:
            gate, inner = inner.chunk(2, dim=-1)
            return x + self.down(F.silu(gate) * inner)
        return x + self.down(F.gelu(inner, approximate="tanh"))


class Connector(nn.Module):
    """Tokens (B, N, width) and mask (B, N) bool -> (B, N, out); every token reads every other that
    the mask has.

    A linear brings tokens of another width to `hidden` first.
    """

    def __init__(self, config: ConnectorConfig, width: int):
        super().__init__()
        self.enter = nn.Identity() if width == config.hidden else nn.Linear(width, config.hidden)
        self.layers = nn.ModuleList(ConnectorLayer(config) for _ in range(config.layers))
        self.leave = nn.Linear(config.hidden, config.out)
        self.reset()

    @torch.no_grad()
    def reset(self) -> None:
        """Draw all weights anew from the global RNG: Xavier-uniform matrices, zero biases, unit
        norms.
        """
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, nn.LayerNorm | nn.RMSNorm):
                module.reset_parameters()

    def forward(self, tokens: Tensor, mask: Tensor) -> Tensor:
        x = self.enter(tokens)
        for layer in self.layers:
            x = layer(x, mask)
        return self.leave(x)
