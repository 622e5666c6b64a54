"""Tokens that go past some blocks: which ones, and how they come back (TREAD, arXiv 2501.04765)."""

from __future__ import annotations

from torch import Tensor


def kept_places(noise: Tensor, count: int) -> Tensor:
    """`count` places of each sample, all as likely, rising: (B, count) int64.

    noise: independent numbers (B, N), no two of a sample alike. ValueError where a sample has fewer
    than `count`.
    """
    if not 0 < count <= noise.shape[1]:
        raise ValueError(f"count: want 1 to {noise.shape[1]}, got {count}")
    return noise.topk(count, dim=1).indices.sort(dim=1).values


def take(tokens: Tensor, places: Tensor) -> Tensor:
    """The tokens (B, N, width) at places (B, K) -> (B, K, width)."""
    return tokens.gather(1, _over_width(places, tokens))


def put_back(tokens: Tensor, places: Tensor, changed: Tensor) -> Tensor:
    """tokens (B, N, width) with those at places (B, K) replaced by `changed` (B, K, width); the
    others are as they were.
    """
    return tokens.scatter(1, _over_width(places, tokens), changed.to(tokens.dtype))


def _over_width(places: Tensor, tokens: Tensor) -> Tensor:
    return places[:, :, None].expand(-1, -1, tokens.shape[2])
