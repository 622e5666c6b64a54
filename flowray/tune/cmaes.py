"""CMA-ES as an Optuna sampler whose state is the study itself.

Optuna's own needs a further package and keeps its state pickled in the study, which a sweep never
unpickles. Here every trial carries two plain attributes, its generation and its draw, and the mean,
step size and covariance are worked out from them anew. Hansen, The CMA Evolution Strategy: A
Tutorial (arXiv 1604.00772), equations in its order; non-negative recombination weights.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from optuna.distributions import BaseDistribution, CategoricalDistribution
from optuna.samplers import BaseSampler, RandomSampler
from optuna.search_space import intersection_search_space
from optuna.study import Study, StudyDirection
from optuna.trial import FrozenTrial, TrialState

from flowray.config.rounding import rounded

# attributes of a trial; the draw is a point of the unit cube, possibly clipped
GENERATION, DRAW = "flowray:generation", "flowray:draw"


class Strategy:
    """Mean, step size, covariance and evolution paths in the unit cube of n ranges."""

    def __init__(self, n: int, sigma: float, population: int | None):
        self.n, self.sigma = n, sigma
        self.population = population or 4 + int(3 * math.log(n))
        self.mean, self.cov = np.full(n, 0.5), np.eye(n)
        self._path_s, self._path_c = np.zeros(n), np.zeros(n)
        parents = self.population // 2
        raw = math.log((self.population + 1) / 2) - np.log(np.arange(1, parents + 1))
        self._weights = raw / raw.sum()
        self._mu = 1 / float((self._weights**2).sum())
        self._c_s = (self._mu + 2) / (n + self._mu + 5)
        self._damp = 1 + 2 * max(0.0, math.sqrt((self._mu - 1) / (n + 1)) - 1) + self._c_s
        self._c_c = (4 + self._mu / n) / (n + 4 + 2 * self._mu / n)
        self._c_1 = 2 / ((n + 1.3) ** 2 + self._mu)
        self._c_mu = min(
            1 - self._c_1, 2 * (self._mu - 2 + 1 / self._mu) / ((n + 2) ** 2 + self._mu)
        )
        self._expected = math.sqrt(n) * (1 - 1 / (4 * n) + 1 / (21 * n**2))
        self.generation = 0

    def draw(self, rng: np.random.Generator) -> np.ndarray:
        """A point (n,) of the unit cube."""
        steps = self._root(0.5) @ rng.standard_normal(self.n)
        return np.clip(self.mean + self.sigma * steps, 0.0, 1.0)

    def _root(self, power: float) -> np.ndarray:
        """The covariance to a power, (n, n), symmetric.

        Eigenvectors alone have no sign, and none of equal eigenvalues has a direction: each
        LAPACK gives others, and points drawn along them would differ between machines.
        """
        values, vectors = np.linalg.eigh(self.cov)
        return (vectors * np.maximum(values, 1e-20) ** power) @ vectors.T

    def learn(self, points: np.ndarray) -> None:
        """Go on to the next generation; points (population, n), best first."""
        self.generation += 1
        steps = (points[: len(self._weights)] - self.mean) / self.sigma
        shift = self._weights @ steps
        self.mean = self.mean + self.sigma * shift
        whitened = self._root(-0.5) @ shift
        self._path_s = (1 - self._c_s) * self._path_s + math.sqrt(
            self._c_s * (2 - self._c_s) * self._mu
        ) * whitened
        length = float(np.linalg.norm(self._path_s))
        settled = (
            length / math.sqrt(1 - (1 - self._c_s) ** (2 * self.generation))
            < (1.4 + 2 / (self.n + 1)) * self._expected
        )
        self._path_c = (1 - self._c_c) * self._path_c + settled * math.sqrt(
            self._c_c * (2 - self._c_c) * self._mu
        ) * shift
        rank_one = (
            np.outer(self._path_c, self._path_c)
            + (not settled) * self._c_c * (2 - self._c_c) * self.cov
        )
        rank_mu = (self._weights[:, None] * steps).T @ steps
        self.cov = (
            (1 - self._c_1 - self._c_mu) * self.cov + self._c_1 * rank_one + self._c_mu * rank_mu
        )
        self.sigma *= math.exp(self._c_s / self._damp * (length / self._expected - 1))


class CmaEsSampler(BaseSampler):
    """Draws the numeric parameters that every trial has; all others at random."""

    def __init__(self, *, seed: int, sigma: float, population: int | None):
        self._rng = np.random.default_rng(seed)
        self._random = RandomSampler(seed=seed)
        self._sigma, self._population = sigma, population

    def infer_relative_search_space(
        self, study: Study, trial: FrozenTrial
    ) -> dict[str, BaseDistribution]:
        space = intersection_search_space(study.get_trials(deepcopy=False), include_pruned=True)
        return {
            key: d
            for key, d in space.items()
            if not isinstance(d, CategoricalDistribution) and not d.single()
        }

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        if "fixed_params" in trial.system_attrs or not search_space:  # it was enqueued
            return {}
        # it is resumed, maybe from before it was given all that was drawn
        if GENERATION in trial.system_attrs:
            drawn = trial.system_attrs[DRAW]
            return {
                key: _from_unit(d, drawn[key]) for key, d in search_space.items() if key in drawn
            }
        strategy = self._replayed(study, list(search_space))
        point = strategy.draw(self._rng)
        storage = study._storage
        storage.set_trial_system_attr(
            trial._trial_id, DRAW, dict(zip(search_space, point.tolist(), strict=True))
        )
        # after it: what has one has both
        storage.set_trial_system_attr(trial._trial_id, GENERATION, strategy.generation)
        return {
            key: _from_unit(d, float(x))
            for (key, d), x in zip(search_space.items(), point, strict=True)
        }

    def sample_independent(
        self,
        study: Study,
        trial: FrozenTrial,
        param_name: str,
        param_distribution: BaseDistribution,
    ) -> Any:
        return self._random.sample_independent(study, trial, param_name, param_distribution)

    def _replayed(self, study: Study, keys: Sequence[str]) -> Strategy:
        """The strategy after every generation of the study that is full; late trials of an older
        generation are left out.
        """
        sign = 1.0 if study.direction == StudyDirection.MINIMIZE else -1.0
        strategy = Strategy(len(keys), self._sigma, self._population)
        ended = [
            t
            for t in study.get_trials(deepcopy=False)
            if t.state in (TrialState.COMPLETE, TrialState.PRUNED) and t.value is not None
        ]
        while True:
            same = [t for t in ended if t.system_attrs.get(GENERATION) == strategy.generation]
            born = [t for t in same if set(t.system_attrs[DRAW]) == set(keys) and _as_drawn(t)]
            if len(born) < strategy.population:
                return strategy
            full = born[: strategy.population]
            best = sorted(full, key=lambda t: (-_reached(t), sign * rounded(t.value or 0.0)))
            strategy.learn(np.array([[t.system_attrs[DRAW][key] for key in keys] for t in best]))


def _reached(trial: FrozenTrial) -> float:
    """A trial that was stopped ranks behind all that went further."""
    return math.inf if trial.state == TrialState.COMPLETE else float(trial.last_step or 0)


def _as_drawn(trial: FrozenTrial) -> bool:
    """Whether it was given what was drawn for it, and not another setting as that was there."""
    drawn = {
        key: _from_unit(trial.distributions[key], x) for key, x in trial.system_attrs[DRAW].items()
    }
    return all(math.isclose(drawn[key], trial.params[key], rel_tol=1e-9) for key in drawn)


def _from_unit(distribution: Any, x: float) -> Any:
    """The value of a numeric distribution at the share x of its range, in the logarithm where it
    has one.
    """
    low, high, whole = distribution.low, distribution.high, isinstance(distribution.step, int)
    value = (
        math.exp(math.log(low) + x * math.log(high / low))
        if distribution.log
        else low + x * (high - low)
    )
    if distribution.step:
        value = low + round((value - low) / distribution.step) * distribution.step
    value = min(high, max(low, value))
    return round(value) if whole else float(value)
