"""How a sweep chooses its trials: one class for each way, with its options."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from flowray.config.base import Config


class TpeSearch(Config):
    """Tree-structured Parzen estimator (arXiv 2304.11127). candidates: draws of which the most
    promising is tried.

    multivariate: joint over the parameters, those of one condition in a group of their own, where
    the good values of one hang on another's. With tens of trials one parameter at a time finds good
    ones sooner (docs/benchmarks/sweep-bench.md): few good ones say little of pairs.
    """

    kind: Literal["tpe"] = "tpe"
    candidates: int = Field(24, gt=0)
    multivariate: bool = False


class GpSearch(Config):
    """Gaussian process with expected improvement: few trials, few continuous parameters. It learns
    from finished trials only.

    deterministic: take the metric as free of noise.
    """

    kind: Literal["gp"] = "gp"
    deterministic: bool = False


class CmaEsSearch(Config):
    """CMA-ES (arXiv 1604.00772) on the ranges; values and conditional parameters are drawn at
    random.

    sigma: first step size, as a share of each range. population: trials of a generation, 4 + 3
    ln(ranges) unless given.
    """

    kind: Literal["cmaes"] = "cmaes"
    sigma: float = Field(0.25, gt=0, le=1)
    population: int | None = Field(None, ge=4)


class Nsga2Search(Config):
    """NSGA-II, a genetic algorithm for several metrics.

    population: trials of a generation; the first is drawn at random.
    """

    kind: Literal["nsga2"] = "nsga2"
    population: int = Field(10, ge=2)
    crossover: float = Field(0.9, ge=0, le=1)


class RandomSearch(Config):
    """Every trial at random (method: random)."""

    kind: Literal["random"] = "random"


class GridSearch(Config):
    """Every combination once, in order (method: grid)."""

    kind: Literal["grid"] = "grid"


LearningSearch = Annotated[
    TpeSearch | GpSearch | CmaEsSearch | Nsga2Search, Field(discriminator="kind")
]
SearchConfig = TpeSearch | GpSearch | CmaEsSearch | Nsga2Search | RandomSearch | GridSearch
