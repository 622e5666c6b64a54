"""`pack` of whatever pictures come in: lists, parquet, what Hugging Face's `datasets` saves."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pack_sources import (
    CAPTIONS,
    NAMES,
    by_picture,
    listed,
    packed,
    picture,
    pictures,
    rows,
    samples,
    saved,
    struct_table,
    tars,
)
from PIL import Image
from support import assert_refused

from flowray.config.errors import InputError
from flowray.data.pack import key_of, pack_folder
from flowray.data.reader import ShardReader
from flowray.data.shards import find_shards

SAVED = Path(__file__).parent / "hf_datasets"  # by datasets 5.2.0


def tsv(folder: Path) -> None:
    lines = ["caption\tid\timage", "one\t\ta.png", "eins\t0\ta.png"]
    lines += ['"two\ttwo, ""2"""\t1\tsub/b.png', "three\t2\tc.png"]
    (folder / "captions.tsv").write_text("\n".join(lines) + "\n")


def parquet(folder: Path) -> None:
    table = [{"text": texts, "file_name": n} for n, texts in zip(NAMES, CAPTIONS, strict=True)]
    pq.write_table(pa.Table.from_pylist(table), folder / "metadata.parquet", row_group_size=2)


def named(folder: Path) -> None:
    table = [
        {"caption": "wrong", "alt": texts, "image": n}
        for n, texts in zip(NAMES, CAPTIONS, strict=True)
    ]
    pq.write_table(pa.Table.from_pylist(table), folder / "captions.parquet")


@pytest.mark.parametrize(
    ("write", "key"), [(tsv, None), (parquet, None), (named, "alt"), (parquet, "text")]
)
def test_every_list_gives_the_same_shards(
    tmp_path: Path, write: Callable[[Path], None], key: str | None
) -> None:
    write(pictures(tmp_path / "in"))
    pack_folder(tmp_path / "in", tmp_path / "out", 8, caption_key=key, per_shard=2)
    pack_folder(listed(tmp_path / "other" / "in"), tmp_path / "want", 8, per_shard=2)
    assert tars(tmp_path / "out") == tars(tmp_path / "want")
    assert len(tars(tmp_path / "out")) == 2


def binary_table(folder: Path) -> Path:
    folder.mkdir()
    table = [{"jpg": row["image"]["bytes"], "captions": row["text"]} for row in rows()]
    pq.write_table(pa.Table.from_pylist(table), folder / "rows.parquet")
    return folder / "rows.parquet"


def two_tables(folder: Path) -> Path:
    folder.mkdir()
    for i, part in enumerate((rows()[:2], rows()[2:])):
        pq.write_table(pa.Table.from_pylist(part), folder / f"{i}.parquet")
    return folder


def saved_table(folder: Path) -> Path:
    return saved(folder, [rows()[:1], rows()[1:]])


@pytest.mark.parametrize("write", [struct_table, binary_table, two_tables, saved_table])
def test_tables_hold_what_the_equal_folder_does(
    tmp_path: Path, write: Callable[[Path], Path]
) -> None:
    found = packed(write(tmp_path / "in"), tmp_path / "out")
    want = by_picture(packed(listed(tmp_path / "other"), tmp_path / "want"))
    assert by_picture(found) == want
    assert [captions for _, captions in found] == CAPTIONS  # in the table's order


@pytest.mark.parametrize("name", ["saved", "rows.parquet"])
def test_what_datasets_itself_wrote(tmp_path: Path, name: str) -> None:
    found = pack_folder(SAVED / name, tmp_path / "out", None)
    of = {"saved": {"train": [0, 1, 2], "val": [4, 3]}, "rows.parquet": {"all": range(5)}}[name]
    assert found.samples == {split: len(places) for split, places in of.items()}
    for split, places in of.items():
        got = samples(tmp_path / "out" if split == "all" else tmp_path / "out" / split)
        assert [captions for _, captions in got] == [[f"picture {i}", "it"] for i in places]
        for (data, _), i in zip(got, places, strict=True):
            with Image.open(io.BytesIO(data)) as ours, Image.open(io.BytesIO(picture(i))) as theirs:
                np.testing.assert_array_equal(np.asarray(ours), np.asarray(theirs))


def test_splits_of_the_hub_are_kept_and_val_is_a_share_of_train(tmp_path: Path) -> None:
    folder = tmp_path / "in" / "data"
    folder.mkdir(parents=True)
    many = [{"image": picture(i), "caption": f"picture {i}"} for i in range(40)]
    parts = {
        "train-00000-of-00002": many[:15],
        "train-00001-of-00002-ab12": many[15:30],
        "test-00000-of-00001": many[30:],
    }
    for name, part in parts.items():
        pq.write_table(pa.Table.from_pylist(part), folder / f"{name}.parquet")
    assert pack_folder(tmp_path / "in", tmp_path / "all", 8).samples == {"test": 10, "train": 30}
    counts = pack_folder(tmp_path / "in", tmp_path / "out", 8, val=0.3).samples
    assert counts.keys() == {"train", "val", "test"}
    assert counts["train"] + counts["val"] == 30
    assert counts["test"] == 10
    reader = ShardReader(find_shards(str(tmp_path / "out" / "val")))
    name = "data/train-00000-of-00002.parquet"
    first = [i for i in range(15) if int(key_of(f"{name}:{i}"), 16) / 16**16 < 0.3]
    sources = [json.loads(reader.read(i, "json"))["source"] for i in range(len(reader))]
    assert [each for each in sources if each.startswith(name)] == [f"{name}:{i}" for i in first]
    held_out = [{"image": picture(40), "caption": "x"}]
    pq.write_table(pa.Table.from_pylist(held_out), folder / "validation.parquet")
    assert_refused(
        lambda: pack_folder(tmp_path / "in", tmp_path / "more", 8, val=0.3),
        InputError,
        "a split of held-out pictures already",
    )
    pq.write_table(pa.Table.from_pylist(held_out), folder / "others.parquet")
    assert_refused(
        lambda: pack_folder(tmp_path / "in", tmp_path / "more", 8), InputError, "of no split"
    )


def test_rows_added_later_move_no_other(tmp_path: Path) -> None:
    every = [{"image": picture(i), "caption": f"picture {i}"} for i in range(30)]
    saved(tmp_path / "few", [every[:20]])
    saved(tmp_path / "many", [every[:7], every[7:]])
    before, after = (
        set(packed_keys(tmp_path / name, tmp_path / f"{name}-out")) for name in ("few", "many")
    )
    assert before < after


def packed_keys(source: Path, out: Path) -> Iterator[tuple[str, str, tuple[str, ...]]]:
    pack_folder(source, out, 8, val=0.3)
    for split in ("train", "val"):
        reader = ShardReader(find_shards(str(out / split)))
        yield from ((split, reader.key(i), tuple(reader.captions(i))) for i in range(len(reader)))
