"""Captions as a column of the index: equal to what the JSON says, for every sample, whatever it
says.
"""

from __future__ import annotations

import io
import json
import os
import resource
import tracemalloc
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from flowray.config.errors import InputError
from flowray.data.captions import captions_in
from flowray.data.index import SUFFIX, IndexFile, load_index
from flowray.data.reader import ShardReader
from flowray.data.shards import find_shards, write_shards

# what a sample says; of the last ones nothing can be made
SAID: list[dict[str, bytes]] = [
    {"json": json.dumps({"captions": ["one", "two, and more", "drei"]}).encode(), "txt": b"other"},
    {"json": json.dumps({"caption": "alone"}).encode()},
    {"txt": "été 🦊 面白い\u2028same line\n\n  second \r\n".encode()},
    {"txt": b"\xef\xbb\xbfafter a mark"},
    {"json": json.dumps({"text": ["\ufeff marked ", "\ud83e\udd8a of a pair"]}).encode()},
    {"json": b'{"captions": null, "n": 1}', "txt": b"of the text"},
    {"json": b"[1, 2]", "txt": b"no object"},
    {"txt": b"x" * 100_000},
    {"json": json.dumps({"captions": [f"number {i}" for i in range(300)]}).encode()},
    {"txt": b"  \n \xef\xbb\xbf "},
    {"json": b'{"captions": ["fine", " "]}'},
    {"json": b"{torn"},
    {"txt": b"\xff"},
    {},
]
BAD = 5


def rows() -> Iterator[dict[str, Any]]:
    for i, said in enumerate(SAID):
        yield {"__key__": f"k{i:02d}", "bin": bytes(i), **said}


@pytest.fixture
def tars(tmp_path: Path) -> tuple[Path, ...]:
    return find_shards(str(write_shards(tmp_path / "set", rows(), per_shard=4, meta={})))


def with_columns(tars: tuple[Path, ...]) -> tuple[Path, ...]:
    for tar in tars:
        load_index(tar, captions_in)
    return tars


def said_by(reader: ShardReader, i: int) -> list[str] | str:
    try:
        return reader.captions(i)
    except InputError as error:
        return str(error)


@pytest.mark.parametrize(
    "options", [{}, {"limit": 7}, {"without": (0, 5, 13)}, {"limit": 9, "without": (8, 1)}], ids=str
)
def test_equal_to_what_the_samples_say(tars: tuple[Path, ...], options: dict[str, Any]) -> None:
    plain = ShardReader(tars, **options)
    parsed = [said_by(plain, i) for i in range(len(plain))]
    unread = set(range(len(SAID) - BAD, options.get("limit", len(SAID)))) - {*plain.without}
    assert sum(isinstance(said, str) for said in parsed) == len(unread)
    reader = ShardReader(with_columns(tars), **options)
    assert [said_by(reader, i) for i in range(len(reader))] == parsed
    good = np.array([i for i, said in enumerate(parsed) if isinstance(said, list)])[::-1]
    for u in (0.0, 1 / 3, 0.5, float(np.nextafter(np.float32(1), np.float32(0)))):
        wanted = [parsed[i][int(u * len(parsed[i]))] for i in good]
        for each in (plain, reader):
            assert each.chosen_captions(good, [u] * len(good)) == wanted
    for i in set(range(len(parsed))) - set(good.tolist()):
        with pytest.raises(InputError) as refused:
            reader.chosen_captions(np.array([0, i]), [0.0, 0.0])
        assert str(refused.value) == parsed[i]


def test_the_column_is_read_and_not_the_json(tars: tuple[Path, ...]) -> None:
    """Of a tar whose captions were painted over, with its time kept, the column still tells."""
    reader = ShardReader(with_columns(tars))
    said, stat = reader.captions(0), tars[0].stat()
    tars[0].write_bytes(tars[0].read_bytes().replace(b'"captions"', b'"capt1ons"'))
    os.utime(tars[0], ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert ShardReader(tars).captions(0) == said
    tars[0].with_name(tars[0].name + SUFFIX).unlink()
    assert ShardReader(tars).captions(0) == ["other"]


def test_an_index_gets_its_column_later_and_keeps_it(tars: tuple[Path, ...]) -> None:
    def columned(tar: Path) -> bool:
        index = load_index(tar)
        assert isinstance(index, IndexFile)
        return index.open().captions is not None

    assert not any(map(columned, tars))
    with_columns(tars)
    stamps = [tar.with_name(tar.name + SUFFIX).stat().st_mtime_ns for tar in tars]
    assert all(map(columned, tars))
    with_columns(tars)
    assert [tar.with_name(tar.name + SUFFIX).stat().st_mtime_ns for tar in tars] == stamps
    index = tars[0].with_name(tars[0].name + SUFFIX)
    for size in range(index.stat().st_size):
        if size % 97 == 0:
            whole = index.read_bytes()
            index.write_bytes(whole[:size])
            assert isinstance(load_index(tars[0], captions_in), IndexFile)
            assert index.read_bytes() == whole


def test_where_nothing_can_be_written_it_is_in_memory(
    tars: tuple[Path, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("flowray.data.index.write_whole", full)
    column = load_index(tars[0], captions_in).open().captions
    assert column is not None
    assert column.captions(0) == ["one", "two, and more", "drei"]
    assert not list(tars[0].parent.glob(f"*{SUFFIX}"))


def test_captions_take_no_memory_a_sample(tmp_path: Path) -> None:
    def held(count: int) -> int:
        rows = ({"__key__": f"{i:06d}", "txt": b"a caption of a sample"} for i in range(count))
        folder = write_shards(tmp_path / str(count), rows, per_shard=count, meta={})
        tars = with_columns(find_shards(str(folder)))
        tracemalloc.start()
        reader = ShardReader(tars)
        for i in range(0, count, 50):
            assert reader.chosen_captions(np.array([i]), [0.5]) == ["a caption of a sample"]
        now: int = tracemalloc.get_traced_memory()[0]
        tracemalloc.stop()
        return now

    assert held(6_000) - held(1_000) < 16 * 1024


@contextmanager
def files_allowed(count: int) -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (count, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_more_shards_than_files_may_be_open(tmp_path: Path) -> None:
    """All of them stay mapped, none stays open, and what was read outlives its reader."""
    rows = (
        {"__key__": f"{i:04d}", "txt": f"text {i}".encode(), "n.npy": npy(i)} for i in range(300)
    )
    tars = with_columns(
        find_shards(str(write_shards(tmp_path / "set", rows, per_shard=1, meta={})))
    )
    before = len(os.listdir("/proc/self/fd"))
    with files_allowed(before + 40):
        reader = ShardReader(tars)
        order = np.random.default_rng(0).permutation(300)
        for indices in np.split(order, 10):
            texts = reader.chosen_captions(indices, [0.0] * 30)
            assert texts == [f"text {i}" for i in indices]
            assert reader.gather(indices, "n.npy").tolist() == [[i] for i in indices]
        assert len(os.listdir("/proc/self/fd")) == before
    assert maps_of(tmp_path) == 2 * 300
    column = load_index(tars[0]).open().captions
    del reader
    assert maps_of(tmp_path) == 1
    assert column is not None
    assert column.captions(0) == ["text 0"]


def npy(value: int) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, np.array([value]))
    return buffer.getvalue()


def maps_of(folder: Path) -> int:
    """How many files below it this process has mapped."""
    return Path("/proc/self/maps").read_text().count(f" {folder}/")
