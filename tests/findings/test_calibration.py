"""Numbers held against those of healthy runs, findings that exclude each other, and the answer
where no rule knows the cause.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
from healthy import FACTS, HEALTHY

from flowray.findings.calibration import LEVELS, domain, healthy_ranges, most_unlike, ranges_of
from flowray.findings.checks import above, below
from flowray.findings.consequences import CONTRADICTIONS
from flowray.findings.derived import DERIVED
from flowray.findings.diagnose import diagnose
from flowray.findings.reading import Reading
from flowray.findings.rule import Rule
from flowray.findings.rules import RULES
from flowray.findings.rules_unlike import UNLIKE, held

ROWS = [{"shoot/energy": 0.5 + i / 100, "flow/cos": 0.9, "std/mean": 1.0} for i in range(41)]


def test_a_range_counts_who_is_as_far_out():
    one = ranges_of(ROWS)["shoot/energy"]
    assert len(one.quantiles) == LEVELS + 1
    assert one.quantiles[0] == 0.5
    assert one.quantiles[-1] == 0.9
    assert one.beyond(0.95, "above") == 0.0
    assert one.beyond(0.95, "below") == 1.0
    assert one.beyond(0.7, "above") == pytest.approx(0.5, abs=1.1 / LEVELS)


@pytest.mark.parametrize(
    ("value", "better", "far"),
    [
        (0.9, "none", 0.0),
        (0.9 + 0.32, "none", 1.0),
        (0.5 - 0.32, "none", 1.0),
        (0.9 + 0.32, "higher", 0.0),
        (0.5 - 0.64, "higher", 2.0),
        (0.9 + 0.32, "lower", 1.0),
        (0.5 - 0.64, "lower", 0.0),
    ],
)
def test_how_far_outside_counts_on_the_bad_side(value, better, far):
    assert ranges_of(ROWS)["shoot/energy"].outside(value, better) == pytest.approx(far, abs=0.01)


def test_above_a_positive_range_factors_count():
    """A velocity that is small by right made a healthy run's guidance/gap, a share of it, 20 times
    any other's.
    """
    spread = ranges_of([{"x": 2.0 ** (i / 4)} for i in range(41)])["x"]  # 1 to 1024, in factors
    assert spread.outside(1024 * 2**8, "none") == pytest.approx(1.0, abs=0.05)
    assert spread.outside(1024 * 2**8, "higher") == 0.0
    assert 0 < spread.outside(0.0, "none") < 0.01
    signed = ranges_of([{"x": i - 20.0} for i in range(41)])["x"]
    assert signed.outside(20.0 + 32, "none") == pytest.approx(1.0, abs=0.01)


def test_a_key_of_few_runs_has_no_range():
    assert "rare" not in ranges_of([*ROWS, {"rare": 1.0}])


def test_the_furthest_come_first():
    r = Reading({"shoot/energy": 3.0, "flow/cos": 0.1, "std/mean": 1.0}, {}, (), DERIVED)
    ranges = ranges_of(ROWS)
    assert [one.key for one in most_unlike(r, ranges, list(ranges))] == ["flow/cos", "shoot/energy"]


def rule(id: str, check, **more) -> Rule:
    return Rule(id, "bad", check, "cause", "fix", **more)


@pytest.mark.parametrize("pair", CONTRADICTIONS, ids=sorted)
def test_of_two_that_exclude_each_other_one_is_shown(pair):
    first, second = sorted(pair)
    rules = [
        rule(first, above("x", 0.0)),
        rule(second, above("x", 0.0)),
        rule("other", above("x", 0)),
    ]
    assert [found.id for found in diagnose({"x": 1.0}, {}, rules=rules)] == [first, "other"]


def test_every_contradiction_is_between_rules_that_are_there():
    assert {id for pair in CONTRADICTIONS for id in pair} <= {one.id for one in RULES}


def test_a_finding_says_how_many_healthy_runs_look_so():
    ranges = healthy_ranges()
    low = ranges["flow/cos"].quantiles[0]
    found = diagnose({"flow/cos": low - 0.1}, {}, rules=[rule("r", below("flow/cos", low))])
    assert [one.healthy_share for one in found] == [0.0]
    many = diagnose({"flow/cos": low + 0.1}, {}, rules=[rule("r", below("flow/cos", 1.0))])
    assert many[0].healthy_share > 0
    assert diagnose({"x": 1.0}, {}, rules=[rule("r", above("x", 0))])[0].healthy_share is None


def odd_run() -> dict[str, float]:
    """A healthy run but for numbers that no rule reads."""
    keys = [key for key in held(healthy_ranges()) if key.startswith("optim/step_highest/")]
    return {**HEALTHY, **dict.fromkeys(keys[:4], 40.0)}


SMALL = {**FACTS, "step": 150, "steps": 150, "batch_size": 32}


def test_what_no_rule_explains_is_said_to_be_unknown():
    inside = {name: high for name, (_, high) in domain().items()}
    found = diagnose(odd_run(), {**SMALL, **inside}, rules=UNLIKE)
    assert [(one.id, one.severity) for one in found] == [("unlike_healthy", "warn")]
    assert len(found[0].judged) == 3
    assert len({one.key for one in found[0].judged} & (odd_run().keys() - HEALTHY.keys())) >= 2


def test_of_a_run_of_another_size_nothing_is_said():
    outside = {name: 100 * high for name, (_, high) in domain().items()}
    assert diagnose(odd_run(), {**SMALL, **outside}, rules=UNLIKE) == []


def test_a_known_cause_leaves_no_room_for_an_unknown_one():
    inside = {name: high for name, (_, high) in domain().items()}
    rules = [rule("known", above("flow/cos", 0.0)), *(replace(one) for one in UNLIKE)]
    assert [one.id for one in diagnose(odd_run(), {**SMALL, **inside}, rules=rules)] == ["known"]
