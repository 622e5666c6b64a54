"""Samples compared by distance, of latents or of features: nearest neighbours, copies, the Frechet
distance; and what a mean over captions is worth. No torch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import numpy as np

CHUNK = 256  # vectors whose distances are taken at once
BLOCK = 4096  # of the others that are held in fp64
GROUPS = 24  # of captions that the jackknife leaves out, one at a time
RESAMPLES = 400  # of the bootstrap


def mean(values: Iterable[float]) -> float | None:
    """Without nan; None where nothing is left."""
    left = [value for value in values if not np.isnan(value)]
    return float(np.mean(left)) if left else None


def standard_error(values: np.ndarray) -> float:
    """Of the mean over captions; 0 where there is but one."""
    left = values[~np.isnan(values)]
    return float(left.std(ddof=1) / np.sqrt(len(left))) if len(left) > 1 else 0.0


def beats(gain: np.ndarray) -> bool:
    """Whether gains, one for each caption, are above 0 in the mean by more than its standard
    error.
    """
    return (mean(gain) or 0.0) > standard_error(gain)


def distances(vectors: np.ndarray, among: np.ndarray) -> Iterator[np.ndarray]:
    """From vectors (N, dims) to others (M, dims), CHUNK at a time: the root of the mean square over
    dims, (n, M) fp64.
    """
    blocks = [among[start : start + BLOCK] for start in range(0, len(among), BLOCK)]
    lengths = np.concatenate([np.square(block.astype(np.float64)).sum(1) for block in blocks])
    for start in range(0, len(vectors), CHUNK):
        part = vectors[start : start + CHUNK].astype(np.float64)
        products = [part @ block.astype(np.float64, copy=False).T for block in blocks]
        squares = np.square(part).sum(1)[:, None] + lengths - 2 * np.concatenate(products, axis=1)
        yield np.sqrt(np.maximum(squares, 0) / vectors.shape[1])


def nearest(latents: np.ndarray, among: np.ndarray) -> np.ndarray:
    """Distance of each latent (N, dims) to the nearest among others (M, dims), (N,)."""
    return np.concatenate([part.min(1) for part in distances(latents, among)])


def copies(near: np.ndarray, near_real: np.ndarray) -> dict[str, float | None]:
    """Whether latents lie nearer to training latents than new pictures do; both arguments are
    `nearest` among the training latents.

    nearer: the share within the 1 % quantile of held-out real pictures, 0.01 as in the data.
    median_ratio: None where half of these lie on training latents themselves.
    """
    median = float(np.median(near_real))
    return {
        "median_ratio": float(np.median(near)) / median if median else None,
        "nearer": float(is_nearer(near, near_real).mean()),
    }


def is_nearer(near: np.ndarray, near_real: np.ndarray) -> np.ndarray:
    """Which are within the 1 % quantile of held-out real pictures, bool (N,).

    That is 0 where some of these are in training under another name, and a copy is then at 0 too.
    """
    return near <= np.quantile(near_real, 0.01)


class Gaussian(NamedTuple):
    """Mean (dims,) and covariance of a sample, as a factor R of R'R = covariance, fp64."""

    mean: np.ndarray
    factor: np.ndarray


def gaussian(sample: np.ndarray) -> Gaussian:
    """Of a sample (N, dims); the factor has no more rows than dims."""
    sample = sample.astype(np.float64)
    centred = (sample - sample.mean(0)) / np.sqrt(max(len(sample) - 1, 1))
    return Gaussian(sample.mean(0), np.asarray(np.linalg.qr(centred, mode="r")))


def frechet(first: np.ndarray, second: np.ndarray | Gaussian) -> float:
    """Frechet distance of the gaussians with the mean and covariance of two samples (N, dims):
    |m1 - m2|^2 + tr(A + B - 2 (A B)^(1/2)), fp64.

    With A = R'R and B = S'S the last trace is the sum of the singular values of R S': no root of a
    matrix that few samples leave singular.
    """
    a, b = gaussian(first), second if isinstance(second, Gaussian) else gaussian(second)
    shared = np.linalg.svd(a.factor @ b.factor.T, compute_uv=False).sum()
    traces = np.square(a.factor).sum() + np.square(b.factor).sum()
    return float(np.square(a.mean - b.mean).sum() + traces - 2 * shared)


def frechet_beats(latents: np.ndarray, other: np.ndarray, real: np.ndarray) -> bool:
    """Whether latents (captions, draws, dims) are nearer to the real ones (M, dims) than others of
    the same captions by more than the standard error.
    """
    truth = gaussian(real)

    def gain(kept: np.ndarray) -> float:
        a, b = (x[kept].reshape(-1, x.shape[-1]) for x in (other, latents))
        return frechet(a, truth) - frechet(b, truth)

    return gain(np.arange(len(latents))) > jackknife_error(gain, len(latents))


def jackknife_error(figure: Callable[[np.ndarray], float], captions: int) -> float:
    """Standard error of a figure over captions, by leaving out GROUPS of them in turn: of what is
    no mean over captions, as a covariance or the share that any of them reaches. Resampling has but
    63 % of the captions, which would narrow both. Of a share near 1 it is rather too large.

    figure: of the captions that are kept, by index.
    """
    every = np.arange(captions)
    groups = np.array_split(every, min(GROUPS, captions))
    left = np.array([figure(np.setdiff1d(every, group)) for group in groups])
    return float(np.sqrt((len(left) - 1) * left.var()))


def bootstrap_error(figure: Callable[[np.ndarray], float], captions: int, seed: int) -> float:
    """Standard error of a mean over captions, by RESAMPLES of them with replacement.

    figure: of the captions that are drawn, by index; nan counts for nothing, but some are not.
    """
    rng = np.random.default_rng(seed)
    drawn = np.array(
        [figure(rng.integers(captions, size=captions)) for _ in range(RESAMPLES)], dtype=np.float64
    )
    return float(np.nanstd(drawn))
