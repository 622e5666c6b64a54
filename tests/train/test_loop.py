"""The loop on real files: what it logs, what a resume repeats, how it fails."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from support import tiny_recipe
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from flowray.config.load import load_recipe, override_recipe
from flowray.config.recipe import Recipe
from flowray.flow.path import sample_path, time_code
from flowray.probes.field import field_metrics
from flowray.store.checkpoint import list_checkpoints, newest_checkpoint, save_checkpoint
from flowray.store.latents import ensure_latents, load_latents
from flowray.store.rows import read_rows
from flowray.store.run import RunDirectory
from flowray.train.group import Group
from flowray.train.loop import is_finished, train
from flowray.train.state import Halted, fresh_state
from flowray.train.step import BatchMaker

CPU = Group(0, 1, torch.device("cpu"))
CADENCE = {
    "train.steps": 12,
    "train.log_every": 1,
    "train.probe_every": 3,
    "train.sample_every": 5,
    "train.checkpoint_every": 5,
}


class Crash(Exception):
    pass


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Recipe:
    return tiny_recipe(
        tmp_path_factory.mktemp("loop"),
        **CADENCE,
        **{"loss.clip.weight": 0.5, "train.keep_checkpoints": 3},
    )


def go(recipe: Recipe, name: str, report=lambda row: None, **overrides) -> tuple[RunDirectory, str]:
    recipe = override_recipe(recipe, {"name": name, **overrides})
    run = RunDirectory(Path(recipe.storage_path) / name)
    return run, train(recipe, run, CPU, report)


def told(rows: list[dict]) -> list[dict]:
    """Rows without the clock's numbers."""
    return [
        {key: value for key, value in row.items() if not key.startswith("perf/")} for row in rows
    ]


@pytest.fixture(scope="module")
def whole(base) -> RunDirectory:
    """A run from start to end."""
    run, outcome = go(base, "whole")
    assert outcome == "finished"
    return run


def test_the_run_directory_holds_what_the_cadence_says(whole, base):
    assert [row["step"] for row in read_rows(whole.metrics)] == list(range(1, 13))
    assert [row["step"] for row in read_rows(whole.probes)] == [3, 6, 9, 12]
    assert sorted(path.name for path in whole.samples.glob("*.png")) == [
        "step_000005.png",
        "step_000010.png",
        "step_000012.png",
    ]
    assert [path.name for path in list_checkpoints(whole.checkpoints)] == [
        "step_000005",
        "step_000010",
        "step_000012",
    ]
    prompts = (whole.samples / "prompts.txt").read_text().splitlines()
    assert Image.open(whole.samples / "step_000012.png").size == (8 * len(prompts), 8)
    assert load_recipe(str(whole.config)).recipe == override_recipe(base, {"name": "whole"})
    assert not (whole.path / ".lock").exists()
    last = read_rows(whole.probes)[-1]
    assert {"ema/shoot/nmse", "flow/cos", "vae/psnr", "teacher/mse@100"} <= last.keys()
    assert all(value is not None and np.isfinite(value) for value in last.values())


def test_the_same_batch_has_the_same_nmse_in_the_loop_and_in_the_probe(whole, base):
    latents = load_latents(
        ensure_latents(base.data, base.model.autoencoder, base.model.latent)["train"]
    )
    state, batch = fresh_state(base, CPU.device), BatchMaker(base, latents, CPU)(0)
    state.model.eval()
    with torch.no_grad():
        z0 = state.model.source(batch.captions, batch.noise).z0
        path = sample_path(batch.t, z0, batch.target, base.flow.path.rho)
        v_pred = state.model.velocity(path.xt, time_code(path.t), batch.null)
    probed = field_metrics(v_pred, path.v_target, path.t)["flow/nmse"]
    assert read_rows(whole.metrics)[0]["train/nmse"] == pytest.approx(probed, rel=1e-6)


@pytest.mark.parametrize("how", ["stopped", "crashed"])
def test_an_interrupted_run_repeats_the_whole_one_bit_for_bit(base, whole, how):
    run = RunDirectory(Path(base.storage_path) / how)

    def interrupt(row: dict) -> None:
        if how == "stopped" and row["step"] == 6:
            run.stop_request.touch()
        if how == "crashed" and row["step"] == 9:
            raise Crash

    if how == "stopped":
        assert go(base, how, interrupt)[1] == "stopped"
        assert newest_checkpoint(run.checkpoints).name == "step_000007"  # the next step
        run.stop_request.unlink()
    else:
        with pytest.raises(Crash):
            go(base, how, interrupt)
        assert newest_checkpoint(run.checkpoints).name == "step_000005"
        # 6 to 9 come again
        assert [row["step"] for row in read_rows(run.metrics)] == list(range(1, 10))
    assert not is_finished(override_recipe(base, {"name": how}), run)
    assert not (run.path / ".lock").exists()
    assert go(base, how)[1] == "finished"

    assert told(read_rows(run.metrics)) == told(read_rows(whole.metrics))
    assert told(read_rows(run.probes)) == told(read_rows(whole.probes))
    for group in ("model", "ema", "optim"):
        here, there = (
            load_file(newest_checkpoint(r.checkpoints) / f"{group}.safetensors")
            for r in (run, whole)
        )
        assert here.keys() == there.keys()
        assert all(torch.equal(here[key], there[key]) for key in here)
    strips = [np.asarray(Image.open(r.samples / "step_000012.png")) for r in (run, whole)]
    assert np.array_equal(*strips)

    events = EventAccumulator(str(run.path / "tensorboard")).Reload()
    tags = {"loss/total": "loss/total", "lr/z_head": "lr/z_head", "train/std/mean": "std/mean"}
    for file, pairs in (
        (run.metrics, tags),
        (run.probes, {key: key for key in ("ema/shoot/nmse", "std/mean")}),
    ):
        for tag, key in pairs.items():
            shown = [(event.step, event.value) for event in events.Scalars(tag)]
            assert shown == [
                (row["step"], pytest.approx(row[key], rel=1e-6)) for row in read_rows(file)
            ]
    assert [event.step for event in events.Images("samples")] == [5, 10, 12]


def test_a_finished_run_is_left_alone(whole, base):
    before = {path: path.read_bytes() for path in (whole.metrics, whole.probes)}
    assert go(base, "whole")[1] == "finished"
    assert {path: path.read_bytes() for path in before} == before


def test_a_longer_run_goes_on_from_the_end(base, whole):
    run, _ = go(base, "longer")
    go(base, "longer", **{"train.steps": 14})
    assert [row["step"] for row in read_rows(run.metrics)] == list(range(1, 15))
    assert [row["step"] for row in read_rows(run.probes)] == [3, 6, 9, 12, 14]


def test_a_loss_that_is_not_finite_names_the_step_and_keeps_the_checkpoint(base):
    run, _ = go(base, "diverges", **{"train.steps": 5})
    before = {path.name: path.read_bytes() for path in newest_checkpoint(run.checkpoints).iterdir()}
    with pytest.raises(Halted, match=r"step 7: loss/flow is not finite.*optim\.lr") as error:
        go(
            base,
            "diverges",
            **{"optim.lr": 1e30, "train.checkpoint_every": 100, "train.max_skipped": 0},
        )
    assert "\n" not in str(error.value)
    assert {
        path.name: path.read_bytes() for path in newest_checkpoint(run.checkpoints).iterdir()
    } == before
    assert [row["step"] for row in read_rows(run.metrics)] == list(range(1, 7))
    for line in run.metrics.read_text().splitlines():
        assert json.loads(line, parse_constant=lambda word: pytest.fail(f"{word} is not JSON"))


def test_weights_that_are_not_finite_are_not_saved(base):
    run, _ = go(base, "overflows", **{"train.steps": 5})
    with pytest.raises(Halted, match=r"step 6: .* is not finite, so no checkpoint was written"):
        go(
            base,
            "overflows",
            **{"optim.lr": 1e39, "train.checkpoint_every": 1, "train.probe_every": 100},
        )
    assert [path.name for path in list_checkpoints(run.checkpoints)] == ["step_000005"]


def test_whether_a_run_has_finished_is_known_without_reading_its_weights(tmp_path):
    """A checkpoint of a large model takes minutes to read; every rank of a resume asks."""
    recipe = override_recipe(Recipe(), {"train.steps": 30})
    run = RunDirectory(tmp_path)
    run.create()
    kept = save_checkpoint(run.checkpoints, 20, {"model": {"w": torch.zeros(8)}}, {}, keep=2)
    read = []
    sys.addaudithook(lambda event, given: read.append(str(given[0])) if event == "open" else None)
    run.probes.write_text('{"step": 20}\n')
    assert not is_finished(recipe, run)
    unfinished = [name for name in read if name.endswith(".safetensors")]
    assert is_finished(override_recipe(recipe, {"train.steps": 20}), run)
    assert unfinished == []
    assert str(kept / "model.safetensors") in read
