"""What a plan says of a run is what the run does: tokens, micro-batches, the size of a
checkpoint.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support import tiny_recipe

from flowray.cli.plan import make_plan
from flowray.store.latents import ensure_latents, load_latents
from flowray.store.run import RunDirectory
from flowray.train.group import Group
from flowray.train.state import fresh_state, save_state
from flowray.train.step import BatchMaker, train_step

CPU = Group(0, 1, torch.device("cpu"))


@pytest.mark.parametrize("option", ["adamw", "muon", "routed"])
def test_a_plan_is_what_the_run_does(tmp_path: Path, option: str) -> None:
    keys = {"train.accumulate": 2, "model.velocity.patch": 2, "model.text.queries": 6}
    more = {
        "adamw": {},
        "muon": {"optim.matrices.kind": "muon"},
        "routed": {"model.velocity.route": {"before": 0, "after": 1, "keep": 0.4}},
    }
    recipe = tiny_recipe(tmp_path, **keys, **more[option])
    plan, state = make_plan(recipe), fresh_state(recipe, CPU.device)
    shapes: dict[str, set[tuple[int, ...]]] = {"head": set(), "velocity": set()}
    state.model.head.register_forward_pre_hook(
        lambda module, args: shapes["head"].add(tuple(args[0].values.shape[:2]))
    )
    first = state.model.velocity.token_blocks().blocks[0]
    first.register_forward_pre_hook(
        lambda module, args: shapes["velocity"].add(tuple(args[0].shape[:2]))
    )

    latents = load_latents(
        ensure_latents(recipe.data, recipe.model.autoencoder, recipe.model.latent)["train"]
    )
    train_step(state, state.objective, BatchMaker(recipe, latents, CPU)(0), recipe, CPU)
    tokens, batch = plan["tokens"], plan["batch_per_gpu"]
    seen = 2 if option == "routed" else tokens["velocity"]  # in the first block
    assert shapes == {"head": {(batch, tokens["head"])}, "velocity": {(batch, seen)}}
    assert tokens.get("1 routed blocks") == (2 if option == "routed" else None)
    assert (batch, tokens["head"], tokens["velocity"]) == (4, 6, 4)
    longest = state.model.text.tokenize([" ".join(["red"] * 39)])  # and <eos>
    assert tokens["text"] == longest.ids.shape[1] + recipe.model.text.queries == 46

    run = RunDirectory(tmp_path / "run")
    run.create()
    save_state(state, recipe, run)
    size = sum(
        tensor.nbytes
        for file in run.checkpoints.rglob("*.safetensors")
        for tensor in load_file(file).values()
    )
    # AdamW's step counts are not planned
    assert size == pytest.approx(plan["checkpoint_bytes"], rel=0.01)
