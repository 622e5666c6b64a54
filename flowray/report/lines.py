"""Text for a terminal: how wide it is, and lines that are broken between words only."""

from __future__ import annotations

import shutil
import textwrap

COLUMNS = 100  # where the output is no terminal


def columns() -> int:
    """The width of the terminal, or what the variable COLUMNS says; 100 for a file or a pipe."""
    return shutil.get_terminal_size((COLUMNS, 40)).columns


def wrapped(text: str, width: int, first: str = "", rest: str = "") -> list[str]:
    """Lines of at most `width` columns, broken between words only: a longer word (a path) is left
    to the terminal.

    first, rest: what the first and the other lines begin with.
    """
    return textwrap.wrap(
        text,
        max(width, 20),
        initial_indent=first,
        subsequent_indent=rest,
        break_long_words=False,
        break_on_hyphens=False,
    )
