"""A checkpoint that several write together: whole or absent, and the same to every reader."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from shares import save_shares

from flowray.store import checkpoint
from flowray.store.checkpoint import (
    STATE,
    damage_of,
    group_files,
    is_valid,
    list_checkpoints,
    load_tensors,
)
from flowray.store.weights import Weights

WEIGHTS = torch.arange(30.0).reshape(10, 3)
BIAS = torch.ones(4)
SHARES: list[dict[str, dict[str, torch.Tensor]]] = [
    {"model": {"w": WEIGHTS[:4], "b": BIAS}, "optim": {}},
    {"model": {"w": WEIGHTS[4:8]}, "optim": {"w/step": torch.tensor(3.0)}},
    {"model": {"w": WEIGHTS[8:]}, "optim": {}},
]


def test_readers_see_whole_tensors(tmp_path):
    made = save_shares(tmp_path, 7, SHARES)
    assert made == [tmp_path / "step_000007"] * 3 == list_checkpoints(tmp_path) * 3
    (checkpoint,) = list_checkpoints(tmp_path)
    state = json.loads((checkpoint / STATE).read_text())
    assert (state["step"], state["seed"]) == (7, 3)  # what the first one keeps
    names = {f"{g}-0000{n}-of-00003.safetensors" for g in ("model", "optim") for n in (1, 2, 3)}
    assert state["files"].keys() == names
    assert {path.name for path in checkpoint.iterdir()} == {*names, STATE}
    model = load_tensors(checkpoint, "model")
    assert model.keys() == {"w", "b"}
    assert torch.equal(model["w"], WEIGHTS)
    assert torch.equal(model["b"], BIAS)
    assert load_tensors(checkpoint, "optim") == {"w/step": torch.tensor(3.0)}
    weights = Weights("a run", group_files(checkpoint, "model"))
    assert weights.shapes() == {"w": (10, 3), "b": (4,)}
    assert torch.equal(weights.tensors()["w"], WEIGHTS)
    assert damage_of(checkpoint) is None


@pytest.mark.parametrize("harm", [Path.unlink, lambda file: file.write_bytes(b"x" * 8)])
def test_a_share_that_is_damaged_damages_all(tmp_path, harm: Callable[[Path], Any]):
    save_shares(tmp_path, 7, SHARES)
    (checkpoint,) = list_checkpoints(tmp_path)
    harm(checkpoint / "model-00002-of-00003.safetensors")
    assert not is_valid(checkpoint)
    assert "model-00002-of-00003.safetensors" in (damage_of(checkpoint) or "")


@pytest.mark.parametrize("rank", [0, 1, 2])
def test_where_one_cannot_write_none_has_written(tmp_path, rank):
    save_shares(tmp_path, 1, SHARES)
    shares = [*SHARES]
    shares[rank] = {"no such folder/model": {}}
    failed = save_shares(tmp_path, 2, shares)
    assert all(isinstance(error, OSError) for error in failed)
    assert {str(error) for error in failed} == {
        f"[Errno 2] No such file or directory (rank {rank})"
    }
    assert [path.name for path in tmp_path.iterdir()] == ["step_000001"]
    assert damage_of(tmp_path / "step_000001") is None


def test_the_first_one_alone_fails_to_begin(tmp_path):
    (tmp_path / "file").touch()
    failed = save_shares(tmp_path / "file" / "checkpoints", 1, SHARES)
    assert {str(error) for error in failed} == {"[Errno 20] Not a directory (rank 0)"}


def test_a_share_that_the_first_does_not_see_is_no_checkpoint(tmp_path, monkeypatch):
    """As on a mount that keeps lists of files for a while."""
    write = checkpoint.write_tensors

    def elsewhere(path: Path, tensors: dict[str, torch.Tensor]) -> dict[str, int]:
        told = write(path, tensors)
        if "-00002-of-" in path.name:
            path.rename(tmp_path / path.name)
        return told

    monkeypatch.setattr(checkpoint, "write_tensors", elsewhere)
    found = save_shares(tmp_path, 7, SHARES)
    assert {type(each) for each in found} == {OSError}
    assert not list(tmp_path.glob("step_*"))
    assert not list(tmp_path.glob(".partial_*"))
