"""What `flowray.data pack` takes: a folder of pictures with captions beside them or in a list, or
tables that hold the pictures themselves.
"""

from __future__ import annotations

import os
import re
import stat
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any

from flowray.config.errors import InputError
from flowray.config.paths import is_file, is_folder, no_such
from flowray.data.captions import caption_columns, captions_of, captions_of_row
from flowray.data.decode import EXTENSIONS, UNREAD, unread
from flowray.data.folders import is_clutter
from flowray.data.shards import SPLITS
from flowray.data.tables import Table, parquet_table, saved_tables

SUFFIXES = tuple(f".{extension}" for extension in EXTENSIONS)
PARQUET = ".parquet"
_HELD_OUT = {"validation": "val", "valid": "val", "dev": "val"}  # what others call that split
_PART = re.compile(r"-\d+-of-\d+.*$")


@dataclass(frozen=True)
class Row:
    """A picture to pack. name: its path in the folder, odd bytes as `\\xe9`, or its place in a
    table, from which alone its key follows; split: the one its source has it in, "" of none; at:
    (table, row), or (0, place among the folder's pictures).
    """

    name: str
    captions: list[str]
    split: str = ""
    at: tuple[int, int] = (0, 0)


@dataclass
class Source:
    """rows: what has captions; faults: a line for whatever has none or cannot be read; unread: a
    line about pictures of kinds that are not read, or beside tables; fetch: for each of some rows,
    in their order, what gets its bytes, ValueError or OSError where there are none.
    """

    rows: list[Row]
    fetch: Callable[[Sequence[Row]], Iterator[Callable[[], bytes]]]
    faults: list[str] = field(default_factory=list)
    unread: str = ""


def open_source(given: Path, key: str | None = None) -> Source:
    """The pictures of a folder, of parquet files with pictures in them, or of what `save_to_disk`
    of Hugging Face's `datasets` wrote.

    key: the column of a list or table that has the captions. InputError: nothing of these.
    """
    if is_file(given) and given.suffix.lower() == PARQUET:
        if table := parquet_table(given, f"{given.name}:"):
            return _of_tables([table], given.parent, frozenset(), key)
        raise InputError(f"{given}: no column with pictures")
    files, faults = _files(given)
    if tables := saved_tables(given) or _parquet_tables(given, files):
        source = _of_tables(tables, given, frozenset(files), key)
        source.faults += faults
        beside = sum(path.suffix.lower() in SUFFIXES for path in files)
        if beside:
            source.unread = f"{beside} picture file(s) beside the tables, but for those rows name"
        return source
    return _of_folder(given, files, faults, key)


def _files(folder: Path) -> tuple[list[Path], list[str]]:
    """The files of a folder at any depth, sorted, and a line for whatever cannot be looked at.

    Links to folders are followed, to each folder once; those to a place in this one lead nowhere
    else, so that names stay what they are where such a link is added.
    """
    if not is_folder(folder):
        what = no_such(folder)
        raise InputError(f"{folder}: {what}; give a folder of pictures ({', '.join(SUFFIXES)})")

    files, faults, root = list[Path](), list[str](), folder.resolve()
    seen = {root}

    def failed(error: OSError) -> None:
        faults.append(f"{error.filename}: cannot be read ({error.strerror})")

    def leads_on(path: Path) -> bool:
        real = path.resolve()
        inside = real.is_relative_to(root) and not is_clutter(real.relative_to(root))
        if real in seen or (inside and path.is_symlink()):
            return False
        seen.add(real)
        return True

    for place, folders, names in os.walk(folder, onerror=failed, followlinks=True):
        at = Path(place)
        shown = sorted(name for name in folders if not is_clutter(Path(name)))
        folders[:] = [name for name in shown if leads_on(at / name)]
        for name in names:
            try:
                if not is_clutter(Path(name)) and stat.S_ISREG((at / name).stat().st_mode):
                    files.append(at / name)
            except OSError as error:
                failed(error)
    return sorted(files), sorted(faults)


def _of_folder(folder: Path, files: list[Path], faults: list[str], key: str | None) -> Source:
    pictures = [path for path in files if path.suffix.lower() in SUFFIXES]
    kinds = (path.suffix.lower().removeprefix(".") for path in files)
    others = Counter(kind for kind in kinds if kind in UNREAD)
    passed_over = unread(others) if others else ""
    if not pictures and not faults:
        why = f", but {passed_over}" if others else f"; looked for {', '.join(SUFFIXES)}"
        raise InputError(f"{folder}: no picture in it{why}")
    captions = captions_of(pictures, files, faults, key)
    rows = [
        Row(_named(path.relative_to(folder)), captions[path], at=(0, place))
        for place, path in enumerate(pictures)
        if path in captions
    ]

    def fetch(chosen: Sequence[Row]) -> Iterator[Callable[[], bytes]]:
        for row in chosen:
            yield pictures[row.at[1]].read_bytes

    return Source(rows, fetch, faults, passed_over)


def _named(path: Path) -> str:
    return path.as_posix().encode(errors="surrogateescape").decode(errors="backslashreplace")


def _parquet_tables(folder: Path, files: list[Path]) -> list[Table]:
    """Parquet files with pictures in them, each of the split that it or its folder is named by, as
    the hub's are. InputError where some are of a split and some of none.
    """
    tables = [
        table
        for path in files
        if path.suffix.lower() == PARQUET
        and (table := parquet_table(path, f"{_named(path.relative_to(folder))}:", _split(path)))
    ]
    lacking = next((table for table in tables if not table.split), None)
    if lacking and any(table.split for table in tables):
        raise InputError(
            f"{lacking.files[0]}: of no split, as others are; name it train-00000-of-00001.parquet,"
            " or give one file alone"
        )
    return tables


def _split(path: Path) -> str:
    named = (_PART.sub("", path.stem).lower(), path.parent.name.lower())
    return next((name for name in named if name in SPLITS), "")


def _of_tables(
    tables: list[Table], folder: Path, files: frozenset[Path], key: str | None
) -> Source:
    """files: those that a row without bytes may name by its path, from the folder on."""
    rows, faults = list[Row](), list[str]()
    for number, table in enumerate(tables):
        columns = caption_columns(table.columns, key)
        if not columns:
            raise InputError(
                f"{table.files[0]}: no column {key or 'captions, caption or text'}; its columns are"
                f" {', '.join(table.columns)}, --caption names another"
            )
        split = _HELD_OUT.get(table.split, table.split)
        for place, row in enumerate(table.rows(columns)):
            name = f"{table.name}{place}"
            try:
                captions = captions_of_row(row, key)
            except ValueError as error:
                faults.append(f"{folder / name}: {error}")
            else:
                rows.append(Row(name, captions, split, (number, place)))
    if not rows and not faults:
        raise InputError(f"{tables[0].files[0]}: no rows in {len(tables)} table(s)")

    def fetch(chosen: Sequence[Row]) -> Iterator[Callable[[], bytes]]:
        for number, group in groupby(chosen, lambda row: row.at[0]):
            table = tables[number]
            for get in table.pictures([row.at[1] for row in group]):
                yield partial(_bytes_of, get, table.files[0].parent, folder, files)

    return Source(rows, fetch, faults)


def _bytes_of(get: Callable[[], Any], beside: Path, folder: Path, files: frozenset[Path]) -> bytes:
    """A picture's bytes, or those of the file in the folder that it names instead."""
    cell = get()
    found = cell.get("bytes") if isinstance(cell, dict) else cell
    if found is not None:
        return bytes(found)
    named = cell.get("path") if isinstance(cell, dict) else None
    if not named:
        raise ValueError("no picture")
    for path in (beside / named, folder / named):
        # a table that was fetched may come with links
        if path in files and path.resolve().is_relative_to(folder.resolve()):
            return path.read_bytes()
    raise ValueError(f"no bytes, and no such picture in {folder}: {named}")
