"""Latents in buckets: each picture in the one of the nearest aspect ratio, cropped to it; held-out
ones at the model's own size; the cache of a run without buckets untouched.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from bucket_support import BUCKET_OF, LATENTS, SIZES, bucket_recipe, picture, pictures
from PIL import Image, ImageOps
from support import Heard

from flowray.config.load import override_recipe
from flowray.config.recipe import Recipe
from flowray.data.pixels import to_pictures
from flowray.data.reader import ShardReader
from flowray.data.shards import find_shards
from flowray.model.autoencoder import load_autoencoder
from flowray.store.latents import (
    LatentSet,
    channel_statistics,
    ensure_latents,
    load_latents,
    load_training,
    unencoded,
)
from flowray.store.splits import BUCKETS


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    return bucket_recipe(tmp_path_factory.mktemp("latents"))


def folders_of(recipe: Recipe, heard: Heard | None = None) -> dict[str, Path]:
    made_of = recipe.data, recipe.model.autoencoder, recipe.model.latent
    return ensure_latents(*made_of, heard or Heard())


@pytest.fixture(scope="module")
def training(recipe: Recipe) -> LatentSet:
    return load_training(folders_of(recipe)["train"], recipe)


def expected(recipe: Recipe, i: int, size: tuple[int, int]) -> np.ndarray:
    """The mean latent of sample i cropped to latents of this size."""
    autoencoder = load_autoencoder(recipe.model.autoencoder, recipe.model.latent).of_size(size)
    height, width = autoencoder.picture_size
    image = Image.fromarray(picture(i))
    if image.size != (width, height):
        image = ImageOps.fit(image, (width, height), Image.Resampling.BOX)
    return autoencoder.encode_moments(to_pictures([np.asarray(image)])).mean[0].numpy()


def test_each_picture_is_in_the_nearest_bucket_and_cropped_to_it(
    recipe: Recipe, training: LatentSet
) -> None:
    assert training.sizes == LATENTS
    assert training.buckets is not None
    assert training.buckets.tolist() == BUCKET_OF * 8
    for i in range(16):
        size = LATENTS[BUCKET_OF[i % 8]]
        assert training.size(i) == size
        mean = training.moments(np.array([i])).mean[0].numpy()
        np.testing.assert_allclose(mean, expected(recipe, i, size), rtol=1e-2, atol=1e-2)
    parts = training.of_one_size(np.arange(64))
    assert sorted(np.concatenate(parts).tolist()) == list(range(64))
    for part, size in zip(parts, LATENTS, strict=True):
        assert training.moments(part).mean.shape == (len(part), 4, *size)


def test_held_out_pictures_are_of_the_own_size_and_shared_with_a_run_without(
    recipe: Recipe, training: LatentSet
) -> None:
    heard = Heard()
    plain = override_recipe(recipe, {"data.aspect_ratios": []})
    folders = folders_of(recipe)
    held_out = load_latents(folders["val"])
    assert held_out.buckets is None
    mean = held_out.moments(np.arange(len(held_out))).mean
    assert mean.shape[1:] == (4, 4, 4)
    # none would be enlarged
    kept = [i for i in range(64, 80) if min(SIZES[i % 8]) >= 8]
    assert len(held_out) == len(kept) == 12
    for row, i in zip(mean[:4], kept, strict=False):
        np.testing.assert_allclose(row, expected(recipe, i, (4, 4)), rtol=1e-2, atol=1e-2)
    without = folders_of(plain, heard)
    assert without["val"] == folders["val"]
    assert without["train"].parent == folders["val"].parent != folders["train"].parent
    assert [what for what in heard.tasks if "encoding" in what] == ["encoding train pictures"]
    assert load_latents(without["train"]).buckets is None


def test_the_same_shards_may_be_trained_on_and_held_out(
    recipe: Recipe, training: LatentSet
) -> None:
    both = override_recipe(recipe, {"data.val_shards": recipe.data.shards})
    folders = folders_of(both)
    assert load_latents(folders["train"]).buckets is not None
    held_out = load_latents(folders["val"])
    assert held_out.moments(np.arange(len(held_out))).mean.shape[1:] == (4, 4, 4)


def test_other_ratios_are_another_cache_and_a_new_shard_is_encoded_alone(
    tmp_path: Path, recipe: Recipe, training: LatentSet
) -> None:
    made_of = recipe.model.autoencoder, recipe.model.latent
    assert unencoded(recipe.data, *made_of) == 0
    other = override_recipe(recipe, {"data.aspect_ratios": [0.5]})
    assert unencoded(other.data, *made_of) == 64
    same = override_recipe(recipe, {"data.aspect_ratios": [2.0, 1.0, 0.5]})
    assert folders_of(same) == folders_of(recipe)

    folder = tmp_path / "grown"
    pictures(folder / "a", 64)
    pictures(folder / "b", 8, 200)
    more = override_recipe(recipe, {"data.shards": f"{folder}/*/*.tar"})
    assert unencoded(more.data, *made_of) == 8
    heard = Heard()
    grown = load_latents(folders_of(more, heard)["train"])
    assert heard.tasks["encoding train pictures"] == 8
    assert grown.buckets is not None
    assert grown.buckets.tolist() == BUCKET_OF * 9
    first = load_latents(folders_of(more)["train"], 20)
    assert first.buckets is not None
    assert first.buckets.tolist() == (BUCKET_OF * 3)[:20]


def test_what_is_on_disk(recipe: Recipe, training: LatentSet) -> None:
    folder = folders_of(recipe)["train"]
    column = np.load(folder / BUCKETS)
    assert column.dtype == np.uint8
    assert column.tolist() == BUCKET_OF * 8
    shards = sorted((folder.parent / "shards").glob("*.json"))
    rows = [json.loads(file.read_text()) for file in shards]
    letters = "".join(map(str, BUCKET_OF))
    assert {row["buckets"] for row in rows if row["samples"] == 16} == {letters * 2}
    held_out = folders_of(recipe)["val"].parent / "shards"
    assert not any("buckets" in json.loads(file.read_text()) for file in held_out.glob("*.json"))


def test_the_samples_of_the_own_size_as_a_set(recipe: Recipe, training: LatentSet) -> None:
    own = training.of_own_size()
    assert own is not None
    wanted = [i for i in range(64) if BUCKET_OF[i % 8] == 0]
    assert own.buckets is None
    assert own.places().tolist() == wanted
    mine = own.moments(np.arange(len(own))).mean
    torch.testing.assert_close(mine, training.moments(np.array(wanted)).mean)
    assert [own.captions(i) for i in range(len(own))] == [training.captions(i) for i in wanted]
    seen = own.picture_reader()
    keys = ShardReader(find_shards(str(recipe.data.shards))).keys
    assert [seen.key(i) for i in range(len(own))] == [keys[i] for i in wanted]
    held_out = load_latents(folders_of(recipe)["val"])
    assert held_out.of_own_size() is held_out


def test_statistics_are_over_all_buckets(training: LatentSet) -> None:
    mean, std = channel_statistics(training)
    parts = [training.moments(np.array([i])) for i in range(64)]
    scaled = [training.scale.sample(p, torch.zeros_like(p.mean)).double() for p in parts]
    torch.testing.assert_close(mean, torch.cat([z.mean((2, 3)) for z in scaled]).mean(0))
    assert bool(((std > 0) & std.isfinite()).all())
