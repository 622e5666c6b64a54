"""How two samples of features cover each other, by balls about the nearest neighbours; no torch.

Precision and recall are those of Kynkaanniemi et al. (arXiv 1904.06991) with k = 3, density and
coverage those of Naeem et al. (arXiv 2002.09797) with k = 5.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from flowray.sample.distances import distances

NEAR, DENSE = 3, 5  # the k of precision and recall, and that of density and coverage


@dataclass(frozen=True)
class Manifold:
    """Real features (M, dims), and around each the radii to its NEAR-th and DENSE-th neighbour."""

    features: np.ndarray
    near: np.ndarray
    dense: np.ndarray


@dataclass(frozen=True)
class Overlap:
    """A generated sample of N beside a real one of M.

    precise: bool (N,), in a real ball; density: (N,), real balls around each over k; recalled,
    covered: bool (N, M), which real ones lie in a generated ball, and whose ball holds a generated
    one.
    """

    precise: np.ndarray
    density: np.ndarray
    recalled: np.ndarray
    covered: np.ndarray


def radii(features: np.ndarray, k: int) -> np.ndarray:
    """Distance of each (N, dims) to its k-th nearest other one, the last where there are fewer."""
    k = min(k, len(features) - 1)
    # a sample's own distance to itself is the nearest
    return np.concatenate(
        [np.partition(part, k, axis=1)[:, k] for part in distances(features, features)]
    )


def manifold(features: np.ndarray) -> Manifold:
    """Of a real sample (M, dims)."""
    return Manifold(features, radii(features, NEAR), radii(features, DENSE))


def overlap(generated: np.ndarray, real: Manifold) -> Overlap:
    """Of a generated sample (N, dims) with a real one."""
    between = np.concatenate(list(distances(generated, real.features)))
    covered = between <= real.dense
    return Overlap(
        precise=np.any(between <= real.near, axis=1),
        density=covered.sum(1) / DENSE,
        recalled=between <= radii(generated, NEAR)[:, None],
        covered=covered,
    )
