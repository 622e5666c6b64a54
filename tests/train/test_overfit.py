"""The notes' first health check, on real pictures: every head with every velocity network overfits
128 of them.

Pass: the flow loss falls by more than 20 %, the cosine of predicted and true velocity rises, the KL
is steady.
"""

from __future__ import annotations

from pathlib import Path
from statistics import mean
from typing import Any

import pytest
import torch

from flowray.config.load import load_recipe, override_recipe
from flowray.data.make import ShapesSet, write_set
from flowray.store.rows import read_rows
from flowray.store.run import RunDirectory
from flowray.train.group import Group
from flowray.train.loop import train

HEADS: dict[str, dict[str, Any]] = {
    "pooled": {"hidden": 128, "layers": 3},
    "grid": {"hidden": 32, "heads": 2, "layers": 1, "convs": 1},
    "conv": {"hidden": 16, "mlp": 64, "layers": 1},
    "transencoder": {"layers": 1, "reductions": 1, "heads": 4, "ffn": 128},
}
VELOCITIES: dict[str, dict[str, Any]] = {
    "dit": {"patch": 2, "width": 64, "depth": 2, "heads": 4},
    "dimr": {"widths": [64, 32], "depths": [3, 1], "heads": 4, "level_weights": [0.25, 1.0]},
}
SMALL = {
    "train.steps": 80,
    "train.batch_size": 16,
    "optim.lr": 3e-3,
    "probes.batch_size": 16,
    "probes.shoot_steps": 10,
}
OFTEN = {
    "train.log_every": 1,
    "train.probe_every": 20,
    "train.sample_every": 1000,
    "train.checkpoint_every": 1000,
}


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("overfit")
    return write_set(ShapesSet(train=128, val=1, unseen=1, closed=True), root / "shapes")["train"]


@pytest.mark.parametrize("velocity", VELOCITIES)
@pytest.mark.parametrize("head", HEADS)
def test_overfits(head: str, velocity: str, pictures: Path, tmp_path: Path) -> None:
    data = {
        "data.shards": str(pictures),
        "data.val_shards": str(pictures),
        "data.cache": str(pictures.parent.parent / "cache"),
    }
    parts = {
        "model.head": {"kind": head, **HEADS[head]},
        "model.velocity": {"kind": velocity, **VELOCITIES[velocity]},
    }
    recipe = override_recipe(
        load_recipe("overfit").recipe,
        {**data, **parts, **SMALL, **OFTEN, "storage_path": str(tmp_path)},
    )
    run = RunDirectory(tmp_path / recipe.name)
    train(recipe, run, Group(0, 1, torch.device("cpu")), lambda row: None)
    rows, probes = read_rows(run.metrics), read_rows(run.probes)
    flow, kl, cos = ([row[key] for row in rows] for key in ("loss/flow", "loss/kl", "train/cos"))
    probed = [row["ema/flow/cos"] for row in probes]
    assert mean(flow[-10:]) < 0.8 * mean(flow[:10])
    assert mean(cos[-10:]) > mean(cos[:10]) + 0.1
    assert probed == sorted(probed)
    assert probed[-1] > max(0.5, probed[0] + 0.05)
    assert mean(kl[-10:]) == pytest.approx(mean(kl[-20:-10]), rel=0.25)
