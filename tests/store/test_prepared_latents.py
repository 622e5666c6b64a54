"""Pictures of all sizes, encoded as `data.prepare` says: the same pixels as `pack` makes, and
wherever real pictures are looked at.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from support import (
    SPEC,
    Heard,
    assert_refused,
    captions,
    tiny_autoencoder,
    tiny_pictures,
    tiny_recipe,
)

from flowray.config.errors import InputError
from flowray.config.model import KLAutoencoder
from flowray.config.prepare import PrepareConfig
from flowray.config.recipe import Recipe
from flowray.config.train import DataConfig
from flowray.data.make import png
from flowray.data.pack import pack_folder
from flowray.data.pictures import decode_image
from flowray.data.pixels import from_pictures, to_pictures
from flowray.data.prepare import Preparation
from flowray.data.reader import ShardReader
from flowray.data.shards import find_shards, write_shards
from flowray.doctor.dataset import _pictures
from flowray.model.autoencoder import load_autoencoder
from flowray.probes.vae import vae_metrics
from flowray.store.fingerprints import autoencoder_fingerprint, pictures_fingerprint
from flowray.store.latents import LatentSet, ensure_latents, load_latents, load_training
from flowray.store.run import RunDirectory
from flowray.store.splits import BAD_SAMPLES
from flowray.store.sums import Sums
from flowray.train.group import Group
from flowray.train.loop import train

TEXTS = captions(40)
SIZES = [(8, 8), (16, 16), (9, 23), (40, 12), (8, 31)]  # height, width
SMALL, LONG = (7, 20), (8, 80)


def image(i: int, size: tuple[int, int]) -> np.ndarray:
    return np.random.default_rng(i).integers(0, 256, (*size, 3), dtype=np.uint8)


def sample(i: int, size: tuple[int, int], **over: bytes) -> dict[str, Any]:
    picture, text = png(image(i, size)), TEXTS[i].encode()
    return {"__key__": f"s{i:03d}", "png": picture, "txt": text, **over}


@pytest.fixture
def config(tmp_path: Path) -> KLAutoencoder:
    return KLAutoencoder(path=str(tiny_autoencoder(tmp_path / "autoencoder")))


def data_of(home: Path, train: Path, **options: Any) -> DataConfig:
    val = tiny_pictures(home / "val", 8)
    cache = str(home / "cache")
    return DataConfig(shards=str(train), val_shards=str(val), cache=cache, **options)


def shards_of(home: Path, sizes: list[tuple[int, int]]) -> Path:
    return write_shards(home / "train", (sample(i, s) for i, s in enumerate(sizes)), meta={})


def pixels(latents: LatentSet, config: KLAutoencoder) -> np.ndarray:
    """As the doctor sees them."""
    autoencoder = load_autoencoder(config, SPEC)
    return from_pictures(_pictures(latents, np.arange(len(latents)), autoencoder))


@pytest.mark.parametrize("resize", ["area", "lanczos"])
def test_the_same_as_packed_at_that_size(
    tmp_path: Path, config: KLAutoencoder, resize: str
) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    for i, size in enumerate(SIZES):
        Image.fromarray(image(i, size)).save(folder / f"s{i:03d}.png")
        (folder / f"s{i:03d}.txt").write_text(TEXTS[i])
    prepare = PrepareConfig.model_validate({"resize": resize})
    pack_folder(folder, tmp_path / "packed", 8, prepare=prepare)
    packed = load_latents(
        ensure_latents(data_of(tmp_path, tmp_path / "packed"), config, SPEC)["train"]
    )
    data = data_of(tmp_path, shards_of(tmp_path, SIZES), prepare=prepare)
    prepared = load_latents(ensure_latents(data, config, SPEC)["train"])
    assert prepared.prepare == prepare
    assert len(prepared) == len(SIZES)
    every = np.arange(len(SIZES))
    assert prepared.moments(every).mean.equal(packed.moments(every).mean)
    np.testing.assert_array_equal(pixels(prepared, config), pixels(packed, config))
    autoencoder = load_autoencoder(config, SPEC)
    assert vae_metrics(autoencoder, prepared, 4, 0) == vae_metrics(autoencoder, packed, 4, 0)


def test_what_filters_leave_out_is_named_and_no_bad_sample(
    tmp_path: Path, config: KLAutoencoder
) -> None:
    sizes = [(8, 8), SMALL, (20, 20), LONG, SMALL, (9, 9)]
    options = {"prepare": {"resize": "area", "max_aspect": 4}, "max_bad": 0}
    data, heard = data_of(tmp_path, shards_of(tmp_path, sizes), **options), Heard()
    folder = ensure_latents(data, config, SPEC, heard)["train"]
    rows = [json.loads(line) for line in (folder / BAD_SAMPLES).read_text().splitlines()]
    named = [(row["key"], row["cause"]) for row in rows]
    assert named == [("s001", "too small"), ("s003", "aspect ratio"), ("s004", "too small")]
    (told,) = [line for line in heard.said if "left out" in line]
    assert "3 of 6 train samples left out by data.prepare: too small x2, aspect ratio x1" in told
    assert "skipped" not in told
    latents = load_latents(folder)
    assert latents.reader.keys == latents.picture_reader().keys == ["s000", "s002", "s005"]
    assert len(pixels(latents, config)) == 3


def test_bad_samples_among_them_are_counted_alone(tmp_path: Path, config: KLAutoencoder) -> None:
    sizes = [SMALL, (8, 8), (8, 8), (8, 8)]
    rows = [sample(i, size) for i, size in enumerate(sizes)]
    rows[2] = sample(2, sizes[2], txt=b" ")
    train = write_shards(tmp_path / "train", rows, meta={})
    prepare = {"resize": "area"}
    data = data_of(tmp_path, train, prepare=prepare)
    refused = r"^1 bad of 4 train samples so far.*'s002'"
    assert_refused(lambda: ensure_latents(data, config, SPEC), InputError, refused)
    heard = Heard()
    ensure_latents(data.model_copy(update={"max_bad": 0.25}), config, SPEC, heard)
    assert any(
        "1 of 4 train samples skipped: no caption x1; 1 of 4 train samples left out" in line
        for line in heard.said
    )


def test_small_pictures_are_enlarged_where_it_is_asked_for(
    tmp_path: Path, config: KLAutoencoder
) -> None:
    options = {"prepare": {"resize": "lanczos", "min_size": 2}}
    data = data_of(tmp_path, shards_of(tmp_path, [(8, 8), (4, 5)]), **options)
    latents = load_latents(ensure_latents(data, config, SPEC)["train"])
    assert latents.skipped == ()
    assert pixels(latents, config).shape == (2, 8, 8, 3)


def test_nothing_left_is_one_line(tmp_path: Path, config: KLAutoencoder) -> None:
    data = data_of(tmp_path, shards_of(tmp_path, [SMALL, SMALL]), prepare={"resize": "area"})
    refused = "all 2 samples are bad or left out by data.prepare"
    assert_refused(lambda: ensure_latents(data, config, SPEC), InputError, refused)


def test_caches_of_other_settings_stand_beside_each_other(
    tmp_path: Path, config: KLAutoencoder
) -> None:
    train = write_shards(
        tmp_path / "train",
        [sample(i, (8, 8), json=json.dumps({"alt": f"alt {i}"}).encode()) for i in range(3)],
        meta={},
    )
    settings: list[dict[str, Any]] = [
        {},
        {"prepare": {"resize": "area"}},
        {"prepare": {"background": [0, 0, 0]}},
        {"caption_key": "alt"},
    ]
    val = tmp_path / "val"
    write_shards(
        val, [sample(9, (8, 8), json=b'{"alt": "held out", "caption": "another"}')], meta={}
    )
    places = []
    for options in settings:
        data = data_of(tmp_path, train, **options)
        folders = ensure_latents(data, config, SPEC)
        places.append(folders["train"].parent.name)
        latents = load_latents(folders["train"])
        assert latents.prepare == data.prepare
        alt = [["alt 0"], ["alt 1"], ["alt 2"]]
        want = alt if data.caption_key else [[text] for text in TEXTS[:3]]
        assert [latents.captions(i) for i in range(3)] == want
        assert [latents.picture_reader().captions(i) for i in range(3)] == want
    assert len(set(places)) == len(settings)
    assert places[0] == f"latents-{autoencoder_fingerprint(config)}-4x4"


def test_fingerprints_of_prepared_pictures(tmp_path: Path) -> None:
    reader = ShardReader(find_shards(str(shards_of(tmp_path, SIZES))))
    sums = Sums(tmp_path)
    (tmp_path / "cache").mkdir()
    area = Preparation(PrepareConfig(resize="area"), (8, 8))
    plain = pictures_fingerprint(reader, sums)
    assert pictures_fingerprint(reader, sums, Preparation(PrepareConfig(), (8, 8))) == plain
    assert pictures_fingerprint(reader, sums, area) != plain


def test_without_resize_another_size_is_bad_as_ever(tmp_path: Path, config: KLAutoencoder) -> None:
    data = data_of(tmp_path, shards_of(tmp_path, [(8, 8), (8, 16)]), max_bad=0.5)
    folder = ensure_latents(data, config, SPEC)["train"]
    (row,) = [json.loads(line) for line in (folder / BAD_SAMPLES).read_text().splitlines()]
    assert (row["key"], row["cause"]) == ("s001", "another size")
    latents = load_latents(folder)
    shown = pixels(latents, config)
    want = from_pictures(to_pictures([decode_image(latents.picture_reader(), 0)]))
    np.testing.assert_array_equal(shown, want)


def test_a_run_trains_on_pictures_of_all_sizes(tmp_path: Path) -> None:
    sizes = [SMALL if i in (7, 23) else SIZES[i % len(SIZES)] for i in range(40)]
    keys = {"data.shards": str(shards_of(tmp_path / "own", sizes)), "train.steps": 4}
    keys |= {"data.prepare.resize": "area", "data.max_bad": 0}
    recipe, run = tiny_recipe(tmp_path, **keys), RunDirectory(tmp_path / "run")
    train(recipe, run, Group(0, 1, torch.device("cpu")), lambda row: None)
    rows = [json.loads(line) for line in run.bad_samples.read_text().splitlines()]
    assert [(row["key"], row["cause"]) for row in rows] == [
        ("s007", "too small"),
        ("s023", "too small"),
    ]
    latents = load_training(ensure_latents_of(recipe)["train"], recipe)
    assert len(latents) == 38
    assert latents.prepare == recipe.data.prepare


def ensure_latents_of(recipe: Recipe) -> dict[str, Path]:
    return ensure_latents(recipe.data, recipe.model.autoencoder, recipe.model.latent)
