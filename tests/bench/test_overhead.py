"""The synthetic sweep that measures the tuner's overhead, through the real tuner and through
stock Ray Tune.
"""

import json

import pytest

from benchmarks.__main__ import main
from benchmarks.overhead import ratio

TRIALS, ROWS = 4, 3


def test_a_ratio_is_taken_round_by_round():
    assert ratio([2.0, 9.0, 8.0], [1.0, 3.0, 1.0]) == {
        "median": 3.0,
        "min": 2.0,
        "max": 8.0,
        "rounds": 3,
    }


@pytest.mark.slow
def test_all_sides_end_all_their_trials(capsys):
    assert (
        main(
            [
                "tune-overhead",
                "--trials",
                str(TRIALS),
                "--rows",
                str(ROWS),
                "--rounds",
                "1",
                "--json",
            ]
        )
        == 0
    )
    facts = json.loads(capsys.readouterr().out)
    assert (facts["bench"], facts["trials"], facts["guards"]) == (
        "tune-overhead",
        TRIALS,
        {"all_trials_ended": True},
    )
    seconds, rows = facts["seconds_per_trial"], facts["rows_per_second"]
    assert set(seconds) == set(rows) == {"flowray", "stock", "stock_reusing"}
    for name in seconds:
        assert seconds[name] > 0
        # rows a trial: the first rung is the first row
        assert 1 <= rows[name] * seconds[name] <= ROWS
    for suffix, other in (("", "stock"), ("_reusing", "stock_reusing")):
        assert facts["ratios"][f"trial_seconds{suffix}"]["median"] == pytest.approx(
            seconds[other] / seconds["flowray"]
        )
        assert facts["ratios"][f"rows_per_s{suffix}"]["median"] == pytest.approx(
            rows["flowray"] / rows[other]
        )
