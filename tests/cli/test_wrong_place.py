"""The right thing in the wrong place: a sweep given to train, a run given to tune, a key typed
like an option, a moved run.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from support import own_pictures, tiny_recipe
from test_bad_input import line_of

from flowray.cli import data, doctor, eval, sample, train, tune
from flowray.config.load import dump_recipe
from flowray.store.run import RunDirectory
from flowray.train.group import Group
from flowray.train.loop import train as train_loop

SWEEP = (
    "name: s\nbase: tiny.yaml\nmetric: {name: ema/shoot/nmse}\nparameters:\n  optim.lr: {min: 1e-4,"
    " max: 1e-2}\n"
)
KEYS = (
    "train.log_every",
    "train.probe_every",
    "train.sample_every",
    "train.checkpoint_every",
    "train.steps",
)


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """tiny.yaml, s.yaml, the finished run runs/tiny, and runs/s: what a sweep leaves, with its
    best.yaml and a trial.
    """
    folder = tmp_path_factory.mktemp("wrong") / "a b"
    folder.mkdir()
    recipe = tiny_recipe(folder, **{"train.steps": 2})
    (folder / "tiny.yaml").write_text(dump_recipe(recipe))
    (folder / "s.yaml").write_text(SWEEP)
    train_loop(
        recipe, RunDirectory(folder / "runs" / "tiny"), Group.current("cpu"), lambda row: None
    )
    (folder / "runs" / "s").mkdir()
    (folder / "runs" / "s" / "sweep.yaml").write_text(SWEEP)
    shutil.copytree(folder / "runs" / "tiny", folder / "runs" / "s" / "0")
    shutil.copy(folder / "tiny.yaml", folder / "runs" / "s" / "best.yaml")
    (folder / "weights.safetensors").write_bytes(b"")
    return folder


@pytest.mark.parametrize(
    ("main", "argv", "says"),
    [
        (train.main, ["s.yaml"], "flowray.tune"),
        (train.main, ["head"], "flowray.tune head"),
        (train.main, ["sweeps/head.yaml"], "flowray.tune sweeps/head.yaml"),
        (train.main, ["runs/s"], "runs/s/best.yaml"),
        (train.main, ["runs/s/sweep.yaml"], "flowray.tune"),
        (train.main, ["runs/tiny"], "runs/tiny/config.yaml --resume"),
        (train.main, ["runs/tiny/checkpoints/step_000002"], "runs/tiny/config.yaml --resume"),
        (train.main, ["runs/tiny/checkpoints"], "the checkpoints of the run"),
        (train.main, ["weights.safetensors"], "weights.safetensors"),
        (tune.main, ["tiny.yaml"], "flowray.train tiny.yaml"),
        (tune.main, ["quickstart"], "flowray.train quickstart"),
        (tune.main, ["runs/s"], "runs/s/sweep.yaml --resume"),
        (tune.main, ["runs/s/best.yaml"], "flowray.train runs/s/best.yaml"),
        (tune.main, ["runs/tiny"], "runs/tiny/config.yaml --resume"),
        (tune.main, ["runs/tiny/config.yaml"], "a file of the run runs/tiny"),
        (tune.main, ["runs/tiny/checkpoints/step_000002"], "a checkpoint of the run runs/tiny"),
        (sample.main, ["runs/s", "a red circle"], "the folder of a sweep"),
        (sample.main, ["tiny.yaml", "a red circle"], "flowray.train tiny.yaml"),
        (sample.main, ["runs/tiny/config.yaml", "a red circle"], "a file of the run runs/tiny"),
        (sample.main, ["quickstart", "a red circle"], "a packaged recipe"),
        (sample.main, ["runs/tny", "a red circle"], "runs/tiny?"),
        (eval.main, ["runs/s/best.yaml"], "flowray.train runs/s/best.yaml"),
        (doctor.main, ["runs/s"], "the folder of a sweep"),
        (doctor.main, ["s.yaml"], "flowray.tune s.yaml"),
    ],
)
def test_a_thing_in_the_wrong_place_says_what_it_is_and_what_takes_it(
    place, monkeypatch, main, argv, says
):
    monkeypatch.chdir(place)
    line = line_of(main, argv)
    assert says in line
    assert Path(argv[0]).name in line


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["optim.lrr=1"], "unknown key optim.lrr"),
        (["optim.lr", "=", "3e-4"], "optim.lr=VALUE"),
        (["optim.lr", "=3e-4"], "optim.lr=3e-4"),
        (["optim.lr=", "3e-4"], "optim.lr=3e-4"),
        (["--optim.lr=3e-4"], "no dashes before a key: optim.lr=3e-4"),
        (["--seed=4"], "seed=4"),
        (["--optim.lr", "3e-4"], "optim.lr=VALUE"),
        (["optim.lr"], "want key=value"),
        (["s.yaml"], "a second file"),
        (["nowhere.yaml"], "a second file"),
    ],
)
def test_what_was_typed_is_blamed_on_the_command_line(place, monkeypatch, argv, says):
    monkeypatch.chdir(place)
    for main, source, prefix in ((train.main, "tiny.yaml", ""), (tune.main, "s.yaml", "set.")):
        words = [f"{prefix}{word}" if word.startswith("optim") else word for word in argv]
        line = line_of(main, [source, *words])
        assert line.startswith("error: command line: "), line
        assert says.split("key ")[-1].split(": ")[-1] in line


@pytest.mark.parametrize(
    ("argv", "key"),
    [
        (["run_cpa=4"], "run_cpa"),
        (["optim.lr=1"], "optim.lr"),
        (["parameters.optim.lr.min=fast"], "optim.lr"),
        (["set.train.steps=many"], "train.steps"),
        (["metric.name=shoot/nsme"], "shoot/nsme"),
        (["run_cap=0"], "run_cap"),
        (["warm_start=[$NOWHERE/x]"], "warm_start"),
        (["set={train: {stpes: 3}}"], "train.stpes"),
    ],
)
def test_the_keys_of_a_sweep_are_blamed_where_they_were_typed(place, monkeypatch, argv, key):
    monkeypatch.chdir(place)
    line = line_of(tune.main, ["s.yaml", *argv])
    assert line.startswith("error: command line: ")
    assert key in line


def test_a_key_before_the_recipe(place, monkeypatch):
    monkeypatch.chdir(place)
    for main, source in ((train.main, "tiny.yaml"), (tune.main, "s.yaml")):
        assert line_of(main, ["optim.lr=1", source]).startswith(
            "error: command line: got 'optim.lr=1'"
        )


@pytest.mark.parametrize(
    "given", ["runs/tiny/", "~/moved", "$PLACE/moved/", "moved/checkpoints/step_000002", "runs/s/0"]
)
def test_a_run_is_found_wherever_it_lies(place, monkeypatch, given):
    monkeypatch.chdir(place)
    monkeypatch.setenv("HOME", str(place))
    monkeypatch.setenv("PLACE", str(place))
    if not (place / "moved").exists():
        shutil.copytree(place / "runs" / "tiny", place / "moved")
    out = place / "out.png"
    assert sample.main([given, "a red circle", "--out", "~/out.png"]) == 0
    assert out.is_file()
    out.unlink()


def test_a_moved_run_is_continued_where_it_is(place, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(place)
    shutil.copytree(place / "runs" / "tiny", tmp_path / "copy")
    config = str(tmp_path / "copy" / "config.yaml")
    assert train.main([config, "--resume", "--json"]) == 0  # it has all its steps
    assert json.loads(capsys.readouterr().out)["run"] == str(tmp_path / "copy")
    assert "--resume" in line_of(train.main, [config])


@pytest.mark.timeout(900)  # Ray starts, on a busy machine slowly
def test_own_pictures_by_relative_paths_from_a_folder_with_a_space(tmp_path):
    """Packed, checked and trained as users type it: Ray's worker runs in another folder."""
    place = tmp_path / "my photos"
    own_pictures(place / "PHOTOS", 16)
    lines = [
        "base: tiny.yaml",
        "name: mine",
        "storage_path: out",
        "data: {shards: shards/, val_shards: ./shards, cache: cache}",
    ]
    (place / "recipes").mkdir()
    recipe = tiny_recipe(tmp_path / "made", **dict.fromkeys(KEYS, 2))
    (place / "recipes" / "tiny.yaml").write_text(dump_recipe(recipe))
    (place / "recipes" / "my.yaml").write_text("\n".join(lines) + "\n")

    def command(*words: str) -> str:
        done = subprocess.run(
            [sys.executable, "-m", *words], cwd=place, capture_output=True, text=True, timeout=600
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    command("flowray.data", "pack", "PHOTOS/", "recipes/shards/", "--size", "8")
    made = json.loads(command("flowray.train", "recipes/my.yaml", "probes.batch_size=8", "--json"))
    run = place / "out" / "mine"
    assert Path(made["run"]) == run
    assert (run / "samples" / "step_000002.png").is_file()
    assert (place / "recipes" / "cache").is_dir()
    moved = tmp_path / "elsewhere"
    shutil.move(run, moved)
    assert data.main(["check", str(place / "recipes" / "shards" / "*.tar")]) == 0
    assert sample.main([str(moved), "a photo", "--out", str(tmp_path / "a.png")]) == 0
