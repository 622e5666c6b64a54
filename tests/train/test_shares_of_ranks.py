"""Every rank writes its share of a checkpoint, and any number of ranks goes on from it."""

from __future__ import annotations

import errno
import itertools
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from kills import Instant, assert_as_if_untouched, came, writing
from support import files_of_at_most, on_ranks, on_two_ranks, started_ranks, tiny_recipe

from flowray.config.load import override_recipe
from flowray.config.recipe import Recipe
from flowray.store.checkpoint import list_checkpoints, load_state, load_tensors
from flowray.store.run import RunDirectory
from flowray.train.group import Group
from flowray.train.loop import train
from flowray.train.sharding import share_of
from flowray.train.state import (
    ALONE,
    Halted,
    Kept,
    fresh_state,
    restore_state,
    save_state,
    write_kept,
)

GROUPS = ("model", "ema", "optim", "moving")
# what losses keep, and a number without a dimension, which ranks hold whole beside parts
SEMANTIC = {"loss.clip.weight": 0.5, "loss.dino.weight": 0.5, "loss.dino.prototypes": 16}


def run_of(recipe: Recipe) -> RunDirectory:
    return RunDirectory(Path(recipe.storage_path) / recipe.name)


def go(recipe: Recipe) -> RunDirectory:
    train(recipe, run_of(recipe), Group.current("cpu"), lambda row: None)
    return run_of(recipe)


def rank_of_run(rank: int, plain: dict[str, Any]) -> None:
    go(Recipe.model_validate(plain))


def save_again(rank: int, plain: dict[str, Any], run: Path, other: Path) -> None:
    """Restore a run's state, and save it as it is; a node has two ranks."""
    os.environ["LOCAL_WORLD_SIZE"] = "2"
    recipe, group = Recipe.model_validate(plain), Group.current("cpu")
    state = fresh_state(recipe, group.device, group)
    restore_state(state, recipe, RunDirectory(run), group)
    save_state(state, recipe, RunDirectory(other), group)


def sizes(checkpoint: Path) -> list[int]:
    """Bytes of tensors that each rank has written, those of files' heads left out."""
    of_ranks: dict[str, int] = {}
    for file in checkpoint.glob("*-of-*.safetensors"):
        rank = file.stem.split("-")[1]
        with file.open("rb") as opened:
            head = 8 + int.from_bytes(opened.read(8), "little")
        of_ranks[rank] = of_ranks.get(rank, 0) + file.stat().st_size - head
    return [of_ranks[rank] for rank in sorted(of_ranks)]


def test_a_state_is_the_same_from_any_ranks(tmp_path):
    """1 -> 2 in parts -> 4 in parts, of two nodes and of one -> 4 with all -> 1: bit for bit."""
    recipe = tiny_recipe(tmp_path, **{"train.steps": 4, **SEMANTIC})
    first = go(recipe)
    stages: list[tuple[int, dict[str, Any]]] = [
        (2, {"resources.shard": "full"}),
        (4, {"resources.shard": "hybrid"}),
        (4, {"resources.shard": "full"}),
        (4, {"resources.shard": "none"}),
        (1, {}),
    ]
    (before,) = list_checkpoints(first.checkpoints)
    start, last = load_state(before), first.path
    for place, (ranks, resources) in enumerate(stages):
        stage = override_recipe(recipe, {"resources.num_workers": ranks, **resources})
        again = tmp_path / f"again-{place}"
        plain = stage.model_dump(mode="json")
        if ranks == 1:
            with pytest.MonkeyPatch.context() as patch:
                patch.setenv("LOCAL_WORLD_SIZE", "1")
                save_again(0, plain, last, again)
        else:
            on_ranks(ranks, save_again, plain, last, again)
        (checkpoint,) = list_checkpoints(RunDirectory(again).checkpoints)
        for group in GROUPS:
            whole, found = load_tensors(before, group), load_tensors(checkpoint, group)
            assert found.keys() == whole.keys()
            for key, tensor in whole.items():
                assert found[key].dtype == tensor.dtype
                assert torch.equal(found[key], tensor), (stage, group, key)
        state = load_state(checkpoint)
        assert {**state, "files": start["files"], "data": start["data"]} == start
        if ranks > 1:
            assert len(written := sizes(checkpoint)) == ranks
            assert sum(written) == sum(sizes_alone(before))  # nothing twice
            assert max(written) < 1.15 * sum(written) / ranks, (stage, written)
        last = again
    assert state["files"] == start["files"]  # one process: the very bytes
    for file in before.glob("*.safetensors"):
        assert (checkpoint / file.name).read_bytes() == file.read_bytes()


def sizes_alone(checkpoint: Path) -> list[int]:
    return [
        tensor.nbytes for group in GROUPS for tensor in load_tensors(checkpoint, group).values()
    ]


def test_ranks_that_hold_all_share_the_bytes():
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(1, 300, (40,), generator=generator).tolist()
    groups = {
        group: {f"{place}": torch.empty(length) for place, length in enumerate(lengths)}
        for group in ("model", "ema")
    }
    shares = [share_of(groups, Group(rank, 7, ALONE.device)) for rank in range(7)]
    for group, tensors in groups.items():
        keys = list(itertools.chain(*(share[group] for share in shares)))
        assert sorted(keys) == sorted(tensors)  # each once
    written = [sum(t.nbytes for of in share.values() for t in of.values()) for share in shares]
    assert max(written) < 1.02 * min(written)
    assert share_of(groups, ALONE) == {name: {**of} for name, of in groups.items()}


def halted(rank: int, plain: dict[str, Any]) -> None:
    """Rank 1 can write less than its share."""
    recipe = Recipe.model_validate(plain)
    group, run = Group.current("cpu"), run_of(recipe)
    told = ["trained", "written"]
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # it may be a file too
    with files_of_at_most(1000 if rank == 1 else 2**30):
        try:
            go(recipe)
        except Halted as error:
            told[0] = f"{error.errno} {error}"
        weights = {"w": torch.full((3,), float("nan") if rank == 1 else 1.0)}
        try:
            write_kept(run, Kept(99, {"model": weights}, {}), 2, group=group)
        except Halted as error:
            told[1] = str(error)
    run.path.with_name(f"told-{rank}").write_text("\n".join(told))


def test_a_rank_that_cannot_write_halts_all_with_one_line(tmp_path):
    recipe = tiny_recipe(tmp_path, **{"train.steps": 4, "train.sample_every": 1000})
    run = go(recipe)
    more = {"train.steps": 400, "resources.num_workers": 2, "train.probe_every": 1000}
    two = override_recipe(recipe, {**more, "optim.schedule.kind": "constant"})
    on_two_ranks(halted, two.model_dump(mode="json"))
    lines = [run.path.with_name(f"told-{rank}").read_text().splitlines() for rank in (0, 1)]
    assert lines[0] == lines[1]
    assert lines[0][0] == (
        f"{errno.EFBIG} step 8: the checkpoint cannot be written: File too large (rank 1); the ones"
        " before it are kept"
    )
    assert lines[0][1].startswith("step 99: w is not finite, so no checkpoint was written")
    assert [path.name for path in run.checkpoints.iterdir()] == ["step_000004"]
    assert len(run.metrics.read_text().splitlines()) < 100  # not at the end of the run


@pytest.mark.faults
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("shard", ["none", "full"])
def test_a_rank_that_is_killed_while_it_writes(tmp_path, shard):
    """The others end by themselves, and the run goes on from the checkpoint before to the state of
    one that nobody touched.
    """
    cadence = {"train.steps": 24, "train.log_every": 1, "train.checkpoint_every": 3}
    cadence |= {"train.probe_every": 4, "train.sample_every": 1000, "probes.raw": False}
    two = {"resources.num_workers": 2, "resources.shard": shard}
    recipe = tiny_recipe(tmp_path, **cadence, **SEMANTIC, **two)
    whole = override_recipe(recipe, {"name": "whole"})
    on_two_ranks(rank_of_run, whole.model_dump(mode="json"))
    run, cut = run_of(recipe), 0
    for place, (step, rank) in enumerate(((4, 1), (9, 1), (14, 0), (19, 1))):
        processes = started_ranks(2, rank_of_run, recipe.model_dump(mode="json")).processes
        killed, other = processes[rank], processes[1 - rank]
        instant = Instant(step, "writing", 0.001 * place)
        assert came(instant, run, killed.is_alive), f"{instant}: the run ended before"
        os.kill(killed.pid, signal.SIGKILL)
        began = time.monotonic()
        other.join(600)
        assert other.exitcode not in (None, 0), time.monotonic() - began
        killed.join()
        cut += any(writing(run))
    on_two_ranks(rank_of_run, recipe.model_dump(mode="json"))
    assert_as_if_untouched(run, run_of(whole), recipe)
    assert cut >= 1
