"""A command that refuses leaves every byte of what is there as it was: checks come first,
writing after.
"""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from support import tiny_recipe, word_tokenizer
from test_bad_input import line_of

from flowray.cli import data, doctor, eval, report, sample, train, tune
from flowray.config.errors import InputError
from flowray.config.load import dump_recipe, load_recipe, override_recipe
from flowray.config.recipe import Recipe
from flowray.config.resume import refuse_changes
from flowray.store.found import find_checkpoint
from flowray.store.run import RunDirectory
from flowray.sweepconfig.check import base_recipe
from flowray.sweepconfig.file import load_sweep
from flowray.train.group import Group
from flowray.train.loop import train as train_loop
from flowray.tune.folder import open_directory

SWEEP = (
    "name: s\nbase: tiny.yaml\nmetric: {name: ema/shoot/nmse}\nparameters:\n  optim.lr: {min: 1e-4,"
    " max: 1e-2}\n"
)


def bytes_of(folder: Path) -> dict[str, str]:
    """path -> hash of every file of a folder, and every folder in it."""
    return {
        str(path.relative_to(folder)): (
            hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""
        )
        for path in sorted(folder.rglob("*"))
    }


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder with a space in its name: tiny.yaml, two sets of shards, a sweep, a finished run
    `runs/tiny` of 2 steps.
    """
    folder = tmp_path_factory.mktemp("refused") / "my files"
    folder.mkdir()
    recipe = tiny_recipe(folder, **{"train.steps": 2})
    tiny_recipe(folder / "other")
    (folder / "tiny.yaml").write_text(dump_recipe(recipe))
    (folder / "s.yaml").write_text(SWEEP)
    train_loop(
        recipe, RunDirectory(folder / "runs" / "tiny"), Group.current("cpu"), lambda row: None
    )
    (folder / "damaged.pth").write_bytes(b"no weights")
    return folder


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        (["model.velocity.width=128"], "model.velocity.width: got 128"),
        (["model.velocity.depth=3", "train.steps=9"], "model.velocity.depth: got 3"),
        (["model.head.kind=pooled"], "model.head.kind: got 'pooled'"),
        (["model.latent.height=8"], "model.latent.height: got 8"),
        (["model.autoencoder.scaling_factor=0.7"], "model.autoencoder.scaling_factor: got 0.7"),
        (["seed=5", "train.steps=9"], "seed: got 5"),
        (["data.shards=other/pictures/train"], "data.shards: got"),
        (["data.shards=shapes"], "data.shards: got 'shapes'"),
        (["data.limit=4"], "data.limit: got 4"),
        (["train.batch_size=4", "train.steps=9"], "train.batch_size: got 4"),
        (["data.shuffle_captions=true"], "data.shuffle_captions: got true"),
        (["train.steps=1"], "train.steps: got 1"),
        (["loss.clip.weight=1", "train.steps=9"], "loss.clip.weight: got 1"),
        (["train.steps=9", "optim.lr=fast"], "command line: optim.lr: got 'fast'"),
        (["train.steps=9", "data.cache=damaged.pth/x"], "data.cache"),
        (["train.steps=9", "loss.lpips.weight=1", "loss.lpips.vgg=nowhere.pth"], "loss.lpips.vgg"),
        (["train.steps=9", "train.device=cuda"], "train.device"),
        (["train.steps=9", "resources.gpus_per_worker=64"], "resources"),
    ],
)
def test_a_refused_resume_leaves_the_run_as_it_was(place, monkeypatch, changes, key):
    monkeypatch.chdir(place)
    before = bytes_of(place / "runs")
    assert key in line_of(train.main, ["tiny.yaml", *changes, "--resume"])
    assert bytes_of(place / "runs") == before
    assert find_checkpoint(place / "runs" / "tiny").recipe == load_recipe("tiny.yaml").recipe


def test_what_only_the_worker_can_see_leaves_the_recipe_as_it_was(place):
    run = RunDirectory(place / "runs" / "tiny")
    before = bytes_of(run.path)
    recipe = load_recipe(str(place / "tiny.yaml"), ["train.steps=4"]).recipe
    broken = override_recipe(
        recipe, {"loss.lpips.vgg": str(place / "damaged.pth"), "loss.lpips.weight": 1.0}
    )
    run.next_config.write_text(dump_recipe(broken))
    with pytest.raises(InputError, match=r"damaged\.pth"):
        train_loop(broken, run, Group.current("cpu"), lambda row: None)
    run.next_config.unlink()
    assert bytes_of(run.path) == before


def test_a_start_that_is_accepted_brings_its_recipe(place):
    recipe = load_recipe(str(place / "tiny.yaml"), ["name=goes_on"]).recipe
    run = RunDirectory(place / "runs" / "goes_on")
    for steps in (2, 3):
        longer = override_recipe(recipe, {"train.steps": steps})
        run.create()
        run.next_config.write_text(f"# steps: {steps}\n{dump_recipe(longer)}")
        train_loop(longer, run, Group.current("cpu"), lambda row: None)
        assert not run.next_config.exists()
        assert run.config.read_text().startswith(f"# steps: {steps}\n")
        assert load_recipe(str(run.config)).recipe == longer


def test_a_second_start_leaves_the_files_of_the_first(place, monkeypatch):
    monkeypatch.chdir(place)
    hold = f"""
import sys
from pathlib import Path
from flowray.store.run import RunDirectory, RunLock
run = RunDirectory(Path({str(place / "runs" / "twice")!r}))
run.create()
with RunLock(run, file=run.start_lock):
    run.next_config.write_text("of the first")
    print("held", flush=True)
    sys.stdin.read()
"""
    command = [sys.executable, "-c", hold]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as first:
        assert first.stdout is not None
        assert first.stdout.readline() == b"held\n"
        before = bytes_of(place / "runs" / "twice")
        line = line_of(train.main, ["tiny.yaml", "name=twice", "--resume"])
        assert f"in use by process {first.pid} " in line
        assert bytes_of(place / "runs" / "twice") == before
        first.communicate()


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        (["data.shards=pictuers/train"], "did you mean"),
        (["model.text.path=./no-llm"], "no-llm"),
        (["storage_path=tiny.yaml"], "tiny.yaml"),
        (["storage_path=new/runs", "data.val_shards=no"], "no such folder"),
    ],
)
def test_a_refused_start_leaves_no_folder(place, monkeypatch, changes, says):
    monkeypatch.chdir(place)
    before = bytes_of(place)
    assert says in line_of(train.main, ["tiny.yaml", "name=new", *changes])
    assert bytes_of(place) == before


@pytest.mark.parametrize(
    ("main", "argv"),
    [
        (tune.main, ["s.yaml", "set.data.shards=nowhere"]),
        (tune.main, ["s.yaml", "run_cap=0"]),
        (tune.main, ["s.yaml", "storage_path=tiny.yaml"]),
        (tune.main, ["tiny.yaml"]),
        (train.main, ["s.yaml"]),
        (report.main, ["other"]),
        (sample.main, ["other", "a red circle"]),
        (eval.main, ["other"]),
        (doctor.main, ["other"]),
        (doctor.main, ["runs/tiny", "--out", "nowhere/page.html"]),
        (data.main, ["pack", "other", "pictures"]),
        (data.main, ["make", "digits", "--out", "pictures"]),
    ],
)
def test_other_commands_that_refuse_write_nothing(place, monkeypatch, main, argv):
    monkeypatch.chdir(place)
    before = bytes_of(place)
    line_of(main, argv)
    assert bytes_of(place) == before


def test_what_encoding_refuses_leaves_sweeps_and_runs_as_they_were(place, tmp_path, monkeypatch):
    """Captions that the tokenizer cannot tell apart: a new sweep, one with another cap, a new
    run.
    """
    monkeypatch.chdir(place)
    shutil.copytree(place / "text", tmp_path / "dumb")
    word_tokenizer(["zebra"]).save_pretrained(tmp_path / "dumb")
    keys = {"model.text.path": tmp_path / "dumb", "data.cache": tmp_path / "cache"}
    changes = [f"{key}={value}" for key, value in keys.items()]
    words = ["s.yaml", f"storage_path={tmp_path / 'out'}", *(f"set.{word}" for word in changes)]
    assert "caption" in line_of(tune.main, words)
    assert "caption" in line_of(
        train.main, ["tiny.yaml", f"storage_path={tmp_path / 'out'}", *changes]
    )
    assert not (tmp_path / "out").exists()
    sweep = load_sweep(words[0], words[1:])
    open_directory(sweep, base_recipe(sweep), resume=False)
    before = bytes_of(tmp_path / "out")
    assert "caption" in line_of(tune.main, [*words, "run_cap=9", "--resume"])
    assert bytes_of(tmp_path / "out") == before


def test_what_a_resume_may_change(tmp_path):
    before = override_recipe(Recipe(), {"data.shards": str(tmp_path), "loss.repa.weight": 1.0})
    allowed = {
        "optim.lr": 1e-5,
        "optim.schedule.kind": "warm_restarts",
        "train.steps": 2000,
        "loss.kl.weight": 0.3,
        "loss.repa.weight": 2.0,
        "flow.null_probability": 0.2,
        "resources.num_workers": 2,
        "data.cache": "/x",
        "model.velocity.gradient_checkpointing": True,
        "model.text.cache": True,
        "model.text.cache_gib": 0.5,
        "sample.guidance_scale": 3.0,
        "storage_path": "/y",
    }
    for key, value in allowed.items():
        refuse_changes(before, override_recipe(before, {key: value}), 100, "run")
    # it has moved
    refuse_changes(override_recipe(before, {"data.shards": "/gone/shards"}), before, 100, "run")
    for key, value in {
        "loss.repa.hidden": 64,
        "loss.repa.weight": 0.0,
        "loss.dino.weight": 1.0,
        "data.shards": "shapes",
    }.items():
        with pytest.raises(InputError, match=f"^{key}: got "):
            refuse_changes(before, override_recipe(before, {key: value}), 100, "run")
