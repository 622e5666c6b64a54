"""Pictures with captions to pack, in a folder and in tables, and what came of them."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from flowray.data.pack import pack_folder
from flowray.data.reader import ShardReader
from flowray.data.shards import find_shards

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


def struct_table(folder: Path) -> Path:
    folder.mkdir()
    pq.write_table(pa.Table.from_pylist(rows()), folder / "rows.parquet", row_group_size=2)
    return folder
