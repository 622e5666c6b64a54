"""Pictures against words that say how they must look: names of colours, and sides.

Channels in another order, negatives and mirrored pictures are seen, where captions have such words,
in English or Chinese.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import permutations

import numpy as np
import torch
from torch import Tensor

from flowray.probes.told import words_of

ENOUGH = 8  # captions that name a colour
COLOURS: Mapping[tuple[str, ...], tuple[int, int, int]] = {
    ("red", "红"): (210, 45, 45),
    ("green", "绿"): (40, 160, 60),
    ("blue", "蓝"): (40, 80, 210),
    ("yellow", "黄"): (245, 205, 40),
    ("purple", "violet", "紫"): (145, 60, 180),
    ("cyan", "turquoise", "青"): (60, 200, 210),
    ("orange", "橙"): (245, 140, 30),
    ("pink", "粉"): (250, 180, 200),
    ("brown", "棕", "褐"): (120, 75, 40),
    ("white", "白"): (245, 245, 245),
    ("black", "黑"): (15, 15, 15),
    ("gray", "grey", "灰"): (128, 128, 128),
}
# (words for the low end, for the high end) of x and of y; y grows downwards
SIDES: Mapping[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "across": (("left", "左"), ("right", "右")),
    "down": (("top", "顶"), ("bottom", "底")),
}
PLACED = 0.06  # of the picture's side: how far off the centre a thing is placed
_PAIRS = {"of", "to"}  # "left of", "to the left of": both sides have something


def _named(captions: Sequence[str], words: tuple[str, ...]) -> np.ndarray:
    return np.array([not set(words_of(caption)).isdisjoint(words) for caption in captions])


def _effects(has: np.ndarray, pictured: np.ndarray) -> np.ndarray:
    """What each word adds to the mean colour (words, 3), by ridge regression."""
    x, y = has - has.mean(0), pictured - pictured.mean(0)
    return np.linalg.solve(x.T @ x + np.eye(x.shape[1]), x.T @ y)


def _chroma(colours: np.ndarray) -> np.ndarray:
    """Without brightness, which is the same for every order of the channels."""
    return colours - colours.mean(1, keepdims=True)


def _cosine(a: np.ndarray, b: np.ndarray) -> float:
    return float((a * b).sum() / max(np.linalg.norm(a) * np.linalg.norm(b), 1e-12))


def colour_metrics(captions: Sequence[str], pictures: Tensor) -> dict[str, float]:
    """data/colour_*: do pictures (N, 3, H, W) in [-1, 1] of captions with a colour's name differ
    from others as the colour does.

    All without brightness. told: cosine of the two over all words; other: the best of the same
    with channels exchanged or colours inverted; z: how far the words' effect stands above that of
    shuffled captions, in standard deviations; chroma: mean difference of a pixel's channels, of 1.
    Empty where fewer than three colours, two of them no greys, are named often enough.
    """
    named = {words: _named(captions, words) for words in COLOURS}
    kept = [words for words, has in named.items() if ENOUGH <= has.sum() <= len(has) - ENOUGH]
    if len(kept) < 3 or sum(np.ptp(COLOURS[words]) > 50 for words in kept) < 2:
        return {}
    has = np.stack([named[words] for words in kept], axis=1).astype(np.float64)
    pixels = (pictures.float().cpu() + 1).clamp(0, 2) / 2
    mean = pixels.mean((2, 3)).double().numpy()
    effects = _effects(has, mean)
    wanted = np.array([COLOURS[words] for words in kept], dtype=np.float64) / 255
    weight, rng = np.sqrt(has.sum(0))[:, None], np.random.default_rng(0)
    seen = _chroma(effects) * weight
    wanted = _chroma(wanted - np.average(wanted, axis=0, weights=has.sum(0))) * weight
    chance = [
        np.linalg.norm(_chroma(_effects(rng.permutation(has), mean)) * weight) for _ in range(16)
    ]
    others = [_cosine(seen[:, order], wanted) for order in permutations(range(3))][1:]
    told = _cosine(seen, wanted)
    return {
        "data/colour_told": told,
        "data/colour_other": max(*others, -told),
        "data/colour_z": float(
            (np.linalg.norm(seen) - np.mean(chance)) / max(np.std(chance), 1e-9)
        ),
        "data/colour_chroma": float((pixels.amax(1) - pixels.amin(1)).mean()),
    }


def _centres(pictures: Tensor) -> Tensor:
    """Where in [-1, 1] of x and y the mass lies that differs from the border, (N, 2)."""
    pixels = pictures.float().cpu()
    edge = torch.cat([pixels[:, :, 0], pixels[:, :, -1], pixels[..., 0], pixels[..., -1]], dim=2)
    mass = (pixels - edge.median(2).values[:, :, None, None]).abs().sum(1)
    mass = (mass - 0.1).clamp_min(0)  # an autoencoder's ripples
    total = mass.sum((1, 2)).clamp_min(1e-6)
    x, y = (torch.linspace(-1, 1, n) for n in (pixels.shape[3], pixels.shape[2]))
    return torch.stack([(mass.sum(1) * x).sum(1), (mass.sum(2) * y).sum(1)], dim=1) / total[:, None]


def side_metrics(captions: Sequence[str], pictures: Tensor) -> dict[str, float]:
    """data/side_{across,down}*: of captions that name one side (left, right; top, bottom) the
    share whose picture has its mass there, among those with it off the centre; high, low: its
    interval, of two standard deviations. Empty where there are few.
    """
    centres = _centres(pictures).numpy()
    rows: dict[str, float] = {}
    for axis, (name, (low, high)) in enumerate(SIDES.items()):
        one, other = _named(captions, low), _named(captions, high)
        related = np.array([not _PAIRS.isdisjoint(words_of(caption)) for caption in captions])
        where = centres[:, axis]
        judged = (one ^ other) & ~related & (np.abs(where) > PLACED)
        if judged.sum() < ENOUGH:
            continue
        right = np.where(one, where < 0, where > 0)[judged]
        share, margin = float(right.mean()), float(1 / np.sqrt(len(right)))  # 2 sd of a half
        rows |= {
            f"data/side_{name}": share,
            f"data/side_{name}_high": share + margin,
            f"data/side_{name}_low": share - margin,
        }
    return rows
