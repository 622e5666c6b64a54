"""Sets are written whole or not at all, and found by every form of spec."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from small_tars import hand_tar, samples

from flowray.config.errors import InputError
from flowray.data.reader import ShardReader
from flowray.data.shards import find_shards, write_shards


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_shards(tmp_path / "set", samples(25), per_shard=10, meta={"made": "here"})


def test_a_failing_writer_leaves_nothing(tmp_path: Path) -> None:
    def fails() -> Iterator[dict[str, Any]]:
        yield from samples(15)
        raise RuntimeError("decoder died")

    with pytest.raises(RuntimeError, match="decoder died"):
        write_shards(tmp_path / "set", fails(), per_shard=10, meta={})
    assert list(tmp_path.iterdir()) == []


def test_the_slower_of_two_writers_leaves_the_other_whole(tmp_path: Path) -> None:
    def overtaken() -> Iterator[dict[str, Any]]:
        yield from samples(5)
        write_shards(tmp_path / "set", samples(3), meta={})

    with pytest.raises(InputError, match="exists already"):
        write_shards(tmp_path / "set", overtaken(), meta={})
    assert [p.name for p in tmp_path.iterdir()] == ["set"]
    assert len(ShardReader(find_shards(str(tmp_path / "set")))) == 3


@pytest.mark.parametrize(
    ("rows", "says"),
    [
        ([], "no samples"),
        ([{"__key__": "a.b", "txt": b""}], "'a.b'"),
        ([{"__key__": "a"}] * 2, "twice"),
    ],
)
def test_writer_refuses(tmp_path: Path, rows: list[dict[str, Any]], says: str) -> None:
    with pytest.raises(InputError, match=says):
        write_shards(tmp_path / "set", rows, meta={})
    assert list(tmp_path.iterdir()) == []


def test_writer_never_overwrites(folder: Path) -> None:
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    with pytest.raises(InputError, match="exists already"):
        write_shards(folder, samples(1), meta={})
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before


def test_find_shards(folder: Path, tmp_path: Path) -> None:
    tars = tuple(sorted(folder.glob("*.tar")))
    assert (
        find_shards(str(folder))
        == find_shards(str(folder / "*.tar"))
        == find_shards(str(folder / "shard*"))
        == tars
    )
    assert find_shards(str(tars[1])) == (tars[1],)
    (tmp_path / "none").mkdir()
    empty = hand_tar(tmp_path / "empty.tar", [])
    zero = tmp_path / "zero.tar"
    zero.touch()
    for spec, says in [
        (str(tmp_path / "none"), "holds no .tar file;"),
        (str(tmp_path), "not one sample"),
        (str(tmp_path / "*" / "*.txt"), "no .tar file matches"),
        (str(folder / "manifest.json"), "not a .tar file"),
        (str(empty), "not one sample"),
        (str(zero), "not one sample"),
        ("shpes", "did you mean shapes?"),
        ("/dev/null", "there is a device of that name"),
    ]:
        with pytest.raises(InputError, match=says.replace("?", r"\?")) as caught:
            find_shards(spec)
        assert "\n" not in str(caught.value)
    with pytest.raises(InputError) as caught:
        find_shards("shapes")  # whose name the callers know that take it
    assert "did you mean" not in str(caught.value)
    empty.unlink()
    zero.unlink()
    assert find_shards(str(tmp_path)) == tars  # those of `set`, as no split lies beside it
    (tmp_path / "none").rename(tmp_path / "val")
    hand_tar(tmp_path / "val" / "a.tar", [("a.txt", b"1")])
    with pytest.raises(InputError, match=r"under it do: set, val; did you mean .*set\?"):
        find_shards(str(tmp_path))
    loud = tars[0].rename(folder / "LOUD.TAR")
    assert find_shards(str(folder)) == (loud, *tars[1:])
    assert find_shards(str(loud)) == find_shards(str(folder / "L*")) == (loud,)


def test_patterns_with_braces_and_stars(tmp_path: Path) -> None:
    names = ["a/00000.tar", "a/00001.tar", "b/x/00000.tar", "b/x/00002.tar"]
    for name in [*names, "a/._00001.tar", "@eaDir/1.tar"]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        hand_tar(tmp_path / name, [("k.txt", b"1")])
    every = [tmp_path / name for name in names]
    for spec, wanted in {
        "a/{00000..00001}.tar": every[:2],
        "{b/x,a}/00000.tar": [every[0], every[2]],  # in the order of paths, as with any other spec
        "{a,b/x}": every,
        "{a,b/*}/0*.tar": every,
        "[ab]/**/*.tar": every,
        "a": every[:2],
    }.items():
        assert find_shards(str(tmp_path / spec)) == tuple(wanted), spec
    for spec, says in {
        "a/{00000..00127}.tar": "126 of 128 are not there, first .*00002.tar",
        "a/{000000000..999999999}.tar": "more than 1000000 names",
        "c/{0}.tar": "give",
    }.items():
        with pytest.raises(InputError, match=says) as caught:
            find_shards(str(tmp_path / spec))
        assert "\n" not in str(caught.value)
    odd = hand_tar(tmp_path / "{0,1}.tar", [("k.txt", b"1")])
    assert find_shards(str(odd)) == (odd,)


def test_a_set_of_that_name_is_not_offered_where_none_is_taken() -> None:
    """Who takes named sets looks them up before the folders."""
    with pytest.raises(InputError) as refused:
        find_shards("emoji_64")
    assert "emoji_128" not in str(refused.value)
    with pytest.raises(InputError, match="emoji_64"):
        find_shards("emoji_46")


def test_a_path_that_is_no_utf8_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / os.fsdecode(b"gr\xfcn")
    folder.mkdir()
    hand_tar(folder / "a.tar", [("a.png", b"x")])
    with pytest.raises(InputError, match=r"gr.udcfcn/a\.tar' is no UTF-8; rename it"):
        find_shards(str(folder))
