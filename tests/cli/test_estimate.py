"""The wall time that `--plan` gives: near that of a real run, taken from an earlier run where
there is one.
"""

import json
import re
import shutil
import statistics
import time
from pathlib import Path

import pytest
import torch
from support import own_pictures, tiny_recipe

from flowray.cli import data, train, tune
from flowray.cli.estimate import passes, wall_time, why_not
from flowray.cli.plan import make_plan
from flowray.cli.progress import START_S
from flowray.cli.ready import problems
from flowray.config.errors import InputError
from flowray.config.load import dump_recipe, override_recipe
from flowray.config.recipe import Recipe
from flowray.data.pack import pack_folder
from flowray.store.latents import ensure_latents, load_latents, load_training
from flowray.store.rows import read_rows
from flowray.store.run import RunDirectory
from flowray.train import loop, measure
from flowray.train.group import Group
from flowray.train.looks import Looks
from flowray.train.state import fresh_state


def estimate(recipe: Recipe) -> dict:
    plan = make_plan(recipe)
    return wall_time(recipe, sum(plan["memory_per_gpu"].values()), plan["weights"])


@pytest.mark.parametrize(
    "size",
    [
        {},
        {
            "model.velocity.width": 128,
            "model.velocity.depth": 3,
            "model.velocity.heads": 4,
            "model.head.hidden": 256,
            "train.batch_size": 16,
            "train.steps": 12,
            "train.probe_every": 12,
            "probes.shoot_steps": 20,
            "sample.guidance_scale": 2.0,
        },
    ],
    ids=["overhead", "arithmetic"],
)
def test_within_a_factor_of_three_of_a_real_run(tmp_path: Path, size: dict) -> None:
    recipe = tiny_recipe(tmp_path, **{"probes.shoot_steps": 30, **size})
    guess = estimate(recipe)
    assert "timed on this machine" in guess["basis"]
    assert "80 pictures" in guess["basis"]
    run, began = RunDirectory(tmp_path / "runs" / "tiny"), time.monotonic()
    loop.train(recipe, run, Group.current("cpu"), lambda row: None)
    took = time.monotonic() - began
    step_s = statistics.median(row["perf/step_s"] for row in read_rows(run.metrics))
    assert step_s / 3 < guess["step_s"] < step_s * 3
    assert guess["seconds"] - START_S < took * 3  # which loads models, as START_S does
    assert took < guess["seconds"] * 3
    run.config.write_text(dump_recipe(recipe))
    again = estimate(override_recipe(recipe, {"name": "other", "train.steps": 2400}))
    assert str(run.path) in again["basis"]
    assert again["step_s"] == pytest.approx(step_s)
    assert again["seconds"] > 2400 * step_s


@pytest.mark.parametrize("named", ["", "local"])
def test_an_address_that_names_no_cluster_means_this_machine(tmp_path, monkeypatch, named) -> None:
    monkeypatch.setenv("RAY_ADDRESS", named)
    recipe = tiny_recipe(tmp_path, **{"resources.gpus_per_worker": 64})
    assert "GPU" in why_not(recipe, 0, [])
    assert any(line.startswith("resources") for line in problems(recipe))


def test_json_has_seconds_basis_and_what_this_machine_lacks(tmp_path: Path, capsys) -> None:
    recipe = tiny_recipe(tmp_path)
    (tmp_path / "tiny.yaml").write_text(dump_recipe(recipe))
    assert train.main([str(tmp_path / "tiny.yaml"), "--plan", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["wall_time"]["seconds"] > START_S
    assert plan["problems"] == []
    shards = f"data.shards={tmp_path / 'none'}"
    asked = ["resources.gpus_per_worker=1", "resources.num_workers=8", "train.device=cuda", shards]
    assert train.main([str(tmp_path / "tiny.yaml"), "--plan", "--json", *asked]) == 1
    plan = json.loads(capsys.readouterr().out)
    if plan["wall_time"]["seconds"] is None:  # no GPU here
        gpus, device, shards = plan["problems"]
        assert gpus.startswith("resources.gpus_per_worker: got 1")
        assert device.startswith("train.device: got cuda")
    assert str(tmp_path / "none") in plan["problems"][-1]


def pointer(folder: Path) -> None:
    (folder / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\n")


def quantised(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (folder / "config.json").write_text(json.dumps(config))


def untokenised(folder: Path) -> None:
    for path in folder.glob("tokenizer*"):
        path.unlink()


def unread(folder: Path) -> None:
    (folder / "config.json").write_text("{")


@pytest.mark.parametrize("spoil", [pointer, quantised, untokenised, unread])
def test_a_text_model_that_cannot_be_used_is_listed_in_plans(tmp_path, capsys, spoil) -> None:
    """Of a run, and of a sweep where one value of a choice leads to it.

    Only shapes that cannot be read are left out.
    """
    recipe = tiny_recipe(tmp_path)
    bad = tmp_path / "bad"
    shutil.copytree(recipe.model.text.path, bad)
    spoil(bad)
    (tmp_path / "tiny.yaml").write_text(dump_recipe(recipe))
    assert (
        train.main([str(tmp_path / "tiny.yaml"), "--plan", "--json", f"model.text.path={bad}"]) == 1
    )
    plan = json.loads(capsys.readouterr().out)
    assert all(
        line.startswith("model.text.path:") and str(bad) in line for line in plan["problems"]
    )
    assert plan["problems"]
    assert (plan["steps"], plan["wall_time"]["seconds"]) == (recipe.train.steps, None)
    assert (plan["parameters"] is None) == (spoil is unread)
    (tmp_path / "sweep.yaml").write_text(
        f"name: s\nbase: {tmp_path / 'tiny.yaml'}\nstorage_path: {tmp_path / 'runs'}\nmethod:"
        " grid\nmetric: {name: ema/shoot/nmse}\nparameters: {model.text.path: {values:"
        f" [{recipe.model.text.path}, {bad}]}}}}\n"
    )
    assert tune.main([str(tmp_path / "sweep.yaml"), "--plan", "--json"]) == 1
    (line,) = json.loads(capsys.readouterr().out)["problems"]
    assert str(bad) in line
    with pytest.raises(InputError, match=str(bad)):
        tune.main([str(tmp_path / "sweep.yaml")])


@pytest.mark.parametrize(
    ("key", "value"), [("data.shards", "nowhere"), ("data.val_shards", "null")]
)
def test_shards_that_are_not_there_are_listed_in_plans(tmp_path, capsys, key, value) -> None:
    (tmp_path / "tiny.yaml").write_text(dump_recipe(tiny_recipe(tmp_path)))
    assert train.main([str(tmp_path / "tiny.yaml"), "--plan", "--json", f"{key}={value}"]) == 1
    plan = json.loads(capsys.readouterr().out)
    (line,) = plan["problems"]
    assert key in line or value in line
    assert plan["parameters"]["head"] > 0
    assert plan["wall_time"]["seconds"] is None
    assert train.main([str(tmp_path / "tiny.yaml"), "--plan", f"{key}={value}"]) == 1
    assert line in capsys.readouterr().out


def large_pictures(folder: Path, side: int) -> Path:
    """Shards `train` and `val` of pictures of another size than `tiny_recipe`'s."""
    own_pictures(folder / "own")
    pack_folder(folder / "own", folder / "shards", side, val=0.3)
    return folder / "shards"


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        (["data.val_shards=shards/val"], "8 x 8 px.*16 x 16 px.*--size"),
        (
            ["data.shards=shards/train", "data.val_shards=shards/val"],
            "model.latent.height=8 model.latent.width=8$",
        ),
        (["data.shards=odd/train", "data.val_shards=odd/val"], "2 px a cell.*9 x 9 px.*--size 8$"),
        (["data.shards=shapes"], "64 x 64 px.*model.latent.height=32 model.latent.width=32$"),
        (["model.latent.height=8"], "type model.latent.height=4$"),
        (["model.latent.channels=8"], "type model.latent.channels=4$"),
        (["storage_path=tiny.yaml"], "storage_path: .*tiny.yaml is a file"),
        (["storage_path=/proc/x"], "storage_path: /proc cannot be written"),
        (["name=taken"], "storage_path: .*taken is a file"),
    ],
)
def test_what_a_run_refuses_its_plan_lists(tmp_path, monkeypatch, capsys, changes, says) -> None:
    """Before anything starts, and also where latents of the right shape are in the cache."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny.yaml").write_text(dump_recipe(tiny_recipe(tmp_path)))
    large_pictures(tmp_path, 16)
    large_pictures(tmp_path / "again", 9).rename("odd")
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "taken").touch()
    assert data.main(["encode", "tiny.yaml"]) == 0
    capsys.readouterr()
    assert train.main(["tiny.yaml", *changes, "--plan", "--json"]) == 1
    (line,) = json.loads(capsys.readouterr().out)["problems"]
    assert re.search(says, line), line
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(InputError) as caught:
        train.main(["tiny.yaml", *changes])
    assert str(caught.value) == line
    if not says.startswith("storage_path"):
        with pytest.raises(InputError) as caught:
            data.main(["encode", "tiny.yaml", *changes])
        assert str(caught.value) == line
    assert sorted(tmp_path.rglob("*")) == before


def sweep_of(folder: Path, parameters: dict[str, object], **changes: object) -> str:
    """A sweep file with these parameters, of the tiny recipe with `changes`."""
    (folder / "tiny.yaml").write_text(dump_recipe(tiny_recipe(folder, **changes)))
    sweep = {
        "name": "s",
        "base": "tiny.yaml",
        "method": "grid",
        "metric": {"name": "ema/shoot/nmse"},
        "time_budget": "1h",
    }
    (folder / "s.yaml").write_text(
        json.dumps({**sweep, "storage_path": str(folder / "out"), "parameters": parameters})
    )
    return str(folder / "s.yaml")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("data.shards", "nowhere"),
        ("data.shards", "nowhere/*/shard-*.tar"),
        ("data.val_shards", "nowhere"),
        ("model.latent.height", 8),
    ],
)
def test_each_searched_value_is_looked_at(tmp_path, capsys, key, value) -> None:
    section, *rest = key.split(".")
    good = tiny_recipe(tmp_path).model_dump()[section]
    for name in rest:
        good = good[name]
    source = sweep_of(tmp_path, {key: {"values": [good, value]}})
    assert tune.main([source, "--plan", "--json"]) == 1
    (line,) = json.loads(capsys.readouterr().out)["problems"]
    assert str(value) in line
    with pytest.raises(InputError) as caught:
        tune.main([source])
    assert str(caught.value) == line
    assert not (tmp_path / "out").exists()


def test_searched_shards_that_come_with_what_fits_them_are_good(tmp_path, capsys) -> None:
    """Each set has its own held-out shards and latents; the base's are not there at all, and no
    trial reads them.
    """
    small, large = tiny_recipe(tmp_path).data, large_pictures(tmp_path, 16)
    sets = {"values": [small.shards, str(large / "train")]}
    when = {"when": {"data.shards": [str(large / "train")]}}
    parameters = {
        "data.shards": sets,
        "data.val_shards": {"values": [str(large / "val")], **when},
        "model.latent.height": {"values": [8], **when},
        "model.latent.width": {"values": [8], **when},
    }
    source = sweep_of(tmp_path, parameters, **{"data.shards": str(tmp_path / "nowhere")})
    assert tune.main([source, "--plan", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["problems"] == []


def test_nothing_is_timed_where_a_gpu_has_too_little_room(tmp_path, monkeypatch) -> None:
    """Told before it is tried, and where the guess was too low."""
    recipe = tiny_recipe(tmp_path, **{"train.device": "auto", "resources.gpus_per_worker": 1})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (2**30, 2**35))
    assert "2.0 GiB" in wall_time(recipe, 2**31, [])["basis"]

    def full(*args: object) -> None:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(measure, "fresh_state", full)
    guess = wall_time(override_recipe(recipe, {"resources.gpus_per_worker": 0}), 2**20, [])
    assert guess["seconds"] is None
    assert "memory" in guess["basis"]


def test_a_sweep_that_nothing_was_timed_for_is_timed(tmp_path: Path, capsys) -> None:
    (tmp_path / "tiny.yaml").write_text(dump_recipe(tiny_recipe(tmp_path)))
    (tmp_path / "sweep.yaml").write_text(f"""
name: timed
storage_path: {tmp_path / "runs"}
base: {tmp_path / "tiny.yaml"}
method: random
metric: {{name: ema/shoot/nmse}}
parameters: {{optim.lr: {{distribution: uniform, min: 1.0e-4, max: 1.0e-3}}}}
run_cap: 4
""")
    assert tune.main([str(tmp_path / "sweep.yaml"), "--plan", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["hours_at_most"]["cpu"] > 0
    assert START_S < plan["wall_time"]["seconds"] < START_S + 60
    assert "timed on this machine" in plan["wall_time"]["basis"]


def test_passes_are_those_that_a_look_takes(tmp_path):
    recipe = tiny_recipe(
        tmp_path,
        **{
            **dict.fromkeys(("train.steps", "train.probe_every", "train.sample_every"), 1),
            "sample.prompts": list("abcdefgh"),
            "sample.batch_size": 8,
        },
    )
    folders = ensure_latents(recipe.data, recipe.model.autoencoder, recipe.model.latent)
    sets = load_training(folders["train"], recipe), load_latents(folders["val"])
    group = Group(0, 1, torch.device("cpu"))
    state, looks = fresh_state(recipe, group.device), Looks(recipe, *sets, group)
    state.step, rows = 1, []
    state.model.velocity.blocks_in_order()[0].register_forward_pre_hook(
        lambda _, given: rows.append(len(given[0]))
    )
    looks(state, pictures=True, probes=True)
    assert passes(recipe) == sum(rows)
    both = override_recipe(recipe, {"resources.num_workers": 2})
    assert passes(both) == sum(rows) / 2
