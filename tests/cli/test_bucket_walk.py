"""docs/data.md, aspect-ratio buckets: its commands in order, on a folder of photographs of all
shapes. The quick walk plans what the slow one trains and draws.
"""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from support import own_pictures

from flowray.config.load import load_recipe

PATIENCE_S = 420  # for one command
DOCS = Path(__file__).parents[2] / "docs" / "data.md"
SHORT = ("steps=4", "batch_size=4", "probe_every=4", "sample_every=4", "checkpoint_every=4")
NARROW = ("model.velocity.width=32", "model.velocity.depth=1", "model.velocity.heads=2")
FEW = ("probes.batch_size=8", "probes.shoot_steps=4", "sample.steps=4")
# the walk is of the commands, not of the quality: probes of the whole model take minutes on a core
SMALL = [*(f"train.{key}" for key in SHORT), *NARROW, *FEW, "resources.num_workers=1"]


def commands() -> list[list[str]]:
    """[verb, argument, ...] of the section's commands."""
    text = DOCS.read_text(encoding="utf-8")
    section = text.split("\n## Aspect-ratio buckets\n")[1].split("\n## ")[0]
    found = re.findall(r"^ {4}python -m flowray\.(.+)$", section, re.MULTILINE)
    return [shlex.split(line) for line in found]


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with PHOTOS: shapes as JPEGs between 1:2 and 2:1."""
    monkeypatch.chdir(tmp_path)
    own, photos = own_pictures(tmp_path / "own", 48), tmp_path / "PHOTOS"
    photos.mkdir()
    rng = np.random.default_rng(0)
    for path in sorted(own.glob("*.png")):
        ratio, shorter = 2 ** rng.uniform(-1, 1), rng.integers(150, 200)
        size = round(shorter * max(1, ratio)), round(shorter * max(1, 1 / ratio))
        Image.open(path).convert("RGB").resize(size).save(photos / f"{path.stem}.jpg")
        path.with_suffix(".txt").rename(photos / f"{path.stem}.txt")
    return tmp_path


def test_the_quick_walk(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pack, init, plan, train, sample = commands()
    assert (train, sample[0]) == (plan[:-1], "sample")
    for verb, *words in (pack, init):
        assert import_module(f"flowray.cli.{verb}").main(words) == 0
    capsys.readouterr()
    assert import_module("flowray.cli.train").main([*plan[1:], "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    recipe = load_recipe("photos.yaml").recipe
    own = [recipe.model.latent.height, recipe.model.latent.width]
    assert own[0] == own[1] >= 16
    sizes = [bucket["latent"] for bucket in told["buckets"]]
    assert sizes[0] == own
    assert len(sizes) == 5
    assert all(height * width <= own[0] * own[1] for height, width in sizes)


@pytest.mark.slow
@pytest.mark.timeout(5 * PATIENCE_S)
def test_the_walk(place: Path) -> None:
    for verb, *words in commands():
        short = SMALL if verb == "train" else []
        command = [sys.executable, "-m", f"flowray.{verb}", *words, *short]
        done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_S)
        assert done.returncode == 0, done.stderr
    (drawn,) = (place / "runs" / "photos" / "samples").glob("a_red_circle*.png")
    with Image.open(drawn) as picture:
        assert picture.width > picture.height
