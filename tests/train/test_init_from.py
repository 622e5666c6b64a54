"""`train.init_from`: a new run that starts from the weights of another."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support import tiny_recipe

from flowray.cli.export import main as export
from flowray.cli.ready import problems
from flowray.config.errors import InputError, Notice
from flowray.config.load import dump_recipe, load_recipe
from flowray.doctor.subject import open_subject, untrained
from flowray.store.found import find_checkpoint
from flowray.store.run import RunDirectory
from flowray.train.begin import begin_from
from flowray.train.state import TrainState, fresh_state, restore_state, save_state

CPU = torch.device("cpu")


def started(recipe) -> TrainState:
    state = fresh_state(recipe, CPU)
    restore_state(state, recipe, RunDirectory(Path(recipe.storage_path) / recipe.name))
    return state


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A run with a step whose average is another than its weights, its export and single file."""
    folder = tmp_path_factory.mktemp("from")
    recipe = tiny_recipe(folder)
    run = RunDirectory(folder / "runs" / "tiny")
    run.create()
    run.config.write_text(dump_recipe(recipe))
    state = fresh_state(recipe, CPU)
    for i, (name, weight) in enumerate(state.parameters.items()):
        weight.data += 0.01 * (i + 1)
        state.ema.average[name] -= 0.02 * (i + 1)
    state.step = 4
    save_state(state, recipe, run)
    assert (
        export(
            [
                str(run.path),
                "--out",
                str(folder / "pipe"),
                "--single",
                str(folder / "all.safetensors"),
            ]
        )
        == 0
    )
    return folder


@pytest.mark.parametrize(
    "source", ["runs/tiny", "runs/tiny/checkpoints/step_000004", "pipe", "all.safetensors"]
)
def test_weights_and_average_are_those_of_the_source(folder, source):
    place = str(folder / source)
    recipe = tiny_recipe(folder, **{"name": "new", "train.init_from": place, "seed": 5})
    assert not [line for line in problems(recipe) if "init_from" in line]
    state = started(recipe)
    want = load_file(folder / "runs/tiny/checkpoints/step_000004/ema.safetensors")
    assert state.step == 0
    assert state.parameters.keys() == want.keys()
    for name, tensor in want.items():
        assert torch.equal(state.parameters[name], tensor), name
        assert torch.equal(state.ema.average[name], tensor), name
    assert not state.optimizer.state


def test_a_resumed_run_knows_what_it_began_from(folder):
    source = folder / "again"
    shutil.copytree(folder / "runs" / "tiny", source)
    recipe = tiny_recipe(folder, **{"name": "long", "train.init_from": str(source)})
    run = RunDirectory(folder / "runs" / "long")
    run.create()
    run.config.write_text(dump_recipe(recipe))
    state = started(recipe)
    state.step = 3
    save_state(state, recipe, run)
    want = load_file(source / "checkpoints" / "step_000004" / "ema.safetensors")
    resumed = started(recipe)
    assert resumed.step == 3
    for initial in (
        untrained(recipe, resumed.begun_from)[1],
        open_subject(find_checkpoint(run.path)).initial,
    ):
        assert initial.keys() == want.keys()
        assert all(torch.equal(initial[name], weight) for name, weight in want.items())
    # not the weights that it began from any more
    save_file(
        {name: w + 1 for name, w in want.items()},
        source / "checkpoints/step_000004/ema.safetensors",
    )
    assert untrained(recipe, resumed.begun_from)[1] is None
    assert open_subject(find_checkpoint(run.path)).initial is None
    plain = tiny_recipe(folder, name="plain")
    assert untrained(plain, "")[1].keys() == untrained(plain, None)[1].keys() == want.keys()
    assert untrained(plain, resumed.begun_from)[1] is None


def test_raw_weights_where_the_source_samples_with_them(folder):
    config = folder / "runs" / "tiny" / "config.yaml"
    before = config.read_text()
    config.write_text(before.replace("weights: ema", "weights: raw"))
    try:
        recipe = tiny_recipe(
            folder, **{"name": "raw", "train.init_from": str(folder / "runs" / "tiny")}
        )
        state = started(recipe)
    finally:
        config.write_text(before)
    want = load_file(folder / "runs/tiny/checkpoints/step_000004/model.safetensors")
    assert all(torch.equal(state.parameters[name], tensor) for name, tensor in want.items())


def test_a_loss_that_is_new_begins_with_weights_of_its_own(folder):
    keys = {"name": "more", "loss.clip.weight": 1.0}
    plain = started(tiny_recipe(folder, **keys))
    recipe = tiny_recipe(folder, **keys, **{"train.init_from": str(folder / "pipe")})
    with pytest.warns(Notice) as heard:
        state = started(recipe)
    assert len(heard) == 1
    assert "semantic.clip" in str(heard[0].message)
    new = [name for name in state.parameters if name.startswith("semantic.")]
    assert new
    assert all(torch.equal(state.parameters[name], plain.parameters[name]) for name in new)
    want = load_file(folder / "runs/tiny/checkpoints/step_000004/ema.safetensors")
    assert all(torch.equal(state.parameters[name], tensor) for name, tensor in want.items())


def test_a_teacher_that_follows_begins_at_the_student(folder):
    keys = {"name": "dino", "loss.dino.weight": 1.0, "loss.dino.prototypes": 8}
    recipe = tiny_recipe(folder, **keys, **{"train.init_from": str(folder / "runs" / "tiny")})
    state = fresh_state(recipe, CPU)
    dino = state.model.semantic.dino
    with torch.no_grad():
        for p in dino.teacher.head.parameters():
            p.zero_()
    with pytest.warns(Notice):
        begin_from(state, recipe)
    for own, live in zip(dino.teacher.head.parameters(), dino.student.parameters(), strict=True):
        assert torch.equal(own, live)


def test_a_resume_does_not_read_it_again(folder, tmp_path):
    source = tmp_path / "source.safetensors"
    source.write_bytes((folder / "all.safetensors").read_bytes())
    recipe = tiny_recipe(tmp_path, **{"name": "again", "train.init_from": str(source)})
    state = started(recipe)
    state.step = 2
    state.parameters["text.queries"].data += 1
    run = RunDirectory(tmp_path / "runs" / "again")
    run.create()
    save_state(state, recipe, run)
    source.unlink()
    assert not [line for line in problems(recipe) if "init_from" in line]
    resumed = started(recipe)
    assert resumed.step == 2
    assert torch.equal(resumed.parameters["text.queries"], state.parameters["text.queries"])


def test_what_does_not_fit_is_one_line(folder, tmp_path):
    """The same line before a run starts, from shapes alone, and where it starts."""
    plain = tmp_path / "plain.safetensors"
    save_file({"x": torch.zeros(2)}, plain)
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(b"no tensors")
    for keys, words in (
        (
            {"model.velocity.width": 32, "train.init_from": str(folder / "pipe")},
            r"\(16, 4\) for \(32, 4\)",
        ),
        ({"model.velocity.depth": 3, "train.init_from": str(folder / "runs/tiny")}, "blocks.2"),
        ({"train.init_from": str(plain)}, "is too much: x"),
        ({"train.init_from": str(broken)}, "cannot be read"),
        ({"train.init_from": str(tmp_path / "none")}, "none"),
    ):
        recipe = tiny_recipe(folder, name="misfit", **keys)
        (line,) = [line for line in problems(recipe) if "init_from" in line]
        assert "\n" not in line
        with pytest.raises(InputError, match=words) as refused:
            started(recipe)
        assert str(refused.value) == line
    assert not (folder / "runs" / "misfit").exists()


def test_a_relative_path_is_kept_whole(folder, monkeypatch):
    """Ray's workers run in other folders."""
    monkeypatch.chdir(folder)
    recipe = load_recipe("quickstart", ["train.init_from=pipe"]).recipe
    assert recipe.train.init_from == str(folder / "pipe")
