"""`pack` of tables that are odd, broken or cut off: one line, and nothing of elsewhere is read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pack_sources import CAPTIONS, picture, pictures, rows, samples, saved, struct_table
from support import assert_refused

from flowray.cli.data import main
from flowray.config.errors import InputError
from flowray.data.pack import LEFT_OUT, pack_folder
from flowray.data.tables import saved_tables


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
