"""Emoji art as small pictures on white, drawn by several processes."""

from __future__ import annotations

import importlib.util
import io
import multiprocessing
import signal
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import partial

import numpy as np
from PIL import Image

from flowray.config.cores import usable_cores
from flowray.config.errors import InputError
from flowray.data.make import png

_SEEN = 8  # of 255: weaker alpha at the border is smoothing of what ends inside
_MOST = 16  # processes, each of which imports the libraries anew
_CHUNK = 32  # drawings a process takes at once


def refuse_without_resvg() -> None:
    """InputError with what to install where resvg-py, which draws SVG, is not there."""
    if importlib.util.find_spec("resvg_py") is None:
        raise InputError(
            "make emoji: needs resvg-py, which draws SVG; type pip install 'flowray[emoji]'"
        )


def render(art: str | bytes, size: int) -> np.ndarray:
    """Art, an SVG or the bytes of a raster picture, as uint8 (size, size, 3) on white.

    It fills the picture as its box was drawn; where it touches the border it is made smaller about
    the centre, so that 1/32 of the side stays free. ValueError or OSError where it does not
    decode.
    """
    layer = _layer(art, size)
    margin = max(1, size // 32)
    alpha = np.asarray(layer.getchannel("A"))
    if max(alpha[[0, -1]].max(), alpha[:, [0, -1]].max()) > _SEEN:
        inner = _layer(art, size - 2 * margin)
        layer = Image.new("RGBA", (size, size))
        layer.paste(inner, (margin, margin))
    white = Image.new("RGBA", layer.size, "white")
    return np.asarray(Image.alpha_composite(white, layer).convert("RGB"))


def _layer(art: str | bytes, size: int) -> Image.Image:
    """RGBA (size, size), the art's box centred in it."""
    if isinstance(art, str):
        from resvg_py import svg_to_bytes  # not installed by default

        drawn = svg_to_bytes(svg_string=art, width=size, height=size, skip_system_fonts=True)
        layer = Image.open(io.BytesIO(bytes(drawn))).convert("RGBA")
    else:
        layer = Image.open(io.BytesIO(art)).convert("RGBA")  # resampled with premultiplied alpha
    if layer.size == (size, size):
        return layer
    scale = size / max(layer.size)
    width, height = (max(1, round(side * scale)) for side in layer.size)
    square = Image.new("RGBA", (size, size))
    fitted = layer.resize((width, height), Image.Resampling.LANCZOS)
    square.paste(fitted, ((size - width) // 2, (size - height) // 2))
    return square


def render_pngs(arts: Sequence[tuple[str, str | bytes]], size: int) -> Iterator[bytes]:
    """`render` of each as a PNG, in their order, by a process for each processor, at most _MOST.

    arts: (name, art); InputError names one that does not decode.
    """
    processes = min(usable_cores(), _MOST, -(-len(arts) // _CHUNK))
    if processes < 2:
        yield from (_png(each, size) for each in arts)
        return
    pool = ProcessPoolExecutor(
        processes,
        mp_context=multiprocessing.get_context("spawn"),  # a fork would share threads
        initializer=_leave_interrupts_to_the_parent,
    )
    try:
        yield from pool.map(partial(_png, size=size), arts, chunksize=_CHUNK)
    except BrokenProcessPool as error:
        raise InputError(
            "a process that draws was killed, most likely for want of memory; the same command"
            " begins anew"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def _png(named: tuple[str, str | bytes], size: int) -> bytes:
    name, art = named
    try:
        return png(render(art, size))
    except (ValueError, OSError, SyntaxError) as error:  # SyntaxError: Pillow, of a broken chunk
        raise InputError(f"the drawing {name} does not decode: {error}") from error


def _leave_interrupts_to_the_parent() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
