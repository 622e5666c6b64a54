"""Runs whose pictures lie in a bucket alone, its server failing now and then, equal those of a
disk's.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from remote_servers import BUCKET, Failing, client, s3_server, upload, use
from support import assert_refused, own_pictures, tiny_recipe

from flowray.cli.ready import check_shards
from flowray.config.errors import InputError
from flowray.config.load import dump_recipe, override_recipe
from flowray.config.recipe import Recipe
from flowray.data.remote import remote_of
from flowray.data.shards import MANIFEST, find_shards
from flowray.store.latents import ensure_latents, load_latents, unencoded
from flowray.store.rows import read_rows
from flowray.store.run import RunDirectory
from flowray.train.group import Group
from flowray.train.loop import train

CPU = Group(0, 1, torch.device("cpu"))
SHARDS = 5  # of 16 samples: four to train on, one held out


@pytest.fixture(scope="module")
def server() -> Iterator[tuple[str, Failing]]:
    with s3_server() as found:
        yield found


@pytest.fixture
def failing(server: tuple[str, Failing], monkeypatch: pytest.MonkeyPatch) -> Iterator[Failing]:
    endpoint, failing = server
    use(endpoint, monkeypatch)
    failing.seen.clear()
    yield failing
    failing.every = 0


@pytest.fixture
def local(tmp_path: Path) -> Recipe:
    return tiny_recipe(tmp_path)


@pytest.fixture
def remote(local: Recipe, tmp_path: Path, failing: Failing) -> Recipe:
    """The same pictures in the bucket, with caches and runs of their own."""
    prefix = tmp_path.name
    for split in ("train", "val"):
        upload(os.environ["AWS_ENDPOINT_URL"], tmp_path / "pictures" / split, f"{prefix}/{split}")
    failing.seen.clear()
    return override_recipe(
        local,
        {
            "data.shards": f"s3://{BUCKET}/{prefix}/train",
            "data.val_shards": f"s3://{BUCKET}/{prefix}/val",
            "data.cache": str(tmp_path / "remote-cache"),
            "storage_path": str(tmp_path / "remote-runs"),
        },
    )


def latents_of(recipe: Recipe) -> dict[str, Path]:
    return ensure_latents(recipe.data, recipe.model.autoencoder, recipe.model.latent)


def _ignore(row: dict[str, Any]) -> None:
    pass


def trained(recipe: Recipe, until: int | None = None) -> list[dict[str, Any]]:
    """The rows of a run, without the clock's numbers."""
    run = RunDirectory(Path(recipe.storage_path) / recipe.name)
    train(override_recipe(recipe, {"train.steps": until} if until else {}), run, CPU, _ignore)
    rows = read_rows(run.metrics) + read_rows(run.probes)
    return [{key: row[key] for key in row if not key.startswith("perf/")} for row in rows]


def cached(recipe: Recipe) -> dict[str, bytes]:
    """The latent shards and what is said of them."""
    files = Path(str(recipe.data.cache)).glob("latents-*/shards/*")
    return {file.name: file.read_bytes() for file in files if file.suffix != ".index"}


def fetched_shards(recipe: Recipe) -> list[Path]:
    return list((Path(str(recipe.data.cache)) / "remote").rglob("*.tar"))


def test_encoding_and_training_from_a_bucket_equal_those_from_a_disk(
    local: Recipe, remote: Recipe, failing: Failing
) -> None:
    failing.every = 3
    latents_of(remote)
    latents_of(local)
    assert cached(remote) == cached(local)
    assert len(cached(local)) == 2 * SHARDS
    for recipe in (remote, local):
        trained(recipe, until=6)
    assert trained(remote) == trained(local)  # each resumed
    assert failing.failed > 3


def test_what_is_encoded_is_not_fetched_again(remote: Recipe, failing: Failing) -> None:
    made_of = remote.data, remote.model.autoencoder, remote.model.latent
    assert unencoded(*made_of) == 80
    assert failing.fetched() == []  # to plan
    latents_of(remote)
    assert len(failing.fetched()) == SHARDS
    for tar in fetched_shards(remote):
        tar.unlink()
    failing.seen.clear()
    assert unencoded(*made_of) == 0
    check_shards(remote)
    trained(remote)
    # the probe of the autoencoder looks at held-out pictures
    assert {path.split("/")[-2] for path in failing.fetched()} == {"val"}
    assert len(failing.fetched()) == 1


def test_a_set_encoded_from_a_disk_is_encoded_for_the_bucket_too(
    local: Recipe, remote: Recipe, failing: Failing
) -> None:
    latents_of(local)
    remote = override_recipe(remote, {"data.cache": local.data.cache})
    before = cached(local)
    latents_of(remote)
    assert cached(local) == before
    assert failing.fetched() == []


def test_a_cache_of_one_shard_encodes_all_of_them(
    local: Recipe, remote: Recipe, failing: Failing
) -> None:
    latents_of(local)
    small = override_recipe(remote, {"data.remote_cache_gb": 60e3 / 1e9})
    latents_of(small)
    assert cached(small) == cached(local)
    assert len(failing.fetched()) == SHARDS  # each once
    assert len(fetched_shards(small)) == 1
    splits = latents_of(small)
    reader = load_latents(splits["train"]).picture_reader()
    pictures = [reader.read(i, "png") for i in range(len(reader))]
    reader = load_latents(latents_of(local)["train"]).picture_reader()
    assert pictures == [reader.read(i, "png") for i in range(len(reader))]
    assert len(set(pictures)) == 64


def test_a_set_without_a_manifest_is_read_all_the_same(
    local: Recipe, remote: Recipe, failing: Failing
) -> None:
    for split in ("train", "val"):
        key = f"{remote.data.shards.removeprefix(f's3://{BUCKET}/').rpartition('/')[0]}/{split}"
        client(os.environ["AWS_ENDPOINT_URL"]).delete_object(Bucket=BUCKET, Key=f"{key}/{MANIFEST}")
    failing.every = 4
    assert trained(remote) == trained(local)


def test_a_server_that_is_gone_ends_a_run_with_one_line(
    remote: Recipe, failing: Failing, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("flowray.data.remote.TRIES", 2)
    find_shards(remote.data.shards)
    failing.every = 1
    assert_refused(lambda: latents_of(remote), InputError, "cannot be reached or read, 2 times")
    assert cached(remote) == {}


def command(place: Path, name: str, *words: str) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [sys.executable, "-m", f"flowray.{name}", *words],
        capture_output=True,
        text=True,
        cwd=place,
        env=os.environ | {"FLOWRAY_CACHE": str(place / "cache")},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done


def walk(place: Path, shards: str, recipe: Recipe) -> dict[str, Any]:
    """Pack, check, encode, train, resume and evaluate with `shards` for data; what came of it."""
    place.mkdir()
    own = own_pictures(place / "own", 48)
    command(place, "data", "pack", str(own), shards, "--size", "8", "--val", "0.3",
            "--per-shard", "8")  # fmt: skip
    shutil.rmtree(own)
    told = json.loads(command(place, "data", "check", shards, "--json").stdout)
    recipe = override_recipe(
        recipe,
        {
            "data.shards": f"{shards}/train",
            "data.val_shards": f"{shards}/val",
            "data.cache": str(place / "cache"),
            "storage_path": str(place / "runs"),
        },
    )
    (place / "r.yaml").write_text(dump_recipe(recipe))
    command(place, "data", "encode", "r.yaml", "--workers", "2")
    command(place, "train", "r.yaml", "train.steps=6")
    command(place, "train", "r.yaml", "--resume")
    run = RunDirectory(place / "runs" / recipe.name)
    command(place, "eval", str(run.path), "--captions", "8", "--draws", "2", "--features", "pixels")
    rows = read_rows(run.metrics) + read_rows(run.probes)
    scores = json.loads((run.path / "eval.json").read_text())
    scores.pop("run")
    return {
        "check": told,
        "rows": [{k: row[k] for k in row if not k.startswith("perf/")} for row in rows],
        "eval": scores,
        "run": run,
    }


@pytest.mark.slow
def test_a_whole_walk_from_a_bucket_equals_one_from_a_disk(
    local: Recipe, failing: Failing, tmp_path: Path
) -> None:
    disk = walk(tmp_path / "disk", str(tmp_path / "set"), local)
    failing.every, failing.failed = 5, 0
    bucket = walk(tmp_path / "bucket", f"s3://{BUCKET}/walk/set", local)
    assert failing.failed > 10
    for what in ("check", "rows", "eval"):
        assert bucket[what] == disk[what]
    (path, *_) = (Path(str(tmp_path / "bucket" / "cache"))).rglob("*.tar.remote")
    assert remote_of(path.with_suffix("")) is not None
    said = "".join(
        file.read_text(errors="replace")
        for folder in (tmp_path / "bucket" / "runs", tmp_path / "bucket" / "cache" / "remote")
        for file in folder.rglob("*")
        if file.is_file() and file.suffix in (".yaml", ".json", ".jsonl", ".md", ".html", ".remote")
    )
    assert os.environ["AWS_SECRET_ACCESS_KEY"] not in said
    assert os.environ["AWS_ACCESS_KEY_ID"] not in said
