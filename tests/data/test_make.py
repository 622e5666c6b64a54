"""The embedded sets: made once, whole after a kill, safe for two processes, never stale."""

from __future__ import annotations

import io
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import webdataset
from PIL import Image

from flowray.config.cache import cache_dir
from flowray.config.errors import InputError
from flowray.data import shapes
from flowray.data.make import (
    DigitsSet,
    ShapesSet,
    ensure_embedded,
    ensure_set,
    fingerprint,
    make_set,
)
from flowray.data.reader import ShardReader
from flowray.data.shards import find_shards

SMALL = ShapesSet(train=60, val=8, unseen=4, closed=True)


def _ensure(cache: Path) -> dict[str, Path]:
    return ensure_set(SMALL, cache)


def test_shapes_hold_what_the_generator_drew(tmp_path: Path) -> None:
    folders = ensure_set(SMALL, tmp_path)
    assert {
        split: len(ShardReader(find_shards(str(folder)))) for split, folder in folders.items()
    } == {"train": 60, "val": 8, "unseen": 4}
    for split in SMALL.splits:
        reader = ShardReader(find_shards(str(folders[split])))
        for i, (picture, captions, scene) in enumerate(
            shapes.samples(getattr(SMALL, split), split, 0, SMALL.two_share)
        ):
            np.testing.assert_array_equal(
                np.asarray(Image.open(io.BytesIO(reader.read(i, "png")))), picture
            )
            assert reader.captions(i) == captions
            assert reader.read(i, "txt").decode() == captions[0]
            assert shapes.Scene.from_json(json.loads(reader.read(i, "json"))["scene"]) == scene
            assert scene.split == split


def test_digits_decode_in_stock_webdataset(tmp_path: Path) -> None:
    folders = ensure_embedded("digits", tmp_path)
    paths = [str(p) for p in find_shards(str(folders["val"]))]
    stock = list(webdataset.WebDataset(paths, shardshuffle=False).decode("pil"))
    assert len(stock) == 180
    assert len(ShardReader(find_shards(str(folders["train"])))) == 1797 - 180
    assert stock[0]["png"].size == (64, 64)
    assert stock[0]["txt"] == stock[0]["json"]["captions"][0]
    assert {row["json"]["label"] for row in stock} == set(range(10))


def test_second_call_writes_nothing(tmp_path: Path) -> None:
    folders = ensure_set(SMALL, tmp_path)
    before = {p: p.stat().st_mtime_ns for p in folders["train"].parent.rglob("*")}
    assert ensure_set(SMALL, tmp_path) == folders
    assert {p: p.stat().st_mtime_ns for p in folders["train"].parent.rglob("*")} == before


def test_fingerprint_follows_arguments_and_source(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert (
        len(
            {
                fingerprint(s)
                for s in (
                    SMALL,
                    ShapesSet(),
                    ShapesSet(seed=1),
                    ShapesSet(two_share=0.1),
                    ShapesSet(closed=True),
                    DigitsSet(),
                )
            }
        )
        == 6
    )
    before = fingerprint(SMALL)
    changed = tmp_path / "shapes.py"
    changed.write_text(Path(shapes.__file__).read_text() + "# changed\n")
    monkeypatch.setattr(shapes, "__file__", str(changed))
    assert fingerprint(SMALL) != before


def test_two_processes_at_once(tmp_path: Path) -> None:
    with multiprocessing.get_context("fork").Pool(2) as pool:
        first, second = pool.map(_ensure, [tmp_path, tmp_path], chunksize=1)
    assert first == second
    root = first["train"].parent
    assert sorted(p.name for p in root.iterdir()) == [".lock", "train", "unseen", "val"]
    assert len(ShardReader(find_shards(str(first["train"])))) == 60


def test_a_killed_maker_leaves_no_split_and_the_next_one_mends(tmp_path: Path) -> None:
    code = f"""
from pathlib import Path
import time
from flowray.data import make, shapes
drawn = shapes.samples
def slow(*args):
    for sample in drawn(*args):
        yield sample
        time.sleep(0.05)
shapes.samples = slow
make.ensure_set(make.ShapesSet(train=60, val=8, unseen=4, closed=True), Path({str(tmp_path)!r}))
"""
    child = subprocess.Popen([sys.executable, "-c", code])
    root = tmp_path / f"{SMALL.name}-{fingerprint(SMALL)}"
    deadline = time.monotonic() + 60
    while (
        not list(root.glob(".train.*/*.tar"))
        and time.monotonic() < deadline
        and child.poll() is None
    ):
        time.sleep(0.02)
    os.kill(child.pid, signal.SIGKILL)
    child.wait()
    assert list(root.glob(".train.*/*.tar"))
    assert not (root / "train").exists()
    folders = ensure_set(SMALL, tmp_path)
    assert len(ShardReader(find_shards(str(folders["train"])))) == 60
    assert not list(root.glob(".train.*"))


def test_a_killed_maker_leaves_a_folder_that_the_next_one_takes(tmp_path: Path) -> None:
    """With anything else than what it left hidden in it the folder is refused, and is as it was."""
    out, what = tmp_path / "my [set]", ShapesSet(train=4, val=2, unseen=2, closed=True)
    left = out / ".train.0123456789ab"
    left.mkdir(parents=True)
    (left / "shard-000000.tar").write_bytes(b"half")
    for other in (".train.mine", ".other.0123456789ab", "notes.txt"):
        (out / other).write_text("mine")
        with pytest.raises(InputError, match="is not an empty folder"):
            make_set(what, out, tmp_path)
        assert {path.name for path in out.iterdir()} == {left.name, other}
        (out / other).unlink()
    folders = make_set(what, out, tmp_path)
    assert sorted(path.name for path in out.iterdir()) == ["train", "unseen", "val"]
    assert len(ShardReader(find_shards(str(folders["train"] / "shard-000000.tar")))) == 4
    with pytest.raises(InputError, match="is not an empty folder"):
        make_set(what, out, tmp_path)


def test_cache_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("FLOWRAY_CACHE", str(tmp_path / "env"))
    assert cache_dir(None) == tmp_path / "env"
    assert cache_dir(str(tmp_path / "given")) == tmp_path / "given"
    assert (tmp_path / "given").is_dir()
    monkeypatch.setenv("FLOWRAY_CACHE", "")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_dir(None) == tmp_path / ".cache" / "flowray"
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=r"data.cache .*file.*cannot be written"):
        cache_dir(str(tmp_path / "file" / "below"))


@pytest.mark.parametrize("home", ["/dev/null", "/proc/nobody", "relative"])
def test_without_a_home_the_cache_lies_beside_the_temporary_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, home: str
) -> None:
    monkeypatch.delenv("FLOWRAY_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", home)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    folder = cache_dir(None)
    assert folder.parent == tmp_path
    assert folder.stat().st_mode & 0o777 == 0o700
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_dir(None) == tmp_path / "xdg" / "flowray"
