"""Who stops, who goes on and who is best does not hang on the last digits of a metric."""

from __future__ import annotations

import math
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.pool import Entry, Space
from flowray.config.ranking import ranked, setting
from flowray.config.rounding import rounded
from flowray.findings.checks import above, below
from flowray.findings.reading import Reading
from flowray.report.edges import edges
from flowray.report.load import load_run
from flowray.report.results import Metric, Trial
from flowray.report.results import Sweep as Loaded
from flowray.sweepconfig.parameters import LogUniform, Uniform
from flowray.sweepconfig.stop import BoundRule, GainRule
from flowray.sweepconfig.sweep import Asha, Hyperband, Median, Sweep
from flowray.tune.cmaes import Strategy
from flowray.tune.pruners import MedianRule, Rungs
from flowray.tune.stop import StopRules

METRIC = "ema/shoot/nmse"
FP32, FP64 = 1e-7, 1e-16
SIGNS = list(product((-1, 1), repeat=3))


def sweep(early: Hyperband | Asha | Median, goal: str = "minimize") -> Sweep:
    return Sweep(
        name="s",
        base="b",
        metric={"name": METRIC, "goal": goal},
        parameters={"optim.lr": Uniform(min=0, max=1)},
        early_terminate=early,
    )


def trial(number: int, **changes: Any) -> Trial:
    plain = {
        "params": {"optim.lr": 0.5},
        "status": "finished",
        "last_step": 10,
        "budget_steps": 10,
        "stopped_by": "",
        "metrics": {METRIC: 0.3},
        "seconds": 1.0,
        "error": "",
        "repeats": (),
        "run": load_run(Path("nowhere")),
    }
    return Trial(number=number, **{**plain, **changes})


@pytest.mark.parametrize("noise", [FP32, FP64])
@pytest.mark.parametrize("goal", ["minimize", "maximize"])
def test_of_equal_trials_at_a_rung_the_earlier_goes_on(noise: float, goal: str) -> None:
    for signs in SIGNS:
        rungs = Rungs(sweep(Hyperband(min_iter=10, eta=3), goal), 100)
        for number, sign in enumerate(signs):
            rungs.judge(number, 10, 0.3 * (1 + sign * noise))
        assert rungs.promote([0, 1, 2], last=False) == 0
        assert rungs.why(2).startswith(f"{METRIC} 0.3 at step 10 is number 1 of 3")


def test_the_best_share_of_a_rung_is_whole() -> None:
    """33 / 1.1 is 30, though not to a computer."""
    rungs = Rungs(sweep(Asha(rungs=(10,), eta=(1.1,))), 100)
    said = [rungs.judge(number, 10, float(number)) for number in range(33)]
    assert said[29] is not None
    assert rungs.promote([29], last=False) == 29


@pytest.mark.parametrize("value", [0.3, 0.1 + 0.2, 1 / 3, 0.7])
@pytest.mark.parametrize("noise", [0.0, FP32, FP64])
def test_a_trial_like_all_others_is_not_worse_than_the_median(value: float, noise: float) -> None:
    """The mean of three times 0.7 is 0.6999999999999998 where sums are rounded one by one."""
    for signs in SIGNS:
        rule = MedianRule(sweep(Median(min_iter=1, min_trials=2)), 100)
        for number, sign in enumerate(signs):
            said = [rule.judge(number, step, value * (1 + sign * noise)) for step in (1, 2, 3)]
            assert said == [None] * 3


@pytest.mark.parametrize("noise", [0.0, FP32, -FP32, FP64, -FP64])
def test_a_bound_that_is_just_met_is_met(noise: float) -> None:
    one = StopRules([BoundRule(metric="flow/cos", below=0.3)], METRIC)
    assert one.feed({"step": 1, "flow/cos": 0.3 * (1 + noise)}) is None
    two = StopRules([GainRule(metric="flow/cos", gains_less_than=0.1, patience=1)], METRIC)
    for step, value in enumerate((0.7, 0.8, 0.9, 1.0)):
        assert two.feed({"step": step, "flow/cos": value * (1 + noise)}) is None
    assert two.feed({"step": 9, "flow/cos": 1.09}) is not None


def test_cma_es_draws_alike_whatever_directions_its_eigenvectors_have(monkeypatch) -> None:
    """LAPACKs differ in eigenvectors' signs, and in all of them where eigenvalues are equal."""
    exact = np.linalg.eigh

    def other(matrix: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        values, vectors = exact(matrix)
        turned = vectors * np.array([1, -1, -1])
        if np.ptp(values) < 1e-12:
            turned = turned @ np.linalg.qr(np.arange(9.0).reshape(3, 3) % 5 + np.eye(3))[0]
        return values, turned

    def points() -> np.ndarray:
        strategy, out = Strategy(3, 0.2, None, seed=0), []
        for _ in range(4):
            born = [strategy.ask() for _ in range(strategy.population_size)]
            strategy.learn(sorted(born, key=lambda x: float(x @ [1.0, 2.0, -1.0])))
            out += born
        return np.array(out)

    plain = points()
    monkeypatch.setattr(np.linalg, "eigh", other)
    assert points() == pytest.approx(plain, abs=1e-9)


@pytest.mark.parametrize("noise", [FP32, FP64])
def test_equal_trials_are_ranked_by_number(noise: float) -> None:
    for signs in SIGNS:
        trials = [trial(i, metrics={METRIC: 0.3 * (1 + s * noise)}) for i, s in enumerate(signs)]
        for goal in ("minimize", "maximize"):
            found = ranked(trials[::-1], Metric(METRIC, goal))
            assert [each.number for each in found] == [0, 1, 2]


def test_steps_of_a_range_are_one_setting_with_the_number_that_was_typed() -> None:
    assert setting({"x": 0.1 + 2 * 0.1}) == setting({"x": 0.3})
    assert setting({"x": [0.1 + 0.2]}) == setting({"x": [0.3]})
    assert setting({"x": 0.3001}) != setting({"x": 0.3})


@pytest.mark.parametrize("low", [0.0, 0.1, 0.7, 3.0])
def test_a_twentieth_of_the_range_from_its_end_is_no_edge(low: float) -> None:
    space = {"optim.lr": {"distribution": "uniform", "min": low, "max": low + 1}}
    for value in (low + 0.05, low + 0.95):
        metric = Metric(METRIC, "minimize")
        only = (trial(0, params={"optim.lr": value}),)
        loaded = Loaded(Path("nowhere"), "s", {"parameters": space}, (metric,), only, {}, ())
        assert edges(loaded) == []


@pytest.mark.parametrize("noise", [0.0, FP32, -FP32, FP64, -FP64])
def test_a_finding_does_not_hang_on_a_number_that_is_1_by_its_formula(noise: float) -> None:
    """A field that stands still has an nmse of 1: not above 1, and not below it."""
    reading = Reading({"flow/nmse": 1 + noise}, {}, [], {})
    assert above("flow/nmse", 1.0)(reading) is None
    assert below("flow/nmse", 1.0)(reading) is None


@pytest.mark.parametrize("order", [1, -1])
def test_of_equally_near_entries_of_a_pool_the_first_is_the_nearest(order: int) -> None:
    space = Space({"optim.lr": LogUniform(min=1e-4, max=1e-2)})
    ends = (1e-2, 1e-4)[::order]
    entries = [Entry(number, {"optim.lr": lr}, (), {}, None) for number, lr in enumerate(ends)]
    assert space.nearest({"optim.lr": 1e-3}, entries).number == 0


def test_six_digits_and_what_is_no_number() -> None:
    assert rounded(0.1 + 0.2) == rounded(0.3) == 0.3
    assert rounded(0.300001) != rounded(0.3)
    assert [rounded(value) for value in (math.inf, -math.inf, 0.0)] == [math.inf, -math.inf, 0.0]
    assert math.isnan(rounded(math.nan))
