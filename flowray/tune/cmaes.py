"""CMA-ES of the `cmaes` package as an Optuna sampler whose state is the study itself.

Optuna's own sampler keeps the strategy pickled in the study, which a sweep never unpickles, and
counts no trial that was stopped. Here every trial carries two plain attributes, its generation and
its draw, and the strategy is told every full generation anew.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from cmaes import CMA
from optuna.distributions import BaseDistribution, CategoricalDistribution
from optuna.samplers import BaseSampler, RandomSampler
from optuna.search_space import intersection_search_space
from optuna.study import Study, StudyDirection
from optuna.trial import FrozenTrial, TrialState

from flowray.config.rounding import rounded
from flowray.tune.optuna_private import FIXED, set_attribute

# attributes of a trial; the draw is a point of the unit cube, possibly clipped
GENERATION, DRAW = "flowray:generation", "flowray:draw"


class Strategy(CMA):
    """CMA-ES in the unit cube of n ranges; sigma: the first step size."""

    def __init__(self, n: int, sigma: float, population: int | None, seed: int):
        super().__init__(np.full(n, 0.5), sigma, seed=seed, population_size=population)

    def ask(self) -> np.ndarray:
        """A point (n,) of the cube; one that falls outside is moved to its side. The package would
        draw it again, and come to a best value at the end of a range much later.
        """
        return np.clip(super().ask(), 0.0, 1.0)

    def _sample_solution(self) -> np.ndarray:
        """Along the covariance's symmetric root: eigenvectors have no sign, and those of equal
        eigenvalues no direction. Each LAPACK gives others, and so would draws along them.
        """
        vectors, lengths = self._eigen_decomposition()
        root = (vectors * lengths) @ vectors.T
        return np.asarray(self._mean + self._sigma * root @ self._rng.randn(self.dim))

    def learn(self, best_first: Sequence[np.ndarray]) -> None:
        """Go on to the next generation, told all points of this one."""
        self.tell([(point, place) for place, point in enumerate(best_first)])


class CmaEsSampler(BaseSampler):
    """Draws the numeric parameters that every trial has; all others at random."""

    def __init__(self, *, seed: int, sigma: float, population: int | None):
        self._random = RandomSampler(seed=seed)
        self._seed, self._sigma, self._population = seed, sigma, population

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
        if FIXED in trial.system_attrs or not search_space:  # it was enqueued
            return {}
        drawn: dict[str, float] = trial.system_attrs.get(DRAW, {})
        # else it is resumed, maybe from before it was given all that was drawn
        if GENERATION not in trial.system_attrs:
            strategy = self._replayed(study, list(search_space))
            drawn = dict(zip(search_space, strategy.ask().tolist(), strict=True))
            set_attribute(study, trial, DRAW, drawn)
            set_attribute(study, trial, GENERATION, strategy.generation)  # last: it has both then
        return {key: _from_unit(d, drawn[key]) for key, d in search_space.items() if key in drawn}

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
        strategy = Strategy(len(keys), self._sigma, self._population, self._seed)
        ended = [
            t
            for t in study.get_trials(deepcopy=False)
            if t.state in (TrialState.COMPLETE, TrialState.PRUNED) and t.value is not None
        ]
        while True:
            same = [t for t in ended if t.system_attrs.get(GENERATION) == strategy.generation]
            born = [t for t in same if set(t.system_attrs[DRAW]) == set(keys) and _as_drawn(t)]
            if len(born) < strategy.population_size:
                return strategy
            full = born[: strategy.population_size]
            best = sorted(full, key=lambda t: (-_reached(t), sign * rounded(t.value or 0.0)))
            strategy.learn([np.array([t.system_attrs[DRAW][key] for key in keys]) for t in best])


def _reached(trial: FrozenTrial) -> float:
    """A trial that was stopped ranks behind all that went further."""
    return math.inf if trial.state == TrialState.COMPLETE else float(trial.last_step or 0)


def _as_drawn(trial: FrozenTrial) -> bool:
    """Whether the trial has the setting that was drawn for it; it was given another where some
    trial had that one already.
    """
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
