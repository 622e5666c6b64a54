"""Hostile and odd folders, for `flowray.data pack`."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

from hostile import OTHER, PICTURE, TEXT, Case, Write
from hostile_samples import DEEP, EPS, flat_png


def folder(fill: Callable[[Path], object]) -> Write:
    """A good picture a with its caption, and what this adds."""

    def write(place: Path) -> str:
        inside = place / "in"
        inside.mkdir()
        (inside / "a.png").write_bytes(PICTURE)
        (inside / "a.txt").write_text(TEXT)
        fill(inside)
        return "{}"

    return write


def files(**content: bytes) -> Write:
    """Beside it b.png and files whose names have _ for the dot."""
    rest = {name.replace("_", "."): data for name, data in content.items()}

    def fill(inside: Path) -> None:
        for name, data in {"b.png": OTHER, **rest}.items():
            (inside / name).write_bytes(data)

    return folder(fill)


def listed(*names: str, caption: str = TEXT) -> Write:
    """A list with these names of pictures, and the good one."""
    rows = [json.dumps({"image": name, "caption": caption}) for name in ("a.png", *names)]
    return folder(lambda inside: (inside / "captions.jsonl").write_text("\n".join(rows)))


def rows(text: bytes, name: str = "captions.jsonl") -> Write:
    good = b'{"image": "a.png", "caption": "a thing"}\n' if name.endswith("l") else b""
    return folder(lambda inside: (inside / name).write_bytes(good + text))


FOLDERS = [
    Case("a list that names ../../etc/passwd", listed("../../../../etc/passwd")),
    Case("a list that names /etc/passwd", listed("/etc/passwd")),
    Case("a list that names a pipe: command", listed("pipe:touch ran")),
    Case("a name with NUL in a list", listed("b\0.png")),
    Case("half of a surrogate pair in a list", listed(caption="red \ud83d")),
    Case("a line nested 100,000 deep", rows(DEEP)),
    Case("captions.json nested 100,000 deep", rows(DEEP, "captions.json")),
    Case("captions.csv with NUL", rows(b"image,caption\na.png,re\0d\n", "captions.csv")),
    Case("NUL in a .txt", files(b_txt=b"r\0e\0d\0")),
    Case("EPS that is called b.png", files(b_png=EPS, b_txt=b"red")),
    Case("a picture of 30,000 x 30,000", files(b_png=flat_png(30_000, 30_000), b_txt=b"red")),
    Case("a pipe called b.png", folder(lambda inside: os.mkfifo(inside / "b.png"))),
    Case("a link to nothing", folder(lambda inside: (inside / "b.png").symlink_to("gone"))),
    Case("a folder that holds itself", folder(lambda inside: (inside / "sub").symlink_to("."))),
    Case(
        "a picture's name with a line feed",
        files(b_txt=b"red", **{"c\n_png": OTHER, "c\n_txt": b"red"}),
    ),
]
