"""Ranks that hang: the others end within the limit and say at which step and for whom; what the
lead does while they wait may take longer.
"""

from __future__ import annotations

import itertools
import json
import multiprocessing
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from support import tiny_recipe

from flowray.config.errors import InputError
from flowray.config.recipe import Recipe
from flowray.losses.total import Batch
from flowray.store import checkpoint
from flowray.store.checkpoint import list_checkpoints, step_of
from flowray.store.run import RunDirectory
from flowray.train.group import Group
from flowray.train.loop import train
from flowray.train.step import BatchMaker

STEPS, AT = 8, 5  # and the step at which a rank hangs
LIMIT_S = 12.0
STARTING_S = 240.0  # of two processes, on a busy machine
RARELY = {"train.steps": STEPS, "train.checkpoint_every": 2, "train.sample_every": 100}
FOREVER_S = 10_000.0
BOTH = 2


def run_of(recipe: Recipe) -> RunDirectory:
    return RunDirectory(Path(recipe.storage_path) / recipe.name)


def _told_often(count: int, then: Callable[[], None]) -> Callable[[], bool]:
    """What `train` asks at every step, and what happens when it asks so often."""
    asked = itertools.count(1)

    def told() -> bool:
        if next(asked) == count:
            then()
        return False

    return told


def freeze() -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


def fail(rank: int) -> None:
    """Rank 1 has a batch that cannot be made, and takes its time to end: a share is written."""
    make, write = BatchMaker.__call__, checkpoint.write_tensors

    def made(self: BatchMaker, step: int) -> Batch:
        if step == 4:
            raise InputError("the true failure")
        return make(self, step)

    def slowly(path: Path, tensors: dict[str, torch.Tensor]) -> dict[str, int]:
        time.sleep(LIMIT_S)
        return write(path, tensors)

    if rank == 1:
        BatchMaker.__call__, checkpoint.write_tensors = made, slowly


def rank(rank: int, port: int, plain: dict, ill: int, how: str) -> None:
    """One of two ranks, of which `ill` hangs."""
    torch.set_num_threads(1)
    recipe = Recipe.model_validate(plain)
    run_of(recipe).path.mkdir(parents=True, exist_ok=True)
    sys.stderr = (run_of(recipe).path / f"stderr-{rank}").open("w", buffering=1)
    dist.init_process_group(
        "gloo",
        init_method=f"tcp://127.0.0.1:{port}",
        rank=rank,
        world_size=2,
        timeout=timedelta(seconds=STARTING_S if how != "long work" else LIMIT_S),
    )
    told, report, make = None, lambda row: None, BatchMaker.__call__
    if how == "fails":
        fail(rank)
    elif rank == ill or ill == BOTH:
        hang = freeze if how == "frozen" else lambda: time.sleep(FOREVER_S)
        told = _told_often(AT, hang) if how in ("frozen", "in the step") else None
        if how == "no batch":
            BatchMaker.__call__ = lambda self, step: hang() if step >= AT - 1 else make(self, step)
        if how == "long work":
            report = lambda row: time.sleep(2 * LIMIT_S)  # noqa: E731
    train(recipe, run_of(recipe), Group.current("cpu"), report, told=told)
    dist.destroy_process_group()


@contextmanager
def two_ranks(
    recipe: Recipe, ill: int, how: str
) -> Iterator[list[multiprocessing.context.ForkServerProcess]]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    args = (port, recipe.model_dump(mode="json"), ill, how)
    context = multiprocessing.get_context("forkserver")
    started = [context.Process(target=rank, args=(number, *args)) for number in range(2)]
    for process in started:
        process.start()
    try:
        yield started
    finally:
        for process in started:
            process.kill()
            process.join()


@pytest.mark.parametrize(
    ("ill", "how", "named", "said"),
    [
        (1, "frozen", [1], "no sign of life"),
        pytest.param(0, "frozen", [0], "does not answer", marks=pytest.mark.faults),
        pytest.param(1, "no batch", [1], "its batch", marks=pytest.mark.faults),
        pytest.param(BOTH, "no batch", [0, 1], "the data's storage", marks=pytest.mark.faults),
        pytest.param(1, "in the step", [0, 1], "the network", marks=pytest.mark.faults),
    ],
)
def test_ranks_that_wait_for_one_that_hangs_end(tmp_path, ill, how, named, said):
    recipe = tiny_recipe(
        tmp_path,
        **RARELY,
        **{"resources.num_workers": 2, "resources.stuck_after_s": LIMIT_S, "data.prefetch": 0},
    )
    run = run_of(recipe)
    with two_ranks(recipe, ill, how) as processes:
        waiting = processes[0 if ill else 1]
        waiting.join(STARTING_S)
        assert waiting.exitcode == 1
    told = json.loads(run.stuck.read_text())
    assert told["ranks"] == named
    assert said in told["why"]
    assert f"in step {AT} " in told["why"]
    # the other one may have struck first, and ended the collective
    lines = [(run.path / f"stderr-{rank}").read_text() for rank in range(2)]
    assert [text for text in lines if told["why"] in text]
    assert step_of(list_checkpoints(run.checkpoints)[-1]) == AT - 1  # that a start goes on from


@pytest.mark.faults
def test_what_the_lead_does_between_steps_may_take_longer(tmp_path):
    """Longer than the limit, and than that of the process group."""
    recipe = tiny_recipe(
        tmp_path,
        **RARELY,
        **{"train.probe_every": 6, "resources.num_workers": 2, "resources.stuck_after_s": LIMIT_S},
    )
    with two_ranks(recipe, 0, "long work") as processes:
        for process in processes:
            process.join(STARTING_S)
        assert [process.exitcode for process in processes] == [0, 0]
    run = run_of(recipe)
    assert step_of(list_checkpoints(run.checkpoints)[-1]) == STEPS
    assert not run.stuck.exists()


@pytest.mark.faults
def test_one_that_fails_may_take_longer_to_end(tmp_path):
    recipe = tiny_recipe(
        tmp_path,
        **RARELY,
        **{"resources.num_workers": 2, "resources.stuck_after_s": LIMIT_S, "data.prefetch": 0},
    )
    run = run_of(recipe)
    with two_ranks(recipe, 1, "fails") as processes:
        processes[1].join(STARTING_S)
        assert processes[1].exitcode == 1
    assert "the true failure" in (run.path / "stderr-1").read_text()
    assert not run.stuck.exists()
