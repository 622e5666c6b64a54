"""One PNG a picture, each with how it was drawn, and a JSON lines file of them all."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from flowray.config.progress import Advance
from flowray.config.writing import write_whole
from flowray.sample.pipeline import Pipeline
from flowray.sample.prompts import words_of

LISTED = "pictures.jsonl"
Told = Mapping[str, str]  # what a PNG says of itself


def key_of(prompt: str, number: int) -> str:
    """What with the seed decides a picture, short: the caption's sha256 and its number."""
    return f"{hashlib.sha256(prompt.encode()).hexdigest()[:12]}_{number}"


def file_name(told: Told) -> str:
    """Of a picture, the same wherever its prompt stands."""
    return f"{words_of(told['prompt'])[:40]}_{told['key']}_seed{told['seed']}.png"


def save_picture(path: Path, picture: np.ndarray, told: Told) -> None:
    """uint8 (H, W, 3) as a PNG with its text, written whole."""
    png, info = io.BytesIO(), PngInfo()
    for key, value in told.items():
        info.add_text(key, value)
    Image.fromarray(picture).save(png, format="png", pnginfo=info)
    write_whole(path, png.getvalue())


def kept_picture(path: Path, told: Told) -> np.ndarray | None:
    """The picture (H, W, 3) that lies there whole and says the same of itself; None of another."""
    try:
        with Image.open(path) as image:
            image.load()
            return np.asarray(image) if dict(image.info) == dict(told) else None
    except (OSError, SyntaxError, ValueError):  # not there, cut off, or no PNG
        return None


def save_list(folder: Path, rows: Sequence[Told]) -> None:
    """A line a picture in LISTED: file, prompt, seed, ...; the lines of other files in the folder
    stay, but for those that are damaged.
    """
    new, kept = {file_name(told): told for told in rows}, []
    if (listed := folder / LISTED).is_file():
        # not splitlines, which cuts at letters that a caption may have, such as U+2028
        for line in listed.read_text(encoding="utf-8", errors="replace").split("\n"):
            with suppress(ValueError, KeyError, TypeError):
                row = json.loads(line)
                kept += [row] if row["file"] not in new else []
    lines = [*kept, *({"file": name, **told} for name, told in new.items())]
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    write_whole(listed, text)


def painted(
    pipe: Pipeline, told: Sequence[Told], folder: Path, **how: Any
) -> Iterator[tuple[int, np.ndarray]]:
    """Place in `told` and picture (H, W, 3) of each, as soon as it lies in the folder: first those
    that lie there already.

    told: has prompt, number and key of each. how: as for `Pipeline`, without numbers.
    """
    files = [folder / file_name(one) for one in told]
    todo = []
    for i, (file, one) in enumerate(zip(files, told, strict=True)):
        if (kept := kept_picture(file, one)) is None:
            todo.append(i)
        else:
            yield i, kept
    prompts, numbers = [told[i]["prompt"] for i in todo], [int(told[i]["number"]) for i in todo]
    places = iter(todo)
    for part in pipe.pictures(prompts, numbers=numbers, **how) if todo else ():
        folder.mkdir(parents=True, exist_ok=True)
        for picture in part:
            i = next(places)
            save_picture(files[i], picture, told[i])
            yield i, picture


def save_each(
    pipe: Pipeline, told: Sequence[Told], folder: Path, advance: Advance, **how: Any
) -> np.ndarray:
    """Pictures uint8 (B, H, W, 3) of `told`, each in a file as `painted` has it, and LISTED.

    advance: hears of every picture.
    """
    made: dict[int, np.ndarray] = {}
    try:
        for i, picture in painted(pipe, told, folder, **how):
            made[i] = picture
            advance()
    finally:
        if made:
            save_list(folder, [told[i] for i in sorted(made)])
    return np.stack([made[i] for i in range(len(told))])
