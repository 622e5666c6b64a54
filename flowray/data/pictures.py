"""The pictures of shards, decoded."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image, UnidentifiedImageError

from flowray.config.errors import InputError
from flowray.data.reader import IMAGES, ShardReader


def decode_image(reader: ShardReader, index: int) -> np.ndarray:
    """The picture of a sample, uint8 (H, W, 3); InputError names shard and sample where it does
    not decode.
    """
    has = [e for e in IMAGES if e in reader.extensions(index)]
    if not has:
        raise InputError(f"{reader.label(index)}: no picture (.{', .'.join(IMAGES)})")
    try:
        return np.asarray(Image.open(io.BytesIO(reader.read(index, has[0]))).convert("RGB"))
    # SyntaxError: pillow on a broken PNG chunk
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        reason = "not a picture" if isinstance(error, UnidentifiedImageError) else error
        raise InputError(f"{reader.label(index)}: .{has[0]} does not decode: {reason}") from error
