"""Batches made some steps ahead, and blocks that are compiled."""

import threading
import time
from pathlib import Path

import pytest
import torch
from support import tiny_recipe

from flowray.config.load import override_recipe
from flowray.store.rows import read_rows
from flowray.store.run import RunDirectory
from flowray.train.ahead import BatchesAhead
from flowray.train.group import Group
from flowray.train.loop import train
from flowray.train.state import fresh_state

CPU = torch.device("cpu")


def test_every_step_gets_its_own_batch_and_none_is_made_past_the_last():
    made = []

    def make(step):
        made.append((step, threading.current_thread().name))
        return step

    with BatchesAhead(make, 8, CPU) as batches:
        assert [batches(step) for step in (3, 4, 5)] == [3, 4, 5]
        assert batches(7) == 7  # not the one that was begun
    assert [step for step, _ in made if step != 6] == [3, 4, 5, 7]
    assert threading.current_thread().name not in {name for _, name in made}


@pytest.mark.parametrize("depth", [0, 1, 3])
def test_so_many_are_made_ahead_in_the_order_of_the_steps(depth):
    made = []

    def make(step):
        made.append((step, threading.current_thread().name))
        return step

    with BatchesAhead(make, 9, CPU, depth) as batches:
        for step in range(2, 9):
            assert batches(step) == step
            wanted, until = [*range(2, min(step + depth, 8) + 1)], time.monotonic() + 10
            while len(made) < len(wanted) and time.monotonic() < until:
                time.sleep(0.001)
            time.sleep(0.02)  # for one too many
            assert [each for each, _ in made] == wanted
    own = threading.current_thread().name
    assert {name == own for _, name in made} == {not depth}


def test_what_was_begun_for_steps_that_are_passed_over_is_given_up():
    made, may_end = [], threading.Semaphore(1)

    def make(step):
        made.append(step)
        assert may_end.acquire(timeout=10)
        return step

    with BatchesAhead(make, 20, CPU, 4) as batches:
        assert batches(0) == 0
        while made != [0, 1]:
            time.sleep(0.001)
        threading.Timer(0.5, may_end.release, [20]).start()
        assert batches(10) == 10
        assert batches(11) == 11
    assert not {2, 3, 4} & set(made)


def test_an_error_comes_at_the_step_that_needs_the_batch():
    def make(step):
        if step == 2:
            raise OSError("a shard cannot be read")
        return step

    with BatchesAhead(make, 8, CPU) as batches:
        assert batches(1) == 1
        with pytest.raises(OSError, match="a shard"):
            batches(2)
    assert not [t for t in threading.enumerate() if t.name.startswith("batches")]


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [{}, {"model.velocity.gradient_checkpointing": True}, {"model.velocity": {"kind": "dimr"}}],
    ids=["dit", "checkpointing", "dimr"],
)
def test_compiled_blocks_train_as_eager_ones(tmp_path, options):
    recipe = tiny_recipe(tmp_path, **{"train.log_every": 1, "train.steps": 6, **options})
    losses = {}
    for compiled in (False, True):
        typed = override_recipe(recipe, {"train.compile": compiled})
        run = RunDirectory(Path(recipe.storage_path) / f"compiled-{compiled}")
        train(typed, run, Group(0, 1, CPU), lambda row: None)
        losses[compiled] = [row["loss/total"] for row in read_rows(run.metrics)]
        assert len(losses[compiled]) == 6
    assert losses[True] == pytest.approx(losses[False], rel=1e-4)


@pytest.mark.slow
def test_a_hook_hears_compiled_blocks(tmp_path):
    recipe = tiny_recipe(tmp_path)
    velocity = fresh_state(recipe, CPU).model.velocity
    velocity.compile_blocks()
    x, t = torch.randn(2, *recipe.model.latent.shape), torch.zeros(2)
    for _ in range(2):  # REPA puts its hook in anew at every step
        heard = []
        hook = velocity.blocks[1].register_forward_hook(lambda *passed: heard.append(passed[2]))  # noqa: B023
        velocity(x, t, t.bool()).sum().backward()
        hook.remove()
        assert [tokens.shape for tokens in heard] == [(2, 16, 16)]
