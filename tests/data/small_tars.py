"""Small sets of tars: of samples by number, or put together by hand."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np


def npy(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def samples(count: int, start: int = 0) -> Iterator[dict[str, Any]]:
    for i in range(start, start + count):
        latent = np.random.default_rng(i).standard_normal((8, 4, 4)).astype(np.float16)
        row = json.dumps({"captions": [f"caption {i}", f"other {i}"]}).encode()
        yield {
            "__key__": f"{i:05d}",
            "txt": f"text {i}".encode(),
            "json": row,
            "moments.npy": npy(latent),
            "bin": b"x" * (i * 37 % 1500),
        }


def hand_tar(path: Path, members: list[tuple[str, bytes]]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path
