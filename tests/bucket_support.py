"""A tiny recipe on pictures of three aspect ratios, with a bucket for each."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from support import captions, tiny_recipe

from flowray.config.recipe import Recipe
from flowray.data.make import png
from flowray.data.shards import write_shards

# height and width in px; by number of the sample. Of the first three every bucket's own size.
SIZES = [(8, 8), (10, 6), (6, 10), (9, 9), (24, 11), (13, 31), (40, 33), (12, 17)]
# of latents, own size first; a picture of SIZES goes to the bucket of the same place below
LATENTS = ((4, 4), (5, 3), (3, 5))
BUCKET_OF = [0, 1, 2, 0, 1, 2, 0, 2]


def picture(i: int) -> np.ndarray:
    """Sample i's, uint8 (H, W, 3) of SIZES."""
    size = SIZES[i % len(SIZES)]
    return np.random.default_rng(i).integers(0, 256, (*size, 3), dtype=np.uint8)


def pictures(folder: Path, count: int, start: int = 0) -> str:
    """Shards of 16 samples from number `start` on, if they are not there yet."""
    texts = captions(start + count)
    samples = (
        {"__key__": f"s{i:05d}", "png": png(picture(i)), "txt": texts[i].encode()}
        for i in range(start, start + count)
    )
    if not folder.is_dir():
        write_shards(folder, samples, per_shard=16, meta={})
    return str(folder)


def bucket_recipe(place: Path, **overrides: Any) -> Recipe:
    """`tiny_recipe` on 64 + 16 of these pictures, in buckets."""
    shards = {
        "data.shards": pictures(place / "mixed" / "train", 64),
        "data.val_shards": pictures(place / "mixed" / "val", 16, 64),
        "data.aspect_ratios": [0.5, 2.0],
        "data.prepare.resize": "area",
    }
    return tiny_recipe(place, **{**shards, **overrides})
