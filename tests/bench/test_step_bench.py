"""`flowray.bench step`: a step beside a plain loop's and an older commit's."""

import json
from dataclasses import replace

import pytest

from benchmarks.__main__ import main
from benchmarks.step import ARMS, QUICK, Timed, facts
from flowray.config.errors import InputError

OURS = Timed(0.1, 2.0, [4.0, 3.0, 2.0, 1.0])


def measured(**arms: Timed):
    """The facts of one round in which every other arm was as ours."""
    return facts(QUICK, "abc", 1000, {arm: [arms.get(arm, OURS)] for arm in ARMS})


def test_a_ratio_is_the_other_loops_time_over_ours():
    seconds = {"plain": 0.4, "before": 0.12, "bf16": 0.06}
    told = measured(**{arm: replace(OURS, step_s=step_s) for arm, step_s in seconds.items()})
    ratios = {name: ratio["median"] for name, ratio in told["ratios"].items()}
    wanted = {"vs_plain": 4.0, "vs_before": 1.2, "bf16_vs_before": 2.0, "aa": 1.0}
    assert ratios == pytest.approx(wanted)
    goals = {name: goal["reached"] for name, goal in told["goals"].items()}
    assert goals == {"vs_before": False, "bf16_vs_before": True, "probes_share": True}
    assert told["probes_share"] == pytest.approx(2.0 / 102.0)
    assert all(told["guards"].values())


def test_dear_probes_miss_their_goal():
    dear = replace(OURS, probe_s=4.0)
    assert not measured(flowray=dear, again=dear)["goals"]["probes_share"]["reached"]


@pytest.mark.parametrize("losses", [[4.0, 3.0, 2.0, 1.1], [4.0, 3.0, 2.0], [5.0, 3.0, 2.0, 1.0]])
def test_another_loss_curve_fails_its_guard(losses):
    guards = measured(plain=replace(OURS, losses=losses))["guards"]
    assert {name for name, holds in guards.items() if not holds} == {"equal_losses_plain"}


def test_a_commit_that_is_not_there_is_refused():
    with pytest.raises(InputError, match="--before: got 'nonsense'"):
        main(["step", "--quick", "--before", "nonsense"])


@pytest.mark.slow
def test_all_loops_train_to_the_same_losses(capsys):
    assert main(["step", "--quick", "--json", "--before", "HEAD"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["guards"] == {f"equal_losses_{arm}": True for arm in ARMS[1:]}
    assert told["seconds"].keys() == {*ARMS, "probe"}
    for name, arm in (("vs_plain", "plain"), ("vs_before", "before"), ("aa", "again")):
        seconds = told["seconds"]
        assert told["ratios"][name]["median"] == pytest.approx(seconds[arm] / seconds["flowray"])
