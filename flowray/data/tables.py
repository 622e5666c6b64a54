"""Tables, some with pictures in them: parquet files, as the Hugging Face hub has them, and what its
`datasets` saves to disk. Both are read by pyarrow; nothing in them is run.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from flowray.config.errors import InputError

_INFO, _STATE, _DICT = "dataset_info.json", "state.json", "dataset_dict.json"
_ROWS = 32  # of pictures read at a time
_BYTES, _PATH = "bytes", "path"  # the parts of an Image of `datasets`
_IMAGE = "image"  # the column meant where several hold pictures


@dataclass(frozen=True)
class Table:
    """A table whose column `image` holds pictures: files, or Images of `datasets`.

    files: its parts, in order; name: what the names of its rows begin with, before their place.
    """

    files: tuple[Path, ...]
    name: str
    split: str
    image: str
    columns: tuple[str, ...]

    def rows(self, columns: Sequence[str]) -> Iterator[dict[str, Any]]:
        """Every row, of these columns alone. InputError where a file is broken."""
        for batch in self._batches(columns):
            for i in range(batch.num_rows):
                yield {name: batch.column(name)[i].as_py() for name in columns}

    def pictures(self, places: Sequence[int]) -> Iterator[Callable[[], Any]]:
        """For each of the rows, which rise, what gets its cell: bytes, or a mapping with `bytes`
        and `path`, null where there is none.
        """
        wanted, start = iter(places), 0
        place = next(wanted, None)
        for batch in self._batches([self.image]):
            while place is not None and place < start + batch.num_rows:
                yield partial(_cell, batch.column(self.image), place - start)
                place = next(wanted, None)
            start += batch.num_rows
            if place is None:
                return

    def _batches(self, columns: Sequence[str]) -> Iterator[Any]:
        for file in self.files:
            with _readable(file):
                opened = _arrow if file.suffix == ".arrow" else _parquet
                yield from opened(file, list(columns))


def parquet_rows(file: Path, columns: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Every row of a parquet file, those of the columns that there are; OSError where it cannot be
    read.
    """
    try:
        there = [name for name in columns if name in _schema(file).names]
        yield from Table((file,), "", "", "", ()).rows(there)
    except InputError as error:
        raise OSError(str(error)) from error


def parquet_table(file: Path, name: str, split: str = "") -> Table | None:
    """A parquet file with pictures; None of one without. InputError where it cannot be read, or
    several columns hold some.
    """
    return _table((file,), _schema(file), name, split)


def saved_tables(folder: Path) -> list[Table]:
    """What `save_to_disk` of `datasets` wrote: a table, or one for each split of a DatasetDict,
    named by it; [] where the folder is no such one.

    InputError where a part of it is not there or holds no pictures.
    """
    if (folder / _DICT).is_file():
        splits = _read_json(folder / _DICT).get("splits")
        if not isinstance(splits, list) or not all(_is_name(split) for split in splits):
            raise InputError(f"{folder / _DICT}: no list of splits")
        return [_saved(folder / split, f"{split}/", split) for split in splits]
    if (folder / _STATE).is_file() and (folder / _INFO).is_file():
        return [_saved(folder, "", "")]
    return []


def _saved(folder: Path, name: str, split: str) -> Table:
    state = _read_json(folder / _STATE)
    if state.get("_indices_files") or state.get("_indices_data_files"):
        raise InputError(f"{folder}: rows by indices of an old `datasets`; save it with a new one")
    rows = state.get("_data_files")
    names = [row.get("filename") for row in rows or () if isinstance(row, dict)]
    if not names or not all(_is_name(each) for each in names):
        raise InputError(f"{folder / _STATE}: no list of data files in this folder")
    files = tuple(folder / str(each) for each in names)
    if table := _table(files, _schema(files[0]), name, split):
        return table
    raise InputError(f"{folder}: no column with pictures")


def _is_name(value: Any) -> bool:
    """Whether it names a file or folder in the folder itself."""
    return isinstance(value, str) and value == Path(value).name and value not in ("", "..")


def _table(files: tuple[Path, ...], schema: Any, name: str, split: str) -> Table | None:
    found = [column.name for column in schema if _holds_pictures(column.type)]
    if len(found) > 1 and _IMAGE not in found:
        raise InputError(
            f"{files[0]}: several columns with pictures: {', '.join(found)}; want one, or one named"
            f" {_IMAGE}"
        )
    if not found:
        return None
    image = _IMAGE if _IMAGE in found else found[0]
    return Table(files, name, split, image, tuple(schema.names))


def _holds_pictures(kind: Any) -> bool:
    import pyarrow.types as types

    if types.is_struct(kind):
        return any(part.name == _BYTES and _is_bytes(part.type) for part in kind)
    return _is_bytes(kind)


def _is_bytes(kind: Any) -> bool:
    import pyarrow.types as types

    return types.is_binary(kind) or types.is_large_binary(kind)


def _cell(column: Any, i: int) -> Any:
    return column[i].as_py()


def _schema(file: Path) -> Any:
    import pyarrow as pa
    import pyarrow.parquet as pq

    with _readable(file):
        if file.suffix != ".arrow":
            return pq.read_schema(file)
        with pa.memory_map(str(file)) as held, pa.ipc.open_stream(held) as reader:
            return reader.schema


def _arrow(file: Path, columns: list[str]) -> Iterator[Any]:
    """Batches of a stream, mapped and not copied."""
    import pyarrow as pa

    with pa.memory_map(str(file)) as held, pa.ipc.open_stream(held) as reader:
        for batch in reader:
            chosen = batch.select(columns)
            chosen.validate(full=True)  # offsets beyond the file would be read as they stand
            yield chosen


def _parquet(file: Path, columns: list[str]) -> Iterator[Any]:
    import pyarrow.parquet as pq

    # read ahead, it would hold a whole group of rows; these are often all that a file has
    with pq.ParquetFile(file, pre_buffer=False, buffer_size=2**20) as reader:
        yield from reader.iter_batches(_ROWS, columns=columns)


def _read_json(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{file}: cannot be read: {error}") from error
    if not isinstance(found, dict):
        raise InputError(f"{file}: no JSON object")
    return found


@contextmanager
def _readable(file: Path) -> Iterator[None]:
    """InputError where pyarrow cannot read the file."""
    import pyarrow as pa

    try:
        yield
    except (OSError, ValueError, pa.ArrowException) as error:
        raise InputError(f"{file}: cannot be read: {error}") from error
