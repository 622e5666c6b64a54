"""Reading shards: stock webdataset and ShardReader must agree, and damage
must be named.
"""

from __future__ import annotations

import io
import json
import pickle
import sys
import tarfile
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import webdataset
from safetensors import safe_open
from safetensors.numpy import load, save, save_file
from small_tars import hand_tar, npy, samples

from flowray.config.errors import InputError
from flowray.data.captions import captions_in
from flowray.data.index import IndexFile, load_index
from flowray.data.pictures import equal_pictures, pictures_also_in
from flowray.data.reader import ShardReader
from flowray.data.shards import find_shards, write_shards


def latent(i: int) -> np.ndarray:
    return np.random.default_rng(i).standard_normal((8, 4, 4)).astype(np.float16)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_shards(tmp_path / "set", samples(25), per_shard=10, meta={"made": "here"})


def test_stock_webdataset_and_reader_see_equal_bytes(folder: Path) -> None:
    paths = find_shards(str(folder))
    reader = ShardReader(paths)
    stock = list(webdataset.WebDataset([str(p) for p in paths], shardshuffle=False))
    assert [s["__key__"] for s in stock] == reader.keys == [f"{i:05d}" for i in range(25)]
    for i, (sample, written) in enumerate(zip(stock, samples(25), strict=True)):
        for extension in ("txt", "json", "moments.npy", "bin"):
            assert sample[extension] == reader.read(i, extension) == written[extension]


def test_manifest_counts_what_is_there(folder: Path) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["meta"] == {"made": "here"}
    assert manifest["samples"] == 25
    assert [row["samples"] for row in manifest["shards"]] == [10, 10, 5]
    assert [row["bytes"] for row in manifest["shards"]] == [
        p.stat().st_size for p in find_shards(str(folder))
    ]


def test_same_samples_same_bytes(folder: Path, tmp_path: Path) -> None:
    again = write_shards(tmp_path / "again", samples(25), per_shard=10, meta={"made": "here"})
    for path in folder.iterdir():
        assert (again / path.name).read_bytes() == path.read_bytes()


def test_gather_equals_the_arrays_across_shards_in_any_order(folder: Path) -> None:
    indices = np.array([24, 0, 13, 13, 9, 10])
    got = ShardReader(find_shards(str(folder))).gather(indices, "moments.npy")
    assert got.dtype == np.float16
    np.testing.assert_array_equal(got, np.stack([latent(i) for i in indices]))


@pytest.mark.parametrize(
    "odd",
    [np.ones((2, 3), np.float16).T.copy(order="F"), np.zeros((3, 2), np.float32), np.int16(4)],
)
def test_gather_of_odd_arrays_is_right_or_refused(tmp_path: Path, odd: np.ndarray) -> None:
    rows = [
        {"__key__": "a", "npy": npy(odd)},
        {"__key__": "b", "npy": npy(odd * 2)},
        {"__key__": "c", "npy": npy(np.ones((9, 9)))},
    ]
    reader = ShardReader(find_shards(str(write_shards(tmp_path / "odd", rows, meta={}))))
    np.testing.assert_array_equal(reader.gather(np.array([1, 0]), "npy"), np.stack([odd * 2, odd]))
    with pytest.raises(InputError, match=r"shard-000000.tar, sample 'c'.*float64 \(9, 9\)"):
        reader.gather(np.array([0, 2]), "npy")


def test_gather_refuses_equal_bytes_of_another_shape(tmp_path: Path) -> None:
    wide, tall = npy(np.zeros((2, 3), np.float16)), npy(np.zeros((3, 2), np.float16))
    assert len(wide) == len(tall)
    rows = [{"__key__": "a", "npy": wide}, {"__key__": "b", "npy": tall}]
    reader = ShardReader(find_shards(str(write_shards(tmp_path / "s", rows, meta={}))))
    with pytest.raises(
        InputError, match=r"sample 'b': .npy is float16 \(3, 2\), others are float16 \(2, 3\)"
    ):
        reader.gather(np.array([0, 1]), "npy")


def test_gather_never_unpickles(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    np.save(buffer, np.array([{"a": 1}], dtype=object), allow_pickle=True)
    rows = [{"__key__": k, "npy": buffer.getvalue()} for k in "ab"]
    reader = ShardReader(find_shards(str(write_shards(tmp_path / "o", rows, meta={}))))
    with pytest.raises(InputError, match=r"sample 'a'.*not a plain .npy"):
        reader.gather(np.array([0, 1]), "npy")


def test_captions_come_from_json_else_txt(tmp_path: Path) -> None:
    rows = [
        {"__key__": "a", "txt": b"plain", "json": b'{"captions": ["one", "two "]}'},
        {"__key__": "b", "txt": "gr\u00fcn\n".encode(), "json": b'{"label": 3}'},
        {"__key__": "c", "txt": b" "},
        {"__key__": "d", "txt": b"\xff"},
        {"__key__": "e", "json": b"{"},
        {"__key__": "f", "bin": b""},
    ]
    reader = ShardReader(find_shards(str(write_shards(tmp_path / "c", rows, meta={}))))
    assert reader.captions(0) == ["one", "two"]
    assert reader.captions(1) == ["gr\u00fcn"]
    for i in (2, 3, 4, 5):
        with pytest.raises(InputError, match=f"shard-000000.tar, sample '{reader.keys[i]}'"):
            reader.captions(i)


def test_limit_pickle_and_fingerprint(folder: Path) -> None:
    paths = find_shards(str(folder))
    whole, part = ShardReader(paths), ShardReader(paths, limit=12)
    assert len(part) == 12
    assert part.keys == whole.keys[:12]
    copy = pickle.loads(pickle.dumps(part))
    assert len(copy) == 12
    assert copy.read(11, "txt") == b"text 11"
    assert copy.fingerprint() == part.fingerprint() != whole.fingerprint()
    with pytest.raises(IndexError):
        part.read(12, "txt")


def test_samples_are_left_out_by_their_places(folder: Path) -> None:
    paths = find_shards(str(folder))
    whole, part = ShardReader(paths, 20), ShardReader(paths, 20, without={0, 11, 99})
    for each in (part, pickle.loads(pickle.dumps(part))):
        assert each.keys == [key for key in whole.keys if key not in ("00000", "00011")]
        assert [each.read(i, "txt") for i in (0, 10, 17)] == [b"text 1", b"text 12", b"text 19"]
        assert each.label(10) == whole.label(12)
        np.testing.assert_array_equal(
            each.gather(np.array([17, 0]), "moments.npy"), np.stack([latent(19), latent(1)])
        )
        with pytest.raises(IndexError):
            each.read(18, "txt")
    assert part.sizes("bin").tolist() == [len(part.read(i, "bin")) for i in range(len(part))]
    assert part.sizes("png").tolist() == [-1] * len(part)
    assert part.fingerprint() != whole.fingerprint()
    with pytest.raises(InputError, match="all are left out"):
        ShardReader(paths, without=range(25))


@pytest.mark.parametrize("limit", [None, 1])
def test_the_same_picture_is_found_by_its_bytes(tmp_path: Path, limit: int | None) -> None:
    def reader(name: str, rows: dict[str, dict[str, bytes]]) -> ShardReader:
        keyed = [{"__key__": key, "txt": b"x", **row} for key, row in rows.items()]
        return ShardReader(find_shards(str(write_shards(tmp_path / name, keyed, meta={}))), limit)

    rows = {"a": {"png": b"one"}, "b": {"jpg": b"six"}, "c": {"jpg": b"two"}, "d": {"gif": b"ten"}}
    held_out = reader("a", rows)
    other = {"b": {"jpeg": b"six"}, "c": {"png": b"four"}, "d": {"jpg": b"two"}, "e": {}}
    # of several pictures of a sample the first one, a png, is read
    two = {"f": {"png": b"nine", "gif": b"ten"}}
    training = reader("b", {"z": {"png": b"one"}, **other, **two})
    assert pictures_also_in(held_out, training) == ({0} if limit else {0, 1, 2})


def test_equal_pictures_of_a_set_are_grouped(tmp_path: Path) -> None:
    pictures = {"a": ("png", b"one"), "b": ("jpg", b"one"), "c": ("png", b"two"), "e": ("gif", b"")}
    rows = [{"__key__": key, name: data} for key, (name, data) in pictures.items()]
    rows += [{"__key__": "f", "txt": b"one"}, {"__key__": "g", "jpeg": b"one"}]
    rows += [{"__key__": "h", "webp": b"six"}, {"__key__": "i", "png": b"six"}]
    reader = ShardReader(find_shards(str(write_shards(tmp_path / "d", rows, meta={}))))
    found = [
        [reader.key(i) for i in group] for group in equal_pictures(reader, np.arange(len(reader)))
    ]
    assert found == [["a", "b", "g"], ["h", "i"]]
    assert equal_pictures(reader, np.array([0, 2, 4, 5, 6])) == [[0, 5]]


def test_kept_index_is_used_and_made_anew_when_the_tar_changes(folder: Path) -> None:
    tar = find_shards(str(folder))[0]
    beside = tar.with_name(tar.name + ".index")
    ShardReader([tar])
    whole = beside.read_bytes()
    beside.write_bytes(whole.replace(b"0000000001", b"renam00001"))
    assert ShardReader([tar]).keys[0] == "renam"  # so it is really read
    for broken in (b"", b"{", b"\xff" * 100, whole[:40], whole[:-1], whole + b"0"):
        beside.write_bytes(broken)
        assert ShardReader([tar]).keys[0] == "00000"
        assert beside.read_bytes() == whole
    arrays = load(whole)
    arrays[".txt"] = arrays[".txt"] + 10**12
    stat = tar.stat()
    stamp = json.dumps([f"2 {stat.st_size} {stat.st_mtime_ns}", []])
    beside.write_bytes(save(arrays, {"tar": stamp}))
    for call in (
        lambda reader: reader.read(0, "txt"),
        lambda reader: reader.captions(0),
        lambda reader: reader.gather(np.array([1]), "txt"),
    ):
        with pytest.raises(InputError, match=r"does not fit it; remove shard-000000.tar.index"):
            call(ShardReader([tar]))
    hand_tar(tar, [("new.txt", b"hello")])
    assert ShardReader([tar]).keys == ["new"]


def test_an_index_that_another_process_makes_anew_is_taken_as_it_is_then(folder: Path) -> None:
    """It may lie otherwise in its file: here with a column of captions."""
    tars = find_shards(str(folder))
    reader, other = ShardReader(tars), ShardReader(tars)
    for tar in tars:
        load_index(tar, captions_in)
    assert [reader.read(i, "txt") for i in range(len(reader))] == [
        ShardReader(tars).read(i, "txt") for i in range(len(reader))
    ]
    hand_tar(tars[0], [("new.txt", b"hello")])
    ShardReader(tars)
    with pytest.raises(InputError, match=r"shard-000000.tar: changed since it was indexed"):
        other.read(0, "txt")


def test_an_index_that_cannot_be_kept_is_held(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("flowray.data.index.write_whole", full)
    reader = ShardReader(find_shards(str(folder)))
    assert [reader.read(i, "txt") for i in (0, 24)] == [b"text 0", b"text 24"]
    assert not list(folder.glob("*.index"))


def test_an_index_takes_no_memory_a_sample(tmp_path: Path) -> None:
    """What 20,000 more samples take once the index is there: less than a byte each."""

    def held(count: int) -> int:
        tar = tmp_path / f"{count}.tar"
        with tar.open("wb") as file:
            for i in range(count):
                info = tarfile.TarInfo(f"{i:09d}.txt")
                file.write(info.tobuf())
            file.write(bytes(1024))
        load_index(tar)
        tracemalloc.start()
        reader = ShardReader([tar])
        assert reader.key(count - 1) == f"{count - 1:09d}"
        now: int = tracemalloc.get_traced_memory()[0]
        tracemalloc.stop()
        return now

    assert held(22_000) - held(2_000) < 16 * 1024


def test_missing_member_names_shard_and_sample(tmp_path: Path) -> None:
    rows = [{"__key__": "a", "txt": b"1", "npy": npy(np.ones(2))}, {"__key__": "b", "txt": b"2"}]
    reader = ShardReader(find_shards(str(write_shards(tmp_path / "m", rows, meta={}))))
    for call in (lambda: reader.read(1, "npy"), lambda: reader.gather(np.array([0, 1]), "npy")):
        with pytest.raises(
            InputError, match=r"shard-000000.tar, sample 'b': no .npy member; it has .txt"
        ):
            call()
    with pytest.raises(InputError, match=r"sample 'a': no .gif"):
        reader.gather(np.array([0]), "gif")


def test_every_truncation_is_noticed_and_costs_what_follows(folder: Path, tmp_path: Path) -> None:
    whole = ShardReader(find_shards(str(folder))[2:3])
    data = whole.paths[0].read_bytes()
    end = len(data.rstrip(b"\0"))
    cut = tmp_path / "cut.tar"
    for length in range(512, end, 512):  # at every block, so also exactly between two members
        cut.write_bytes(data[:length])
        cut.with_name("cut.tar.index").unlink(missing_ok=True)
        reader = ShardReader([cut])
        last = len(reader) - 1
        assert [i for i in range(len(reader)) if reader.fault(i)] == [last]
        assert reader.keys == whole.keys[: last + 1]
        for i in range(last):
            assert reader.read(i, "moments.npy") == whole.read(i, "moments.npy")
            assert reader.captions(i) == whole.captions(i)
        for read in (lambda: reader.read(last, "txt"), lambda: reader.captions(last)):  # noqa: B023
            with pytest.raises(InputError, match=r"cut.tar, sample .*: the shard is truncated"):
                read()
        assert reader.sizes("txt")[last] == -1


def test_a_broken_header_names_the_sample_before_it(folder: Path) -> None:
    tar = find_shards(str(folder))[0]
    data = bytearray(tar.read_bytes())
    at = data.index(b"00004.json\0")
    data[at : at + 5] = b"\xff" * 5
    tar.write_bytes(data)
    reader = ShardReader([tar])
    faults = [reader.fault(i) for i in range(len(reader))]
    assert [fault and fault.cause for fault in faults] == [None] * (len(reader) - 1) + ["cut off"]
    assert reader.key(len(reader) - 1) == "00004"


def test_not_a_tar(tmp_path: Path) -> None:
    path = tmp_path / "page.tar"
    path.write_bytes(b"<html>not found</html>" * 100)
    with pytest.raises(InputError, match=r"page.tar: truncated or not a plain tar"):
        ShardReader([path])


def test_a_member_twice_in_one_shard(tmp_path: Path) -> None:
    for name, members in {
        "beside": [("a.txt", b"1"), ("a.txt", b"2")],
        "apart": [("a.txt", b"1"), ("b.txt", b"2"), ("a.TXT", b"3")],
    }.items():
        path = hand_tar(tmp_path / f"{name}.tar", [*members, ("c.txt", b"4")])
        for _ in range(2):  # by the scan, and by the index that it left
            reader = ShardReader([path])
            (twice,) = [i for i in range(len(reader)) if reader.fault(i)]
            assert reader.key(twice) == "a"
            with pytest.raises(InputError, match=rf"{name}.tar, sample 'a': a.\w+ comes twice"):
                reader.read(twice, "txt")
            assert reader.read(len(reader) - 1, "txt") == b"4"


def test_a_shard_of_many_faults_costs_these_samples(tmp_path: Path) -> None:
    """The first thousand are named; the index that is left keeps all of them."""
    members = [(f"{i:04d}.txt", b"1") for i in range(3000) for _ in range(1 + (i % 2))]
    path = hand_tar(tmp_path / "twice.tar", members)
    for _ in range(2):
        reader = ShardReader([path])
        assert len(reader) == 3000
        assert isinstance(load_index(path), IndexFile)
        for i in range(3000):
            fault = reader.fault(i)
            assert (fault.cause if fault else "") == ("comes twice" if i % 2 else "")
            if fault:
                assert (f"{i:04d}.txt" in fault.message) == (i < 2000)
        assert reader.read(2998, "txt") == b"1"
        with pytest.raises(InputError, match=r"twice.tar, sample '2999': a member comes twice"):
            reader.read(2999, "txt")
    assert path.with_name("twice.tar.index").stat().st_size < 256 * 1024


@pytest.mark.parametrize("between", [0, 512, 10240, 3 << 20])
def test_tars_put_together_are_read_to_the_end(folder: Path, tmp_path: Path, between: int) -> None:
    """As `cat a.tar b.tar` leaves them: the same samples and bytes as from each alone."""
    paths = find_shards(str(folder))
    path = tmp_path / "all.tar"
    path.write_bytes(bytes(between).join(tar.read_bytes() for tar in paths))
    whole, apart = ShardReader([path]), ShardReader(paths)
    assert whole.keys == apart.keys
    for i in range(len(apart)):
        assert whole.fault(i) is None
        assert whole.read(i, "moments.npy") == apart.read(i, "moments.npy")
        assert whole.captions(i) == apart.captions(i)


def test_of_tars_put_together_each_may_be_cut_off(folder: Path, tmp_path: Path) -> None:
    """The last, or one in the middle, behind whose cut nothing can be told apart."""
    first, second, *_ = (tar.read_bytes() for tar in find_shards(str(folder)))
    names = ShardReader(find_shards(str(folder))[:2]).keys
    path = tmp_path / "all.tar"
    path.write_bytes(first + second[: len(second) // 3])
    reader = ShardReader([path])
    last = len(reader) - 1
    assert reader.keys == names[: last + 1]
    assert [i for i in range(last + 1) if reader.fault(i)] == [last]
    path.write_bytes(first[: len(first) // 3 // 512 * 512 + 100] + second)
    reader = ShardReader([path])
    last = len(reader) - 1
    assert reader.keys == names[: last + 1]
    assert [i for i in range(last + 1) if reader.fault(i)] == [last]


@pytest.mark.parametrize("wrong", ["row", "kind", "lacking", "many"])
def test_an_index_whose_faults_do_not_fit_is_made_anew(tmp_path: Path, wrong: str) -> None:
    path = hand_tar(tmp_path / "a.tar", [("a.txt", b"1"), ("a.txt", b"2"), ("b.txt", b"3")])
    assert ShardReader([path]).fault(0)
    beside = path.with_name("a.tar.index")
    with safe_open(beside, "np") as file:
        arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        told = file.metadata()
    rows = {"row": [[2, 0]], "kind": [[0, 1]], "lacking": [[0, 0]], "many": [[0, 0]] * 9}
    arrays["faults"] = np.array(rows[wrong], np.int64)
    if wrong == "lacking":
        del arrays["faults"]
    save_file(arrays, beside, metadata=told)
    before = beside.read_bytes()
    reader = ShardReader([path])
    assert [bool(reader.fault(i)) for i in range(2)] == [True, False]
    assert beside.read_bytes() != before


def test_members_of_a_key_that_lie_apart_are_one_sample(tmp_path: Path) -> None:
    """As `tar --sort=inode`, or one that adds all captions after all pictures, leaves them."""
    members = [("b.png", b"1"), ("a.txt", b"2"), ("b.txt", b"3"), ("a.png", b"4")]
    reader = ShardReader([hand_tar(tmp_path / "apart.tar", members)])
    assert reader.keys == ["b", "a"]
    assert [reader.read(i, e) for i in (0, 1) for e in ("png", "txt")] == [b"1", b"3", b"4", b"2"]


def test_keys_that_begin_anew_in_each_shard(tmp_path: Path) -> None:
    """A sample is its shard and its key; an empty shard among others has none."""
    paths = [
        hand_tar(tmp_path / f"{n}.tar", [(f"{k:05d}.txt", f"{n} {k}".encode()) for k in range(2)])
        for n in range(2)
    ]
    empty = hand_tar(tmp_path / "0a.tar", [])
    (tmp_path / "0b.tar").touch()
    assert find_shards(str(tmp_path)) == (paths[0], empty, tmp_path / "0b.tar", paths[1])
    reader = ShardReader(find_shards(str(tmp_path)))
    assert reader.keys == ["00000", "00001"] * 2
    assert [reader.read(i, "txt") for i in range(4)] == [b"0 0", b"0 1", b"1 0", b"1 1"]
    assert [reader.label(i) for i in (0, 2)] == [f"shard {path}, sample '00000'" for path in paths]
    one = [hand_tar(tmp_path / f"{n}.tar", [("a.txt", b"1")]) for n in range(2)]
    assert len({ShardReader(one, without={i}).fingerprint() for i in (0, 1)}) == 2
    with pytest.raises(InputError, match="no samples in 2 shard"):
        ShardReader([empty, tmp_path / "0b.tar"])


def test_folders_long_names_and_meta_members_index_as_webdataset_does(tmp_path: Path) -> None:
    long = "deep/" * 60 + "x"
    members = [
        ("__meta__/info.json", b"{}"),
        ("d.1/a.TXT", b"1"),
        ("d.1/a.seg.png", b"2"),
        (f"{long}.txt", b"3"),
        ("noext", b""),
    ]
    path = hand_tar(tmp_path / "h.tar", members)
    stock = list(webdataset.WebDataset([str(path)], shardshuffle=False))
    reader = ShardReader([path])
    assert reader.keys == [s["__key__"] for s in stock] == ["d.1/a", long]
    assert reader.read(0, "txt") == stock[0]["txt"] == b"1"
    assert reader.extensions(0) == ["seg.png", "txt"]


def test_threads_may_read_one_set_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A batch is made ahead while the doctor looks at the same shards, more than are kept open."""
    write_shards(tmp_path / "set", samples(24), per_shard=2, meta={})
    monkeypatch.setattr("flowray.data.reader.OPEN_SHARDS", 2)
    reader = ShardReader(find_shards(str(tmp_path / "set")))

    def read(seed: int) -> None:
        for i in np.random.default_rng(seed).integers(24, size=4000).tolist():
            assert reader.read(i, "txt") == f"text {i}".encode()

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-7)
    try:
        with ThreadPoolExecutor(4) as threads:
            assert list(threads.map(read, range(4))) == [None] * 4
    finally:
        sys.setswitchinterval(interval)
