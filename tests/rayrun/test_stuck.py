"""A worker under Ray Train that is frozen: the run goes on without it and loses nothing."""

import os
import re
import shutil
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from commands import Commands, commands, until
from kills import LONG_S, assert_as_if_untouched, logged, marked
from support import on_two_ranks, tiny_recipe
from test_preempted import starts, workers

from flowray.config.load import dump_recipe, override_recipe
from flowray.config.recipe import Recipe
from flowray.store.rows import read_rows
from flowray.store.run import RunDirectory
from flowray.train.group import Group
from flowray.train.loop import train

pytestmark = [pytest.mark.faults, pytest.mark.timeout(1800)]
CADENCE = {
    "train.steps": 60,
    "train.log_every": 1,
    "train.probe_every": 30,
    "train.sample_every": 1000,
    "train.checkpoint_every": 4,
    "resources.num_workers": 2,
    "resources.max_failures": 1,
    "resources.stuck_after_s": 45,
}


@pytest.fixture
def place(tmp_path) -> Iterator[Path]:
    (tmp_path / "tiny.yaml").write_text(dump_recipe(tiny_recipe(tmp_path, **CADENCE)))
    with pytest.MonkeyPatch.context() as patch:
        tmp = tempfile.mkdtemp(prefix="frs-")  # short, for Ray's sockets
        patch.setenv("TMPDIR", tmp)
        yield tmp_path
    shutil.rmtree(tmp, ignore_errors=True)


@pytest.fixture
def started(place) -> Iterator[Commands]:
    with commands(place) as made:
        yield made


def plain(_: int, recipe: Recipe) -> None:
    run = RunDirectory(Path(recipe.storage_path) / recipe.name)
    train(recipe, run, Group.current("cpu"), lambda row: None)


def test_a_frozen_worker_is_replaced_and_nothing_is_lost(place, started):
    recipe = tiny_recipe(place, **CADENCE, name="frozen")
    whole = override_recipe(recipe, {"name": "whole"})
    on_two_ranks(plain, whole)
    run = RunDirectory(place / "runs" / "frozen")
    driver = started("name=frozen")
    until(lambda: logged(run) >= 20, "the first steps", driver, LONG_S)
    frozen = workers(marked(f"FLOWRAY_E2E={place}"))[-1]
    os.kill(frozen, signal.SIGSTOP)
    _, stderr = driver.communicate(timeout=LONG_S)
    assert driver.returncode == 0, stderr
    assert_as_if_untouched(run, RunDirectory(place / "runs" / "whole"), recipe)
    assert not Path(f"/proc/{frozen}").exists()
    (lost,) = [row for row in read_rows(run.times) if "lost" in row]
    assert len(lost["lost"]) == 1  # the one that was frozen, and not those that have ended
    assert starts(run) == [0, lost["step"]]
    told = [line for line in stderr.splitlines() if "stuck in step" in line]
    assert len(told) == 1
    assert re.search(rf"lost worker {lost['lost'][0]}: .* for 45 s", told[0])
