"""Tensors into a .safetensors file, summed on the way: to read them back for a checksum takes as
long again as to write them. And out of several files that hold the rows of one tensor.

The library's `save_file` writes by itself and tells no sum, its `save` takes the memory once more;
what is written here it reads.
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open

if TYPE_CHECKING:
    from torch import Tensor

Shape = tuple[int, ...]
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


@dataclass(frozen=True)
class Stored:
    """A tensor in open files: all of it in one, or some of its rows in each, in their order.

    pieces: (file, shape of what is there).
    """

    name: str
    pieces: tuple[tuple[Any, Shape], ...]

    @property
    def shape(self) -> Shape:
        """Of the whole."""
        first = self.pieces[0][1]
        if len(self.pieces) == 1:
            return first
        return sum(shape[0] for _, shape in self.pieces), *first[1:]

    def whole(self) -> Tensor:
        """All of it, on the CPU."""
        return _joined([file.get_slice(self.name)[...] for file, _ in self.pieces])

    def rows(self, begin: int, end: int) -> Tensor:
        """Of its first dimension those from `begin` to before `end`; no others are read."""
        reads, first = [], 0
        for file, shape in self.pieces:
            reads.append((file, range(shape[0])[max(begin - first, 0) : max(end - first, 0)]))
            first += shape[0]
        reads = [(file, here) for file, here in reads if here] or reads[:1]
        return _joined([file.get_slice(self.name)[here.start : here.stop] for file, here in reads])


def _joined(pieces: list[Tensor]) -> Tensor:
    import torch

    return pieces[0] if len(pieces) == 1 else torch.cat(pieces)


Take = Callable[[str, Stored], "Tensor"]


@contextmanager
def opened(files: Sequence[Path], library: str = "pt") -> Iterator[dict[str, Stored]]:
    """The tensors of files by name; but for the heads nothing is read yet.

    library: `np` for who needs shapes alone, and not torch. OSError, and ValueError where a file is
    not what it should be.
    """
    pieces: dict[str, list[tuple[Any, Shape]]] = {}
    with ExitStack() as closing:
        for path in files:
            try:
                file = closing.enter_context(safe_open(path, library))
            except SafetensorError as error:
                raise ValueError(f"{path}: {error}") from error
            for name in file.keys():  # noqa: SIM118  # it is no mapping
                shape = tuple(file.get_slice(name).get_shape())
                pieces.setdefault(name, []).append((file, shape))
        yield {name: Stored(name, tuple(each)) for name, each in pieces.items()}


def whole(name: str, stored: Stored) -> Tensor:
    """All of a tensor: what most readers take."""
    return stored.whole()


def read_tensors(files: Sequence[Path], take: Take = whole) -> dict[str, Tensor]:
    """What `take` makes of each tensor of the files, by its name; raises as `opened` does."""
    with opened(files) as stored:
        return {name: take(name, each) for name, each in stored.items()}
