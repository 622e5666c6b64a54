"""A PNG of captions, each with a real picture of it and draws."""

from __future__ import annotations

import io
import textwrap
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from flowray.config.writing import write_whole

SIDE = 64  # px that pictures are shown at, at least
GAP, TEXT, LINE = 4, 240, 13  # px between pictures, of a caption, of a line of it
LETTERS, LINES = 40, 4  # that fit


def save_sheet(
    path: Path, captions: Sequence[str], labels: Sequence[str | None], pictures: np.ndarray
) -> None:
    """A row a caption: its words, the first picture, which is a real one, a gap, and the others.

    labels: shown in brackets for captions in scripts that the font lacks.
    pictures: uint8 (captions, 1 + draws, H, W, 3).
    """
    rows, columns, height, width, _ = pictures.shape
    scale = max(1, -(-SIDE // height))
    height, width = scale * height, scale * width
    size = (TEXT + columns * (width + GAP) + 2 * GAP, rows * (height + GAP) + GAP)
    sheet = Image.new("RGB", size, "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(11)
    for i, (caption, label, row) in enumerate(zip(captions, labels, pictures, strict=True)):
        top = GAP + i * (height + GAP)
        words = caption if _has_letters(caption) else f"[{label}]"
        lines = textwrap.wrap(words, LETTERS)[:LINES]
        for line, text in enumerate(lines):
            draw.text((GAP, top + line * LINE), text, "black", font)
        for j, picture in enumerate(row):
            left = TEXT + j * (width + GAP) + (2 * GAP if j else 0)
            shown = Image.fromarray(picture).resize((width, height), Image.Resampling.NEAREST)
            sheet.paste(shown, (left, top))
    png = io.BytesIO()
    sheet.save(png, format="png")
    write_whole(path, png.getvalue())


def _has_letters(text: str) -> bool:
    """Whether the font, which is of Latin letters, can show a text."""
    return all(ord(letter) < 0x250 or 0x2000 <= ord(letter) < 0x2070 for letter in text)
