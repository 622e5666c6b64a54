"""The doctor inside training: when it comes, what it writes, and that training does not notice."""

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from support import tiny_recipe

from flowray.config.load import override_recipe
from flowray.data.order import EpochOrder
from flowray.doctor.visits import Visits
from flowray.findings.rules import RULES
from flowray.store.checkpoint import newest_checkpoint
from flowray.store.latents import LatentSet
from flowray.store.rows import read_rows
from flowray.store.run import RunDirectory
from flowray.train.group import Group
from flowray.train.loop import train
from flowray.train.state import Halted

CPU = Group(0, 1, torch.device("cpu"))


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    often = {
        "train.steps": 6,
        "train.probe_every": 2,
        "train.log_every": 1,
        "train.checkpoint_every": 6,
        "train.sample_every": 6,
    }
    return tiny_recipe(
        tmp_path_factory.mktemp("visits"), **often, **{"loss.clip.weight": 0.5, "optim.lr": 1e-9}
    )


def go(base, name, **keys):
    recipe = override_recipe(base, {"name": name, **keys})
    run = RunDirectory(Path(recipe.storage_path) / name)
    train(recipe, run, CPU, lambda row: None, Visits)
    return run


@pytest.fixture(scope="module")
def plain(base):
    return go(base, "plain")


@pytest.fixture(scope="module")
def visited(base):
    return go(base, "visited", **{"probes.doctor_every": 2})


def test_it_comes_at_every_nth_probe_and_at_the_last_step(plain, visited):
    assert not plain.findings.exists()
    visits = read_rows(visited.findings)
    assert [row["step"] for row in visits] == [4, 6]
    ids = {rule.id for rule in RULES}
    assert all({finding["id"] for finding in row["findings"]} <= ids for row in visits)
    assert visits[-1]["findings"], "6 steps of lr 1e-9 on 64 random pictures"
    assert all(
        finding["evidence"] and finding["cause"] and finding["fix"]
        for row in visits
        for finding in row["findings"]
    )


def test_training_is_the_same_bit_for_bit_with_it(plain, visited):
    for file in ("model", "ema", "optim"):
        a, b = (
            load_file(newest_checkpoint(run.checkpoints) / f"{file}.safetensors")
            for run in (plain, visited)
        )
        assert a.keys() == b.keys()
        assert all(torch.equal(a[name], b[name]) for name in a), file
    losses = [
        [(row["step"], row["loss/total"]) for row in read_rows(run.metrics)]
        for run in (plain, visited)
    ]
    assert losses[0] == losses[1]


def test_it_comes_when_training_halts_and_names_what_was_not_finite(base, monkeypatch):
    moments = LatentSet.moments

    def corrupt(self, indices):
        made = moments(self, indices)
        if len(self) == 64:
            made.mean[torch.from_numpy(indices == 20)] = torch.nan
        return made

    monkeypatch.setattr(LatentSet, "moments", corrupt)
    order = EpochOrder(64, base.seed)(np.arange(64)).tolist()
    fails_at = order.index(20) // base.train.batch_size  # steps that are done before
    keys = {"probes.doctor_every": 100, "train.steps": 9, "train.max_skipped": 0}
    with pytest.raises(Halted, match=f"step {fails_at + 1}: loss/flow is not finite"):
        go(base, "halts", **keys)
    (visit,) = read_rows(RunDirectory(Path(base.storage_path) / "halts").findings)
    assert visit["step"] == fails_at
    first = visit["findings"][0]
    assert first["id"] == "non_finite"
    assert "s00020" in first["evidence"]
