"""Training on a GPU, without Ray: `make test-gpu`, or `make gpu` with its measurements."""

import math
from pathlib import Path

import pytest
import torch
from support import tiny_recipe

from benchmarks.trunk import Bench, host_syncs
from flowray.config.load import override_recipe
from flowray.config.recipe import Recipe
from flowray.doctor.examine import examine
from flowray.doctor.subject import open_subject
from flowray.doctor.visits import Visits
from flowray.model.autoencoder import load_autoencoder
from flowray.sample.generate import generate
from flowray.sample.restore import open_run
from flowray.store.checkpoint import load_tensors, newest_checkpoint
from flowray.store.found import find_checkpoint
from flowray.store.latents import ensure_latents, load_latents
from flowray.store.rows import read_rows
from flowray.store.run import RunDirectory
from flowray.train.group import Group
from flowray.train.loop import train

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]
GPU = torch.device("cuda" if torch.cuda.is_available() else "cpu", 0)
EVERYTHING = {
    "loss.clip.weight": 0.5,
    "loss.dino.weight": 0.1,
    "loss.tv.weight": 0.1,
    "train.grad_every": 2,
    "train.accumulate": 2,
}


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Recipe:
    return tiny_recipe(tmp_path_factory.mktemp("gpu"), **{"train.device": "cuda"})


def go(recipe: Recipe, name: str, stop_at: int | None = None, **overrides) -> RunDirectory:
    recipe = override_recipe(recipe, {"name": name, **overrides})
    run = RunDirectory(Path(recipe.storage_path) / name)

    def report(row):
        if row["step"] == stop_at:
            run.stop_request.touch()

    train(recipe, run, Group(0, 1, GPU), report)
    run.stop_request.unlink(missing_ok=True)
    return run


def kept(run: RunDirectory) -> dict[str, torch.Tensor]:
    newest = newest_checkpoint(run.checkpoints)
    assert newest is not None
    assert newest.name == "step_000012"
    return {
        f"{group}/{name}": value
        for group in ("model", "ema", "optim")
        for name, value in load_tensors(newest, group).items()
    }


@pytest.mark.parametrize("options", [{}, EVERYTHING], ids=["plain", "everything"])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_a_stopped_run_ends_with_the_same_bits(base, precision, options):
    typed = {"train.precision": precision, **options}
    name = f"{precision}-{len(options)}"
    whole = kept(go(base, f"{name}-whole", **typed))
    go(base, f"{name}-parted", stop_at=4, **typed)
    parted = kept(go(base, f"{name}-parted", **typed))
    assert whole.keys() == parted.keys()
    assert [key for key in whole if not torch.equal(whole[key], parted[key])] == []


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_trains_as_fp32_does(base, precision):
    losses = {}
    for each in ("fp32", precision):
        run = go(base, f"near-{precision}-{each}", **{"train.precision": each})
        losses[each] = [row["loss/total"] for row in read_rows(run.metrics)]
    assert losses[precision] == pytest.approx(losses["fp32"], rel=0.03)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_compiled_blocks_train_as_eager_ones(base, precision):
    losses = {}
    for compiled in (False, True):
        typed = {"train.precision": precision, "train.compile": compiled, "train.log_every": 1}
        run = go(base, f"compiled-{precision}-{compiled}", **typed)
        losses[compiled] = [row["loss/total"] for row in read_rows(run.metrics)]
    near = 1e-4 if precision == "fp32" else 0.02
    assert losses[True] == pytest.approx(losses[False], rel=near)


def test_a_device_without_a_number_is_the_gpu_in_use(base):
    run = RunDirectory(Path(base.storage_path) / "plain-cuda")
    recipe = override_recipe(base, {"name": "plain-cuda"})
    train(recipe, run, Group(0, 1, torch.device("cuda")), lambda row: None)
    assert kept(run)


def test_an_ordinary_step_waits_for_the_gradients_norm_alone(base):
    """And where transformers asks a mask of ours whether it hides anything."""
    folders = ensure_latents(base.data, base.model.autoencoder, base.model.latent)
    bench = Bench.of(base, load_latents(folders["train"]), GPU)
    for _ in range(4):
        bench.step()
    places = host_syncs(bench.step)
    ours = {place: count for place, count in places.items() if "transformers" not in place}
    assert sum(ours.values()) == 1, places
    assert sum(places.values()) <= 3, places


def test_a_run_is_sampled_and_examined_on_the_gpu(base):
    run = go(base, "examined", **{"train.precision": "bf16"})
    opened = open_run(find_checkpoint(run.path, []), GPU)
    config = opened.recipe.model
    autoencoder = load_autoencoder(config.autoencoder, config.latent).to(GPU)
    pictures = generate(opened.model, autoencoder, ["a red circle"], opened.recipe.sample, 0)
    assert pictures.shape == (1, 8, 8, 3)
    metrics = examine(open_subject(find_checkpoint(run.path, []))).metrics
    assert metrics
    assert math.isfinite(metrics["ema/flow/nmse"])


def test_the_doctor_visits_a_run_on_the_gpu(base):
    recipe = override_recipe(base, {"name": "visited", "probes.doctor_every": 1})
    run = RunDirectory(Path(recipe.storage_path) / "visited")
    train(recipe, run, Group(0, 1, GPU), lambda row: None, Visits)
    assert [row["step"] for row in read_rows(run.findings)] == [4, 8, 12]
