"""No command is silent for long: the real ones, with the times at which their lines come.

`python tests/silence.py -m flowray.train quickstart` prints those of any command.
"""

import json
import os
import sys
from pathlib import Path

import pytest
from silence import Talk, listen
from support import tiny_recipe

from flowray.config.load import dump_recipe, load_recipe
from flowray.store.run import RunDirectory
from flowray.train.group import Group
from flowray.train.loop import train
from flowray.train.state import fresh_state, save_state

SILENCE_S = 10.0  # alone on two cores no gap is over 4 s; tests share theirs


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with tiny.yaml and a finished run of it, `runs/tiny`."""
    folder = tmp_path_factory.mktemp("silence")
    recipe = tiny_recipe(folder, **{"train.steps": 8, "train.log_every": 1})
    (folder / "tiny.yaml").write_text(dump_recipe(recipe))
    train(recipe, RunDirectory(folder / "runs" / "tiny"), Group.current("cpu"), lambda row: None)
    return folder


def heard(place: Path, *argv: str) -> Talk:
    environment = {**os.environ, "FLOWRAY_CACHE": str(place / "cache")}
    talk = listen([sys.executable, "-m", "flowray", *argv], cwd=place, env=environment)
    assert talk.code in (0, 1), talk.lines
    assert talk.longest[0] < SILENCE_S, talk.lines
    assert talk.first < SILENCE_S
    return talk


def told(talk: Talk) -> dict:
    """The one JSON object on stdout."""
    (line,) = talk.of("stdout")
    return json.loads(line)


def test_sample(place: Path) -> None:
    talk = heard(place, "sample", "runs/tiny", "a red circle", "--json")
    assert Path(told(talk)["picture"]).is_file()


def test_report(place: Path) -> None:
    talk = heard(place, "report", "runs/tiny")
    assert [Path(line).name for line in talk.of("stdout")] == ["report.html"]


@pytest.mark.slow
def test_train_is_heard_and_takes_what_its_plan_said(place: Path) -> None:
    own = ("tiny.yaml", "name=other", f"data.cache={place / 'empty'}", f"storage_path={place}/new")
    guess = told(heard(place, "train", *own, "--plan", "--json"))["wall_time"]["seconds"]
    talk = heard(place, "train", *own, "--json")
    assert talk.seconds / 3 < guess < talk.seconds * 3
    said = " ".join(talk.of("stderr"))
    assert all(what in said for what in ("importing", "starting Ray", "training"))
    assert told(talk)["run"] == str(place / "new" / "other")


@pytest.mark.slow
def test_tune(place: Path) -> None:
    (place / "sweep.yaml").write_text(
        """
name: heard
storage_path: runs
base: tiny.yaml
method: random
metric: {name: ema/shoot/nmse}
parameters: {optim.lr: {distribution: uniform, min: 1.0e-4, max: 1.0e-3}}
run_cap: 2
"""
    )
    talk = heard(place, "tune", "sweep.yaml", "--json")
    assert len(told(talk)["trials"]) == 2


@pytest.mark.slow
def test_cluster_check(place: Path) -> None:
    talk = heard(place, "cluster", "check", "--storage", str(place), "--json")
    assert told(talk)["nodes"]
    said = " ".join(talk.of("stderr"))
    assert all(what in said for what in ("importing", "starting Ray", "asking the nodes"))


@pytest.mark.slow
def test_doctor(place: Path) -> None:
    assert told(heard(place, "doctor", "runs/tiny", "--json"))["findings"]


@pytest.mark.slow
def test_eval(place: Path) -> None:
    """Of quickstart's model as it is before training: the checker needs its 64 px pictures."""
    run = RunDirectory(place / "runs" / "untrained")
    run.create()
    recipe = load_recipe("quickstart", ["name=untrained", "sample.steps=2"]).recipe
    save_state(fresh_state(recipe, Group.current("cpu").device), recipe, run)
    run.config.write_text(dump_recipe(recipe))
    talk = heard(place, "eval", "runs/untrained", "--json")
    assert "judging pictures" in " ".join(talk.of("stderr"))
    assert told(talk)["step"] == 0
