"""What a case of a hostile or odd input is, and the tars that most of them are made of."""

from __future__ import annotations

import io
import pickle
import tarfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

CANARY = "canary"  # a file beside the set that only code from the set would make
TEXT = "a thing"
Members = list[tuple[str | tarfile.TarInfo, bytes]]
Write = Callable[[Path], str]


@dataclass(frozen=True)
class Case:
    """An input; docs/odd-inputs.md says in the row of its name what becomes of it.

    write: writes it into an empty folder and returns data.shards, of which {} stands for the
    folder. told: a pattern of what `check` says. captions, right, off: of sample b the captions,
    the pixels and how far off these may be.
    """

    name: str
    write: Write
    told: str = ""
    captions: tuple[str, ...] | None = None
    right: Any = None
    off: int = 0


def saved(image: Image.Image, form: str = "PNG", **how: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **how)
    return buffer.getvalue()


def noise(seed: int, side: int = 8) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8)


PICTURE = saved(Image.fromarray(noise(1)))
OTHER = saved(Image.fromarray(noise(2)))


def sample(key: str = "a", picture: bytes = PICTURE) -> Members:
    return [(f"{key}.png", picture), (f"{key}.txt", TEXT.encode())]


B = sample("b", OTHER)


def tar_of(members: Members, form: int = tarfile.GNU_FORMAT) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(
        fileobj=buffer, mode="w", format=form, encoding="utf-8", errors="surrogateescape"
    ) as tar:
        for name, data in members:
            info = name if isinstance(name, tarfile.TarInfo) else tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def put(folder: Path, data: bytes, name: str = "odd.tar") -> str:
    (folder / name).write_bytes(data)
    return "{}"


def tar(data: Callable[[], bytes] | bytes, name: str = "odd.tar", spec: str = "{}") -> Write:
    """These bytes as a tar."""

    def write(folder: Path) -> str:
        put(folder, data if isinstance(data, bytes) else data(), name)
        return spec

    return write


def members(*more: tuple[str | tarfile.TarInfo, bytes], form: int = tarfile.GNU_FORMAT) -> Write:
    """A good sample a, and these members."""
    return tar(lambda: tar_of([*sample(), *more], form))


def parts(**files: bytes) -> Write:
    """A good sample a, and b of these files."""
    return members(*((f"b.{extension}", data) for extension, data in files.items()))


def texts(**files: bytes) -> Write:
    """A good sample a, and b of a picture and these files."""
    return parts(png=OTHER, **files)


def picture(extension: str, data: Callable[[], bytes] | bytes) -> Write:
    """A good sample a, and b whose picture this is."""

    def write(folder: Path) -> str:
        return parts(**{extension: data if isinstance(data, bytes) else data()}, txt=TEXT.encode())(
            folder
        )

    return write


def changed(change: Callable[[bytearray], object]) -> Write:
    """The tar of good samples a and b, and its bytes changed in place: headers are at 0 (a.png),
    1024 (a.txt), 2048 (b.png) and 3072 (b.txt).
    """

    def write(folder: Path) -> str:
        data = bytearray(tar_of([*sample(), *B]))
        change(data)
        return put(folder, bytes(data))

    return write


def header(data: bytearray, at: int, fields: dict[int, bytes], sums: bool = True) -> None:
    """Fields of the header at this place, each by its offset in it, and its sum made right."""
    for offset, value in fields.items():
        data[at + offset : at + offset + len(value)] = value
    if sums:
        data[at + 148 : at + 156] = b" " * 8
        data[at + 148 : at + 156] = b"%06o\0 " % sum(data[at : at + 512])


def of_kind(name: str, kind: bytes, to: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, to
    return info


def pax(name: str, **headers: str) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.pax_headers = headers
    return info


class Runs:
    """Leaves a file where it is unpickled."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self) -> Any:
        return Path.touch, (self.mark,)


def pickled(extension: str, make: Callable[[Runs], bytes] = pickle.dumps) -> Write:
    """A good sample a that also has a pickle."""

    def write(folder: Path) -> str:
        data = make(Runs(folder.parent / f"{folder.name}.{CANARY}"))
        return put(folder, tar_of([*sample(), (f"a.{extension}", data), *B]))

    return write


def objects(runs: Runs) -> bytes:
    """A .npy of an object."""
    buffer = io.BytesIO()
    np.save(buffer, np.array([runs], dtype=object), allow_pickle=True)
    return buffer.getvalue()


def npy(shape: str, data: bytes = b"", dtype: str = "<f4", fortran: bool = False) -> bytes:
    """A .npy that says this of its bytes."""
    said = f"{{'descr': '{dtype}', 'fortran_order': {fortran}, 'shape': {shape}, }}".ljust(117)
    return b"\x93NUMPY\x01\0" + (118).to_bytes(2, "little") + said.encode() + b"\n" + data
