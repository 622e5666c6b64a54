"""Ranks that hold parts train as one process does; a checkpoint fits any number of ranks."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from support import assert_refused, on_ranks, on_two_ranks, tiny_recipe
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from flowray.config.errors import InputError
from flowray.config.load import override_recipe
from flowray.config.recipe import Recipe
from flowray.model.assemble import build_model
from flowray.store.checkpoint import list_checkpoints, load_state, load_tensors
from flowray.store.latents import ensure_latents, load_latents
from flowray.store.rows import read_rows
from flowray.store.run import RunDirectory
from flowray.train.group import Group
from flowray.train.loop import train
from flowray.train.sharding import local, whole
from flowray.train.state import TrainState, fresh_state, tensor_groups
from flowray.train.step import BatchMaker, train_step

Tensors = dict[str, torch.Tensor]
STEPS = 4
ALONE = Group(0, 1, torch.device("cpu"))
CASES: dict[str, dict[str, Any]] = {
    "plain": {"optim.clip_grad": 0.1},
    "accumulated": {"train.accumulate": 2},
    # a logit scale without a dimension, negatives from both ranks, a teacher that follows
    "semantic": {"loss.clip.weight": 0.5, "loss.dino.weight": 0.5, "loss.dino.prototypes": 16},
    "dimr": {
        "model.velocity.kind": "dimr",
        "model.velocity.widths": [16, 8],
        "model.velocity.depths": [1, 3],
        "model.velocity.heads": 2,
        "model.velocity.level_weights": [0.5, 1.0],
    },
    "checkpointed": {"model.velocity.gradient_checkpointing": True},
    "bf16": {"train.precision": "bf16"},
    "fp16": {"train.precision": "fp16", "train.loss_scale": 1024.0},
    "fp32 island": {"train.precision": "bf16", "train.velocity_fp32": True},
    "text in parts": {"resources.shard_text": True},
}
HALF = ("bf16", "fp16", "fp32 island")
ROWS = ("loss/flow", "loss/kl", "loss/total", "grad/total", "std/mean", "mu/abs_mean")


class Sent(TorchDispatchMode):
    """The collectives that torch sends within the block, each with the bytes of its largest tensor:
    what a gather makes, and what is reduced.
    """

    def __init__(self) -> None:
        super().__init__()
        self.sent: list[tuple[str, int]] = []

    def bytes_of(self, kind: str) -> list[int]:
        return [size for name, size in self.sent if kind in name]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            leaves = [x for x in tree_leaves(args) if isinstance(x, torch.Tensor)]
            self.sent.append((str(func), max((x.nbytes for x in leaves), default=0)))
        return func(*args, **(kwargs or {}))


def whole_groups(state: TrainState, group: Group) -> dict[str, Tensors]:
    """All tensors of a state in one piece, on the lead."""
    groups = {
        name: whole(tensors, keep=group.lead) for name, tensors in tensor_groups(state).items()
    }
    return groups if group.lead else {}


def steps(recipe: Recipe, group: Group) -> dict[str, Any]:
    """Rows of a few steps, the whole weights before and all tensors after them, how many numbers
    of weights this rank holds, and in each step the bytes of every gather of weights and of every
    sum of gradients.
    """
    latents = load_latents(
        ensure_latents(recipe.data, recipe.model.autoencoder, recipe.model.latent)["train"]
    )
    state = fresh_state(recipe, group.device, group)
    objective, make_batch = group.wrap(state.objective), BatchMaker(recipe, latents, group)
    start = whole_groups(state, group).get("model", {})
    start = {name: tensor.clone() for name, tensor in start.items()}
    rows, sent = [], []
    for step in range(STEPS):
        batch = make_batch(step)
        with Sent() as heard:
            row = train_step(state, objective, batch, recipe, group)
        sent.append([heard.bytes_of(kind) for kind in ("allgather", "reduce_scatter")])
        rows.append({key: float(group.mean(row[key].float())) for key in ROWS})
    return {
        "rows": rows,
        "start": start,
        "groups": whole_groups(state, group),
        "held": sum(local(p.detach()).numel() for p in state.parameters.values()),
        "sent": sent,
    }


def worker(rank: int, plain: dict, folder: Path) -> None:
    recipe = Recipe.model_validate(plain)
    cases = CASES | {
        f"{name} with all": {**CASES[name], "resources.shard": "none"} for name in ("plain", *HALF)
    }
    found = {
        name: steps(override_recipe(recipe, options), Group.current("cpu"))
        for name, options in cases.items()
    }
    torch.save(found, folder / f"rank-{rank}")


def in_shards(rank: int, plain: dict, folder: Path) -> None:
    """Full and hybrid sharding on two nodes of two ranks each."""
    os.environ["LOCAL_WORLD_SIZE"] = "2"
    group, recipe = Group.current("cpu"), Recipe.model_validate(plain)
    found = {
        kind: steps(override_recipe(recipe, {"resources.shard": kind}), group)
        for kind in ("full", "hybrid")
    }
    torch.save(found, folder / f"rank-{rank}")


def on_uneven_nodes(rank: int, plain: dict) -> None:
    os.environ["LOCAL_WORLD_SIZE"] = str(rank + 1)
    recipe, group = Recipe.model_validate(plain), Group.current("cpu")
    assert_refused(
        lambda: fresh_state(recipe, group.device, group),
        InputError,
        "resources.shard: hybrid wants as many workers on every node, got 1, 2",
    )


def assert_alike(lead: dict[str, Any], alone: dict[str, Any], within: float) -> None:
    """Rows, and how far all weights together have moved, with EMA and optimiser. Not each by
    itself: where a gradient is zero but for rounding, as an attention's key bias has it, AdamW
    moves as far as anywhere.
    """
    for row, other in zip(alone["rows"], lead["rows"], strict=True):
        for key in ROWS:
            assert other[key] == pytest.approx(row[key], rel=within, abs=1e-6), key
    assert lead["groups"].keys() == alone["groups"].keys()
    for name, tensors in alone["groups"].items():
        start = alone["start"] if name in ("model", "ema") else {}
        assert apart(lead["groups"][name], tensors, start) <= within, name


def apart(found: Tensors, tensors: Tensors, start: Tensors) -> float:
    """The distance of two sets of tensors, over the way that the second has come from `start`."""
    shapes = {key: tensor.shape for key, tensor in tensors.items()}
    assert {key: tensor.shape for key, tensor in found.items()} == shapes
    moved, between = (
        torch.cat([(x - less.get(key, 0)).flatten() for key, x in tensors.items()]).norm()
        for less in (start, found)
    )
    return float(between / moved)


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Recipe:
    return tiny_recipe(
        tmp_path_factory.mktemp("parts"),
        **{
            "loss.kl.schedule.kind": "constant",
            "resources.num_workers": 2,
            "resources.shard": "full",
        },
    )


@pytest.fixture(scope="module")
def ranks(base, tmp_path_factory) -> list[dict[str, Any]]:
    """What each of two ranks found in every case."""
    ensure_latents(base.data, base.model.autoencoder, base.model.latent)
    folder = tmp_path_factory.mktemp("found")
    on_two_ranks(worker, base.model_dump(mode="json"), folder)
    return [torch.load(folder / f"rank-{rank}", weights_only=True) for rank in (0, 1)]


@pytest.mark.parametrize("case", CASES)
def test_parts_train_as_the_whole(base, ranks, case):
    lead, other = (found[case] for found in ranks)
    alone = steps(override_recipe(base, CASES[case]), ALONE)
    assert other["groups"] == {}  # the lead alone gathers
    for name, tensor in alone["start"].items():
        assert torch.equal(lead["start"][name], tensor), name
    if case in HALF:  # rounding makes another step of another batch
        alone = ranks[0][f"{case} with all"]
    assert_alike(lead, alone, 1e-3)
    assert 0.45 * alone["held"] < lead["held"] < 0.55 * alone["held"]
    assert sum(found[case]["held"] for found in ranks) <= alone["held"] + 1  # and a logit scale


def test_parts_train_as_ranks_that_hold_all(ranks):
    assert_alike(ranks[0]["plain"], ranks[0]["plain with all"], 1e-3)
    assert ranks[0]["plain with all"]["sent"] == [[[], []]] * STEPS  # DDP sums otherwise


def test_what_a_step_sends(base, ranks):
    """Blocks are gathered for every forward and backward pass, the rest for both at once; gradients
    are summed once a step however it is cut. As docs/scaling.md says.
    """
    model = build_model(base.model, base.loss, base.seed)
    total = sum(p.nbytes for p in model.trainable().values())
    in_blocks = sum(
        p.nbytes for block in model.velocity.blocks_in_order() for p in block.parameters()
    )
    for gathered, summed in ranks[0]["plain"]["sent"]:
        assert (len(gathered), len(summed)) == (2 * 2 + 1, 2 + 1)
        assert sum(gathered) == pytest.approx(total + in_blocks, rel=0.01)  # padded to even parts
        assert sum(summed) == pytest.approx(total, rel=0.01)
    for gathered, summed in ranks[0]["accumulated"]["sent"]:
        assert sum(gathered) == pytest.approx(2 * (total + in_blocks), rel=0.01)
        assert sum(summed) == pytest.approx(total, rel=0.01)
    for gathered, summed in ranks[0]["bf16"]["sent"]:  # the blocks in half of the bytes
        assert sum(gathered) == pytest.approx(total, rel=0.01)
        assert sum(summed) == pytest.approx(total, rel=0.01)


@pytest.mark.slow
def test_four_ranks_on_two_nodes(base, tmp_path):
    recipe = override_recipe(base, {"resources.num_workers": 4})
    on_ranks(4, in_shards, recipe.model_dump(mode="json"), tmp_path)
    alone = steps(recipe, ALONE)
    found = [torch.load(tmp_path / f"rank-{rank}", weights_only=True) for rank in range(4)]
    for kind, parts in (("full", 4), ("hybrid", 2)):
        assert_alike(found[0][kind], alone, 1e-3)
        assert sum(each[kind]["held"] for each in found) == 4 / parts * alone["held"]
        assert found[3][kind]["rows"] == found[0][kind]["rows"]


def test_nodes_with_other_numbers_of_ranks_are_refused(base):
    recipe = override_recipe(base, {"resources.shard": "hybrid"})
    on_two_ranks(on_uneven_nodes, recipe.model_dump(mode="json"))


def go(recipe: Recipe) -> None:
    run = RunDirectory(Path(recipe.storage_path) / recipe.name)
    train(recipe, run, Group.current("cpu"), lambda row: None)


def rank_of_run(rank: int, plain: dict) -> None:
    go(Recipe.model_validate(plain))


def test_a_run_goes_on_with_other_ranks_in_other_parts(tmp_path):
    recipe = tiny_recipe(
        tmp_path, **{"train.log_every": 1, "train.steps": 16, "train.keep_checkpoints": 4}
    )
    go(recipe)
    stages = (
        (4, {}),
        (8, {"resources.num_workers": 2, "resources.shard": "full"}),
        (12, {"resources.num_workers": 2}),
        (16, {}),
    )
    for last, resources in stages:
        schedule = {"name": "moved", "train.steps": last, "optim.schedule": {"kind": "constant"}}
        stage = override_recipe(recipe, {**schedule, **resources})
        if stage.resources.num_workers == 1:
            go(stage)
        else:
            on_two_ranks(rank_of_run, stage.model_dump(mode="json"))
    straight = override_recipe(recipe, {"name": "straight", "optim.schedule": {"kind": "constant"}})
    go(straight)
    moved, still = (RunDirectory(tmp_path / "runs" / name) for name in ("moved", "straight"))
    rows, others = read_rows(still.metrics), read_rows(moved.metrics)
    assert [row["step"] for row in others] == [row["step"] for row in rows] == list(range(1, 17))
    for row, other in zip(rows, others, strict=True):
        assert other["loss/flow"] == pytest.approx(row["loss/flow"], rel=1e-4)
        assert other["grad/total"] == pytest.approx(row["grad/total"], rel=1e-3)
    for row, other in zip(read_rows(still.probes), read_rows(moved.probes), strict=True):
        for key in ("ema/shoot/nmse", "shoot/nmse", "ema/delta_rms"):
            assert other[key] == pytest.approx(row[key], rel=1e-3)
    first = tensor_groups(fresh_state(recipe, ALONE.device))["model"]
    checkpoints = [list_checkpoints(run.checkpoints) for run in (still, moved)]
    for one, two in zip(*checkpoints, strict=True):
        assert load_state(one)["step"] == load_state(two)["step"]
        for group, start in (("model", first), ("ema", first), ("optim", {})):
            assert apart(load_tensors(two, group), load_tensors(one, group), start) < 1e-2, group
