"""From a search config to the Optuna sampler that it describes.

A new one is a config class, an entry here and a contract test.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from optuna.exceptions import ExperimentalWarning
from optuna.samplers import BaseSampler, GPSampler, RandomSampler, TPESampler

from flowray.config.base import Config
from flowray.sweepconfig.search import (
    CmaEsSearch,
    GpSearch,
    GridSearch,
    Nsga2Search,
    RandomSearch,
    SearchConfig,
    TpeSearch,
)
from flowray.tune.cmaes import CmaEsSampler
from flowray.tune.nsga import RungNsga


@dataclass(frozen=True)
class Setting:
    """What a sampler depends on beside its own options.

    seed: of this one trial, so that no draw is repeated by a later session.
    """

    seed: int
    startup_trials: int
    concurrent: int = 1


def _tpe(search: TpeSearch, at: Setting) -> BaseSampler:
    return TPESampler(
        seed=at.seed,
        multivariate=search.multivariate,
        group=search.multivariate,
        n_startup_trials=at.startup_trials,
        n_ei_candidates=search.candidates,
        constant_liar=at.concurrent > 1,
    )


def _gp(search: GpSearch, at: Setting) -> BaseSampler:
    return GPSampler(
        seed=at.seed,
        n_startup_trials=at.startup_trials,
        deterministic_objective=search.deterministic,
        warn_independent_sampling=False,
    )


def _cmaes(search: CmaEsSearch, at: Setting) -> BaseSampler:
    return CmaEsSampler(seed=at.seed, sigma=search.sigma, population=search.population)


def _nsga2(search: Nsga2Search, at: Setting) -> BaseSampler:
    return RungNsga(
        seed=at.seed, population_size=search.population, crossover_prob=search.crossover
    )


def _random(search: RandomSearch | GridSearch, at: Setting) -> BaseSampler:
    """For a grid it fills in nothing: its points are enqueued whole."""
    return RandomSampler(seed=at.seed)


SAMPLERS: Mapping[type[Config], Callable[[Any, Setting], BaseSampler]] = MappingProxyType(
    {
        TpeSearch: _tpe,
        GpSearch: _gp,
        CmaEsSearch: _cmaes,
        Nsga2Search: _nsga2,
        RandomSearch: _random,
        GridSearch: _random,
    }
)


def make_sampler(search: SearchConfig, setting: Setting) -> BaseSampler:
    """The sampler of one trial; what it knows of the others it reads from the study."""
    with warnings.catch_warnings():
        # TPE's groups, GP: as they are in the Optuna that is pinned
        warnings.simplefilter("ignore", ExperimentalWarning)
        return SAMPLERS[type(search)](search, setting)
