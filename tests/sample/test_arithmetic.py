"""a + b - c: the last column by hand, the others what the captions are drawn as."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support import answering_model, tiny_recipe

from flowray.config.errors import InputError
from flowray.config.flow import SampleConfig
from flowray.sample.arithmetic import sum_latents
from flowray.sample.generate import generate_latents, source_noise
from flowray.sample.prompts import check_balanced

A, B, C = "a large red circle on the left", "a blue square", "cross"
CPU = torch.device("cpu")
CASES: dict[str, dict[str, Any]] = {
    "text": {},
    "text, adaln, dropped where null": {
        "model.velocity.condition.kind": "adaln",
        "model.source.drop_null": True,
    },
    "noise, adaln": {
        "model.source.kind": "noise",
        "loss.kl.weight": 0,
        "model.velocity.condition.kind": "adaln",
    },
}


@pytest.mark.parametrize("name", CASES)
def test_the_sum_by_hand(name: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    """One step: means and velocities of a + b - c, a's log-variance, one noise for all."""
    recipe = tiny_recipe(tmp_path_factory.mktemp("sum"), **CASES[name])
    model, config = answering_model(recipe).eval(), SampleConfig(steps=1)
    noise = source_noise(model, [A], 7, CPU)
    got = sum_latents(model, A, [B], [C], config, noise)
    assert got.shape == (4, 4, 4, 4)
    for column, caption in enumerate((A, B, C)):
        alone = generate_latents(model, [caption], config, noise)[0]
        assert torch.allclose(got[column], alone, atol=1e-4)
    with torch.no_grad():
        a, b, c = (model.source([caption], noise) for caption in (A, B, C))
        mean = a.posterior.mean + b.posterior.mean - c.posterior.mean
        z0 = mean + a.posterior.std * noise
        code, null = torch.zeros(1), torch.tensor([False])
        v_a, v_b, v_c = (model.velocity(z0, code, null, each.text) for each in (a, b, c))
        v = v_a + v_b - v_c if model.velocity.conditioned else v_a
    assert torch.allclose(got[3], (z0 + v)[0], atol=1e-4)
    assert float((got[3] - got[0]).abs().max()) > 1e-3


def test_as_much_is_added_as_is_taken_away() -> None:
    check_balanced([B], [C])
    for plus, minus in (([B], []), ([], [C])):
        with pytest.raises(InputError, match="want as many of one as of the other"):
            check_balanced(plus, minus)
