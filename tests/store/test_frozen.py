"""A checkpoint and the frozen models it was trained against: with other weights of theirs nothing
goes on.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from support import assert_refused, tiny_autoencoder, tiny_recipe, tiny_text

from flowray.cli import doctor, eval, sample, train
from flowray.config.errors import InputError
from flowray.config.load import dump_recipe, load_recipe, override_recipe
from flowray.config.recipe import Recipe
from flowray.model.assets import asset_path
from flowray.model.files import BLOCK, BLOCKS, WHOLE, content_of
from flowray.store.checkpoint import list_checkpoints
from flowray.store.found import find_checkpoint
from flowray.store.frozen import WEIGHTS
from flowray.store.run import RunDirectory
from flowray.train.state import fresh_state, restore_state, save_state

CPU = torch.device("cpu")


def saved(recipe: Recipe) -> RunDirectory:
    """A run with a checkpoint of step 1 of more."""
    run = RunDirectory(Path(recipe.storage_path) / recipe.name)
    run.create()
    run.config.write_text(f"# BRANCH/COMMIT : main / abc1234\n{dump_recipe(recipe)}")
    state = fresh_state(recipe, CPU)
    restore_state(state, recipe, run)
    state.step = 1
    save_state(state, recipe, run)
    return run


def of_before(run: RunDirectory) -> None:
    """Its checkpoint as a flowray wrote it that did not note the weights."""
    (checkpoint,) = list_checkpoints(run.checkpoints)
    kept = json.loads((checkpoint / "state.json").read_text())
    assert kept.pop(WEIGHTS).keys() == {"model.text.path", "model.autoencoder.path"}
    (checkpoint / "state.json").write_text(json.dumps(kept))


def goes_on(run: RunDirectory) -> None:
    recipe = load_recipe(str(run.config)).recipe
    assert find_checkpoint(run.path).recipe == recipe
    state = fresh_state(recipe, CPU)
    restore_state(state, recipe, run)
    assert state.step == 1


def is_refused(run: RunDirectory, key: str, words: str) -> None:
    """By every command that would use it, with nothing written, and by a worker that restores."""
    before = sorted(run.path.rglob("*"))
    for command, argv in (
        (train, [str(run.config), "--resume"]),
        (sample, [str(run.path), "a red circle"]),
        (eval, [str(run.path)]),
        (doctor, [str(run.path)]),
    ):
        assert_refused(lambda c=command, a=argv: c.main(a), InputError, f"^{key}: .*{words}")
    recipe = load_recipe(str(run.config)).recipe
    state = fresh_state(recipe, CPU)
    assert_refused(lambda: restore_state(state, recipe, run), InputError, f"^{key}: .*{words}")
    assert sorted(run.path.rglob("*")) == before


@pytest.mark.parametrize("key", ["model.text.path", "model.autoencoder.path"])
def test_other_weights_in_the_same_place_are_refused(tmp_path: Path, key: str) -> None:
    recipe = tiny_recipe(tmp_path)
    run = saved(recipe)
    goes_on(run)
    make, name = {
        "model.text.path": (tiny_text, "text"),
        "model.autoencoder.path": (tiny_autoencoder, "autoencoder"),
    }[key]
    kept = tmp_path / "kept"
    (tmp_path / name).rename(kept)
    make(tmp_path / name, seed=1)
    is_refused(run, key, f"{tmp_path / name}.*step_000001 was trained with other weights")
    assert find_checkpoint(run.path, [f"{key}={kept}"]).recipe != recipe  # the same, elsewhere
    shutil.rmtree(tmp_path / name)
    kept.rename(tmp_path / name)
    goes_on(run)
    of_before(run)
    goes_on(run)
    shutil.rmtree(tmp_path / name)
    make(tmp_path / name, seed=1)
    goes_on(run)  # nothing says what they were


def test_what_a_checkpoint_notes_is_what_was_read(tmp_path: Path) -> None:
    """Not what lies there when it is written."""
    recipe = tiny_recipe(tmp_path)
    run = RunDirectory(Path(recipe.storage_path) / recipe.name)
    run.create()
    run.config.write_text(dump_recipe(recipe))
    state = fresh_state(recipe, CPU)
    restore_state(state, recipe, run)
    shutil.rmtree(tmp_path / "text")
    tiny_text(tmp_path / "text", seed=1)
    save_state(state, recipe, run)
    assert_refused(lambda: find_checkpoint(run.path), InputError, "^model.text.path: ")


def test_a_run_of_before_on_the_embedded_models_is_refused(tmp_path: Path) -> None:
    small = {
        "storage_path": str(tmp_path / "runs"),
        "model.velocity.width": 16,
        "model.velocity.depth": 1,
        "model.velocity.heads": 2,
        "train.device": "cpu",
    }
    embedded = override_recipe(load_recipe("quickstart").recipe, small)
    run = saved(embedded)
    goes_on(run)
    of_before(run)
    is_refused(run, "model.text.path", r"'embedded'.*install the flowray .*\(main / abc1234\)")
    kept = tmp_path / "kept"
    shutil.copytree(asset_path("text"), kept)
    typed = [f"model.text.path={kept}"]
    assert_refused(
        lambda: find_checkpoint(run.path, typed), InputError, "^model.autoencoder.path: 'embedded'"
    )
    run.config.write_text(dump_recipe(embedded))  # as trials of a sweep have it, without a card
    assert_refused(lambda: find_checkpoint(run.path), InputError, "flowray that wrote it to go on")


def test_large_weights_are_known_without_being_read_whole(tmp_path: Path) -> None:
    large = tmp_path / "large.safetensors"
    with large.open("wb") as file:  # holes, which take no room
        file.truncate(64 * WHOLE)
    found = {content_of(large)}
    size = large.stat().st_size
    for place in (0, (size - BLOCK) * 21 // (BLOCKS - 1), size - 1):
        with large.open("r+b") as file:
            file.seek(place)
            file.write(b"x")
        found.add(content_of(large))
    with large.open("r+b") as file:
        file.truncate(size + 1)
    found.add(content_of(large))
    assert len(found) == 5
    moved = large.rename(tmp_path / "moved.safetensors")
    assert content_of(moved) in found
    small = tmp_path / "small.safetensors"
    small.write_bytes(bytes(1000))
    before = content_of(small)
    small.write_bytes(bytes(500) + b"x" + bytes(499))
    assert content_of(small) != before
    assert content_of(small, moved) != content_of(moved, small)
