"""How often the host waits for the device in a step."""

from __future__ import annotations

import traceback
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from support import tiny_recipe
from torch.utils._python_dispatch import TorchDispatchMode

from flowray.config.flow import SampleConfig
from flowray.config.load import override_recipe
from flowray.config.recipe import Recipe
from flowray.flow import expect
from flowray.model.assemble import build_model
from flowray.sample.generate import generate_latents
from flowray.store.latents import ensure_latents, load_latents
from flowray.train.group import Group
from flowray.train.state import fresh_state
from flowray.train.step import BatchMaker, train_step

CPU = Group(0, 1, torch.device("cpu"))
# what answers with a number or a shape that only the device knows; the same on CPU and GPU
WAITING = {"_local_scalar_dense", "nonzero", "equal", "masked_select", "_unique2", "is_nonzero"}


class Waits(TorchDispatchMode):
    """Where the host asked, by the line of the package or of a library that did."""

    def __init__(self) -> None:
        super().__init__()
        self.places: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket.__name__ in WAITING:
            frames = [f for f in traceback.extract_stack()[:-1] if "/torch/" not in f.filename]
            self.places[f"{Path(frames[-1].filename).name}:{frames[-1].name}"] += 1
        return func(*args, **(kwargs or {}))


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    return tiny_recipe(
        tmp_path_factory.mktemp("waits"), **{"loss.clip.weight": 0.5, "loss.dino.weight": 0.1}
    )


def waits(recipe: Recipe) -> Counter[str]:
    folders = ensure_latents(recipe.data, recipe.model.autoencoder, recipe.model.latent)
    batches = BatchMaker(recipe, load_latents(folders["train"]), CPU)
    state = fresh_state(recipe, CPU.device)
    train_step(state, state.objective, batches(0), recipe, CPU)
    batch = batches(1)
    with Waits() as seen:
        train_step(state, state.objective, batch, recipe, CPU)
    return seen.places


@pytest.mark.parametrize(
    ("options", "passes"),
    [
        ({}, 1),
        ({"train.accumulate": 2}, 2),
        ({"train.precision": "bf16"}, 1),
        ({"train.precision": "fp16"}, 1),
        ({"loss.balance.kind": "shares"}, 1),  # not due
    ],
)
def test_an_ordinary_step_waits_for_nothing_but_the_library_of_the_text_model(
    base: Recipe, options: dict[str, Any], passes: int
) -> None:
    """transformers looks whether the mask of a pass over queries is all ones; flow/expect.py looks
    at times that lie on the CPU, and at a GPU's not at all.
    """
    seen = waits(override_recipe(base, options))
    assert seen.pop("expect.py:<genexpr>") == 4 * passes
    assert seen == {"masking_utils.py:_ignore_causal_mask_sdpa": passes}


@pytest.mark.parametrize(
    ("how", "calls"),
    [
        ({}, 5),
        ({"guidance_scale": 3.0, "guidance_rescale": 0.5}, 5),
        ({"guidance_scale": 3.0, "guidance_interval": (0.3, 0.7), "solver": {"kind": "heun"}}, 10),
    ],
)
def test_no_step_of_the_sampler_waits(base: Recipe, how: dict[str, Any], calls: int) -> None:
    model = build_model(base.model, base.loss, 0).eval()
    config = SampleConfig.model_validate({"steps": 5, **how})
    with torch.no_grad(), Waits() as seen:
        generate_latents(model, ["a", "b"], config, torch.zeros(2, *base.model.latent.shape))
    assert seen.places.pop("expect.py:<genexpr>") == 2 * calls  # at times on the CPU alone
    assert seen.places == {"masking_utils.py:_ignore_causal_mask_sdpa": 1}


def test_times_on_another_device_are_not_read() -> None:
    with Waits() as seen:
        expect.times(torch.zeros(3, device="meta"), 3)
    assert seen.places == Counter()
