"""One latent shard for each shard of pictures: found again by content, whole after any kill, made
once.
"""

from __future__ import annotations

import json
import os
import pickle
import random
import shutil
import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from threading import Timer
from typing import Any

import numpy as np
import pytest
import torch
import torch.multiprocessing as mp
from support import SPEC, Heard, tiny_autoencoder, tiny_pictures

from flowray.config.model import KLAutoencoder
from flowray.config.progress import SILENT, Advance, Progress
from flowray.config.rows import read_rows
from flowray.config.train import DataConfig
from flowray.data.index import SUFFIX, IndexFile, load_index
from flowray.data.reader import ShardReader
from flowray.data.shards import MANIFEST, find_shards, sha256
from flowray.store.encode import Encoding, Pace
from flowray.store.latents import ensure_latents, load_latents, unencoded
from flowray.store.sums import REMEMBERED, Sums

HASHING = "reading shards for their sha256"


@pytest.fixture
def config(tmp_path: Path) -> KLAutoencoder:
    return KLAutoencoder(path=str(tiny_autoencoder(tmp_path / "autoencoder")))


@pytest.fixture
def data(tmp_path: Path) -> DataConfig:
    return data_of(tmp_path, 96)


def data_of(home: Path, count: int, cache: str = "cache") -> DataConfig:
    """`count` training pictures, 16 a shard."""
    train = tiny_pictures(home / "train", count)
    val = tiny_pictures(home / "val", 16, start=1000)
    return DataConfig(shards=str(train), val_shards=str(val), cache=str(home / cache))


def encoded(data: DataConfig, config: KLAutoencoder, **options: Any) -> dict[str, int]:
    """What had to be encoded of each split."""
    heard = Heard()
    ensure_latents(data, config, SPEC, heard, **options)
    return {what.split()[1]: n for what, n in heard.tasks.items() if what.startswith("encoding")}


def shards_of(data: DataConfig) -> Path:
    (found,) = Path(str(data.cache)).glob("latents-*/shards")
    return found


def whole(data: DataConfig) -> dict[str, tuple[int, int]]:
    """Latent shards that a start finds -> inode and mtime."""
    at = Path(str(data.cache)).glob("latents-*/shards/*.json")
    tars = [file.with_suffix(".tar") for file in at]
    return {tar.name: (tar.stat().st_ino, tar.stat().st_mtime_ns) for tar in tars}


def content(data: DataConfig) -> dict[str, bytes]:
    """Latent shards and their JSONs, by name."""
    files = (file for file in shards_of(data).iterdir() if file.suffix in (".tar", ".json"))
    return {file.name: file.read_bytes() for file in files}


class Killed:
    """Progress that ends its own process, by SIGKILL, some seconds after so many pictures."""

    def __init__(self, pictures: int, seconds: float):
        self._left, self._seconds = pictures, seconds

    def say(self, text: str) -> None:
        pass

    @contextmanager
    def task(self, what: str, total: int | None = None, done: int = 0) -> Iterator[Advance]:
        def advance(count: int = 1, note: str = "") -> None:
            if what.startswith("encoding") and self._left > 0:
                self._left -= count
                if self._left <= 0:
                    Timer(self._seconds, os.kill, (os.getpid(), signal.SIGKILL)).start()

        yield advance


def encode_alone(
    data: DataConfig, config: KLAutoencoder, start: Any = None, progress: Progress = SILENT
) -> None:
    torch.set_num_threads(1)  # as other threads may come to another last bit
    if start:
        start.wait(60)
    ensure_latents(data, config, SPEC, progress)


def process_that_encodes(*args: Any) -> Any:
    """It has imported everything already."""
    process = mp.get_context("forkserver").Process(target=encode_alone, args=args)
    process.start()
    return process


def test_killed_at_random_instants_it_goes_on_where_it_was(
    tmp_path: Path, config: KLAutoencoder
) -> None:
    reference, data = data_of(tmp_path, 192, "reference"), data_of(tmp_path, 192)
    process_that_encodes(reference, config).join()
    shards, rng = 192 // 16 + 1, random.Random(0)
    kept: dict[str, tuple[int, int]] = {}
    cut_off = set()
    for _ in range(20):
        end = Killed(16 * rng.randrange(1, 3), rng.uniform(0, 0.02))
        process_that_encodes(data, config, None, end).join()
        now = whole(data)
        assert {name: now[name] for name in kept} == kept  # nothing is encoded twice
        kept = now
        cut_off.add(len(kept))
    assert len(cut_off & set(range(1, shards))) > 2
    process_that_encodes(data, config).join()
    assert {name: whole(data)[name] for name in kept} == kept
    ours, theirs = content(data), content(reference)
    assert len(theirs) == 2 * shards
    assert {name: ours.get(name) for name in theirs} == theirs


def test_two_processes_at_once(tmp_path: Path, config: KLAutoencoder) -> None:
    data, reference = data_of(tmp_path, 96), data_of(tmp_path, 96, "reference")
    start = mp.get_context("forkserver").Barrier(2)
    both = [process_that_encodes(data, config, start) for _ in range(2)]
    alone = process_that_encodes(reference, config)
    for process in (*both, alone):
        process.join()
        assert process.exitcode == 0
    assert encoded(data, config) == {}
    assert content(data) == content(reference)


def test_a_shard_added_later_encodes_alone(data: DataConfig, config: KLAutoencoder) -> None:
    folder = Path(data.shards)
    last = sorted(folder.glob("*.tar"))[2]
    aside = folder.parent / "aside.tar"
    last.rename(aside)
    assert encoded(data, config)["train"] == 80
    before = whole(data)
    aside.rename(last)
    assert unencoded(data, config, SPEC) == 16
    assert encoded(data, config) == {"train": 16}
    assert {name: whole(data)[name] for name in before} == before
    latents = load_latents(ensure_latents(data, config, SPEC)["train"])
    assert latents.reader.keys == ShardReader(find_shards(data.shards)).keys


def test_a_moved_or_copied_set_encodes_nothing(
    data: DataConfig, config: KLAutoencoder, tmp_path: Path
) -> None:
    ensure_latents(data, config, SPEC)
    shutil.copytree(data.shards, tmp_path / "copied")
    Path(data.shards).rename(tmp_path / "moved")
    for place in ("copied", "moved"):
        there = data.model_copy(update={"shards": str(tmp_path / place)})
        assert encoded(there, config) == {}
        latents = load_latents(ensure_latents(there, config, SPEC)["train"])
        assert {path.parent.name for path in latents.pictures} == {place}


def test_statistics_are_merged_from_the_shards(data: DataConfig, config: KLAutoencoder) -> None:
    folder = ensure_latents(data, config, SPEC)["train"]
    latents, meta = load_latents(folder), json.loads((folder / MANIFEST).read_text())["meta"]
    moments = latents.moments(np.arange(len(latents)))
    z = latents.scale.sample(moments, torch.zeros_like(moments.mean)).double()
    noise = (moments.logvar.double().exp() * float(latents.scale.scale) ** 2).mean()
    assert meta["mean"] == pytest.approx(float(z.mean()), abs=1e-3)
    assert meta["variance"] == pytest.approx(float(z.var() + noise), rel=1e-3)
    rows = [json.loads((folder / row["name"]).with_suffix(".json").read_text()) for row in
            json.loads((folder / MANIFEST).read_text())["shards"]]  # fmt: skip
    assert sum(row["samples"] for row in rows) == 96
    assert meta["mean"] == sum(row["total"] for row in rows) / sum(row["values"] for row in rows)


def test_of_a_limited_set_only_the_shards_needed(data: DataConfig, config: KLAutoencoder) -> None:
    few = data.model_copy(update={"limit": 20})
    assert unencoded(few, config, SPEC) == 48
    assert encoded(few, config) == {"train": 32, "val": 16}
    folder = ensure_latents(few, config, SPEC)["train"]
    assert len(load_latents(folder, few.limit)) == 20
    assert encoded(data, config) == {"train": 64}


def test_a_latent_shard_that_is_cut_is_made_again(data: DataConfig, config: KLAutoencoder) -> None:
    ensure_latents(data, config, SPEC)
    before, tar = content(data), sorted(shards_of(data).glob("*.tar"))[0]
    os.truncate(tar, 1024)
    assert sum(encoded(data, config).values()) == 16
    assert content(data) == before


@pytest.mark.parametrize("fault", ["none", "cut", "without captions", "of another tar"])
def test_captions_are_in_the_index_again_before_training(
    data: DataConfig, config: KLAutoencoder, fault: str
) -> None:
    """Caches of before have none, and a kill or a full disk may leave any of these."""
    folder = ensure_latents(data, config, SPEC)["train"]
    before, every = whole(data), np.arange(96)
    tars = sorted(shards_of(data).glob("*.tar"))
    wanted = load_latents(folder).chosen_captions(every, [0.5] * 96)
    for tar in tars:
        index = tar.with_name(tar.name + SUFFIX)
        if fault == "none":
            index.unlink()
        elif fault == "cut":
            os.truncate(index, index.stat().st_size - 8)
        elif fault == "without captions":
            index.unlink()
            assert not column(tar)
        else:
            os.utime(tar, (0, 0))
            before[tar.name] = (before[tar.name][0], 0)
    assert load_latents(folder).chosen_captions(every, [0.5] * 96) == wanted
    assert encoded(data, config) == {}
    assert whole(data) == before
    assert all(map(column, tars))
    assert load_latents(folder).chosen_captions(every, [0.5] * 96) == wanted


def column(tar: Path) -> bool:
    """Whether its index has the captions; it is made, without them, where there is none."""
    index = load_index(tar)
    assert isinstance(index, IndexFile)
    return index.open().captions is not None


def test_a_latent_shard_that_is_no_tar_is_made_again(
    data: DataConfig, config: KLAutoencoder
) -> None:
    ensure_latents(data, config, SPEC)
    before, tar = content(data), sorted(shards_of(data).glob("*.tar"))[0]
    tar.write_bytes(b"x" * tar.stat().st_size)
    assert sum(encoded(data, config).values()) == 16
    assert content(data) == before


def test_what_a_killed_writer_left_goes_when_nobody_writes_it(
    data: DataConfig, config: KLAutoencoder
) -> None:
    ensure_latents(data.model_copy(update={"limit": 1}), config, SPEC)
    old, new = (shards_of(data) / f".{name}.tar.0123456789ab" for name in ("old", "new"))
    old.touch()
    new.touch()
    os.utime(old, (time.time() - 7200, time.time() - 7200))
    ensure_latents(data, config, SPEC)
    assert (old.exists(), new.exists()) == (False, True)


class Two:
    """A fleet of two that work one after the other, each with what pickling left of its work."""

    count, cores = 2, 1

    def __call__(self, works: Sequence[Encoding], progress: Progress) -> list[Pace]:
        return [pickle.loads(pickle.dumps(work))(progress) for work in works]


def test_a_fleet_reads_its_shards_for_their_sums(tmp_path: Path, config: KLAutoencoder) -> None:
    data, alone = data_of(tmp_path, 96), data_of(tmp_path, 96, "alone")
    shards = [*find_shards(data.shards), *find_shards(str(data.val_shards))]
    shutil.copy(shards[0], shards[0].with_name("shard-000009.tar"))
    heard, one = Heard(), Heard()
    folder = ensure_latents(data, config, SPEC, heard, fleet=Two())["train"]
    assert HASHING not in heard.tasks
    rows = read_rows(tmp_path / "cache" / REMEMBERED)
    found = {row["path"]: row["sha256"] for row in rows}
    assert len(rows) == len(shards) + 1
    assert {path: sha256(Path(path)) for path in found} == found
    ensure_latents(alone, config, SPEC, one)
    assert HASHING in one.tasks
    assert content(data).keys() == content(alone).keys()
    assert len(load_latents(folder)) == 112
    assert len(whole(data)) == len(shards)  # equal bytes are encoded once, known or not
    assert encoded(data, config, fleet=Two()) == {}


def test_a_fleet_finds_a_moved_set_again(data: DataConfig, config: KLAutoencoder) -> None:
    ensure_latents(data, config, SPEC)
    before = whole(data)
    moved = Path(data.shards).rename(Path(data.shards).with_name("moved"))
    there = data.model_copy(update={"shards": str(moved)})
    assert encoded(there, config, fleet=Two()) == {"train": 96}  # looked at, by their sums
    assert whole(there) == before
    assert encoded(there, config) == {}


def test_sums_are_computed_once(tmp_path: Path) -> None:
    shards = find_shards(str(tiny_pictures(tmp_path / "set", 32)))
    heard = Heard()
    first = Sums(tmp_path).of(shards, heard)
    assert heard.tasks == {HASHING: 2}
    with (tmp_path / REMEMBERED).open("a") as file:
        file.write('{"path": "torn')  # a kill
    assert Sums(tmp_path).of(shards, again := Heard()) == first
    assert again.tasks == {}
    shards[0].write_bytes(shards[0].read_bytes())  # another mtime
    assert Sums(tmp_path).of(shards, touched := Heard()) == first
    assert touched.tasks == {HASHING: 1}
    assert Sums(tmp_path).of(shards, Heard()) == first


def test_sums_that_are_damaged_are_computed_again(tmp_path: Path) -> None:
    shards = find_shards(str(tiny_pictures(tmp_path / "set", 32)))
    first = Sums(tmp_path).of(shards)
    file = tmp_path / REMEMBERED
    rows = [json.loads(line) for line in file.read_text().split("\n") if line]
    damage = [{"stamp": 5}, {"stamp": [[]]}, {"path": []}, {"sha256": None}]
    file.write_text("".join(f"{json.dumps(rows[0] | one)}\n" for one in damage))
    assert Sums(tmp_path).of(shards) == first
    assert [Sums(tmp_path).known(shard) for shard in shards] == first
