"""`pack` of whatever pictures come in: lists, parquet, what Hugging Face's `datasets` saves; by any
number of threads; and what it leaves out.
"""

from __future__ import annotations

import hashlib
import io
import json
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from support import Heard, assert_refused

from flowray.cli.data import main
from flowray.config.errors import InputError
from flowray.config.prepare import PrepareConfig
from flowray.data.pack import LEFT_OUT, in_order, key_of, pack_folder
from flowray.data.reader import ShardReader
from flowray.data.shards import find_shards
from flowray.data.tables import saved_tables

SAVED = Path(__file__).parent / "hf_datasets"  # by datasets 5.2.0
NAMES = ["a.png", "sub/b.png", "c.png"]
CAPTIONS = [["one", "eins"], ['two\ttwo, "2"'], ["three"]]
Sample = tuple[bytes, list[str]]


def picture(i: int, height: int = 12, width: int = 16) -> bytes:
    values = np.random.default_rng(i).integers(0, 256, (height, width, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(values).save(buffer, "png")
    return buffer.getvalue()


def pictures(folder: Path, names: Sequence[str] = NAMES) -> Path:
    for i, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(picture(i))
    return folder


def listed(folder: Path) -> Path:
    """The same as a folder, with a list."""
    rows = [
        {"file_name": name, "captions": texts} for name, texts in zip(NAMES, CAPTIONS, strict=True)
    ]
    text = "\n".join(map(json.dumps, rows))
    (pictures(folder) / "metadata.jsonl").write_text(text)
    return folder


def rows() -> list[dict[str, Any]]:
    """A table's rows, in no order of names."""
    return [
        {"image": {"bytes": picture(i), "path": "image.png"}, "text": texts, "id": i}
        for i, texts in enumerate(CAPTIONS)
    ]


def saved(folder: Path, files: Sequence[Sequence[dict[str, Any]]]) -> Path:
    """As `save_to_disk` does."""
    folder.mkdir(parents=True)
    names = [f"data-{i:05d}-of-{len(files):05d}.arrow" for i in range(len(files))]
    for name, each in zip(names, files, strict=True):
        table = pa.Table.from_pylist(list(each))
        with pa.ipc.new_stream(str(folder / name), table.schema) as writer:
            writer.write_table(table, max_chunksize=2)
    state = {"_data_files": [{"filename": name} for name in names], "_split": None}
    (folder / "state.json").write_text(json.dumps(state))
    (folder / "dataset_info.json").write_text("{}")
    return folder


def tars(folder: Path) -> dict[str, str]:
    """Name -> sha256 of every tar."""
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*.tar"))
    }


def samples(folder: Path) -> list[Sample]:
    reader = ShardReader(find_shards(str(folder)))
    return [(reader.read(i, "png"), reader.captions(i)) for i in range(len(reader))]


def packed(source: Path, out: Path, size: int | None = 8, **options: Any) -> list[Sample]:
    pack_folder(source, out, size, **options)
    return samples(out)


def by_picture(found: list[Sample]) -> dict[bytes, list[str]]:
    return dict(found)


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


def struct_table(folder: Path) -> Path:
    folder.mkdir()
    pq.write_table(pa.Table.from_pylist(rows()), folder / "rows.parquet", row_group_size=2)
    return folder


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


def odd(image: Any, caption: Any = "fine") -> dict[str, Any]:
    return {"image": image, "caption": caption}


ODD = {
    "no bytes, no path": (odd({"bytes": None, "path": None}), "no picture"),
    "no cell": (odd(None), "no picture"),
    "no bytes": (odd({"bytes": b"", "path": "a.png"}), "does not decode"),
    "no picture": (odd({"bytes": b"GIF89a", "path": None}), "does not decode"),
    "not there": (odd({"bytes": None, "path": "gone.png"}), "no such picture"),
    "above": (odd({"bytes": None, "path": "../outside.png"}), "no such picture"),
    "back in": (odd({"bytes": None, "path": "../in/beside.png"}), "no such picture"),
    "absolute": (odd({"bytes": None, "path": "/OUTSIDE"}), "no such picture"),
    "a link": (odd({"bytes": None, "path": "link.png"}), "no such picture"),
    "a NUL": (odd({"bytes": None, "path": "a\0.png"}), "no such picture"),
    "null caption": (odd({"bytes": picture(1), "path": None}, None), "empty caption"),
    "empty caption": (odd({"bytes": picture(1), "path": None}, [" \ufeff"]), "empty caption"),
    "no captions": (odd({"bytes": picture(1), "path": None}, []), "empty caption"),
    "a null among them": (odd({"bytes": picture(1), "path": None}, ["a", None]), "no text"),
}


@pytest.mark.parametrize("kind", ["arrow", "parquet"])
@pytest.mark.parametrize("name", ODD)
def test_odd_rows_are_named_and_nothing_escapes(tmp_path: Path, name: str, kind: str) -> None:
    (tmp_path / "outside.png").write_bytes(picture(7))
    row, says = ODD[name]
    row = json.loads(json.dumps({"caption": row["caption"]})) | {"image": row["image"]}
    if row["image"] and row["image"]["path"] == "/OUTSIDE":
        row["image"]["path"] = str(tmp_path / "outside.png")
    if isinstance(row["caption"], str):
        row["caption"] = [row["caption"]]
    good = {"image": {"bytes": picture(0), "path": None}, "caption": ["good"]}
    beside = {"image": {"bytes": None, "path": "beside.png"}, "caption": ["beside"]}
    table = [good, row, beside]
    if kind == "arrow":
        saved(tmp_path / "in", [table])
    else:
        (tmp_path / "in").mkdir()
        pq.write_table(pa.Table.from_pylist(table), tmp_path / "in" / "rows.parquet")
    (tmp_path / "in" / "beside.png").write_bytes(picture(2))
    (tmp_path / "in" / "link.png").symlink_to(tmp_path / "outside.png")
    with pytest.raises(InputError, match="1 fault"):
        pack_folder(tmp_path / "in", tmp_path / "out", 8)
    found = pack_folder(tmp_path / "in", tmp_path / "out", 8, skip_bad=True)
    assert [captions for _, captions in samples(tmp_path / "out")] == [["good"], ["beside"]]
    (line,) = found.left_out
    assert says in line
    assert line.startswith(str(tmp_path / "in"))
    (told,) = (tmp_path / "out" / LEFT_OUT).read_text().splitlines()
    assert json.loads(told) == {"cause": "bad", "message": line}


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("state.json", '{"_data_files": [{"filename": "../data.arrow"}]}', "no list of data"),
        ("state.json", '{"_data_files": [{"filename": "/etc/passwd"}]}', "no list of data"),
        ("state.json", '{"_data_files": [{"filename": ".."}]}', "no list of data"),
        ("state.json", '{"_data_files": [{"filename": "a\\u0000"}]}', "cannot be read"),
        ("state.json", '{"_data_files": [{"filename": "gone.arrow"}]}', "cannot be read"),
        ("state.json", '{"_data_files": []}', "no list of data"),
        ("state.json", "[]", "no JSON object"),
        ("state.json", '{"_indices_data_files": [{"filename": "i"}]}', "indices"),
        ("dataset_dict.json", '{"splits": ["../other"]}', "no list of splits"),
        ("dataset_dict.json", '{"splits": ["train"]}', "cannot be read"),
        ("dataset_dict.json", "{", "cannot be read"),
        ("data-00000-of-00001.arrow", "", "cannot be read"),
        ("data-00000-of-00001.arrow", "ARROW1 and more", "cannot be read"),
    ],
)
def test_a_saved_dataset_that_is_none(tmp_path: Path, name: str, text: str, says: str) -> None:
    saved(tmp_path / "other", [rows()])
    saved(tmp_path / "in", [rows()])
    (tmp_path / "in" / name).write_text(text)
    assert_refused(lambda: pack_folder(tmp_path / "in", tmp_path / "out", 8), InputError, says)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("share", [0.3, 0.6, 0.95])
@pytest.mark.parametrize("kind", ["arrow", "parquet"])
def test_a_table_that_is_cut_off(tmp_path: Path, kind: str, share: float) -> None:
    source = saved(tmp_path / "in", [rows()]) if kind == "arrow" else struct_table(tmp_path / "in")
    (file,) = source.glob(f"*.{kind}")
    file.write_bytes(file.read_bytes()[: int(share * file.stat().st_size)])
    assert_refused(
        lambda: pack_folder(source, tmp_path / "out", 8), InputError, f"{file.name}: cannot be read"
    )
    assert not (tmp_path / "out").exists()


def test_offsets_beyond_the_file_are_not_followed(tmp_path: Path) -> None:
    table = pa.table({"image": [picture(0), picture(1)], "caption": ["a", "b"]})
    column = table.column("image").chunk(0)
    offsets = np.frombuffer(column.buffers()[1], np.int32).copy()
    offsets[1] = 2**30
    buffers = [None, pa.py_buffer(offsets.tobytes()), column.buffers()[2]]
    broken = pa.Array.from_buffers(pa.binary(), 2, buffers)
    batch = pa.record_batch([broken, table.column("caption").chunk(0)], ["image", "caption"])
    saved(tmp_path / "in", [rows()])
    with pa.ipc.new_stream(
        str(tmp_path / "in" / "data-00000-of-00001.arrow"), batch.schema
    ) as writer:
        writer.write_batch(batch)
    assert_refused(
        lambda: pack_folder(tmp_path / "in", tmp_path / "out", 8), InputError, "cannot be read"
    )


def test_a_column_of_captions_that_is_not_there(tmp_path: Path) -> None:
    struct_table(tmp_path / "in")
    for source, says in ((tmp_path / "in", "its columns are image, text, id"),):
        assert_refused(
            lambda source=source: pack_folder(source, tmp_path / "out", 8, caption_key="alt"),
            InputError,
            says,
        )
    pictures(tmp_path / "texts")
    assert_refused(
        lambda: pack_folder(tmp_path / "texts", tmp_path / "out", 8, caption_key="alt"),
        InputError,
        "there is none of the lists",
    )
    assert (
        main(
            [
                "pack",
                str(tmp_path / "in"),
                str(tmp_path / "out"),
                "--size",
                "8",
                "--caption",
                "text",
            ]
        )
        == 0
    )
    assert [captions for _, captions in samples(tmp_path / "out")] == CAPTIONS


def test_a_parquet_file_without_pictures_is_one_line(tmp_path: Path) -> None:
    pq.write_table(pa.table({"url": ["a"], "caption": ["b"]}), tmp_path / "a.parquet")
    assert_refused(
        lambda: pack_folder(tmp_path / "a.parquet", tmp_path / "out", 8),
        InputError,
        "no column with pictures",
    )
    two = pa.table({"jpg": [b"a"], "png": [b"a"], "caption": ["b"]})
    pq.write_table(two, tmp_path / "a.parquet")
    assert_refused(
        lambda: pack_folder(tmp_path / "a.parquet", tmp_path / "out", 8),
        InputError,
        "several columns with pictures: jpg, png",
    )
    assert saved_tables(tmp_path) == []


def mixed(folder: Path, count: int) -> Path:
    """Large ones, small ones, and every seventh broken: what is read first is done last."""
    folder.mkdir()
    for i in range(count):
        side = 300 if i % 5 == 0 else 10
        data = picture(i, side, side + 3)
        (folder / f"{i:03d}.png").write_bytes(data[:60] if i % 7 == 3 else data)
        (folder / f"{i:03d}.txt").write_text(f"picture {i}")
    return folder


def test_any_number_of_workers_makes_the_same(tmp_path: Path) -> None:
    folder = mixed(tmp_path / "in", 40)
    options = {"skip_bad": True, "per_shard": 9, "val": 0.2}
    found = {
        n: pack_folder(folder, tmp_path / str(n), 8, workers=n, **options)  # type: ignore[arg-type]
        for n in (1, 2, 7, 64)
    }
    assert found[1].left_out
    for n in (2, 7, 64):
        assert found[n] == found[1]
        assert tars(tmp_path / str(n)) == tars(tmp_path / "1")
        for name in ("train/manifest.json", LEFT_OUT):
            assert (tmp_path / str(n) / name).read_bytes() == (tmp_path / "1" / name).read_bytes()
    for n in (1, 7):
        with pytest.raises(InputError, match=r"1 fault\(s\): .*003\.png: does not decode"):
            pack_folder(folder, tmp_path / "none", 8, workers=n)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("pack")]


def test_few_are_under_way_at_a_time() -> None:
    begun, taken, ahead = 0, 0, []

    def items() -> Iterator[int]:
        nonlocal begun
        for i in range(100):
            begun += 1
            yield i

    for i, found in enumerate(in_order(lambda i: i * i, items(), 3)):
        assert found == i * i
        taken += 1
        ahead.append(begun - taken)
    assert taken == 100
    assert max(ahead) <= 6


def test_progress_counts_every_picture(tmp_path: Path) -> None:
    folder, heard = mixed(tmp_path / "in", 12), Heard()
    pack_folder(folder, tmp_path / "out", 8, skip_bad=True, workers=3, progress=heard)
    assert heard.tasks["packing all pictures"] == 12


def of_sizes(folder: Path, sizes: Sequence[tuple[int, int]]) -> Path:
    folder.mkdir()
    for i, (height, width) in enumerate(sizes):
        (folder / f"{i}.png").write_bytes(picture(i, height, width))
        (folder / f"{i}.txt").write_text(f"picture {i}")
    return folder


def test_small_and_long_pictures_are_left_out_and_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = of_sizes(tmp_path / "in", [(20, 20), (7, 20), (20, 70), (8, 8), (20, 7)])
    out = tmp_path / "out"
    assert main(["pack", str(folder), str(out), "--size", "8", "--max-aspect", "3"]) == 0
    assert [captions for _, captions in samples(out)] == [["picture 0"], ["picture 3"]]
    rows = [json.loads(line) for line in (out / LEFT_OUT).read_text().splitlines()]
    causes = [(Path(row["message"].split(":")[0]).name, row["cause"]) for row in rows]
    assert causes == [("1.png", "too small"), ("2.png", "aspect ratio"), ("4.png", "too small")]
    err = capsys.readouterr().err
    assert "3 picture(s) not packed: too small x2, aspect ratio x1" in err
    assert str(out / LEFT_OUT) in err


def test_small_pictures_are_enlarged_where_it_is_asked_for(tmp_path: Path) -> None:
    folder = of_sizes(tmp_path / "in", [(20, 20), (7, 20), (4, 4)])
    argv = ["pack", str(folder), str(tmp_path / "out"), "--size", "8", "--min-size", "5"]
    assert main([*argv, "--resize", "area"]) == 0
    assert [captions for _, captions in samples(tmp_path / "out")] == [["picture 0"], ["picture 1"]]
    kept = packed(folder, tmp_path / "kept", None)  # no size: none is small
    assert len(kept) == 3


def test_only_small_pictures_are_one_line(tmp_path: Path) -> None:
    folder = of_sizes(tmp_path / "in", [(7, 20), (4, 4)])
    refused = "nothing packed; 2 picture.* too small x2, first .*0.png: 20 x 7 px"
    assert_refused(lambda: pack_folder(folder, tmp_path / "out", 8), InputError, refused)
    assert not (tmp_path / "out").exists()


def test_background_and_filter_are_told_in_the_manifest(tmp_path: Path) -> None:
    folder = of_sizes(tmp_path / "in", [(16, 16)])
    Image.new("RGBA", (16, 16), (0, 0, 0, 0)).save(folder / "0.png")
    argv = ["pack", str(folder), str(tmp_path / "out"), "--size", "8"]
    assert main([*argv, "--background", "9,8,7", "--resize", "area", "--workers", "2"]) == 0
    ((data, _),) = samples(tmp_path / "out")
    with Image.open(io.BytesIO(data)) as found:
        assert (np.asarray(found) == [9, 8, 7]).all()
    meta = json.loads((tmp_path / "out" / "manifest.json").read_text())["meta"]
    assert PrepareConfig.model_validate(meta["prepare"]).background == (9, 8, 7)


@pytest.mark.parametrize(
    "argv",
    [
        ["--background", "1,2"],
        ["--background", "1,2,256"],
        ["--background", "white"],
        ["--background", "-1,2,3"],
        ["--resize", "cubic"],
        ["--min-size", "0"],
        ["--max-aspect", "0.9"],
        ["--workers", "0"],
    ],
)
def test_options_that_cannot_be(tmp_path: Path, argv: list[str]) -> None:
    folder = of_sizes(tmp_path / "in", [(16, 16)])
    with pytest.raises(InputError, match=argv[0]):
        main(["pack", str(folder), str(tmp_path / "out"), *argv])
    assert not (tmp_path / "out").exists()
