"""Prompts as people give them, and what of them is refused; without torch."""

from __future__ import annotations

import sys
import unicodedata
from collections.abc import Sequence
from pathlib import Path

from flowray.config.errors import InputError

STDIN = Path("-")


def read_prompts(path: Path) -> list[str]:
    """The captions of a prompt file, one a line, or of stdin (`-`); InputError names file and
    line.
    """
    name = "stdin" if path == STDIN else str(path)
    try:
        data = sys.stdin.buffer.read() if path == STDIN else path.read_bytes()
        lines = data.decode("utf-8-sig").splitlines()
    except OSError as error:
        raise InputError(
            f"{name}: cannot be read: {error.strerror}; want a text file with one caption a line"
        ) from error
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise InputError(f"{name}:{line}: not UTF-8 text; want one caption a line") from error
    prompts = [line.strip() for line in lines if line.strip()]
    if any("\0" in prompt for prompt in prompts):
        raise InputError(f"{name}: a binary file; want a text file with one caption a line")
    if not prompts:
        raise InputError(f"{name}: no captions in it; want one caption a line")
    return prompts


def words_of(prompt: str) -> str:
    """A prompt's first words as part of a file name."""
    words = "".join(c if c.isalnum() else " " for c in prompt).split()[:10]
    return "_".join(words)[:60] or "prompt"


def check_prompts(prompts: Sequence[str]) -> None:
    """InputError where there is none, or one is empty, or holds what no caption does: a control
    character or half a letter.
    """
    if isinstance(prompts, str):
        raise InputError(f"prompts: want a list of captions, got one, {prompts[:60]!r}")
    if not prompts:
        raise InputError("no prompt; want a caption or more")
    for place, prompt in enumerate(prompts, 1):
        which = f"prompt {place} of {len(prompts)}"
        if not prompt.strip():
            raise InputError(f"{which}: is empty; type a caption in quotes, or leave it out")
        for letter in prompt:
            if letter not in "\t\n\r" and unicodedata.category(letter) in ("Cc", "Cs"):
                kind = "a control character" if ord(letter) < 0xD800 else "half a letter"
                where = f"U+{ord(letter):04X} at letter {prompt.index(letter) + 1}"
                raise InputError(f"{which}: holds {kind}, {where}; leave it out")


def check_balanced(plus: Sequence[str], minus: Sequence[str]) -> None:
    """InputError unless as many captions are added as are taken away: what of a picture is in all
    of them, such as its brightness, must stay there once.
    """
    if len(plus) != len(minus):
        raise InputError(
            f"{len(plus)} --plus and {len(minus)} --minus: want as many of one as of the other, as"
            ' in "a red circle" --plus "a blue square" --minus "a red square"'
        )
