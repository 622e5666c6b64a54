"""`flowray.bench train`: what Ray, checkpoints and kills cost a training."""

import json

import pytest

from benchmarks.__main__ import main
from benchmarks.train import (
    QUICK,
    Steps,
    checkpoint_facts,
    facts,
    goodput_facts,
    rate_facts,
    recovery_facts,
)

NEVER = 10**6
SLOW = [9.0] * 3  # the first steps of any run
EVEN = Steps([*SLOW, *[0.1] * 17], NEVER)
LATE = Steps([*SLOW, 0.3, *[0.1, 0.1, 0.1, 0.3] * 4], 4)  # after steps 4, 8, ...


def measured(goodput=None, ray=10.0):
    rates = {1: {"ray": [ray], "torchrun": [10.0], "again": [9.0]}}
    steps = {"with": [LATE], "without": [EVEN], "again": [EVEN]}
    recovery = {"flowray": [5.0], "stock": [15.0]}
    parts = [
        rate_facts(rates, True),
        checkpoint_facts(steps, [2.0], 300),
        recovery_facts(recovery, True),
        *([goodput_facts(goodput)] if goodput is not None else []),
    ]
    return facts(QUICK, parts)


def test_ratios_are_higher_where_flowray_is_better():
    told = measured(goodput=0.96)
    ratios = {name: ratio["median"] for name, ratio in told["ratios"].items()}
    assert ratios == pytest.approx(
        {
            "throughput_vs_torchrun_1": 1.0,
            "throughput_aa_1": 0.9,
            "stall": 10.0,
            "p99_step": 1 / 3,
            "mean_step": 17 / 27,
            "p99_aa": 1.0,
            "recovery": 3.0,
            "goodput": 0.96,
        }
    )
    goals = {name: goal["reached"] for name, goal in told["goals"].items()}
    assert goals == {
        "throughput_vs_torchrun_1": True,
        "stall": False,
        "p99_step": False,
        "goodput": True,
    }
    assert not measured(ray=9.8)["goals"]["throughput_vs_torchrun_1"]["reached"]


def test_a_checkpoint_that_delays_nothing_counts_as_a_tick():
    assert EVEN.stall == 0
    arms = {arm: [EVEN] for arm in ("with", "without", "again")}
    told = facts(QUICK, [checkpoint_facts(arms, [2.0], 300)])
    assert told["ratios"]["stall"]["median"] == pytest.approx(2000.0)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_every_arm_trains_and_comes_back(capsys):
    assert main(["train", "--quick", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["guards"] == {"equal_losses": True, "equal_losses_after_kills": True}
    assert told["ratios"].keys() == {
        *("throughput_vs_torchrun_1", "throughput_aa_1"),
        *("stall", "p99_step", "mean_step", "p99_aa", "recovery"),
    }
    assert told["checkpoint_bytes"] > 0
    seconds = told["seconds"]
    assert seconds["p99_with"] > 0
    assert told["ratios"]["recovery"]["median"] == pytest.approx(
        seconds["recovery_stock"] / seconds["recovery_flowray"]
    )
