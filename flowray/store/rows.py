"""JSON-lines files of metric rows: one row per logged step, flushed as written, no gap and no
duplicate after a resume.
"""

from __future__ import annotations

import json
import math
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

from flowray.config.rows import read_rows
from flowray.config.writing import write_whole

__all__ = ["RowWriter", "add_row", "has_row", "read_rows"]


def has_row(path: Path, step: int, **fields: Any) -> bool:
    """Whether a row of the step is there, with these values in these fields."""
    wanted = {"step": step, **fields}
    return any(wanted.items() <= row.items() for row in read_rows(path) if row.get("step") == step)


class RowWriter:
    """Appends rows with a `step`; opening keeps the rows up to `last_step` and drops the later
    ones, which will be written again.
    """

    def __init__(self, path: Path, last_step: int):
        kept = [row for row in read_rows(path) if row["step"] <= last_step]
        write_whole(path, "".join(_line(row) for row in kept))
        self._file = path.open("a", encoding="utf-8")

    def write(self, row: dict[str, Any]) -> None:
        """Append one row and flush it."""
        self._file.write(_line(row))
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def add_row(path: Path, row: dict[str, Any]) -> None:
    """Append one row to a file of which none is ever dropped; one that a killed writer has torn
    stays alone on its line. Where there is no room it is left out.
    """
    with suppress(OSError), path.open("ab+") as file:
        torn = False
        if file.tell():
            file.seek(-1, os.SEEK_END)
            torn = file.read() != b"\n"
        file.write((b"\n" if torn else b"") + _line(row).encode())


def _line(row: dict[str, Any]) -> str:
    # NaN is not JSON: a non-finite number is kept as null, which every reader treats as missing.
    plain = {
        key: None if isinstance(value, float) and not math.isfinite(value) else value
        for key, value in row.items()
    }
    return json.dumps(plain) + "\n"
