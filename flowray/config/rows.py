"""Rows of a run's JSON-lines files, read as text: what training, sweeps and reports share. A row
is an object on a line of its own.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

Row = dict[str, Any]


def read_rows(path: Path) -> list[Row]:
    """Every whole row; none where there is no file.

    A torn last line (a killed writer) is left out.
    """
    return (
        parse_rows(path.read_text(encoding="utf-8", errors="replace"))[0] if path.is_file() else []
    )


def parse_rows(text: str) -> tuple[list[Row], list[int]]:
    """The rows of whole lines, and the numbers, from 1, of the lines before the last that hold
    none.
    """
    rows: list[Row] = []
    bad: list[int] = []
    lines = text.split("\n")
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        if isinstance(row, dict):
            rows.append(row)
        elif line.strip() and number < len(lines):
            bad.append(number)
    return rows, bad
