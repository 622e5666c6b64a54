"""Probes and pictures come after their step's checkpoint: what fails is a gap, what a kill cut off
is made by the resume.
"""

from __future__ import annotations

import shutil
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from support import tiny_recipe

from flowray.config.load import override_recipe
from flowray.config.recipe import Recipe
from flowray.doctor.visits import Visits
from flowray.report.load import load_run
from flowray.report.page import write_run_report
from flowray.store.checkpoint import list_checkpoints, newest_checkpoint
from flowray.store.rows import read_rows
from flowray.store.run import RunDirectory
from flowray.train.group import Group
from flowray.train.loop import is_finished, train

CPU = Group(0, 1, torch.device("cpu"))


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Recipe:
    """Probes, pictures and a checkpoint at 5 and at 10."""
    every = ("probe_every", "sample_every", "checkpoint_every")
    cadence = {f"train.{key}": 5 for key in every}
    return tiny_recipe(
        tmp_path_factory.mktemp("after"),
        **cadence,
        **{"train.steps": 10, "train.log_every": 1, "probes.doctor_every": 1},
    )


def run_of(recipe: Recipe) -> RunDirectory:
    return RunDirectory(Path(recipe.storage_path) / recipe.name)


@pytest.fixture(scope="module")
def whole(base) -> RunDirectory:
    recipe = override_recipe(base, {"name": "whole"})
    assert train(recipe, run_of(recipe), CPU, lambda row: None, Visits) == "finished"
    return run_of(recipe)


def cut_off(whole: RunDirectory, recipe: Recipe, step: int, *files: str) -> RunDirectory:
    """The run as a kill leaves it between the checkpoint of `step` and what comes after it."""
    run = run_of(recipe)
    shutil.copytree(whole.path, run.path)
    for later in list_checkpoints(run.checkpoints):
        if int(later.name[5:]) > step:
            shutil.rmtree(later)
    for strip in run.strips():
        if int(strip.stem[5:]) > step or ("strip" in files and strip == run.strip(step)):
            strip.unlink()
    for name in ("metrics", "probes", "findings"):
        file: Path = getattr(run, name)
        last = step - (name in files)
        lines = file.read_text().splitlines(keepends=True)
        kept = [
            line for line, row in zip(lines, read_rows(file), strict=True) if row["step"] <= last
        ]
        file.write_text("".join(kept))
    return run


@pytest.mark.parametrize("step", [5, 10])
@pytest.mark.parametrize("files", [("strip", "probes", "findings"), ("findings",), ("strip",)])
def test_what_a_kill_cut_off_is_made_by_the_resume(base, whole, step, files):
    recipe = override_recipe(base, {"name": f"cut-{step}-{'-'.join(files)}"})
    run = cut_off(whole, recipe, step, *files)
    reported: list[dict] = []
    assert is_finished(recipe, run) == (step == 10 and "probes" not in files)
    assert train(recipe, run, CPU, reported.append, Visits) == "finished"
    assert is_finished(recipe, run)
    assert read_rows(run.probes) == read_rows(whole.probes)
    assert [row["step"] for row in read_rows(run.findings)] == [5, 10]
    for strip in whole.strips():
        pictures = [
            np.asarray(Image.open(each.strip(int(strip.stem[5:])))) for each in (run, whole)
        ]
        assert np.array_equal(*pictures)
    again = [step] if "probes" in files else []
    assert [row["step"] for row in reported] == again + [10] * (step == 5)
    assert all({"loss/flow", "findings", "ema/shoot/nmse"} <= row.keys() for row in reported)


def test_probes_and_pictures_that_fail_are_gaps(base, tmp_path, capfd):
    """The autoencoder and the held-out pictures vanish on the way: the steps that are done stay."""
    own = tiny_recipe(tmp_path)  # may be taken away
    recipe = override_recipe(own, {"train.checkpoint_every": 6, "train.probe_every": 6})
    run = run_of(recipe)
    reported: list[dict] = []

    def take_away(row: dict) -> None:
        reported.append(row)
        (run.path / "autoencoder").mkdir(exist_ok=True)
        for file in Path(recipe.model.autoencoder.path).iterdir():
            file.rename(run.path / "autoencoder" / file.name)

    recipe = override_recipe(recipe, {"train.sample_every": 12})
    assert train(recipe, run, CPU, take_away) == "finished"
    assert newest_checkpoint(run.checkpoints).name == "step_000012"
    assert is_finished(recipe, run)
    probed = read_rows(run.probes)
    assert [row["step"] for row in probed] == [6, 12]
    assert "ema/shoot/nmse" in probed[-1]  # the probes that need no pictures
    assert "vae/psnr" not in probed[-1]
    gaps = read_rows(run.gaps)
    assert [(row["step"], row["what"]) for row in gaps] == [
        (12, "pictures"),
        (12, "the autoencoder's round trip"),
    ]
    assert all("\n" not in row["why"] for row in gaps)
    said = [line for line in capfd.readouterr().err.splitlines() if "failed" in line]
    assert len(said) == 2
    assert [row["step"] for row in reported] == [6, 12]
    # a resume of it has nothing to do
    for file in (run.path / "autoencoder").iterdir():
        file.rename(Path(recipe.model.autoencoder.path) / file.name)
    rows = run.probes.read_bytes()
    assert train(recipe, run, CPU, reported.append) == "finished"
    assert (run.probes.read_bytes(), len(reported)) == (rows, 2)
    notes = [note for note in load_run(run.path).notes if note.startswith("gaps.jsonl")]
    assert len(notes) == 2
    assert write_run_report(run.path).is_file()


def test_a_gap_is_told_once(tmp_path):
    """A finished run whose visit and round trip failed, and one that was cut off before the probe
    row: its autoencoder is there when it starts, and gone when it looks.
    """
    every = {f"train.{key}_every": 4 for key in ("probe", "sample", "checkpoint")}
    recipe = tiny_recipe(tmp_path, **every, **{"train.steps": 4, "probes.doctor_every": 1})
    run, away = run_of(recipe), tmp_path / "away"
    place = Path(recipe.model.autoencoder.path)

    class Failing(nullcontext):
        def __init__(self, *_: object) -> None:
            super().__init__()
            place.rename(away)

        def visit(self) -> None:
            raise RuntimeError("no visit")

    wanted = [(4, "pictures"), (4, "the autoencoder's round trip"), (4, "the doctor's visit")]
    for _ in range(2):
        assert train(recipe, run, CPU, lambda row: None, Failing) == "finished"
        away.rename(place)
        assert [(row["step"], row["what"]) for row in read_rows(run.gaps)] == wanted
        run.probes.write_text("")


def test_a_full_disk_is_no_gap(base, whole):
    """What cannot be written ends the run, as the rows after it could not be written either."""
    recipe = override_recipe(base, {"name": "full", "probes.doctor_every": 0})
    run = run_of(recipe)
    shutil.copytree(whole.path, run.path)
    run.strip(10).unlink()
    run.strip(10).with_name(".step_000010.png.partial").symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space left"):
        train(recipe, run, CPU, lambda row: None)
    assert not run.gaps.exists()
