"""scikit-learn's 1797 handwritten digits (real 8x8 scans), as 64 px pictures with captions
templated from their labels.

The captions are templated labels, not descriptions anybody wrote: they say which digit it is and
nothing of how it looks.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from PIL import Image

IMAGE_SIZE = 64
NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
TEMPLATES = ("a handwritten {}", "the digit {}", "a scan of the number {}")


def captions(label: int) -> list[str]:
    """The captions of one label, 0 to 9."""
    return [template.format(NAMES[label]) for template in TEMPLATES]


def facts(label: int) -> list[str]:
    """What a digit says, as one word."""
    return [f"digit{NAMES[label]}"]


def samples(split: str) -> Iterator[tuple[np.ndarray, list[str], int]]:
    """(uint8 (64, 64, 3), captions, label) of a split; every tenth scan is `val`, the rest
    `train`.
    """
    from sklearn.datasets import load_digits  # slow to import, and only digits need it

    scans = load_digits()
    for index, (scan, label) in enumerate(zip(scans.images, scans.target, strict=True)):
        if (split == "val") != (index % 10 == 0):
            continue
        gray = Image.fromarray(np.round(scan * (255 / 16)).astype(np.uint8))
        large = gray.resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BICUBIC)
        yield np.repeat(np.asarray(large)[..., None], 3, axis=-1), captions(int(label)), int(label)
