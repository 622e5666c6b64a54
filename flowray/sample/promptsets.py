"""Pictures of the prompts of GenEval (arXiv 2310.11513), of DPG-Bench (arXiv 2403.05135) and of
COCO's captions, in the folders that their scorers read.
"""

from __future__ import annotations

import io
import json
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from flowray.config.errors import InputError
from flowray.config.progress import SILENT, Progress
from flowray.config.writing import write_whole
from flowray.sample.generate import numbers_of
from flowray.sample.pipeline import Pipeline
from flowray.sample.pngs import Told, kept_picture, save_picture
from flowray.sample.prompts import check_prompts

LISTED = "captions.jsonl"


@dataclass(frozen=True)
class Wanted:
    """A prompt, and what its files are named by. row: what its set says of it, as JSON."""

    name: str
    prompt: str
    row: Mapping[str, Any]


class PromptSet(ABC):
    """A set of prompts: how its files are read, and how its pictures are laid out.

    option: of the command; each: pictures of a prompt.
    """

    option: str
    each: int

    @abstractmethod
    def read(self, path: Path) -> list[Wanted]:
        """The prompts in their order; InputError names the file, and the line where it is one's."""

    @abstractmethod
    def files(self, folder: Path, name: str) -> list[Path]:
        """The PNGs of a prompt."""

    def laid_out(self, pictures: np.ndarray) -> Sequence[np.ndarray]:
        """What each of these shows (H, W, 3), of the prompt's pictures (each, H, W, 3)."""
        return list(pictures)

    def write_beside(self, folder: Path, wanted: Wanted, pictures: np.ndarray) -> None:
        """What else a prompt has, before its PNGs; nothing unless a set says more."""
        return

    def finish(self, folder: Path, wanted: Sequence[Wanted]) -> None:
        """What is written last; nothing unless a set says more."""
        return


class GenEval(PromptSet):
    """A JSON object a line, with its prompt; 00000/metadata.jsonl is line 0, 00000/samples/ has its
    pictures and 00000/grid.png all of them.
    """

    option = "--geneval"
    each = 4

    def read(self, path: Path) -> list[Wanted]:
        found: list[Wanted] = []
        for number, line in enumerate(_text(path, self.option).split("\n"), 1):
            if line.strip():
                row = _json(line, f"{self.option}: {path}:{number}")
                said = _said(row, "prompt", f"{path}:{number}", self)
                found.append(Wanted(f"{len(found):05d}", said, row))
        return found

    def files(self, folder: Path, name: str) -> list[Path]:
        return [folder / name / "samples" / f"{i:05d}.png" for i in range(self.each)]

    def write_beside(self, folder: Path, wanted: Wanted, pictures: np.ndarray) -> None:
        write_whole(folder / wanted.name / "metadata.jsonl", json.dumps(wanted.row))
        png = io.BytesIO()
        Image.fromarray(squared(pictures)).save(png, format="png")
        write_whole(folder / wanted.name / "grid.png", png.getvalue())


class Dpg(PromptSet):
    """A folder of text files, a prompt each; the PNG of the same name has four pictures, two by
    two, of the side that the scorer is told by --resolution.
    """

    option = "--dpg"
    each = 4

    def read(self, path: Path) -> list[Wanted]:
        # hidden ones apart, as macOS's ._NAME.txt
        files = sorted(file for file in path.glob("*.txt") if file.name[0] != ".")
        if not files:
            raise InputError(f"{self.option}: {path}: want a folder with a .txt for each prompt")
        texts = [(file, _text(file, self.option).strip()) for file in files]
        if empty := [file for file, text in texts if not text]:
            raise InputError(f"{self.option}: {empty[0]}: is empty, want a prompt")
        return [Wanted(file.stem, text, {}) for file, text in texts]

    def files(self, folder: Path, name: str) -> list[Path]:
        return [folder / f"{name}.png"]

    def laid_out(self, pictures: np.ndarray) -> Sequence[np.ndarray]:
        return [squared(pictures)]


class Coco(PromptSet):
    """COCO's captions JSON: of each image the caption with the least id, and a PNG named as the
    image's own file, or by its id of twelve digits; LISTED says which caption that is.
    """

    option = "--coco"
    each = 1

    def read(self, path: Path) -> list[Wanted]:
        told = _json(_text(path, self.option), f"{self.option}: {path}")
        try:
            images = {row["id"]: row.get("file_name") for row in told.get("images", ())}
            rows = sorted(told["annotations"], key=lambda row: (row["image_id"], row["id"]))
            first: dict[int, Mapping[str, Any]] = {}
            for row in rows:
                first.setdefault(int(row["image_id"]), row)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            want = "want annotations with image_id, id and caption"
            raise InputError(f"{self.option}: {path}: {want}, as in COCO's captions") from error
        if odd := [key for key, file in images.items() if not isinstance(file, str) or not file]:
            raise InputError(f"{self.option}: {path}: image {odd[0]}: want a 'file_name'")
        return [
            Wanted(
                Path(images.get(number, f"{number:012d}")).stem,
                _said(row, "caption", f"{path}, image {number}", self),
                {"image_id": number},
            )
            for number, row in first.items()
        ]

    def files(self, folder: Path, name: str) -> list[Path]:
        return [folder / f"{name}.png"]

    def finish(self, folder: Path, wanted: Sequence[Wanted]) -> None:
        lines = [{"file": f"{one.name}.png", **one.row, "caption": one.prompt} for one in wanted]
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        write_whole(folder / LISTED, text)


def squared(pictures: np.ndarray) -> np.ndarray:
    """Pictures (n^2, H, W, 3) as one of n rows, without gaps."""
    side = round(len(pictures) ** 0.5)
    rows = pictures.reshape(side, side, *pictures.shape[1:])
    return np.concatenate([np.concatenate(list(row), axis=1) for row in rows])


def read_set(prompts: PromptSet, path: Path, limit: int | None = None) -> list[Wanted]:
    """The first `limit` prompts of a set; InputError where one cannot be painted."""
    wanted = prompts.read(path)[:limit]
    if not wanted:
        raise InputError(f"{prompts.option}: {path}: no prompts in it")
    for name, count in Counter(one.name for one in wanted).items():
        if count > 1:
            raise InputError(f"{prompts.option}: {path}: {count} pictures are named {name!r}")
    check_prompts([one.prompt for one in wanted])
    return wanted


def paint_set(
    prompts: PromptSet,
    wanted: Sequence[Wanted],
    pipe: Pipeline,
    folder: Path,
    how: Told,
    seed: int,
    progress: Progress = SILENT,
) -> int:
    """Write the pictures of a set into a folder, and return how many prompts were there already,
    drawn in the same way, and were kept.

    how: what with prompt, number and seed decides a picture, such as the weights; each PNG has it
    as text.
    """
    numbers = numbers_of([one.prompt for one in wanted for _ in range(prompts.each)])
    told = [
        {"prompt": one.prompt, "number": str(numbers[i * prompts.each]), "seed": str(seed), **how}
        for i, one in enumerate(wanted)
    ]
    todo = [
        i
        for i, one in enumerate(wanted)
        if any(kept_picture(path, told[i]) is None for path in prompts.files(folder, one.name))
    ]
    with progress.task("sampling", len(wanted) * prompts.each) as advance:
        advance((len(wanted) - len(todo)) * prompts.each)
        at_once = max(1, pipe.recipe.sample.batch_size // prompts.each)
        for start in range(0, len(todo), at_once):
            part = todo[start : start + at_once]
            texts = [wanted[i].prompt for i in part for _ in range(prompts.each)]
            places = [i * prompts.each + k for i in part for k in range(prompts.each)]
            batches = pipe.pictures(texts, seed=seed, numbers=[numbers[place] for place in places])
            drawn = np.concatenate(list(batches))
            for i, pictures in zip(part, np.split(drawn, len(part)), strict=True):
                _write(prompts, wanted[i], pictures, folder, told[i])
                advance(prompts.each)
    prompts.finish(folder, wanted)
    return len(wanted) - len(todo)


def _write(
    prompts: PromptSet, wanted: Wanted, pictures: np.ndarray, folder: Path, told: Told
) -> None:
    files = prompts.files(folder, wanted.name)
    files[0].parent.mkdir(parents=True, exist_ok=True)
    prompts.write_beside(folder, wanted, pictures)
    for path, picture in zip(files, prompts.laid_out(pictures), strict=True):
        save_picture(path, picture, told)


def _text(path: Path, option: str) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise InputError(f"{option}: {path}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{option}: {path}: is no UTF-8 text") from error


def _json(text: str, where: str) -> dict[str, Any]:
    try:
        row = json.loads(text)
    except ValueError as error:
        raise InputError(f"{where}: is no JSON: {error}") from error
    if not isinstance(row, dict):
        raise InputError(f"{where}: want a JSON object")
    return row


def _said(row: Mapping[str, Any], key: str, where: str, prompts: PromptSet) -> str:
    said = row.get(key)
    if not isinstance(said, str) or not said.strip():
        raise InputError(f"{prompts.option}: {where}: want a {key!r}, a text")
    return said.strip()
