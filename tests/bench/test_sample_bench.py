"""`flowray.bench sample`: the sampler beside the same loop on diffusers' scheduler."""

import json

import numpy as np
import pytest
import torch

from benchmarks.__main__ import main
from benchmarks.sampler import QUICK, facts, through_diffusers
from flowray.config.flow import EulerSolver, SampleConfig
from flowray.sample.generate import integrated

SECONDS = {"flowray": [0.1, 0.2], "diffusers": [0.2, 0.4], "again": [0.1, 0.2]}
PICTURES = dict.fromkeys((*SECONDS, "compiled"), np.full((1, 2, 2, 3), 7, np.uint8))


def test_a_ratio_is_above_1_where_we_or_the_graphs_are_faster():
    told = facts(QUICK, {**SECONDS, "compiled": [0.05, 0.1]}, PICTURES)
    ratios = {name: ratio["median"] for name, ratio in told["ratios"].items()}
    assert ratios == pytest.approx({"vs_diffusers": 2.0, "compiled": 2.0, "aa": 1.0})
    assert set(facts(QUICK, SECONDS, PICTURES)["ratios"]) == {"vs_diffusers", "aa"}


@pytest.mark.parametrize("value", [9, 5])
def test_other_pictures_fail_their_guard(value):
    other = np.full((1, 2, 2, 3), value, np.uint8)
    guards = facts(QUICK, SECONDS, {**PICTURES, "diffusers": other})["guards"]
    assert guards == {"equal_pictures_diffusers": False, "equal_pictures_again": True}


def test_diffusers_loop_is_ours_in_a_field_that_time_and_guidance_bend():
    """In their units of time: sigma 1 - t, a thousand timesteps, the velocity's sign turned."""

    def field(x, code, null):
        t = (0.5 - code / 8).view(-1, 1, 1, 1)
        return torch.where(null.view(-1, 1, 1, 1), t * x, (1 - t).square() - x)

    z0 = torch.randn(3, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    config = SampleConfig(steps=7, guidance_scale=3.0, solver=EulerSolver(nodes="left"))
    ours = integrated(config, field, z0)
    assert float((ours - z0).abs().max()) > 0.1
    assert torch.allclose(through_diffusers(config, field, z0), ours, atol=1e-5)


def test_the_arms_of_the_command_paint_the_same(capsys):
    assert main(["sample", "--quick", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["guards"] == {"equal_pictures_diffusers": True, "equal_pictures_again": True}
    assert told["seconds"].keys() == SECONDS.keys()
    assert all(ratio["rounds"] == QUICK.rounds for ratio in told["ratios"].values())
