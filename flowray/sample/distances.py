"""Samples compared by distance, of latents or of features: nearest neighbours, copies, the Frechet
and the kernel distance; and what a mean over captions is worth. No torch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import numpy as np

CHUNK = 256  # vectors whose distances are taken at once
BLOCK = 4096  # of the others that are held in fp64
GROUPS = 24  # of captions that the jackknife leaves out, one at a time
RESAMPLES = 400  # of the bootstrap
# the kernel of Jayasumana et al. (arXiv 2401.09603), and what its squared distance is multiplied by
SIGMA, SCALE = 10.0, 1000.0
NORMAL = 1.959964  # standard errors to either side hold 95 %


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


class Uncertainty(NamedTuple):
    """Of a figure over captions: its standard error and 95 % confidence interval."""

    error: float
    interval: tuple[float, float]


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


def likeness(vectors: np.ndarray, among: np.ndarray, sigma: float = SIGMA) -> Iterator[np.ndarray]:
    """exp(-d^2 / (2 sigma^2)) - 1 of vectors (N, dims) and others (M, dims), CHUNK at a time,
    (n, M) fp64, d by `distances`: of vectors of length root(dims) as published of unit vectors.

    The 1 that is taken off cancels in the distance, which is small beside it; a vector with itself
    has 0.
    """
    for part in distances(vectors, among):
        yield np.expm1(np.square(part) / (-2 * sigma**2))


def kernel_distance(
    first: np.ndarray, second: np.ndarray, *, biased: bool = False, sigma: float = SIGMA
) -> float:
    """SCALE times the squared maximum mean discrepancy of two samples (N, dims) and (M, dims) by
    `likeness`: CMMD (arXiv 2401.09603) where the vectors are CLIP's, of length root(dims).

    biased: with every vector's likeness to itself, as published: 0 of a sample with itself, above 0
    of any others, and the more so the smaller they are. Without, 0 in expectation of two samples of
    one distribution, of whatever sizes, and so as often below 0 as above. Frechet's distance has no
    such form.
    """
    within = [
        sum(part.sum() for part in likeness(each, each, sigma)) / pairs(len(each), biased)
        for each in (first, second)
    ]
    between = sum(part.sum() for part in likeness(first, second, sigma))
    return float(SCALE * (sum(within) - 2 * between / (len(first) * len(second))))


def pairs(count: int, biased: bool = False) -> int:
    """Of a sample: of two different vectors, or (biased) with those of a vector and itself."""
    return count**2 if biased else max(count * (count - 1), 1)


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


def resampled(figure: Callable[[np.ndarray], float], captions: int, seed: int) -> np.ndarray:
    """A mean over captions of RESAMPLES of them with replacement, (RESAMPLES,): the bootstrap.

    figure: of the captions that are drawn, by index.
    """
    rng = np.random.default_rng(seed)
    drawn = [figure(rng.integers(captions, size=captions)) for _ in range(RESAMPLES)]
    return np.array(drawn, dtype=np.float64)


def bootstrap(figure: Callable[[np.ndarray], float], captions: int, seed: int) -> Uncertainty:
    """Of a mean over captions; nan among the resampled counts for nothing, but some are not."""
    drawn = resampled(figure, captions, seed)
    low, high = np.nanpercentile(drawn, [2.5, 97.5])
    return Uncertainty(float(np.nanstd(drawn)), (float(low), float(high)))


def jackknife(figure: Callable[[np.ndarray], float], captions: int) -> Uncertainty:
    """Of what is no mean over captions; the interval is the normal one."""
    error, value = jackknife_error(figure, captions), figure(np.arange(captions))
    return Uncertainty(error, (value - NORMAL * error, value + NORMAL * error))
