"""Checkpoints written beside training: what they hold, when it may change, what goes wrong."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from support import files_of_at_most, tiny_recipe

from flowray.config.load import override_recipe
from flowray.config.recipe import Recipe
from flowray.store.checkpoint import list_checkpoints, load_state, load_tensors, newest_checkpoint
from flowray.store.run import RunDirectory
from flowray.train.loop import train
from flowray.train.saving import Saver
from flowray.train.state import ALONE, Halted, Kept


def kept(step: int, weights: torch.Tensor) -> Kept:
    scale = torch.full((1,), float(step))
    return Kept(step, {"model": {"w": weights, "scale": scale}, "ema": {"w": weights}}, {"seed": 0})


@pytest.fixture
def run(tmp_path) -> RunDirectory:
    made = RunDirectory(tmp_path / "run")
    made.create()
    return made


def test_what_changes_after_settling_is_not_in_it(run):
    weights = torch.ones(2**20)
    with Saver(run, 2, ALONE) as saver:
        for step in (1, 2, 3):
            saved = kept(step, weights)
            saver.begin(saved)
            saved.groups["model"]["scale"].zero_()  # small ones are copied at once
            saver.settle()
            weights += 1
        saver.wait()
        names = [path.name for path in list_checkpoints(run.checkpoints)]
        assert names == ["step_000002", "step_000003"]
    for step in (2, 3):
        model = load_tensors(run.checkpoints / f"step_{step:06d}", "model")
        assert bool((model["w"] == step).all())
        assert model["scale"].item() == step


def test_the_end_waits_for_the_last_one(run):
    with Saver(run, 2, ALONE) as saver:
        saver.begin(kept(5, torch.ones(2**20)))
    assert newest_checkpoint(run.checkpoints).name == "step_000005"


def test_rows_are_flushed_beside_training_and_before_it_is_there(run):
    go, seen = threading.Event(), []

    def flush() -> None:
        go.wait(60)
        seen.extend(list_checkpoints(run.checkpoints))
        raise OSError(errno.ENOSPC, "full")  # the checkpoint is written all the same

    with Saver(run, 2, ALONE) as saver:
        saver.begin(kept(1, torch.ones(4)), flush)
        saver.settle()
        go.set()
        saver.wait()
    assert not seen
    assert [path.name for path in list_checkpoints(run.checkpoints)] == ["step_000001"]


def checked(saver: Saver) -> None:
    """As every step asks."""
    while not saver.failed():
        time.sleep(0.01)
    raise saver.failure()


def diverge(run: RunDirectory, weights: torch.Tensor) -> None:
    """The step after the checkpoint fails too, before anybody has asked."""
    with Saver(run, 2, ALONE) as saver:
        saver.begin(kept(4, weights / 0))
        raise ValueError("what came of it")


def test_what_goes_wrong_is_raised_by_a_later_call(run):
    big = torch.ones(2**16)
    with Saver(run, 2, ALONE) as saver:
        saver.begin(kept(1, big))
        saver.wait()
        with files_of_at_most(1000):
            saver.begin(kept(2, big))
            saver.settle()
            with pytest.raises(Halted, match="step 2: the checkpoint cannot be written: File too"):
                checked(saver)
        saver.begin(kept(3, big))
    assert [path.name for path in list_checkpoints(run.checkpoints)] == [
        "step_000001",
        "step_000003",
    ]
    with pytest.raises(Halted, match="step 4: w is not finite"):
        diverge(run, big)
    assert newest_checkpoint(run.checkpoints).name == "step_000003"


LOOP = """
import sys
from pathlib import Path
import torch
from flowray.store.run import RunDirectory
from flowray.train.saving import Saver
from flowray.train.state import ALONE, Kept
run = RunDirectory(Path(sys.argv[1]))
run.create()
weights = torch.zeros(2**20)
with Saver(run, 2, ALONE) as saver:
    for step in range(1, 10**6):
        saver.settle()
        weights += 1
        saver.begin(Kept(step, {"model": {"w": weights}, "ema": {"w": weights}}, {"seed": 0}))
        if step == 3:
            print("on", flush=True)
"""


def test_a_kill_at_any_time_leaves_a_whole_one(run):
    last = 0
    for after in (0.0, 0.011, 0.023, 0.037, 0.05):
        shutil.rmtree(run.path)
        with subprocess.Popen(
            [sys.executable, "-c", LOOP, str(run.path)], stdout=subprocess.PIPE, text=True
        ) as process:
            assert process.stdout.readline() == "on\n"
            time.sleep(after)
            os.kill(process.pid, signal.SIGKILL)
        told: list[str] = []
        newest = newest_checkpoint(run.checkpoints, told.append)
        assert told == []  # nothing damaged
        last = load_state(newest)["step"]
        for group in ("model", "ema"):
            assert bool((load_tensors(newest, group)["w"] == last).all())
    assert last > 0


def go(recipe: Recipe) -> RunDirectory:
    run = RunDirectory(Path(recipe.storage_path) / recipe.name)
    train(recipe, run, ALONE, lambda row: None)
    return run


def test_checkpoints_on_the_way_hold_their_own_step(tmp_path):
    """A run that ends at step 4 and one that goes past it hold the same there, bit for bit; the
    update of step 5 comes while the checkpoint is written.
    """
    quiet = {"train.probe_every": 100, "train.sample_every": 100, "train.keep_checkpoints": 9}
    more = {"train.checkpoint_every": 1, "train.steps": 8, "optim.schedule.kind": "constant"}
    more |= {"loss.clip.weight": 0.5, "train.ema": 0.5}
    base = tiny_recipe(tmp_path, **quiet, **more)
    whole = go(base)
    for step in (1, 4):
        short = go(override_recipe(base, {"name": f"short-{step}", "train.steps": step}))
        here, there = (run.checkpoints / f"step_{step:06d}" for run in (short, whole))
        for file in ("model", "ema", "optim"):
            assert (here / f"{file}.safetensors").read_bytes() == (
                there / f"{file}.safetensors"
            ).read_bytes(), (step, file)
