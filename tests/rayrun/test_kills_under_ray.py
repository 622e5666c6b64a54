"""Runs under Ray Train whose workers, driver or node are killed: they come to the state of a run
that nobody touched, bit for bit.
"""

import os
import random
import shutil
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from commands import Commands, commands, finish, until
from kills import LONG_S, assert_as_if_untouched, came, instants, logged, marked, owner
from ray_nodes import joined, running_head
from support import on_two_ranks, tiny_recipe

from flowray.config.load import dump_recipe, load_recipe
from flowray.config.recipe import Recipe
from flowray.store.checkpoint import newest_checkpoint
from flowray.store.rows import read_rows
from flowray.store.run import RunDirectory
from flowray.train.group import Group
from flowray.train.loop import train

pytestmark = [pytest.mark.faults, pytest.mark.timeout(1800)]
STEPS = 160
CADENCE = {
    "train.steps": STEPS,
    "train.log_every": 1,
    "train.probe_every": 20,
    "train.sample_every": 1000,
    "train.checkpoint_every": 4,
    "resources.max_failures": 2,  # in a row: nothing here may count them all together
}
WORKERS = (1, 2)


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Iterator[Path]:
    """A folder with tiny.yaml, where `TMPDIR` is one for Ray's own files."""
    folder = tmp_path_factory.mktemp("kills")
    (folder / "tiny.yaml").write_text(dump_recipe(tiny_recipe(folder, **CADENCE)))
    with pytest.MonkeyPatch.context() as patch:
        tmp = tempfile.mkdtemp(prefix="frk-")  # short, for Ray's sockets
        patch.setenv("TMPDIR", tmp)
        yield folder
    shutil.rmtree(tmp, ignore_errors=True)


@pytest.fixture
def started(place) -> Iterator[Commands]:
    with commands(place) as made:
        yield made


def recipe_of(place: Path, name: str, workers: int) -> Recipe:
    words = [f"name={name}", f"resources.num_workers={workers}"]
    return load_recipe(str(place / "tiny.yaml"), words).recipe


def run_of(recipe: Recipe) -> RunDirectory:
    return RunDirectory(Path(recipe.storage_path) / recipe.name)


def plain(_: int, recipe: Recipe) -> None:
    train(recipe, run_of(recipe), Group.current("cpu"), lambda row: None)


@pytest.fixture(scope="module")
def whole(place) -> dict[int, RunDirectory]:
    """Runs of the plain loop, by the number of ranks."""
    recipes = {workers: recipe_of(place, f"whole-{workers}", workers) for workers in WORKERS}
    plain(0, recipes[1])
    on_two_ranks(plain, recipes[2])
    return {workers: run_of(recipe) for workers, recipe in recipes.items()}


def workers_of(mark: str) -> list[int]:
    """Processes in which Ray trains."""
    return [
        pid
        for pid in marked(mark)
        if b"RayTrainWorker" in Path(f"/proc/{pid}/cmdline").read_bytes()
    ]


@pytest.mark.parametrize(("workers", "kills"), [(1, 14), (2, 8)])
def test_killed_workers_are_replaced_and_nothing_is_lost(place, whole, started, workers, kills):
    recipe = recipe_of(place, f"worker-{workers}", workers)
    run, rng, killed = run_of(recipe), random.Random(workers), 0
    driver = started(f"name={recipe.name}", f"resources.num_workers={workers}")
    for instant in instants(20 + workers, kills, STEPS):
        until(lambda before=killed: owner(run) not in (None, before), "a worker", driver, LONG_S)
        assert came(instant, run, lambda: driver.poll() is None), driver.communicate()
        killed = owner(run)
        # of two the one that does not lead as well
        others = [pid for pid in workers_of(f"FLOWRAY_E2E={place}") if pid != killed]
        os.kill(rng.choice([killed, *others]) if workers > 1 else killed, signal.SIGKILL)
    finish(driver, LONG_S)
    assert_as_if_untouched(run, whole[workers], recipe)
    # each loss is told of, with a start after it
    rows = read_rows(run.times)
    assert sum("lost" in row for row in rows) >= kills
    assert sum(row.get("what") == "ready" for row in rows) == kills + 1


def test_a_driver_killed_three_times_and_typed_again_loses_nothing(place, whole, started):
    recipe = recipe_of(place, "driver", 1)
    run = run_of(recipe)
    name = f"name={recipe.name}"
    for instant in instants(31, 3, STEPS):
        driver = started(name, *(["--resume"] if newest_checkpoint(run.checkpoints) else []))
        assert came(instant, run, lambda one=driver: one.poll() is None), driver.communicate()
        driver.kill()
        driver.wait()
        # its worker would train on for a moment, and a start is refused for as long as it does
        until(lambda: not started.left(), "Ray's processes to go with their driver")
    finish(started(name, "--resume"), LONG_S)
    assert_as_if_untouched(run, whole[1], recipe)


def test_a_run_of_two_workers_goes_on_when_one_of_three_nodes_is_lost(place, whole, tmp_path):
    recipe = recipe_of(place, "node", 2)
    run = run_of(recipe)
    with (
        running_head(tmp_path, "--num-cpus=1") as head,
        joined(head) as one,
        joined(head) as other,
        commands(place) as started,
    ):
        pointed = {key: value for key, value in head.as_driver.items() if key.startswith("RAY_")}
        driver = started(f"name={recipe.name}", "resources.num_workers=2", **pointed)
        until(lambda: logged(run) >= STEPS // 3, "the first steps", driver, LONG_S)
        lost = one if workers_of(f"FLOWRAY_CLUSTER_TEST={one.mark}") else other
        assert workers_of(f"FLOWRAY_CLUSTER_TEST={lost.mark}")
        lost.kill()
        finish(driver, LONG_S)
    assert_as_if_untouched(run, whole[2], recipe)
