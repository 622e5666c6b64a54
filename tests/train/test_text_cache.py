"""Training with what the text model made of the captions kept is training without."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from support import tiny_latents, tiny_recipe

from flowray.config.load import override_recipe
from flowray.store.latents import load_latents
from flowray.store.rows import read_rows
from flowray.store.run import RunDirectory
from flowray.train.group import Group
from flowray.train.loop import train
from flowray.train.state import fresh_state
from flowray.train.step import BatchMaker, train_step

SAMPLES, STEPS = 24, 12  # four epochs of three steps


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_run_with_the_cache_is_the_run_without(precision: str, tmp_path: Path) -> None:
    given: dict[str, Any] = {"train.precision": precision, "model.text.connector.layers": 1}
    given |= {f"model.text.connector.{key}": 32 for key in ("hidden", "intermediate", "out")}
    recipe = tiny_recipe(tmp_path, **given, **{"model.text.connector.heads": 2})
    latents = load_latents(tiny_latents(tmp_path / "latents", SAMPLES))
    group = Group(0, 1, torch.device("cpu"))
    losses, parameters, passes = [], [], []
    for cache in (False, True):
        own = override_recipe(recipe, {"model.text.cache": cache})
        state, batches, counts = fresh_state(own, group.device), BatchMaker(own, latents, group), []

        def hear(module: Any, args: Any, given: Any, counts: list[int] = counts) -> None:
            if (ids := given.get("input_ids")) is not None:
                counts.append(len(ids))

        state.model.text.backbone.register_forward_pre_hook(hear, with_kwargs=True)
        rows = [
            train_step(state, state.objective, batches(step), own, group) for step in range(STEPS)
        ]
        losses.append(torch.stack([row["loss/total"].detach() for row in rows]))
        parameters.append({name: p.detach().clone() for name, p in state.parameters.items()})
        passes.append(counts)
    assert passes[0] == [recipe.train.batch_size] * STEPS
    assert sum(passes[1]) <= SAMPLES  # each caption once
    assert len(passes[1]) <= SAMPLES // recipe.train.batch_size
    close = {"atol": 1e-5, "rtol": 1e-4} if precision == "fp32" else {"atol": 2e-3, "rtol": 2e-2}
    torch.testing.assert_close(losses[1], losses[0], **close)
    assert "text.queries" in parameters[0]
    for name, value in parameters[0].items():
        torch.testing.assert_close(parameters[1][name], value, **close, msg=name)


def test_losses_probes_and_pictures_are_those_without(tmp_path: Path) -> None:
    recipe, group = tiny_recipe(tmp_path), Group(0, 1, torch.device("cpu"))
    runs = {}
    for cache in (False, True):
        own = override_recipe(recipe, {"name": f"cache_{cache}", "model.text.cache": cache})
        runs[cache] = RunDirectory(tmp_path / own.name)
        train(own, runs[cache], group, lambda row: None)
    without, kept = (
        [row for file in (run.metrics, run.probes) for row in read_rows(file)]
        for run in (runs[False], runs[True])
    )
    assert any("ema/shoot/nmse" in row for row in kept)
    for a, b in zip(without, kept, strict=True):
        assert a.keys() == b.keys()
        for key in a:
            if not key.startswith("perf/"):
                assert b[key] == pytest.approx(a[key], rel=1e-3, abs=1e-6), key
    pictures = [sorted(run.samples.glob("*.png")) for run in (runs[False], runs[True])]
    assert pictures[0]
    for one, other in zip(*pictures, strict=True):
        assert one.name == other.name
        drawn, wanted = (np.asarray(Image.open(file)).astype(int) for file in (other, one))
        assert np.abs(drawn - wanted).max() <= 2
