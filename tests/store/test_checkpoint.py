"""Checkpoints are whole or absent, and hold exactly what was saved."""

import errno
import resource
from pathlib import Path

import pytest
import torch

from flowray.config.errors import InputError
from flowray.store.checkpoint import (
    copy_into,
    list_checkpoints,
    load_state,
    load_tensors,
    newest_checkpoint,
    save_checkpoint,
)


def groups(value: float = 0.0) -> dict[str, dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(3, 5, generator=generator) + value
    return {
        "model": {"a.weight": weight, "a.half": weight.bfloat16(), "turned": weight.T},
        "ema": {"a.weight": weight * 0.5},
        "optim": {
            "a.weight/step": torch.tensor(7.0),
            "count": torch.arange(4),
            "flags": torch.tensor([True, False]),
        },
    }


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_round_trip_is_exact_in_every_type_and_holds_no_pickle(tmp_path):
    saved = save_checkpoint(tmp_path, 12, groups(), {"seed": 3}, keep=2)
    assert saved.name == "step_000012"
    state = load_state(saved)
    assert (state["step"], state["seed"]) == (12, 3)
    for group, tensors in groups().items():
        loaded = load_tensors(saved, group)
        assert loaded.keys() == tensors.keys()
        for key, tensor in tensors.items():
            assert loaded[key].dtype == tensor.dtype
            assert torch.equal(loaded[key], tensor)
    assert names(saved) == [
        "ema.safetensors",
        "model.safetensors",
        "optim.safetensors",
        "state.json",
    ]
    assert not any(
        file.read_bytes()[:2] in (b"\x80\x02", b"\x80\x04", b"PK") for file in saved.iterdir()
    )


def test_keeps_the_newest_and_sweeps_up_after_a_killed_writer(tmp_path):
    (tmp_path / ".partial_000003").mkdir()
    for step in (5, 10, 999_995, 1_000_000):
        save_checkpoint(tmp_path, step, groups(), {"seed": 0}, keep=3)
    assert names(tmp_path) == ["step_000010", "step_1000000", "step_999995"]
    assert newest_checkpoint(tmp_path).name == "step_1000000"


@pytest.mark.parametrize("damage", ["truncated", "one bit", "lost", "state"])
def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(tmp_path, damage):
    first = save_checkpoint(tmp_path, 1, groups(), {"seed": 0}, keep=3)
    second = save_checkpoint(tmp_path, 2, groups(1.0), {"seed": 0}, keep=3)
    assert newest_checkpoint(tmp_path) == second
    file = second / ("state.json" if damage == "state" else "model.safetensors")
    content = bytearray(file.read_bytes())
    if damage == "lost":
        file.unlink()
    elif damage == "one bit":
        content[-3] ^= 1
        file.write_bytes(content)
    else:
        file.write_bytes(content[: len(content) // 2])
    assert newest_checkpoint(tmp_path) == first
    assert newest_checkpoint(tmp_path / "none") is None


def test_a_full_disk_raises_oserror_and_leaves_the_older_checkpoint(tmp_path):
    first = save_checkpoint(tmp_path, 1, groups(), {"seed": 0}, keep=2)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    # the kernel refuses the write, as it does on a full disk
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        with pytest.raises(OSError, match="too large") as caught:
            save_checkpoint(tmp_path, 2, {"model": {"a": torch.zeros(1000)}}, {"seed": 0}, keep=2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert caught.value.errno == errno.EFBIG
    assert names(tmp_path) == ["step_000001"]
    assert newest_checkpoint(tmp_path) == first


def test_the_same_step_again_replaces_an_invalid_one(tmp_path):
    (save_checkpoint(tmp_path, 4, groups(), {"seed": 0}, keep=2) / "ema.safetensors").unlink()
    assert list_checkpoints(tmp_path) == []
    save_checkpoint(tmp_path, 4, groups(1.0), {"seed": 0}, keep=2)
    assert torch.equal(
        load_tensors(newest_checkpoint(tmp_path), "model")["a.weight"],
        groups(1.0)["model"]["a.weight"],
    )


def test_copy_into_names_what_does_not_fit():
    here = Path("runs/x/checkpoints/step_000001")
    parameters = {"a": torch.nn.Parameter(torch.zeros(2, 2))}
    copy_into(parameters, {"a": torch.ones(2, 2)}, here)
    assert bool((parameters["a"] == 1).all())
    with pytest.raises(InputError, match=r"step_000001.*lacks \['a'\].*besides \['b'\]"):
        copy_into(parameters, {"b": torch.ones(2, 2)}, here)
    with pytest.raises(InputError, match=r"a is \(3,\), the recipe's model has \(2, 2\)"):
        copy_into(parameters, {"a": torch.ones(3)}, here)
