"""Tensors into a .safetensors file, summed on the way: to read them back for a checksum takes as
long again as to write them.

The library's `save_file` writes by itself and tells no sum, its `save` takes the memory once more;
what is written here it reads.
"""

from __future__ import annotations

import json
import os
import zlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

BLOCK = 2**22  # bytes: summed and written while they are in the processor's cache
_NAMES = {
    "float64": "F64",
    "float32": "F32",
    "float16": "F16",
    "bfloat16": "BF16",
    "int64": "I64",
    "int32": "I32",
    "int16": "I16",
    "int8": "I8",
    "uint8": "U8",
    "bool": "BOOL",
}


def write_tensors(path: Path, tensors: dict[str, Tensor]) -> dict[str, int]:
    """Write a new file and have it on disk; its `size` and `crc32`. Tensors on the host are written
    from where they lie.
    """
    import torch

    # wide ones first, so that each begins at a multiple of its width
    order = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    header: dict[str, Any] = {}
    end = 0
    for name in order:
        tensor = tensors[name]
        begin, end = end, end + tensor.numel() * tensor.element_size()
        header[name] = {
            "dtype": _NAMES[str(tensor.dtype).removeprefix("torch.")],
            "shape": list(tensor.shape),
            "data_offsets": [begin, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    crc = 0
    with path.open("xb") as file:

        def write(data: Any) -> None:
            nonlocal crc
            crc = zlib.crc32(data, crc)
            file.write(data)

        write(len(text).to_bytes(8, "little") + text)
        for name in order:
            flat = tensors[name].detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
            for start in range(0, len(flat), BLOCK):
                write(flat[start : start + BLOCK])
        file.flush()
        os.fsync(file.fileno())
    return {"size": 8 + len(text) + end, "crc32": crc}
