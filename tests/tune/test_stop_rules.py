"""Stop rules: what fires, when, and in which words."""

import math

import pytest

from flowray.config.errors import InputError
from flowray.sweepconfig.sweep import StopRule
from flowray.tune.stop import StopRules, check_findings

COS = StopRule(metric="flow/cos", below=0.3, after=200, patience=2)


def feed(watch, *rows):
    return [watch.feed({"step": step, **metrics}) for step, metrics in rows]


def test_patience_counts_probes_in_a_row_from_after_on():
    watch = StopRules([COS], "shoot/nmse")
    low, high = {"flow/cos": 0.08}, {"flow/cos": 0.4}
    said = feed(watch, (100, low), (150, low), (200, low), (250, high), (300, low), (350, low))
    # before `after`, one strike, a good probe in between, one strike again
    assert said[:5] == [None] * 5
    assert said[5] == "flow/cos 0.08 stayed below 0.3 for 2 probes, to step 350"


def test_above_and_patience_one():
    watch = StopRules([StopRule(metric="shoot/nmse", above=1.5)], "shoot/nmse")
    assert feed(watch, (10, {"shoot/nmse": 1.5}), (20, {"shoot/nmse": 1.51})) == [
        None,
        "shoot/nmse 1.51 is above 1.5 at step 20",
    ]


def test_nan_of_a_watched_metric_stops_at_once_and_of_another_does_not():
    assert (
        StopRules([], "shoot/nmse").feed({"step": 5, "shoot/nmse": math.nan})
        == "shoot/nmse is nan at step 5"
    )
    assert (
        StopRules([COS], "shoot/nmse").feed({"step": 5, "flow/cos": math.inf})
        == "flow/cos is inf at step 5"
    )
    assert (
        StopRules([COS], "shoot/nmse").feed({"step": 5, "text/cos": math.nan, "shoot/nmse": None})
        is None
    )


def test_replay_leaves_the_same_state_and_rows_seen_before_count_once():
    row = {"flow/cos": 0.1}
    watch = StopRules([COS], "shoot/nmse")
    assert feed(watch, (200, row), (200, row), (150, row)) == [None] * 3
    replayed = StopRules([COS], "shoot/nmse")
    feed(replayed, (200, row))
    assert watch.feed({"step": 250, **row}) == replayed.feed({"step": 250, **row}) is not None


def test_every_rule_counts_every_row():
    rules = [
        StopRule(metric="a/x", above=1, patience=2),
        StopRule(metric="b/y", above=1, patience=2),
    ]
    watch = StopRules(rules, "a/x")
    bad = {"a/x": 2.0, "b/y": 2.0}
    assert feed(watch, (1, bad), (2, bad))[1].startswith("a/x")
    assert feed(watch, (3, {"a/x": 0.0, "b/y": 2.0}))[0].startswith("b/y")


def found(**severities):
    """Row values of an examination: findings by id and severity."""
    return {
        "findings": [
            {"id": name, "severity": severity, "evidence": f"{name} it is"}
            for name, severity in severities.items()
        ]
    }


def test_a_finding_stops_in_the_doctors_words_and_patience_counts_examinations():
    watch = StopRules([StopRule(finding="source_collapsed", after=20, patience=2)], "shoot/nmse")
    ill = found(lr_too_low="warn", source_collapsed="bad")
    said = feed(watch, (10, ill), (20, ill), (30, {"shoot/nmse": 1.0}), (40, ill))
    assert said == [
        None,
        None,
        None,
        "the doctor at step 40, 2 times in a row: source_collapsed: source_collapsed it is",
    ]
    # a visit without it starts again
    assert feed(watch, (50, found(lr_too_low="bad")), (60, ill)) == [None, None]


def test_a_severity_is_met_by_itself_and_by_worse():
    rows = [
        (1, found(undertrained="info")),
        (2, found(clip_weak="warn")),
        (3, found(scale_twice="bad")),
    ]
    met = {
        s: [w is not None for w in feed(StopRules([StopRule(finding=s)], "a/x"), *rows)]
        for s in ("info", "warn", "bad")
    }
    assert met == {
        "info": [True, True, True],
        "warn": [False, True, True],
        "bad": [False, False, True],
    }


def test_a_finding_that_does_not_exist_is_refused():
    check_findings([StopRule(finding="bad"), StopRule(finding="lr_too_low"), COS], ["lr_too_low"])
    with pytest.raises(InputError, match="unknown finding lr_to_low, did you mean lr_too_low"):
        check_findings([StopRule(finding="lr_to_low")], ["lr_too_low"])
