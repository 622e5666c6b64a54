"""Pictures one after the other in time: an animated PNG, which browsers play and other viewers
show the first picture of.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from flowray.config.writing import write_whole

FRAME_MS, REST_MS = 120, 1200  # of a picture; of the first and the last one


def save_animation(path: Path, pictures: Sequence[np.ndarray]) -> None:
    """Pictures uint8 (H, W, 3) as an animated PNG that begins anew for ever, written whole."""
    frames = [Image.fromarray(picture) for picture in pictures]
    shown = [FRAME_MS] * len(frames)
    shown[0] = shown[-1] = REST_MS
    png = io.BytesIO()
    frames[0].save(
        png, format="png", save_all=True, append_images=frames[1:], duration=shown, loop=0
    )
    write_whole(path, png.getvalue())
