"""The commands on a run whose training pictures are in buckets."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from bucket_support import bucket_recipe, picture
from PIL import Image
from support import captions

from flowray.cli import doctor, eval, sample
from flowray.cli.plan import show_plan
from flowray.cli.ready import check_shards
from flowray.config.errors import InputError
from flowray.config.load import override_recipe
from flowray.config.progress import SILENT
from flowray.config.recipe import Recipe
from flowray.data.make import png
from flowray.data.shards import write_shards
from flowray.doctor.visits import Visits
from flowray.store.run import RunDirectory
from flowray.train.group import Group
from flowray.train.loop import train


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    place = tmp_path_factory.mktemp("commands")
    return bucket_recipe(place, **{"train.steps": 4, "probes.doctor_every": 1})


@pytest.fixture(scope="module")
def run(recipe: Recipe) -> Path:
    run = RunDirectory(Path(recipe.storage_path) / "tiny")
    train(recipe, run, Group.current("cpu"), lambda row: None, Visits)
    return run.path


def test_the_plan_lists_the_buckets(recipe: Recipe, capsys: pytest.CaptureFixture[str]) -> None:
    assert show_plan(recipe, SILENT, as_json=True)
    plan = json.loads(capsys.readouterr().out)
    assert [(b["latent"], b["pixels"], b["tokens"]) for b in plan["buckets"]] == [
        ([4, 4], [8, 8], 16),
        ([5, 3], [10, 6], 15),
        ([3, 5], [6, 10], 15),
    ]
    assert show_plan(recipe, SILENT, as_json=False)
    shown = capsys.readouterr().out
    assert "5 x 3 cells of 10 x 6 px, 15 tokens" in shown
    assert "3 x 5 cells of 6 x 10 px, 15 tokens" in shown


@pytest.mark.parametrize(
    ("aspect", "shape"), [([], (8, 8)), (["1"], (8, 8)), (["0.5"], (10, 6)), (["2"], (6, 10))]
)
def test_samples_of_each_bucket(
    run: Path, tmp_path: Path, aspect: list[str], shape: tuple[int, int]
) -> None:
    options = ["--aspect", *aspect] if aspect else []
    sheets = []
    for more in (["--count", "3"], ["--between", "3"]):
        out = tmp_path / f"{more[0]}.png"
        prompts = ["a red circle", "a blue square"]
        assert sample.main([str(run), *prompts, *options, *more, "--out", str(out)]) == 0
        with Image.open(out) as sheet:
            sheets.append(np.asarray(sheet))
    assert sheets[0].shape == (2 * shape[0], 3 * shape[1], 3)
    assert sheets[1].shape == (shape[0], 3 * shape[1], 3)


def test_a_ratio_that_was_not_trained_is_refused(run: Path) -> None:
    with pytest.raises(InputError, match=r"--aspect 1.5: the run was trained on 0.5, 1, 2$"):
        sample.main([str(run), "a red circle", "--aspect", "1.5"])


def test_the_doctor_looks_at_the_own_size(run: Path) -> None:
    rows = [json.loads(line) for line in (run / "findings.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [4]
    assert doctor.main([str(run), "--json"]) in (0, 1)


@pytest.mark.parametrize("features", ["pixels", "latents"])
def test_evaluation_is_at_the_own_size(run: Path, features: str) -> None:
    argv = [str(run), "--captions", "4", "--draws", "3", "--features", features]
    assert eval.main(argv) == 0
    told = json.loads((run / "eval.json").read_text())["neighbours"]
    assert told["samples"]["real"] > 20


def test_a_set_without_the_models_own_shape(recipe: Recipe, tmp_path: Path) -> None:
    """It trains; copies, which need latents like the held-out ones, are not looked for, and the
    doctor says what it lacks.
    """
    wide = (
        {"__key__": f"s{i}", "png": png(picture(2 + 8 * i)), "txt": text.encode()}
        for i, text in enumerate(captions(16))
    )
    shards = str(write_shards(tmp_path / "wide", wide, meta={}))
    other = override_recipe(recipe, {"data.shards": shards, "name": "wide", "train.steps": 2})
    check_shards(other)
    run = RunDirectory(Path(other.storage_path) / "wide")
    train(other, run, Group.current("cpu"), lambda row: None)
    rows = [json.loads(line) for line in run.probes.read_text().splitlines()]
    assert "ema/shoot/nmse" in rows[-1]
    assert "ema/shoot/copies" not in rows[-1]
    with pytest.raises(InputError, match="no training picture is in the bucket"):
        doctor.main([str(run.path)])
