"""The record that comes with flowray, and that the default sweep is worth its stops on it."""

import numpy as np
import pytest

from benchmarks.pool import packaged_pool, read_pool
from benchmarks.replay import sweep_search
from benchmarks.sweep import correlations
from flowray.sweepconfig.file import load_sweep

POOL = read_pool(packaged_pool())
# another space, not looked at while metric and rungs were chosen: benchmarks/pools/second.yaml
SECOND = read_pool(packaged_pool().with_name("second.jsonl"))


def test_it_is_whole():
    assert [entry.number for entry in POOL.entries] == list(range(60))
    for entry in POOL.entries:
        assert entry.error is None
        assert [row["step"] for row in entry.rows] == list(range(50, 501, 50))
        assert entry.params.keys() == POOL.sweep.parameters.keys()
    assert len(POOL.best(3)) == 3


def test_the_metric_of_the_default_sweep_knows_the_pictures():
    rho = correlations(POOL, POOL.judged_by[0])
    gain, blur = load_sweep("head").metric.name, "ema/shoot/nmse"
    assert rho[gain][0.33] > 0.65
    assert rho[gain][1.0] > max(0.75, abs(rho["loss/flow"][1.0]) + 0.1)
    assert abs(rho[blur][1.0]) < 0.5  # many answers: the mean of them is nearest to each


def test_the_metric_holds_on_a_pool_that_it_was_not_chosen_with():
    rho = correlations(SECOND, SECOND.judged_by[0])
    metric = load_sweep("head").metric.name
    assert len(SECOND.entries) == 30
    assert rho[metric][0.33] > 0.7
    assert rho[metric][1.0] > 0.6
    for cost in ("ema/shoot/nmse", "ema/shoot/energy"):  # lower is better, and it is not here
        assert rho[cost][1.0] > 0


def test_the_default_sweep_finds_one_of_the_best_for_less_than_half_of_a_random_search():
    hits = [sweep_search(POOL, POOL.best(3), seed, load_sweep("head"), 50).hit for seed in range(4)]
    drawn = (60 + 1) / (3 + 1)  # full trainings until the first of 3 among 60, on average
    assert np.mean(hits) / POOL.budget_steps < drawn / 2
    assert hits == [
        sweep_search(POOL, POOL.best(3), seed, load_sweep("head"), 50).hit for seed in range(4)
    ]


@pytest.mark.parametrize("name", ["flow/cos", "std/mean"])
def test_what_the_logs_warn_of_does_not_rank(name):
    """A cosine or a width is a floor: neither orders configurations by their pictures at a third
    of the budget.
    """
    assert abs(correlations(POOL, POOL.judged_by[0])[f"ema/{name}"][0.33]) < 0.5
