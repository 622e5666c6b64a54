"""The run behind golden_losses.json: 50 steps of the tiny recipe on one CPU thread."""

import json
from pathlib import Path

import torch
from support import tiny_recipe

from flowray.store.rows import read_rows
from flowray.store.run import RunDirectory
from flowray.train.group import Group
from flowray.train.loop import train

FILE = Path(__file__).with_name("golden_losses.json")
KEYS = ("loss/flow", "loss/kl", "loss/clip", "grad/total")


def losses(folder: Path) -> dict[str, list[float]]:
    """KEYS at each of the 50 steps of a fresh run in `folder`."""
    often = {"train.steps": 50, "train.log_every": 1, "train.batch_size": 16}
    seldom = {"train.probe_every": 100, "train.sample_every": 100, "train.checkpoint_every": 100}
    recipe = tiny_recipe(
        folder, **often, **seldom, **{"loss.clip.weight": 0.5, "flow.time.kind": "log_snr"}
    )
    run = RunDirectory(folder / "runs" / recipe.name)
    torch.set_num_threads(1)
    train(recipe, run, Group(0, 1, torch.device("cpu")), lambda row: None)
    rows = read_rows(run.metrics)
    return {key: [row[key] for row in rows] for key in KEYS}


def kept() -> dict[str, list[float]]:
    """What the file holds."""
    return json.loads(FILE.read_text())
