"""The measurement of trial start-up: the real loop on both sides, by the times that the trials
themselves leave.
"""

import json

import pytest

from benchmarks.__main__ import main
from benchmarks.startup import _medians
from benchmarks.trial_startup import Start
from flowray.config.errors import InputError


def test_the_first_trial_is_told_apart():
    rounds = [
        [Start(9.0, 19.0), Start(1.0, 2.0), Start(3.0, 6.0)],
        [Start(8.0, 9.0), Start(4.0, 5.0), Start(4.0, 7.0)],
    ]
    assert _medians(rounds) == {
        "loop": [2.0, 4.0],
        "row": [4.0, 6.0],
        "first_loop": [9.0, 8.0],
        "first_row": [19.0, 9.0],
    }


def test_one_trial_is_too_few():
    with pytest.raises(InputError, match="--trials 2"):
        main(["trial-startup", "--trials", "1"])


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2])
def test_both_sides_train_the_loop(capsys, workers):
    assert (
        main(
            ["trial-startup", "--trials", "2", "--rounds", "1", "--workers", str(workers), "--json"]
        )
        == 0
    )
    facts = json.loads(capsys.readouterr().out)
    assert (facts["bench"], facts["workers"], facts["trials"]) == ("trial-startup", workers, 2)
    assert facts["guards"] == {"all_trials_of_flowray": True, "all_trials_of_stock": True}
    for seconds in facts["seconds"].values():
        assert 0 < seconds["loop"] < seconds["row"]
        assert 0 < seconds["first_loop"] < seconds["first_row"]
    startup = facts["ratios"]["startup"]["median"]
    assert startup == pytest.approx(
        facts["seconds"]["stock"]["loop"] / facts["seconds"]["flowray"]["loop"]
    )
    if workers == 1:
        assert startup >= 3
        assert facts["seconds"]["flowray"]["loop"] < facts["seconds"]["flowray"]["first_loop"]
