"""What the lead writes of its starts' time, and that it is the time."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from pathlib import Path

import torch
from kills import LONG_S, Instant, came
from support import tiny_recipe

from flowray.config.recipe import Recipe
from flowray.report.load import load_run
from flowray.store.checkpoint import list_checkpoints, step_of
from flowray.store.rows import add_row, read_rows
from flowray.store.run import RunDirectory
from flowray.train.group import Group
from flowray.train.loop import train
from flowray.train.times import Times

PROBE_S = 0.3


def slow_report(row: dict) -> None:
    time.sleep(PROBE_S)


def work(plain: dict) -> None:
    torch.set_num_threads(1)
    recipe = Recipe.model_validate(plain)
    run = RunDirectory(Path(recipe.storage_path) / recipe.name)
    train(recipe, run, Group.current("cpu"), slow_report)


def test_of_a_killed_run_the_time_adds_up(tmp_path):
    cadence = {"train.steps": 40, "train.log_every": 1, "train.checkpoint_every": 8}
    recipe = tiny_recipe(tmp_path, **cadence, **{"train.probe_every": 20})
    run = RunDirectory(Path(recipe.storage_path) / recipe.name)
    process = multiprocessing.get_context("forkserver").Process(
        target=work, args=(recipe.model_dump(mode="json"),)
    )
    process.start()
    # after a probe, and some steps after a checkpoint
    assert came(Instant(29, "training", 0.0), run, process.is_alive)
    os.kill(process.pid, signal.SIGKILL)
    process.join(LONG_S)
    cut_off = read_rows(run.times)[-1]
    work(recipe.model_dump(mode="json"))

    rows = read_rows(run.times)
    ready = [row for row in rows if row.get("what") == "ready"]
    assert [row["start"] for row in ready] == [1, 2]
    back = ready[1]["step"]
    assert 16 <= back < cut_off["step"]
    assert rows[-1]["ended"] == "finished"
    told = load_run(run.path).spent
    assert told is not None
    at_back = [row for row in rows if row["start"] == 1 and row["step"] == back][-1]
    assert abs(told.redone - (cut_off["steps_s"] - at_back["steps_s"])) < 1e-6
    assert abs(told.kept - (at_back["steps_s"] + rows[-1]["steps_s"])) < 1e-6
    assert told.probes >= 2 * PROBE_S  # of steps 20 and 40
    assert abs(told.restarts - (ready[1]["at"] - cut_off["at"])) < 1e-6
    # nothing is left out, nothing counted twice
    assert abs(told.total - (rows[-1]["at"] - ready[0]["began"])) < 0.05
    assert step_of(list_checkpoints(run.checkpoints)[-1]) == 40


def test_the_inner_one_of_two_blocks_counts_and_an_error_is_an_end(tmp_path):
    run = RunDirectory(tmp_path)
    try:
        with Times(run) as times:
            times.ready(3, 1)
            with times.on("probes"):
                time.sleep(0.02)
                times.on("saving")(time.sleep)(0.05)
            times.row(4)
            raise RuntimeError
    except RuntimeError:
        pass
    _, row, last = read_rows(run.times)
    assert 0.05 <= row["saving_s"] < 0.05 + row["probes_s"] + 0.05
    assert row["probes_s"] >= 0.02
    assert (last["step"], last["ended"]) == (4, "failed")


def test_a_torn_row_costs_no_other(tmp_path):
    file = tmp_path / "times.jsonl"
    add_row(file, {"step": 1})
    with file.open("a") as out:
        out.write('{"step": 2, "a')
    add_row(file, {"step": 3})
    assert [row["step"] for row in read_rows(file)] == [1, 3]
