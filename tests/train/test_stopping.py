"""A stop is heard after the step under way, whatever is logged, by all ranks at once."""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import signal
import sys
import threading
import time
from pathlib import Path

import torch
from kills import LONG_S, Instant, came, logged
from support import on_two_ranks, tiny_recipe

from flowray.cli.common import STOPPED
from flowray.config.load import override_recipe
from flowray.config.recipe import Recipe
from flowray.store.checkpoint import list_checkpoints, step_of
from flowray.store.rows import read_rows
from flowray.store.run import RunDirectory
from flowray.train.group import Group
from flowray.train.loop import train
from flowray.train.stopping import Sigterm, sigterm_noted

RARELY = {"train.log_every": 1000, "train.checkpoint_every": 1000, "train.probe_every": 3}


def stopped_at_3(recipe: Recipe, rank: int) -> None:
    """One rank; the lead's report of step 3 asks for the stop. Leaves the outcome in told-RANK."""
    run = RunDirectory(Path(recipe.storage_path) / recipe.name)

    def ask(row: dict) -> None:
        if rank == 0:
            run.stop_request.touch()

    outcome = train(recipe, run, Group.current("cpu"), ask)
    (run.path / f"told-{rank}").write_text(outcome)


def worker(rank: int, plain: dict) -> None:
    stopped_at_3(Recipe.model_validate(plain), rank)


def test_between_logged_steps(tmp_path):
    recipe = tiny_recipe(tmp_path, **RARELY)
    two = override_recipe(recipe, {"name": "two", "resources.num_workers": 2})
    stopped_at_3(recipe, 0)
    on_two_ranks(worker, two.model_dump(mode="json"))
    for each, ranks in ((recipe, 1), (two, 2)):
        run = RunDirectory(Path(each.storage_path) / each.name)
        assert [path.name for path in list_checkpoints(run.checkpoints)] == ["step_000004"]
        told = [(run.path / f"told-{rank}").read_text() for rank in range(ranks)]
        assert told == ["stopped"] * ranks
        assert [row["step"] for row in read_rows(run.probes)] == [3]


def told_on_one(rank: int, plain: dict) -> None:
    """Rank 1 alone is told in its step 3; leaves the outcome in told-RANK."""
    recipe = Recipe.model_validate(plain)
    run = RunDirectory(Path(recipe.storage_path) / recipe.name)
    asked = 0

    def told() -> bool:
        nonlocal asked
        asked += 1
        return rank == 1 and asked == 3

    outcome = train(recipe, run, Group.current("cpu"), lambda row: None, told=told)
    (run.path / f"told-{rank}").write_text(outcome)


def test_what_one_rank_is_told_ends_the_step_of_all(tmp_path):
    rarely = RARELY | {"train.probe_every": 1000, "resources.num_workers": 2}
    recipe = tiny_recipe(tmp_path, **rarely)
    on_two_ranks(told_on_one, recipe.model_dump(mode="json"))
    run = RunDirectory(Path(recipe.storage_path) / recipe.name)
    assert [path.name for path in list_checkpoints(run.checkpoints)] == ["step_000003"]
    assert [(run.path / f"told-{rank}").read_text() for rank in (0, 1)] == ["preempted"] * 2


def until_sigterm(plain: dict) -> None:
    """A process of the plain loop; its exit code is 75 where a SIGTERM came."""
    torch.set_num_threads(1)
    recipe = Recipe.model_validate(plain)
    run = RunDirectory(Path(recipe.storage_path) / recipe.name)
    with sigterm_noted() as told:
        outcome = train(recipe, run, Group.current("cpu"), lambda row: None, told=told)
    sys.exit(0 if outcome == "finished" else STOPPED)


def test_a_sigterm_ends_the_step_under_way_with_a_checkpoint(tmp_path):
    often = {"train.steps": 100_000, "train.log_every": 1}
    never = dict.fromkeys(("checkpoint_every", "probe_every", "sample_every"), 1_000_000)
    recipe = tiny_recipe(tmp_path, **often, **{f"train.{key}": n for key, n in never.items()})
    run = RunDirectory(Path(recipe.storage_path) / recipe.name)
    plain = recipe.model_dump(mode="json")
    process = multiprocessing.get_context("forkserver").Process(target=until_sigterm, args=(plain,))
    process.start()
    try:
        assert came(Instant(20, "training", 0.0), run, process.is_alive)
        before = logged(run)
        process.terminate()
        process.join(LONG_S)
        assert process.exitcode == STOPPED
    finally:
        process.kill()
    steps = [row["step"] for row in read_rows(run.metrics)]
    (saved,) = list_checkpoints(run.checkpoints)
    assert steps == list(range(1, step_of(saved) + 1))
    assert step_of(saved) >= before


def test_a_sigterm_is_heard_while_the_main_thread_is_in_c():
    """As that of a Ray worker is: its Python handler runs when the main thread comes back."""
    heard: list[tuple[bool, bool]] = []  # whether it was told, and whether the main thread was back
    back = threading.Event()

    def ask() -> None:
        time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGTERM)
        while not told() and not back.is_set():
            time.sleep(0.001)
        heard.append((told(), back.is_set()))

    with sigterm_noted() as told:
        asking = threading.Thread(target=ask)
        asking.start()
        hashlib.pbkdf2_hmac("sha256", b"", b"", 2_000_000)
        back.set()
        asking.join()
    assert heard == [(True, False)]
    assert not isinstance(signal.getsignal(signal.SIGTERM), Sigterm)
