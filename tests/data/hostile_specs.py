"""Odd things that data.shards may name, and odd indexes and manifests beside a good tar."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
from hostile import OTHER, PICTURE, TEXT, Case, Write, put, tar
from hostile_tars import TWO, special
from safetensors.numpy import save


def beside(name: str, make: Callable[[Path], bytes]) -> Write:
    """A good tar of a and b, and a file beside it."""

    def write(folder: Path) -> str:
        spec = put(folder, TWO)
        (folder / name).write_bytes(make(folder / "odd.tar"))
        return spec

    return write


def index(**changes: object) -> Write:
    """A good tar and an index of it, with arrays changed or left out."""

    def make(path: Path) -> bytes:
        table = np.array([[512, len(PICTURE)], [2560, len(OTHER)]], np.int64)
        text = np.array([[1536, len(TEXT)], [3584, len(TEXT)]], np.int64)
        arrays = {
            "names": np.frombuffer(b"ab", np.uint8),
            "ends": np.array([1, 2], np.int64),
            ".png": table,
            ".txt": text,
        }
        for name, value in changes.items():
            arrays[name if name in arrays else f".{name}"] = np.asarray(value)
        stat = path.stat()
        stamp = f"2 {stat.st_size} {stat.st_mtime_ns}"
        return save(arrays, metadata={"tar": json.dumps([stamp, []])})

    return beside("odd.tar.index", make)


def piped(folder: Path) -> str:
    put(folder, TWO)
    return f"pipe:touch {folder.parent / folder.name}.canary; cat {folder}/odd.tar"


def called(name: str) -> Write:
    """A good tar of this name, named as data.shards."""
    return tar(TWO, name, "{}/" + name)


def manifest(text: str) -> Write:
    return beside("manifest.json", lambda path: text.encode())


def _wide_index(folder: Path) -> None:
    with (folder / "odd.tar.index").open("wb") as file:
        file.write(struct.pack("<Q", (4 << 30) - 8))
        file.truncate(4 << 30)


SPECS = [
    Case("pipe: as data.shards", piped),
    Case("file: as data.shards", tar(TWO, spec="file:{}/odd.tar")),
    Case("a shard's name with ; and $( )", called("a; touch ${HOME} $(id).tar")),
    Case("a shard's name with [ ] and *", called("a[1]*.tar")),
    Case("a shard's name with { }", called("a{1,2}.tar")),
    Case("braces of 10^12 names", tar(TWO, spec="{}/{{0..999999999999}}.tar")),
    Case("a pipe called .tar in the folder", special(lambda f: os.mkfifo(f / "p.tar"))),
    Case("a folder called .tar in the folder", special(lambda f: (f / "p.tar").mkdir())),
    Case("a .tar that is a link to nothing", special(lambda f: (f / "p.tar").symlink_to("no"))),
    Case(
        "a .tar that is a link to /dev/zero",
        special(lambda f: (f / "p.tar").symlink_to("/dev/zero")),
    ),
]

BESIDE = [
    Case("an index of other bytes", beside("odd.tar.index", lambda p: b"\xff" * 100)),
    Case(
        "an index cut off",
        special(
            lambda f: (
                index()(f),
                (f / "odd.tar.index").write_bytes((f / "odd.tar.index").read_bytes()[:-8]),
            )
        ),
    ),
    Case(
        "an index that says a header of 2^62 bytes",
        beside("odd.tar.index", lambda p: struct.pack("<Q", 1 << 62)),
    ),
    Case("an index of 4 GiB, all header", special(lambda f: _wide_index(f))),
    Case(
        "an index nested 100,000 deep",
        beside("odd.tar.index", lambda p: struct.pack("<Q", 200_000) + b"[" * 200_000),
    ),
    Case("an index with sizes beyond the tar", index(png=[[512, 1 << 40], [2560, 8]])),
    Case("an index with sizes that overflow", index(png=[[1 << 62, 1 << 62], [2560, 8]])),
    Case("an index with places below 0", index(png=[[-512, 99], [2560, -8]])),
    Case("an index with ends that fall", index(ends=[2, 1])),
    Case("an index with ends beyond its names", index(ends=[1 << 40, 1 << 41])),
    Case("an index with names that are not UTF-8", index(names=np.array([0xFF, 0xFE], np.uint8))),
    Case("an index with a byte more of names", index(names=np.array([97, 98, 99], np.uint8))),
    Case(
        "an index that is a link to a file outside",
        special(lambda f: (f / "odd.tar.index").symlink_to("/etc/passwd")),
    ),
    Case("an index that is a pipe", special(lambda f: os.mkfifo(f / "odd.tar.index"))),
    Case("a manifest that is no JSON", manifest("{")),
    Case("a manifest nested 100,000 deep", manifest("[" * 100_000)),
    Case("a manifest of another form", manifest('{"shards": {"name": [1]}, "meta": 3}')),
    Case(
        "a manifest with names outside",
        manifest(
            json.dumps(
                {
                    "meta": {"set": 1},
                    "samples": 1,
                    "shards": [{"name": "/etc/passwd", "bytes": 1, "sha256": ""}],
                }
            )
        ),
    ),
    Case(
        "a manifest with wrong sizes",
        manifest(
            json.dumps(
                {
                    "meta": {"set": 1},
                    "samples": 1,
                    "shards": [{"name": "odd.tar", "bytes": 1, "sha256": ""}],
                }
            )
        ),
    ),
]
