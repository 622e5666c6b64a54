"""Bad samples are left out within the budget, counted and named; beyond it one line, and whole
shards stay.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from support import (
    SPEC,
    Heard,
    assert_refused,
    captions,
    tiny_autoencoder,
    tiny_pictures,
    tiny_recipe,
)

from flowray.cli.ready import check_shards
from flowray.config.errors import InputError
from flowray.config.model import KLAutoencoder
from flowray.config.progress import SILENT
from flowray.config.train import DataConfig
from flowray.data.make import png
from flowray.data.pictures import decode_image
from flowray.data.pixels import from_pictures
from flowray.data.reader import ShardReader
from flowray.data.shards import find_shards, write_shards
from flowray.doctor.dataset import _pictures
from flowray.model.autoencoder import load_autoencoder
from flowray.sample.asked import prepare
from flowray.sample.evaluate_neighbours import _features, _latents
from flowray.sample.judges import LATENTS, open_judge
from flowray.sample.neighbours import Choices
from flowray.store.latents import ensure_latents, load_latents, load_training, skipped_places
from flowray.store.moments import BEYOND
from flowray.store.run import RunDirectory
from flowray.store.splits import BAD_SAMPLES
from flowray.train.group import Group
from flowray.train.loop import train

Sample = dict[str, Any]
SHARD = 10  # samples
TEXTS = captions(300)


def clean(i: int) -> Sample:
    picture = np.random.default_rng(i).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    return {"__key__": f"s{i:03d}", "png": png(picture), "txt": TEXTS[i].encode()}


def without(name: str) -> Callable[[Sample], Sample]:
    return lambda sample: {key: value for key, value in sample.items() if key != name}


BAD: dict[str, tuple[Callable[[Sample], Sample], str]] = {
    "cut": (lambda sample: sample | {"png": sample["png"][:80]}, "does not decode"),
    "no picture": (without("png"), "no picture"),
    "size": (lambda sample: sample | {"png": png(np.zeros((8, 16, 3), np.uint8))}, "another size"),
    "no caption": (without("txt"), "no caption"),
    "empty caption": (lambda sample: sample | {"txt": b" \n"}, "no caption"),
    "not UTF-8": (lambda sample: sample | {"txt": b"\xff\xfe\x00"}, "no caption"),
}


def write(folder: Path, count: int, bad: dict[int, str]) -> str:
    samples = (BAD[bad[i]][0](clean(i)) if i in bad else clean(i) for i in range(count))
    return str(write_shards(folder, samples, per_shard=SHARD, meta={}))


@pytest.fixture
def config(tmp_path: Path) -> KLAutoencoder:
    return KLAutoencoder(path=str(tiny_autoencoder(tmp_path / "autoencoder")))


def data_of(home: Path, count: int, bad: dict[int, str], **options: Any) -> DataConfig:
    val = str(tiny_pictures(home / "val", 8))
    shards = write(home / "train", count, bad)
    return DataConfig(shards=shards, val_shards=val, cache=str(home / "cache"), **options)


def test_one_in_each_of_several_shards(tmp_path: Path, config: KLAutoencoder) -> None:
    bad = {SHARD * shard + 3 + shard % 2: name for shard, name in enumerate(BAD)}
    count = SHARD * len(BAD)
    data = data_of(tmp_path, count, bad, max_bad=0.1)
    heard = Heard()
    folder = ensure_latents(data, config, SPEC, heard)["train"]
    rows = [json.loads(line) for line in (folder / BAD_SAMPLES).read_text().splitlines()]
    assert [(row["key"], row["cause"]) for row in rows] == [
        (f"s{i:03d}", BAD[name][1]) for i, name in bad.items()
    ]
    assert [Path(row["shard"]).name for row in rows] == [
        f"shard-{i:06d}.tar" for i in range(len(BAD))
    ]
    told = [line for line in heard.said if "skipped" in line]
    assert len(told) == 1
    assert "6 of 60 train samples skipped: no caption x3, " in told[0]
    assert str(folder / BAD_SAMPLES) in told[0]

    latents = load_latents(folder)
    good = [i for i in range(count) if i not in bad]
    pictures = latents.picture_reader()
    assert latents.reader.keys == pictures.keys == [f"s{i:03d}" for i in good]
    assert skipped_places(data, config, SPEC) == {"train": frozenset(bad), "val": frozenset()}
    whole = load_latents(
        ensure_latents(data_of(tmp_path / "clean", count, {}), config, SPEC)["train"]
    )
    torch.testing.assert_close(
        latents.moments(np.arange(len(good))).mean,
        whole.moments(np.array(good)).mean,
        rtol=2e-3,
        atol=2e-3,
    )
    assert np.array_equal(
        decode_image(pictures, 30), decode_image(whole.picture_reader(), good[30])
    )
    assert len(load_latents(folder, limit=25)) == 22  # of the first 25 samples
    again = Heard()
    assert ensure_latents(data, config, SPEC, again)["train"] == folder
    assert [line for line in again.said if "skipped" in line] == told


def test_one_in_each_of_a_hundred_shards(tmp_path: Path, config: KLAutoencoder) -> None:
    kinds, shards = list(BAD), 100
    bad = {3 * shard + shard % 3: kinds[shard % len(kinds)] for shard in range(shards)}
    samples = (BAD[bad[i]][0](clean(i)) if i in bad else clean(i) for i in range(3 * shards))
    folder = write_shards(tmp_path / "hundred", samples, per_shard=3, meta={})
    data = data_of(tmp_path, 10, {}, max_bad=0.4).model_copy(update={"shards": str(folder)})
    split = ensure_latents(data, config, SPEC)["train"]
    rows = [json.loads(line) for line in (split / BAD_SAMPLES).read_text().splitlines()]
    assert [(Path(row["shard"]).name, row["key"], row["cause"]) for row in rows] == [
        (f"shard-{i // 3:06d}.tar", f"s{i:03d}", BAD[name][1]) for i, name in bad.items()
    ]
    latents = load_latents(split)
    assert latents.reader.keys == [f"s{i:03d}" for i in range(3 * shards) if i not in bad]


@pytest.mark.parametrize(("kind", "place"), [("cut", 0), ("no picture", 19)])
def test_what_is_looked_at_before_a_run_is_said_as_encoding_says_it(
    tmp_path: Path, kind: str, place: int
) -> None:
    data = data_of(tmp_path, 20, {place: kind})
    keys = {"data.shards": data.shards, "data.val_shards": data.val_shards}
    recipe = tiny_recipe(tmp_path / "recipe", **keys)
    with pytest.raises(InputError) as encoding:
        ensure_latents(recipe.data, recipe.model.autoencoder, recipe.model.latent)
    assert "type data.max_bad=0.05 to" in str(encoding.value)
    assert_refused(lambda: check_shards(recipe), InputError, re.escape(str(encoding.value)))


def test_a_shard_of_0_bytes_is_a_bad_sample(tmp_path: Path, config: KLAutoencoder) -> None:
    data = data_of(tmp_path, 4 * SHARD, {})
    empty = Path(data.shards) / "shard-000001.tar"
    empty.write_bytes(b"")
    want = rf"^1 bad of 31 train samples so far, .*: shard {empty}: 0 bytes; .*data\.max_bad=0\.04 "
    with pytest.raises(InputError, match=want):
        ensure_latents(data, config, SPEC)
    heard = Heard()
    some = data.model_copy(update={"max_bad": 0.04})
    folder = ensure_latents(some, config, SPEC, heard)["train"]
    assert any(line.startswith("1 of 31 train samples skipped: 0 bytes x1") for line in heard.said)
    (row,) = map(json.loads, (folder / BAD_SAMPLES).read_text().splitlines())
    assert (row["shard"], row["key"], row["cause"]) == (str(empty), "", "0 bytes")
    latents = load_latents(folder)
    pictures = latents.picture_reader()
    assert latents.reader.keys == pictures.keys
    assert len(latents) == 3 * SHARD
    assert skipped_places(some, config, SPEC)["train"] == frozenset()


def test_beyond_the_budget_whole_shards_stay(tmp_path: Path, config: KLAutoencoder) -> None:
    data = data_of(tmp_path, 40, {34: "cut", 35: "size", 36: "no caption", 37: "cut"}, max_bad=0.05)
    want = (
        r"^4 bad of 40 train samples so far, data\.max_bad 0\.05 allows 2: shard .*-000003\.tar,"
        r" sample 's034': .*sample 's035': .*sample 's036': [^;]*; .*type data\.max_bad=0\.1 "
    )
    assert_refused(lambda: ensure_latents(data, config, SPEC), InputError, want)
    kept = {path: path.stat().st_ino for path in (tmp_path / "cache").rglob("*.tar")}
    assert len(kept) == 3
    assert not list((tmp_path / "cache").rglob(BAD_SAMPLES))
    heard = Heard()
    more = data.model_copy(update={"max_bad": 0.1})
    ensure_latents(more, config, SPEC, heard)
    assert heard.tasks["encoding train pictures"] == 10
    assert {path: path.stat().st_ino for path in kept} == kept
    # what is in the cache by now is still more than this budget
    assert_refused(lambda: ensure_latents(data, config, SPEC), InputError, "^3 bad of 40 train")


@pytest.mark.parametrize(("max_bad", "allowed"), [(0.0, 0), (0.29, 29), (1.0, 100)])
def test_how_many_are_allowed(max_bad: float, allowed: int) -> None:
    from flowray.store.encode import Budget
    from flowray.store.latent_shards import Bad

    budget = Budget("train", 100, max_bad)
    for i in range(allowed):
        budget.add(Path("a.tar"), [Bad(i, f"k{i}", "no caption", "none")])
    with pytest.raises(InputError, match=f"allows {allowed}:"):
        budget.add(Path("a.tar"), [Bad(allowed, "k", "no caption", "none")])


def test_nothing_but_bad_samples(tmp_path: Path, config: KLAutoencoder) -> None:
    data = data_of(tmp_path, 3, dict.fromkeys(range(3), "cut"), max_bad=1)
    heard = Heard()
    with pytest.raises(InputError, match=r"all 3 samples are bad.* decode x3; first shard"):
        ensure_latents(data, config, SPEC, heard)
    assert not [line for line in heard.said if BAD_SAMPLES in line]  # there is no such file


def test_latents_that_are_not_finite(tmp_path: Path) -> None:
    path = tiny_autoencoder(tmp_path / "broken")
    net = AutoencoderKL.from_pretrained(path)
    with torch.no_grad():
        net.encoder.conv_in.weight.view(-1)[0] = math.inf
    net.save_pretrained(path)
    broken = KLAutoencoder(path=str(path))
    data = data_of(tmp_path, 20, {}, max_bad=0.1)
    want = r"bad of 20 train .* NaN or infinite.*are the weights of model\.autoencoder whole\?"
    assert_refused(lambda: ensure_latents(data, broken, SPEC), InputError, want)
    assert not list((tmp_path / "cache").rglob("latents-*/shards/*"))


def test_one_picture_whose_latents_are_beyond_half_precision(tmp_path: Path) -> None:
    path = tiny_autoencoder(tmp_path / "wide")
    net = AutoencoderKL.from_pretrained(path)
    data = data_of(tmp_path, 20, {}, max_bad=0.5)
    usual = KLAutoencoder(path=str(path))
    latents = load_latents(ensure_latents(data, usual, SPEC)["train"])
    largest = latents.moments(np.arange(20)).mean.abs().flatten(1).amax(1)
    second, most = largest.sort().values[-2:].tolist()
    with torch.no_grad():
        for p in net.quant_conv.parameters():
            p[: SPEC.channels] *= 65504 / (0.5 * (second + most))
    net.save_pretrained(path)
    folder = ensure_latents(data, usual, SPEC)["train"]
    (row,) = [json.loads(line) for line in (folder / BAD_SAMPLES).read_text().splitlines()]
    assert (row["key"], row["cause"]) == (f"s{int(largest.argmax()):03d}", BEYOND)
    assert "data.moments=bf16" in row["message"]
    assert load_latents(folder).moments(np.arange(19)).mean.isfinite().all()
    wide = data.model_copy(update={"moments": "bf16"})
    assert len(load_latents(ensure_latents(wide, usual, SPEC)["train"])) == 20


def test_of_a_truncated_shard_what_is_before_the_cut_is_used(
    tmp_path: Path, config: KLAutoencoder
) -> None:
    data = data_of(tmp_path, 30, {}, max_bad=0.1)
    last = find_shards(data.shards)[-1]
    whole = last.read_bytes()
    last.write_bytes(whole[: whole.index(b"s025.txt")])
    folder = ensure_latents(data, config, SPEC)["train"]
    (row,) = [json.loads(line) for line in (folder / BAD_SAMPLES).read_text().splitlines()]
    assert (row["shard"], row["key"], row["cause"]) == (str(last), "s025", "cut off")
    assert load_latents(folder).reader.keys == [f"s{i:03d}" for i in range(25)]
    strict = data.model_copy(update={"max_bad": 0.0})
    assert_refused(
        lambda: ensure_latents(strict, config, SPEC), InputError, r"s025.*the shard is truncated"
    )
    last.write_bytes(whole[:300])
    assert_refused(
        lambda: ensure_latents(data, config, SPEC), InputError, "^shard .*-000002.tar: truncated"
    )


def test_a_run_trains_without_them_and_names_them(tmp_path: Path) -> None:
    shards = write(tmp_path / "own", 40, {7: "cut", 23: "no caption"})
    keys = {"data.shards": shards, "data.max_bad": 0.1, "data.limit": 30, "train.steps": 4}
    recipe, run = tiny_recipe(tmp_path, **keys), RunDirectory(tmp_path / "run")
    train(recipe, run, Group(0, 1, torch.device("cpu")), lambda row: None)
    rows = [json.loads(line) for line in run.bad_samples.read_text().splitlines()]
    assert [(row["split"], row["key"]) for row in rows] == [("train", "s007"), ("train", "s023")]
    made_of = recipe.data, recipe.model.autoencoder, recipe.model.latent
    latents = load_training(ensure_latents(*made_of)["train"], recipe)
    assert len(latents) == 28
    assert latents.reader.keys == [f"s{i:03d}" for i in range(30) if i not in (7, 23)]
    assert len(ShardReader(find_shards(shards))) == 40


def test_each_latent_stays_with_its_own_picture(tmp_path: Path, config: KLAutoencoder) -> None:
    count, cut, twice = 2 * SHARD, SHARD + 3, SHARD + 5
    data = data_of(tmp_path, count, {cut: "cut"}, max_bad=0.1)
    latents = load_latents(ensure_latents(data, config, SPEC)["train"])
    assert latents.places().tolist() == [i for i in range(count) if i != cut]
    clean_data = data_of(tmp_path / "clean", count, {})
    whole = load_latents(ensure_latents(clean_data, config, SPEC)["train"])
    # as evaluation leaves out what is bad, then a picture that training has too
    reader = latents.picture_reader()
    left_out = reader.without | set(reader.places([reader.keys.index(f"s{twice:03d}")]))
    assert left_out == {cut, twice}
    kept = [i for i in range(count) if i not in left_out]
    assert ShardReader(latents.pictures, without=left_out).keys == [f"s{i:03d}" for i in kept]
    expected = _latents(whole, ())[kept]
    np.testing.assert_allclose(_latents(latents, left_out), expected, rtol=1e-2, atol=1e-2)
    # as the doctor decodes the pictures of latents
    good = latents.places()
    autoencoder = load_autoencoder(config, SPEC)
    shown = from_pictures(_pictures(latents, np.arange(len(latents)), autoencoder))
    originals = from_pictures(_pictures(whole, good, autoencoder))
    np.testing.assert_array_equal(np.asarray(shown), np.asarray(originals))


def test_an_evaluation_that_encodes_leaves_them_out_itself(tmp_path: Path) -> None:
    shards = write(tmp_path / "own", 40, {7: "cut", 23: "no caption"})
    recipe = tiny_recipe(tmp_path, **{"data.shards": shards, "data.max_bad": 0.1})
    prepared = prepare(recipe, Choices(), seed=0)
    device = torch.device("cpu")
    autoencoder = load_autoencoder(recipe.model.autoencoder, recipe.model.latent)
    judge = open_judge(LATENTS, autoencoder, recipe.model.autoencoder, device)
    features = _features(prepared, recipe, judge, SILENT)
    assert [len(each) for each in features] == [len(each) for each in prepared.samples.values()]
    assert len(prepared.samples["train"]) == 38
