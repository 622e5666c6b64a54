"""The policy alone: no Ray, no files, no study."""

import math

import pytest
from builders import METRIC, make_sweep

from flowray.sweepconfig.stop import BoundRule, FindingRule
from flowray.sweepconfig.sweep import Hyperband, Median
from flowray.tune.policy import Continue, Pause, Policy, Stop

BUDGET = 40


def row(step, value, **more):
    return {"step": step, "budget_steps": BUDGET, METRIC: value, **more}


def test_a_rule_stops_and_says_which_it_was():
    rules = (BoundRule(metric="flow/cos", below=0.1), BoundRule(metric=METRIC, above=5))
    policy = Policy(make_sweep(stop=rules), BUDGET)
    assert policy.decide(0, row(10, 1.0)) == Continue()
    decision = policy.decide(0, row(20, 9.0))
    assert isinstance(decision, Stop)
    assert (decision.kind, decision.rule) == ("rule", 1)


def test_a_number_that_is_not_finite_stops_without_a_rule():
    decision = Policy(make_sweep(), BUDGET).decide(0, row(10, math.nan))
    assert isinstance(decision, Stop)
    assert (decision.kind, decision.rule) == ("not_finite", None)


def test_a_finding_in_the_row_stops():
    policy = Policy(make_sweep(stop=(FindingRule(finding="scale_twice"),)), BUDGET)
    found = {"id": "scale_twice", "severity": "bad", "evidence": "0.55 of 1"}
    assert policy.decide(0, row(10, 1.0, findings=[])) == Continue()
    assert isinstance(policy.decide(0, row(20, 1.0, findings=[found])), Stop)


@pytest.mark.parametrize("over", [{"step": BUDGET}, {"repeat": 1}])
def test_nothing_is_stopped_at_its_end_or_in_a_later_seed(over):
    policy = Policy(make_sweep(stop=(BoundRule(metric=METRIC, above=5),)), BUDGET)
    assert policy.decide(0, {**row(10, 9.0), **over}) == Continue()


def test_at_a_rung_trials_pause_and_the_best_is_promoted():
    policy = Policy(make_sweep(early_terminate=Hyperband(min_iter=10, eta=2)), BUDGET)
    assert isinstance(policy.decide(0, row(10, 2.0)), Pause)
    assert policy.promote([0], last=False) is None
    assert policy.decide(1, row(10, 1.0)) == Continue()
    assert isinstance(policy.decide(2, row(10, 1.5)), Pause)
    assert isinstance(policy.decide(3, row(10, 3.0)), Pause)
    assert policy.promote([0, 2, 3], last=False) == 2  # two of four go on
    assert policy.promote([0, 3], last=True) == 0
    assert [policy.reached_rung(number) for number in (0, 4)] == [True, False]


def test_the_median_stops_for_good():
    policy = Policy(make_sweep(early_terminate=Median(min_iter=10, min_trials=2)), BUDGET)
    decisions = [policy.decide(n, row(10, value)) for n, value in enumerate([1.0, 1.0, 2.0])]
    assert decisions[:2] == [Continue(), Continue()]
    assert isinstance(decisions[2], Stop)
    assert decisions[2].kind == "comparison"
    assert not policy.pauses


@pytest.mark.parametrize(
    "early", [None, Hyperband(min_iter=10, eta=2), Median(min_iter=10, min_trials=2)]
)
def test_the_same_rows_leave_the_same_policy(early):
    """What lets a new session stand where the last one ended."""
    rules = (BoundRule(metric=METRIC, above=3, patience=2),)
    sweep = make_sweep(early_terminate=early, stop=rules)
    rows = [
        (number, row(step, 0.7 * number + 10 / step))
        for step in range(5, BUDGET + 1, 5)
        for number in range(5)
    ]
    one, two = Policy(sweep, BUDGET), Policy(sweep, BUDGET)
    first = [one.decide(*each) for each in rows]
    for each in rows[:17]:
        two.decide(*each)
    assert [two.decide(*each) for each in rows[17:]] == first[17:]
    assert {type(decision) for decision in first} != {Continue}
