"""`benchmarks sweep`: what the probes save a sweep, replayed on a recorded pool, and what each
knows of the final pictures.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from benchmarks.pool import Pool, spearman, value_at
from benchmarks.record import machine
from benchmarks.replay import Replay, one_rung, random_search, sweep_search
from flowray.config.errors import InputError
from flowray.sweepconfig.check import base_recipe
from flowray.sweepconfig.sweep import Metric, SuccessiveHalving, Sweep, milestones

BEST = 3  # any one of so many will do
EARLY = (0.10, 0.33)  # shares of the budget at which probes are compared with the final pictures
RESAMPLES = 2000
LEVEL = 0.95
ARMS = {
    "random": "random, full budget",
    "one_rung": "random, top K after one rung",
    "loss": "TPE + ASHA on the loss",
    "default": "flowray: TPE + ASHA and rules on probes",
    "oracle": "the same, told the final score at every probe",
}
ORACLE = "eval/final_score"  # no sweep has it: what the pictures will score in the end
WANTED = {"seeds_30": 30, "configurations_60": 60, "minutes_20": 20}


@dataclass(frozen=True)
class Bench:
    """What the replay gave. arms: per search its replays, one per seed; correlations: metric ->
    share of the budget -> Spearman's rho with the final picture score, and at 1.0 that of its last
    value; beside: the same of the second score. halves: random and the default on a random half of
    the pool per seed.
    """

    pool: Pool
    sweep: Sweep
    loss: str
    goal: frozenset[int]
    arms: Mapping[str, Sequence[Replay]]
    correlations: Mapping[str, Mapping[float, float]]
    beside: Mapping[str, Mapping[float, float]]
    halves: Mapping[str, Sequence[Replay]]
    seconds: float


def run(
    pool: Pool, sweep: Sweep, *, seeds: int, loss: str, say: Callable[[str], None] = lambda _: None
) -> Bench:
    """Replay the searches over `seeds` seeds. sweep: flowray's default, over the pool's own
    parameters; loss: the metric of the search on the training loss. InputError where the pool does
    not have what they need.
    """
    began = time.monotonic()
    every = _check(pool, sweep, loss)
    goal, on_loss = pool.best(BEST), Metric(name=loss)
    rung = first_rung(sweep, pool.budget_steps)
    by_loss = sweep.model_copy(update={"metric": on_loss, "stop": ()})
    by_oracle = sweep.model_copy(
        update={"metric": Metric(name=ORACLE, goal="maximize"), "stop": ()}
    )
    told = foretold(pool)
    searches: dict[str, Callable[[int], Replay]] = {
        "random": lambda seed: random_search(pool, goal, seed),
        "one_rung": lambda seed: one_rung(pool, goal, seed, sweep.metric, rung),
        "loss": lambda seed: sweep_search(pool, goal, seed, by_loss, every),
        "default": lambda seed: sweep_search(pool, goal, seed, sweep, every),
        "oracle": lambda seed: sweep_search(told, goal, seed, by_oracle, every),
    }
    arms: dict[str, Sequence[Replay]] = {}
    for name, search in searches.items():
        arms[name] = [search(seed) for seed in range(seeds)]
        say(
            f"{ARMS[name]}: {np.mean([r.hit for r in arms[name]]) / pool.budget_steps:.1f} full"
            " budgets on average"
        )
    parts = [half(pool, seed) for seed in range(seeds)]
    halves = {
        "random": [random_search(part, part.best(BEST), seed) for seed, part in enumerate(parts)],
        "default": [
            sweep_search(part, part.best(BEST), seed, sweep, every)
            for seed, part in enumerate(parts)
        ],
    }
    known, beside = (correlations(pool, score) for score in pool.judged_by)
    return Bench(pool, sweep, loss, goal, arms, known, beside, halves, time.monotonic() - began)


def half(pool: Pool, seed: int) -> Pool:
    """A random half of the pool's configurations, with another best: for what was chosen with
    the whole pool in sight.
    """
    count = len(pool.entries)
    kept = sorted(np.random.default_rng([seed, count]).permutation(count)[: (count + 1) // 2])
    return replace(pool, entries=tuple(pool.entries[i] for i in kept))


def first_rung(sweep: Sweep, budget_steps: int) -> int:
    """The sweep's own, or a third of the budget."""
    rungs = (
        milestones(sweep.early_terminate, budget_steps)
        if isinstance(sweep.early_terminate, SuccessiveHalving)
        else {}
    )
    return next(iter(rungs), budget_steps // 3)


def foretold(pool: Pool) -> Pool:
    """The pool with the final picture score in every probe row: what no probe can beat."""
    score = pool.judged_by[0]
    entries = [
        replace(e, rows=tuple({**row, ORACLE: e.score.get(score)} for row in e.rows))
        for e in pool.entries
    ]
    return replace(pool, entries=tuple(entries))


def _check(pool: Pool, sweep: Sweep, loss: str) -> int:
    """Steps between the probes that the sweep is shown: those of its base recipe, where they
    were recorded.
    """
    spaces = [
        {key: p.model_copy(update={"prior": None}) for key, p in of.parameters.items()}
        for of in (sweep, pool.sweep)
    ]
    if spaces[0] != spaces[1]:
        raise InputError(
            f"sweep {sweep.name}: its parameters are not those that the pool was drawn from; record"
            " a pool of it"
        )
    known = {key for entry in pool.entries for row in entry.rows for key in row}
    for name in (sweep.metric.name, loss, *sweep.rule_metrics):
        if name not in known:
            raise InputError(
                f"{name} is not in the record; recorded are {', '.join(sorted(known - {'step'}))}"
            )
    wanted, recorded = (
        base_recipe(sweep).train.probe_every,
        min(int(entry.rows[0]["step"]) for entry in pool.entries if entry.rows),
    )
    return wanted if wanted % recorded == 0 else recorded


def correlations(pool: Pool, score: str) -> dict[str, dict[float, float]]:
    """Spearman's rho of every recorded metric with a final score of the pictures over the
    configurations that have both, early and at the end.
    """
    judged = [entry for entry in pool.entries if entry.error is None]
    scores = np.array([entry.score[score] for entry in judged])
    names = sorted({key for entry in judged for row in entry.rows for key in row} - {"step"})
    out: dict[str, dict[float, float]] = {}
    for name in names:
        out[name] = {}
        for share in (*EARLY, 1.0):
            values = np.array(
                [value_at(entry, name, share * pool.budget_steps) for entry in judged]
            )
            known = np.isfinite(values)
            out[name][share] = spearman(values[known], scores[known])
    return out


def ratio(
    others: Sequence[Replay], ours: Sequence[Replay], rng: np.random.Generator
) -> dict[str, Any]:
    """Compute of the others over ours, per seed: median, extremes, the median's bootstrap
    interval, and the ratio of the mean computes.
    """
    a, b = (np.array([replay.hit for replay in replays], float) for replays in (others, ours))
    picks = rng.integers(0, len(a), (RESAMPLES, len(a)))
    tails = [(1 - LEVEL) / 2, (1 + LEVEL) / 2]
    medians, means = (
        np.median((a / b)[picks], axis=1),
        a[picks].mean(axis=1) / b[picks].mean(axis=1),
    )
    return {
        "median": float(np.median(a / b)),
        "min": float(np.min(a / b)),
        "max": float(np.max(a / b)),
        "rounds": len(a),
        "interval": [float(x) for x in np.quantile(medians, tails)],
        "of_means": float(a.mean() / b.mean()),
        "of_means_interval": [float(x) for x in np.quantile(means, tails)],
    }


def summary(bench: Bench) -> dict[str, Any]:
    """The command's JSON object."""
    rng, pool = np.random.default_rng(0), bench.pool
    seeds = len(bench.arms["default"])
    have = {"seeds_30": seeds, "configurations_60": len(pool.entries)}
    return {
        "bench": "sweep",
        "machine": machine(),
        "ratios": {
            f"vs_{name}": ratio(bench.arms[name], bench.arms["default"], rng)
            for name in ("random", "one_rung", "loss")
        },
        "guards": (
            {name: count >= WANTED[name] for name, count in have.items()}
            | {"minutes_20": bench.seconds < 60 * WANTED["minutes_20"]}
        ),
        "seconds": round(bench.seconds, 1),
        "pool": {
            "configurations": len(pool.entries),
            "budget_steps": pool.budget_steps,
            "best": sorted(bench.goal),
            **pool.facts,
        },
        "halves": ratio(bench.halves["random"], bench.halves["default"], rng),
        "loss": bench.loss,
        "arms": {name: _arm(bench, replays) for name, replays in bench.arms.items()},
        "judged_by": bench.pool.judged_by,
        "correlations": _by_share(bench.correlations),
        "correlations_beside": _by_share(bench.beside),
    }


def _by_share(known: Mapping[str, Mapping[float, float]]) -> dict[str, dict[str, float]]:
    return {name: {f"{share:g}": rho for share, rho in row.items()} for name, row in known.items()}


def _arm(bench: Bench, replays: Sequence[Replay]) -> dict[str, Any]:
    """One search in full budgets: compute to one of the best, compute for the whole pool, share
    of the best that it stopped, and why.
    """
    budget, drawn = bench.pool.budget_steps, len(bench.goal) * len(replays)
    why: dict[str, int] = {}
    for replay in replays:
        for words in replay.lost.values():
            why[words] = why.get(words, 0) + 1
    hits = [replay.hit / budget for replay in replays]
    return {
        "mean_budgets": float(np.mean(hits)),
        "median_budgets": float(np.median(hits)),
        "pool_budgets": float(np.mean([replay.spent for replay in replays])) / budget,
        "best_lost": sum(len(replay.lost) for replay in replays) / drawn,
        "lost_because": dict(sorted(why.items(), key=lambda item: -item[1])),
    }


def ranked(bench: Bench, share: float = EARLY[1]) -> list[str]:
    """The metrics that say most about the final pictures at a share of the budget, either way
    round, first.
    """
    known = {
        name: abs(row[share])
        for name, row in bench.correlations.items()
        if math.isfinite(row[share])
    }
    return sorted(known, key=lambda name: (-known[name], name))
