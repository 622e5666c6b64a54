"""Training on buckets: a batch is of one shape, every shape comes, the ranks and a resume change
nothing, and the doctor, probes and samples go on at the model's own size.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from bucket_support import BUCKET_OF, LATENTS, bucket_recipe
from PIL import Image
from safetensors.torch import load_file
from support import on_two_ranks
from transformers import Dinov2Config, Dinov2Model

from flowray.config.load import override_recipe
from flowray.config.recipe import Recipe
from flowray.store.checkpoint import newest_checkpoint
from flowray.store.latents import LatentSet, ensure_latents, load_training
from flowray.store.rows import read_rows
from flowray.store.run import RunDirectory
from flowray.train.group import Group
from flowray.train.loop import train
from flowray.train.step import BatchMaker

CADENCE = {
    "train.steps": 6,
    "train.log_every": 1,
    "train.probe_every": 3,
    "train.sample_every": 6,
    "train.checkpoint_every": 2,
    "flow.null_probability": 0.3,
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    return bucket_recipe(tmp_path_factory.mktemp("buckets"), **CADENCE)


@pytest.fixture(scope="module")
def latents(base: Recipe) -> LatentSet:
    folders = ensure_latents(base.data, base.model.autoencoder, base.model.latent)
    return load_training(folders["train"], base)


def go(plain: dict, report: Callable[[dict], None] = lambda row: None) -> RunDirectory:
    recipe = Recipe.model_validate(plain)
    run = RunDirectory(Path(recipe.storage_path) / recipe.name)
    train(recipe, run, Group.current("cpu"), report)
    return run


class Crash(Exception):
    pass


def crash(row: dict) -> None:
    raise Crash


def named(recipe: Recipe, name: str, **overrides: object) -> dict:
    return override_recipe(recipe, {"name": name, **overrides}).model_dump(mode="json")


def weights(run: RunDirectory) -> dict[str, torch.Tensor]:
    checkpoint = newest_checkpoint(run.checkpoints)
    assert checkpoint is not None
    return load_file(checkpoint / "model.safetensors")


def worker(rank: int, plain: dict) -> None:
    go(plain)


@pytest.mark.parametrize("world", [1, 2, 4])
def test_batches_are_of_one_shape_and_every_sample_comes_once_a_pass(
    base: Recipe, latents: LatentSet, world: int
) -> None:
    makers = [BatchMaker(base, latents, Group(r, world, torch.device("cpu"))) for r in range(world)]
    captioned = {latents.captions(i)[0]: i for i in range(64)}
    shapes, seen = set(), []
    for step in range(16):
        batches = [maker(step) for maker in makers]
        samples = [captioned[text] for batch in batches for text in batch.captions]
        assert samples == makers[0].indices(step).tolist()
        (bucket,) = {BUCKET_OF[i % 8] for i in samples}
        for batch in batches:
            for part in (batch.z1, batch.target, batch.noise):
                assert part.shape == (8 // world, 4, *LATENTS[bucket])
        shapes.add(bucket)
        seen += samples
    assert shapes == {0, 1, 2}
    for bucket in range(3):
        own = [i for i in range(64) if BUCKET_OF[i % 8] == bucket]
        drawn = [i for i in seen if i in own]
        for start in range(0, len(drawn) - len(own) + 1, len(own)):
            assert sorted(drawn[start : start + len(own)]) == own


@pytest.mark.parametrize("velocity", ["dit", "dimr"])
@pytest.mark.parametrize("source", ["text", "noise"])
def test_it_trains_and_a_resume_repeats_it(base: Recipe, velocity: str, source: str) -> None:
    kinds: dict[str, object] = {}
    if velocity == "dimr":
        plain = base.model_dump(mode="json")
        plain["model"]["velocity"] = {
            "kind": "dimr",
            "widths": [16, 8],
            "depths": [3, 1],
            "heads": 2,
        }
        plain["data"]["aspect_ratios"], plain["data"]["aspect_step"] = [0.5], 2
        plain["data"]["prepare"]["min_size"] = 1
        base = Recipe.model_validate(plain)
    if source == "noise":
        kinds = {"model.source.kind": "noise", "model.velocity.condition.kind": "cross_attention"}
        kinds |= {"loss.kl.weight": 0.0}
    name = f"{velocity}-{source}"
    whole = go(named(base, name, **kinds))
    rows = read_rows(whole.metrics)
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    assert all(np.isfinite(row["loss/total"]) for row in rows)
    probes = read_rows(whole.probes)
    assert all(np.isfinite(probes[-1][key]) for key in ("ema/shoot/nmse", "ema/shoot/copies"))
    with Image.open(whole.samples / "step_000006.png") as strip:
        assert strip.height == 8

    with pytest.raises(Crash):  # at the first probe, step 3; the last checkpoint is of step 2
        go(named(base, f"{name}-cut", **kinds), crash)
    again = go(named(base, f"{name}-cut", **kinds))
    assert [row["step"] for row in read_rows(again.metrics)] == [1, 2, 3, 4, 5, 6]
    for key, value in weights(whole).items():
        assert torch.equal(weights(again)[key], value), key


def test_two_ranks_equal_one(base: Recipe) -> None:
    alone = go(named(base, "alone"))
    on_two_ranks(worker, named(base, "two", **{"resources.num_workers": 2}))
    both = RunDirectory(Path(base.storage_path) / "two")
    rows, pairs = read_rows(alone.metrics), read_rows(both.metrics)
    assert len(rows) == len(pairs) == 6
    for row, pair in zip(rows, pairs, strict=True):
        for key in ("loss/flow", "loss/kl", "loss/total", "grad/total", "std/mean"):
            assert pair[key] == pytest.approx(row[key], rel=1e-5, abs=1e-6), (key, row["step"])


SEMANTIC: dict[str, dict[str, dict[str, object]]] = {
    "clip": {"loss.clip": {"weight": 0.5}},
    "dino": {"loss.dino": {"weight": 0.5, "prototypes": 16}},
    "dino_frozen": {"loss.dino": {"weight": 0.5, "prototypes": 16}},
    "repa": {"loss.repa": {"weight": 0.5, "hidden": 16, "depth": 1}},
}
DINO = {"hidden_size": 12, "num_hidden_layers": 1, "num_attention_heads": 2, "mlp_ratio": 2}


@pytest.mark.parametrize("loss", SEMANTIC)
def test_a_semantic_loss_trains_in_every_bucket_and_a_resume_repeats_it(
    base: Recipe, latents: LatentSet, loss: str, tmp_path: Path
) -> None:
    values = dict(SEMANTIC[loss])
    key, _, frozen = loss.partition("_")
    if frozen or key == "repa":
        torch.manual_seed(0)
        config = Dinov2Config(**DINO, image_size=8, patch_size=2)
        Dinov2Model(config).save_pretrained(tmp_path / "dinov2")
        teacher = {"kind": "dinov2", "path": str(tmp_path / "dinov2")}
        values = {f"loss.{key}": {**values[f"loss.{key}"], "teacher": teacher}}
    whole = go(named(base, loss, **values))
    order = BatchMaker(base, latents, Group(0, 1, torch.device("cpu"))).indices
    assert {BUCKET_OF[order(step)[0] % 8] for step in range(6)} == {0, 1, 2}
    told = [row[f"loss/{key}"] for row in read_rows(whole.metrics)]
    assert np.isfinite(told).all()
    assert np.all(told)
    with pytest.raises(Crash):
        go(named(base, f"{loss}-cut", **values), crash)
    again = go(named(base, f"{loss}-cut", **values))
    for name, value in weights(whole).items():
        assert torch.equal(weights(again)[name], value), name


def test_shuffled_captions_are_of_another_sample_of_the_same_bucket(base: Recipe) -> None:
    recipe = override_recipe(base, {"data.shuffle_captions": True})
    folders = ensure_latents(recipe.data, recipe.model.autoencoder, recipe.model.latent)
    own, shuffled = (load_training(folders["train"], each) for each in (base, recipe))
    by_caption = {own.captions(i)[0]: i for i in range(64)}
    whose = [by_caption[shuffled.captions(i)[0]] for i in range(64)]
    assert sorted(whose) == list(range(64))
    assert all(i != j and BUCKET_OF[i % 8] == BUCKET_OF[j % 8] for i, j in enumerate(whose))
    assert own.captions(5) == shuffled.captions(whose.index(5))
    few, same = own.of_own_size(), shuffled.of_own_size()
    assert few is not None
    assert same is not None
    places = few.places().tolist()
    assert places == [i for i in range(64) if BUCKET_OF[i % 8] == 0] == same.places().tolist()
    assert [same.captions(i) for i in range(len(same))] == [shuffled.captions(i) for i in places]
    go(named(base, "shuffled", **{"data.shuffle_captions": True}))
