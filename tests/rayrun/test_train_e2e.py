"""`python -m flowray.train` as users run it: two Ray Train workers, a killed driver, a polite
stop, and what a resume repeats.
"""

import json
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from commands import TIMEOUT_S, Commands, commands, finish, until
from support import on_two_ranks, tiny_recipe

from flowray.config.load import dump_recipe, load_recipe
from flowray.config.recipe import Recipe
from flowray.store.checkpoint import newest_checkpoint
from flowray.store.rows import read_rows
from flowray.store.run import RunDirectory
from flowray.train.group import Group
from flowray.train.loop import train

STEPS, EVERY = 200, 20


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder with tiny.yaml: two workers; long enough to be killed on the way, short enough to
    end in seconds.
    """
    folder = tmp_path_factory.mktemp("e2e")
    cadence = {
        "train.log_every": 1,
        "train.probe_every": 100,
        "train.sample_every": 1000,
        "train.checkpoint_every": EVERY,
    }
    recipe = tiny_recipe(folder, **cadence, **{"train.steps": STEPS, "resources.num_workers": 2})
    (folder / "tiny.yaml").write_text(dump_recipe(recipe))
    return folder


@pytest.fixture
def started(place) -> Iterator[Commands]:
    with commands(place) as made:
        yield made


def losses(run: RunDirectory) -> list[tuple[int, float]]:
    return [(row["step"], row["loss/total"]) for row in read_rows(run.metrics)]


def run_of(place: Path, name: str) -> RunDirectory:
    return RunDirectory(place / "runs" / name)


def rank(_: int, plain: dict) -> None:
    recipe = Recipe.model_validate(plain)
    run = RunDirectory(Path(recipe.storage_path) / recipe.name)
    train(recipe, run, Group.current("cpu"), lambda row: None)


@pytest.fixture(scope="module")
def whole(place) -> RunDirectory:
    """The uninterrupted run of two ranks, without a Ray."""
    recipe = load_recipe(str(place / "tiny.yaml"), ["name=whole"]).recipe
    on_two_ranks(rank, recipe.model_dump(mode="json"))
    run = run_of(place, "whole")
    assert [step for step, _ in losses(run)] == list(range(1, STEPS + 1))
    return run


def test_two_workers_killed_and_resumed(place, whole, started):
    run = run_of(place, "killed")
    driver = started("name=killed")
    until(lambda: newest_checkpoint(run.checkpoints), "the first checkpoint", driver)
    driver.kill()
    driver.wait()  # while it is a zombie Ray takes it for alive, for a minute
    until(lambda: not started.left(), "Ray's processes to go with their driver")
    reached = losses(run)[-1][0]
    assert EVERY <= reached < STEPS
    assert not (run.path / "report.html").exists()

    told = json.loads(finish(started("name=killed", "--resume", "--json")))
    assert (told["run"], told["stopped"], told["metrics"]["step"]) == (str(run.path), False, STEPS)
    assert told["report"] == str(run.path / "report.html")
    assert Path(told["report"]).is_file()
    assert losses(run) == losses(whole)  # every step once, the same number bit for bit
    assert [row["ema/shoot/nmse"] for row in read_rows(run.probes)] == [
        row["ema/shoot/nmse"] for row in read_rows(whole.probes)
    ]
    assert (run.path / "card.md").is_file()
    assert not list(run.path.glob(".*"))  # no lock, no stop request, nothing of Ray's


@pytest.mark.faults
def test_sigterm_leaves_a_checkpoint_and_says_75(place, whole, started):
    run = run_of(place, "stopped")
    driver = started("name=stopped")
    until(lambda: len(losses(run)) > 20, "the first steps", driver)
    driver.terminate()
    stdout, _ = driver.communicate(timeout=TIMEOUT_S)
    assert driver.returncode == 75
    assert "--resume" in stdout
    last = losses(run)[-1][0]
    assert last < STEPS
    assert newest_checkpoint(run.checkpoints).name == f"step_{last:06d}"
    until(lambda: not started.left(), "Ray's processes to go")
    finish(started("name=stopped", "--resume"))
    assert losses(run) == losses(whole)


@pytest.mark.faults
def test_a_killed_worker_is_replaced_and_nothing_is_lost(place, whole, started):
    run = run_of(place, "maimed")
    driver = started("name=maimed")
    until(lambda: newest_checkpoint(run.checkpoints), "the first checkpoint", driver)
    # the worker that leads
    os.kill(json.loads((run.path / ".lock").read_text())["pid"], signal.SIGKILL)
    finish(driver)
    assert losses(run) == losses(whole)


@pytest.mark.faults
def test_a_stop_before_the_first_step_ends_the_start(place, started):
    """There is nothing to keep yet: the run directory goes, and a second start finds none."""
    run = run_of(place, "early")
    driver = started("name=early")
    until(run.path.is_dir, "the run directory", driver)
    time.sleep(3)  # Ray is starting
    assert not run.config.is_file()  # the worker writes it as it begins
    driver.send_signal(signal.SIGINT)
    driver.communicate(timeout=TIMEOUT_S)
    assert driver.returncode == 130
    assert not run.path.exists()
    until(lambda: not started.left(), "Ray's processes to go")


@pytest.mark.faults
def test_a_loss_that_is_not_finite_ends_the_run_with_one_line(place, started):
    run = run_of(place, "diverges")
    driver = started("name=diverges", "optim.lr=1e30", "optim.schedule.warmup=0")
    _, stderr = driver.communicate(timeout=TIMEOUT_S)
    assert driver.returncode == 1
    errors = [line for line in stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert "step 2: loss/flow is not finite" in errors[0]
    assert "Traceback" not in stderr
    assert losses(run)[0][0] == 1
    until(lambda: not started.left(), "Ray's processes to go")


@pytest.mark.faults
def test_a_recipe_that_asks_for_gpus_that_are_not_there(place, started):
    torch = pytest.importorskip("torch")
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    driver = started("name=gpus", "resources.gpus_per_worker=1")
    _, stderr = driver.communicate(timeout=TIMEOUT_S)
    assert driver.returncode == 2
    assert "error: resources.gpus_per_worker: got 1, but this machine has no GPU" in stderr
