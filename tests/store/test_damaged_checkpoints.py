"""A checkpoint that is damaged and one that cannot be read are different things."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
import torch
from support import assert_refused

from flowray.config.errors import InputError
from flowray.store import checkpoint as module
from flowray.store.checkpoint import (
    DAMAGED,
    STATE,
    list_checkpoints,
    newest_checkpoint,
    save_checkpoint,
)


def saved(folder: Path, step: int, keep: int = 5) -> Path:
    return save_checkpoint(folder, step, {"model": {"w": torch.ones(8)}}, {"seed": 0}, keep=keep)


def damage(checkpoint: Path) -> None:
    """One bit, which no size tells of."""
    content = bytearray((checkpoint / "model.safetensors").read_bytes())
    content[-3] ^= 1
    (checkpoint / "model.safetensors").write_bytes(content)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_damaged_one_is_said_aloud_and_counts_no_more(tmp_path):
    first, second, third = (saved(tmp_path, step) for step in (10, 20, 30))
    damage(second)
    damage(third)
    said: list[str] = []
    assert newest_checkpoint(tmp_path, said.append) == first
    assert [str(third) in said[0], str(second) in said[1], len(said)] == [True, True, 2]
    assert newest_checkpoint(tmp_path, said.append, set_aside=True) == first
    assert list_checkpoints(tmp_path) == [first]
    said.clear()
    assert newest_checkpoint(tmp_path, said.append) == first
    assert said == []  # it was told when it was set aside
    # rotation: two good ones beside them, whatever they are worth
    for step in (12, 15):
        saved(tmp_path, step, keep=2)
    assert names(tmp_path) == ["step_000012", "step_000015", "step_000020", "step_000030"]
    saved(tmp_path, 20, keep=2)  # in the place of a damaged one
    saved(tmp_path, 25, keep=2)
    assert names(tmp_path) == ["step_000020", "step_000025", "step_000030"]
    assert newest_checkpoint(tmp_path).name == "step_000025"
    for step in (35, 40):  # a damaged one goes once it is older than what is kept
        saved(tmp_path, step, keep=2)
    assert names(tmp_path) == ["step_000035", "step_000040"]


def test_what_was_just_written_never_goes_for_a_later_one(tmp_path):
    """Their content is not read at a save, so nothing is known of those later ones."""
    saved(tmp_path, 100)
    saved(tmp_path, 200)
    assert saved(tmp_path, 10, keep=1).is_dir()
    assert names(tmp_path) == ["step_000010", "step_000100", "step_000200"]


def test_where_all_are_damaged_nothing_begins_anew_by_itself(tmp_path):
    for step in (1, 2):
        damage(saved(tmp_path, step))
    for _ in range(2):  # asking changes nothing
        assert_refused(
            lambda: newest_checkpoint(tmp_path, lambda text: None, set_aside=True),
            InputError,
            r"no checkpoint in it is intact \(2 damaged\).*step_000002.*remove",
        )
    assert all((tmp_path / name / STATE).exists() for name in names(tmp_path))


def test_those_set_aside_are_not_forgotten(tmp_path):
    first, second = saved(tmp_path, 1), saved(tmp_path, 2)
    damage(second)
    newest_checkpoint(tmp_path, lambda text: None, set_aside=True)
    assert (second / DAMAGED).is_file()
    damage(first)
    assert_refused(lambda: newest_checkpoint(tmp_path, lambda text: None), InputError, "2 damaged")


def test_one_cut_off_while_it_was_put_in_place_is_no_damage(tmp_path):
    """A bucket renames file by file, the state last; rotation removes it first."""
    (saved(tmp_path, 1) / STATE).unlink()
    assert newest_checkpoint(tmp_path) is None


def unanswering(file: Path) -> bytes:
    """From now on the system refuses to open it, with another error than that it is missing."""
    content = file.read_bytes()
    file.unlink()
    file.symlink_to(file.name)
    return content


@pytest.mark.parametrize("name", [STATE, "model.safetensors"])
def test_one_that_cannot_be_read_is_waited_for(tmp_path, monkeypatch, name):
    monkeypatch.setattr(module, "PAUSES_S", (0.05,) * 200)
    saved(tmp_path, 1)
    second = saved(tmp_path, 2)
    content = unanswering(second / name)

    def answer() -> None:
        whole = second / "whole"
        whole.write_bytes(content)
        whole.replace(second / name)

    timer = threading.Timer(0.3, answer)
    timer.start()
    assert newest_checkpoint(tmp_path) == second
    timer.join()


@pytest.mark.parametrize("name", [STATE, "model.safetensors"])
def test_one_that_is_never_read_ends_the_start(tmp_path, monkeypatch, name):
    """Not an older one in its stead, and not step 0: it may be whole."""
    monkeypatch.setattr(module, "PAUSES_S", (0.01, 0.01))
    saved(tmp_path, 1)
    second = saved(tmp_path, 2)
    unanswering(second / name)
    assert_refused(
        lambda: newest_checkpoint(tmp_path), InputError, rf"^{second}: cannot be read: .*3 tries"
    )
    assert names(tmp_path) == ["step_000001", "step_000002"]
