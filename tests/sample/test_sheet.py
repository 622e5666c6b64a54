"""The sheet of pictures: every one in its place, whatever the captions are written in."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from flowray.sample.sheet import GAP, TEXT, save_sheet


def test_pictures_lie_in_rows_with_the_real_one_apart(tmp_path: Path) -> None:
    pictures = np.random.default_rng(0).integers(0, 256, (3, 4, 16, 16, 3), dtype=np.uint8)
    fox = "\u72d0\u72f8"
    captions = ["a fox", fox, "word " * 90]
    save_sheet(tmp_path / "a.png", captions, ["fox", "fox", "many"], pictures)
    sheet = np.asarray(Image.open(tmp_path / "a.png"))
    assert sheet.shape == (GAP + 3 * (64 + GAP), TEXT + 4 * (64 + GAP) + 2 * GAP, 3)
    large = pictures.repeat(4, axis=2).repeat(4, axis=3)
    for i in range(3):
        for j in range(4):
            top, left = GAP + i * (64 + GAP), TEXT + j * (64 + GAP) + (2 * GAP if j else 0)
            assert (sheet[top : top + 64, left : left + 64] == large[i, j]).all()
        assert (sheet[GAP + i * (64 + GAP) :][:64, :TEXT] < 128).any()  # words
    # the font has no such letters: the label stands for them
    save_sheet(tmp_path / "b.png", ["[fox]"], ["none"], pictures[:1])
    save_sheet(tmp_path / "c.png", [fox], ["fox"], pictures[:1])
    assert (tmp_path / "b.png").read_bytes() == (tmp_path / "c.png").read_bytes()
