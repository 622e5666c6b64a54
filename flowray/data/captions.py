"""Captions of a folder of pictures: a text file beside each, or lists as they are written
elsewhere.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from flowray.config.errors import InputError
from flowray.config.jsons import parse_json
from flowray.data.tables import parquet_rows

# Our own lists, and those of Hugging Face's image folders.
_LISTED_AS = ("jsonl", "json", "csv", "tsv", "parquet")
LISTS = (
    *(f"captions.{kind}" for kind in _LISTED_AS),
    *(f"metadata.{kind}" for kind in _LISTED_AS if kind != "json"),  # of many a program's own
)
TEXT = ".txt"
# bytes of a .txt or .json of a sample: no caption is as long, and JSON takes many times its size
LONGEST = 8 << 20
LONGEST_CELL = 1 << 20  # characters of a .csv or .tsv: far more than a caption has
# 131,072 by default, of all readers of the process: one that set it back would cut off another
csv.field_size_limit(max(csv.field_size_limit(), LONGEST_CELL))
_NAMES, _CAPTIONS = ("image", "file_name"), ("captions", "caption", "text")
_WANTED = "image (or file_name) and caption (or text)"


def captions_of(
    pictures: list[Path], files: Iterable[Path], faults: list[str], key: str | None = None
) -> dict[Path, list[str]]:
    """The captions of every picture that has some; what is wrong goes to `faults`.

    files: all there are, in a sorted order. A list's names start from its own folder. Where there
    is one, text files are not read. key: the one of the lists that captions stand under.
    InputError: two lists in one folder; a key, but no list.
    """
    others = list(files)
    listed = [path for path in others if path.name.lower() in LISTS]
    if not listed and key is not None:
        raise InputError(f"caption key {key!r}: there is none of the lists {', '.join(LISTS)}")
    if not listed:
        texts = {path.with_suffix(""): path for path in others if path.suffix.lower() == TEXT}
        return {path: found for path in pictures if (found := _beside(path, texts, faults))}
    folders = {path.parent: path for path in listed}
    if double := next((path for path in listed if folders[path.parent] != path), None):
        raise InputError(
            f"{double.parent}: both {double.name} and {folders[double.parent].name} list captions;"
            " keep one of them"
        )
    captions: dict[Path, list[str]] = {}
    known = set(pictures)
    for path in listed:
        for place, name, given in _entries(path, faults, key):
            picture = path.parent / name
            if picture in known:
                captions.setdefault(picture, []).extend(given)
            else:
                faults.append(f"{picture}: no such picture ({place})")
    where = str(listed[0]) if len(listed) == 1 else f"{listed[0]} and {len(listed) - 1} more"
    faults += [f"{path}: no caption in {where}" for path in pictures if path not in captions]
    return captions


def _beside(picture: Path, texts: dict[Path, Path], faults: list[str]) -> list[str]:
    """The lines of the picture's text file."""
    path = texts.get(picture.with_suffix(""))
    if path is None:
        faults.append(
            f"{picture}: no caption file {picture.with_suffix(TEXT).name}, nor one of the lists"
            f" {', '.join(LISTS)}"
        )
        return []
    try:
        found = _lines(path.read_bytes())
    except (OSError, ValueError) as error:
        faults.append(f"{path}: cannot be read as UTF-8 ({error})")
        return []
    if not found:
        faults.append(f"{path}: empty")
    return found


def _entries(
    path: Path, faults: list[str], key: str | None
) -> Iterator[tuple[str, str, list[str]]]:
    """(place, a picture's name, its captions) of every entry of a list that can be read."""
    try:
        rows = list(_rows(path, key))
    except (OSError, ValueError, csv.Error) as error:
        faults.append(f"{path}: cannot be read ({error})")
        return
    for number, row in rows:
        place = f"{path}:{number}"
        try:
            yield place, *_entry(row, key)
        except ValueError as error:
            faults.append(f"{place}: {error}")


def _rows(path: Path, key: str | None) -> Iterator[tuple[int, Any]]:
    """(number from 1, row) of a list, by its suffix."""
    kind = path.suffix.lower()
    if kind == ".parquet":
        wanted = (*_NAMES, *_keys(key))
        yield from enumerate(parquet_rows(path, wanted), 1)
        return
    text = path.read_text(encoding="utf-8-sig")
    if kind in (".csv", ".tsv"):
        yield from _table_rows(text, "\t" if kind == ".tsv" else ",", _keys(key))
    else:
        yield from _json_rows(text, kind == ".json")


def _table_rows(text: str, between: str, keys: Sequence[str]) -> Iterator[tuple[int, Any]]:
    """(line, row), each by the names that the first line gives its cells; those alone where they
    are not a list's.
    """
    # a tab is white space too, and an empty cell between two is none to skip
    options: dict[str, Any] = {"delimiter": between, "skipinitialspace": between == ","}
    reader = csv.DictReader(io.StringIO(text, newline=""), **options)
    names = reader.fieldnames or ()
    if not any(name in names for name in _NAMES) or not any(name in names for name in keys):
        yield 1, dict.fromkeys(names)
        return
    try:
        for row in reader:
            yield reader.line_num, row
    except csv.Error as error:
        line = reader.reader.line_num  # the DictReader's own is of the row before
        raise ValueError(f"line {line}: {error}") from error


def _json_rows(text: str, whole: bool) -> Iterator[tuple[int, Any]]:
    """(line, row) of JSON lines, (place in it, row) of one JSON list, which may also stand in a
    file of lines. What is no JSON is a row as it stands.
    """
    if whole or text.lstrip().startswith("["):
        found = parse_json(text)
        yield from enumerate(found if isinstance(found, list) else [found], 1)
        return
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                yield number, parse_json(line)
            except ValueError:
                yield number, line


def _entry(row: Any, key: str | None) -> tuple[str, list[str]]:
    """(a picture's name, its captions); ValueError says what is wrong with the row."""
    if not isinstance(row, dict):
        raise ValueError(
            f'no entry such as {{"image": "a.png", "caption": "..."}}, but {json.dumps(row)[:40]}'
        )
    if None in row:
        raise ValueError(
            "more cells than the first line names; a caption with a comma or tab stands in quotes"
            ' ("")'
        )
    name = next((row[each] for each in _NAMES if each in row), None)
    if not any(each in row for each in _keys(key)) or not isinstance(name, str) or not name:
        got = ", ".join(map(str, row))[:80] or "nothing"
        wanted = _WANTED if key is None else f"image (or file_name) and {key}"
        raise ValueError(
            f"want {wanted}, got {got}; what is no list of captions needs another name"
        )
    return name, captions_of_row(row, key)


def captions_in(row: bytes | None, text: bytes | None, key: str | None = None) -> list[str]:
    """The captions of a sample of a shard, by the bytes of its .json and .txt, None where it has
    none: `captions`, `caption` or `text` of the .json, the first that is there and not null, a text
    or a list of them; else the .txt, a caption a line, as beside a picture of a folder.

    key: another one of the .json, and then nothing else. ValueError, one line, where there are none
    or they cannot be read.
    """
    try:
        if too_long := next((d for d in (row, text) if d is not None and len(d) > LONGEST), None):
            raise ValueError(f"{len(too_long)} bytes, more than {LONGEST}")
        read = {} if row is None else parse_json(row)
        given = _given(read, key) if isinstance(read, dict) else None
        if given is None and text is not None and key is None:
            given = _lines(text)
    except ValueError as error:  # UnicodeDecodeError and JSONDecodeError are ValueErrors
        raise ValueError(f"caption cannot be read: {error}") from error
    if given is None or given == []:
        beside = "a non-empty .txt, or " if key is None else ""
        raise ValueError(
            f"no caption; it needs {beside}.json with"
            f" {', '.join(f'`{name}`' for name in _keys(key))}, a text or a list of texts"
        )
    return _texts(given)


def captions_of_row(row: dict[str, Any], key: str | None = None) -> list[str]:
    """The captions of a row of a list or table, as `captions_in` has those of a .json."""
    return _texts(_given(row, key))


def caption_columns(names: Iterable[str], key: str | None = None) -> list[str]:
    """Which of the columns of a table have captions."""
    there = set(names)
    return [each for each in _keys(key) if each in there]


def _keys(key: str | None) -> tuple[str, ...]:
    return _CAPTIONS if key is None else (key,)


def _given(row: dict[str, Any], key: str | None) -> Any:
    return next((row[each] for each in _keys(key) if row.get(each) is not None), None)


def _texts(given: Any) -> list[str]:
    """Captions without white space around them; ValueError where one is empty or no text."""
    each = given if isinstance(given, list) else [given]
    texts = [_trimmed(text) for text in each if isinstance(text, str)]
    if not texts or not all(texts) or len(texts) < len(each):
        raise ValueError("empty caption, or one that is no text")
    return texts


def _lines(text: bytes) -> list[str]:
    """The captions of a text file. Lines end at a line feed alone: str.splitlines takes U+2028
    and form feeds, which stand in captions from the web, for ends too.
    """
    return [line for part in text.decode("utf-8").split("\n") if (line := _trimmed(part))]


def _trimmed(text: str) -> str:
    """Without what is round it; ValueError where no tokenizer takes it, or it is no text at all."""
    if "\0" in text:
        raise ValueError("NUL in a caption; is it UTF-16?")
    text.encode()  # half a surrogate pair, which JSON can write, cannot be
    return text.strip().strip("\ufeff").strip()  # a byte order mark, wherever files were joined
