"""The data as training sees it: duplicates, whether captions tell their pictures, and which
times get trained.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import torch

from flowray.config.flow import FlowConfig
from flowray.flow.time import time_config, training_times
from flowray.probes.field import BINS, time_bins

WORDS = 256  # most frequent words that the ridge regression sees
DIMS = 512  # latent dims that it predicts at most, evenly spread
SHUFFLES = 16
RIDGE = 3.0  # penalty, in samples


def duplicate_share(latents: np.ndarray) -> float:
    """Share of the rows (N, ...) that are, bit for bit, an earlier row."""
    seen = {hashlib.sha256(np.ascontiguousarray(row).tobytes()).digest() for row in latents}
    return 1 - len(seen) / len(latents)


def word_counts(captions: Sequence[str]) -> np.ndarray:
    """Log counts (N, words) of the commonest words and word pairs, centred, no word in fewer
    than two captions.
    """
    rows = []
    for caption in captions:
        words = re.findall(r"\w+", caption.lower())
        rows.append(Counter([*words, *(" ".join(pair) for pair in pairwise(words))]))
    common = Counter(word for row in rows for word in row)
    kept = [word for word, count in common.most_common(WORDS) if 1 < count < len(rows)]
    counts = np.array([[row[word] for word in kept] for row in rows], dtype=np.float64).reshape(
        len(rows), len(kept)
    )
    return np.log1p(counts)


def _r_squared(
    features: np.ndarray, targets: np.ndarray, orders: Sequence[np.ndarray]
) -> list[float]:
    """Held-out R^2 of ridge regression from features (N, F) to targets[order] (N, D), for each
    order; fit on half, tested on half.
    """
    fit, test = slice(0, None, 2), slice(1, None, 2)
    x = features - features[fit].mean(0)
    gram = x[fit].T @ x[fit] + RIDGE * np.eye(x.shape[1])
    project = x[test] @ np.linalg.solve(gram, x[fit].T)
    scores = []
    for order in orders:
        y = targets[order]
        y = y - y[fit].mean(0)
        scores.append(
            1 - float(np.square(y[test] - project @ y[fit]).sum() / np.square(y[test]).sum())
        )
    return scores


def agreement_metrics(
    captions: Sequence[str], latents: np.ndarray, seed: int = 0
) -> dict[str, float]:
    """data/agreement*: held-out R^2 of z1 from the words of its caption, beside the same with the
    pairs shuffled.

    latents (N, D). z says how many standard deviations of the shuffles the real pairs stand out;
    about 0 where captions and pictures were mixed up. Empty where the captions have no word that
    tells them apart.
    """
    features = word_counts(captions)
    if not features.shape[1] or len(captions) < 16:
        return {}
    flat = latents.reshape(len(latents), -1).astype(np.float64)
    flat = flat[:, np.linspace(0, flat.shape[1] - 1, min(DIMS, flat.shape[1])).astype(int)]
    rng = np.random.default_rng(seed)
    orders = [np.arange(len(flat)), *(rng.permutation(len(flat)) for _ in range(SHUFFLES))]
    real, *mixed = _r_squared(features, flat, orders)
    return {
        "data/agreement": real,
        "data/agreement_shuffled": float(np.mean(mixed)),
        "data/agreement_z": (real - float(np.mean(mixed))) / max(float(np.std(mixed)), 1e-4),
    }


def time_shares(config: FlowConfig, steps_done: int, total: int, moments: int = 20) -> list[float]:
    """Share of training times in every tenth of [0, 1] over the steps done so far; exact
    quantiles, no draws.
    """
    u = (torch.arange(2000) + 0.5) / 2000
    counts = torch.zeros(BINS)
    for step in np.linspace(0, max(steps_done - 1, 0), moments).astype(int).tolist():
        counts += torch.bincount(
            time_bins(training_times(time_config(config, step, total), u)), minlength=BINS
        )
    return (counts / counts.sum()).tolist()


def coverage_metrics(shares: Sequence[float]) -> dict[str, float]:
    """time/share_t* and time/coverage_min, the least of them relative to a uniform sampler's."""
    return {f"time/share_t{b}": share for b, share in enumerate(shares)} | {
        "time/coverage_min": BINS * min(shares)
    }
