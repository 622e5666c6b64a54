"""The synthetic sweep that measures the tuner's overhead, through the real tuner and through stock Ray Tune."""

import json

import pytest

from flowray.cli.bench import main


@pytest.mark.slow
def test_both_sides_end_all_their_trials(capsys):
    assert main(["tune-overhead", "--trials", "4", "--rows", "3", "--rounds", "1", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["guards"] == {"all_trials_ended": True}
    assert set(facts["ratios"]) == {"trial_seconds", "rows_per_s"}
    for name in ("flowray", "stock"):
        assert 0 < facts["seconds_per_trial"][name] < 60
        assert facts["rows_per_second"][name] > 0
