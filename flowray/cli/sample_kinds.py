"""What `flowray.sample` draws in place of plain pictures, each kind by an option of its own."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from PIL import Image

from flowray.config.errors import InputError
from flowray.config.paths import is_file
from flowray.config.progress import Advance
from flowray.data.decode import decode_rgb
from flowray.sample.prompts import check_balanced

if TYPE_CHECKING:
    from flowray.sample.pipeline import Pipeline

MAX_COUNT = 1024  # pictures of a prompt or row
MAX_SHEET = 16 * MAX_COUNT  # of all rows, in memory at once: 200 MB of 64 px pictures
# option of a kind -> options that go with it; "" is plain pictures
_WITH = {
    "": ("each", "workers", "compile", "negative", "aspect", "count"),
    "between": ("mix", "animate", "aspect", "count"),
    "strip": ("animate", "compile", "negative", "aspect", "count"),
    "plus": ("minus", "aspect", "count"),
    "reverse": (),
}


class Kind(Protocol):
    """rows, columns: of the sheet. told: what JSON says of it; lines: what people are told of it,
    once it is drawn.
    """

    rows: int
    columns: int
    told: dict[str, Any]
    lines: list[str]

    def draw(self, pipe: Pipeline, advance: Advance) -> np.ndarray:
        """Pictures uint8 (rows, columns, H, W, 3)."""

    def frame(self) -> tuple[int, int]:
        """Rows and columns of the pictures that an animation shows at once."""


@dataclass
class _Sheet:
    args: argparse.Namespace
    prompts: list[str]
    told: dict[str, Any] = field(default_factory=dict)
    lines: list[str] = field(default_factory=list)

    @property
    def rows(self) -> int:
        return len(self.prompts) * int(self.args.count)

    @property
    def how(self) -> dict[str, Any]:
        return {"seed": self.args.seed, "aspect": self.args.aspect}

    @property
    def drawn(self) -> tuple[list[str], list[int]]:
        """The prompt and the number of each row."""
        prompts, numbers = zip(*numbered(self.prompts, self.args.count), strict=True)
        return list(prompts), list(numbers)

    def frame(self) -> tuple[int, int]:
        return len(self.prompts), int(self.args.count)


class Between(_Sheet):
    """From each prompt to the next, a row a noise."""

    @property
    def rows(self) -> int:
        return int(self.args.count)

    @property
    def columns(self) -> int:
        """InputError for too few prompts, and for too long a row."""
        captions, pictures = len(self.prompts), int(self.args.between)
        if captions < 2:
            raise InputError(f"--between {pictures}: got 1 caption, want two or more to go between")
        if (columns := (captions - 1) * (pictures - 1) + 1) > MAX_COUNT:
            row = f"{captions} captions make a row of {columns:,} pictures"
            raise InputError(f"--between {pictures}: {row}, want at most {MAX_COUNT:,}")
        return columns

    def draw(self, pipe: Pipeline, advance: Advance) -> np.ndarray:
        more = self.how | {"mix": self.args.mix, "rows": self.rows, "advance": advance}
        return pipe.between(self.prompts, self.args.between, **more)

    def frame(self) -> tuple[int, int]:
        return 1, self.rows


class Strip(_Sheet):
    """The way of each picture from the source."""

    @property
    def columns(self) -> int:
        return int(self.args.strip)

    def draw(self, pipe: Pipeline, advance: Advance) -> np.ndarray:
        prompts, numbers = self.drawn
        more = self.how | {"numbers": numbers, "negative": self.args.negative}
        more |= {"compile": self.args.compile}
        strip = pipe.strip(prompts, self.columns, **more)
        advance(self.rows * self.columns)
        return strip


class Arithmetic(_Sheet):
    """A prompt, what is added and taken away, and what that comes to."""

    @property
    def columns(self) -> int:
        """InputError unless as much is added as is taken away."""
        check_balanced(self.args.plus, self.args.minus)
        return 2 + len(self.args.plus) + len(self.args.minus)

    def draw(self, pipe: Pipeline, advance: Advance) -> np.ndarray:
        prompts, numbers = self.drawn
        more = self.how | {"numbers": numbers, "advance": advance}
        return pipe.arithmetic(prompts, self.args.plus, self.args.minus, **more)


class Reverse(_Sheet):
    """A picture, what the autoencoder makes of it, where its path begins, and the picture again."""

    @property
    def columns(self) -> int:
        """InputError for another number of pictures than prompts."""
        return 4 if self.files else 0

    @property
    def files(self) -> list[Path]:
        """A picture a prompt."""
        files, count = self.args.reverse, len(self.prompts)
        if len(files) not in (1, count):
            raise InputError(
                f"{len(files)} --reverse pictures, but {count} prompts; want a caption for each"
                " picture, or one picture"
            )
        if missing := [file for file in files if not is_file(file)]:
            raise InputError(f"--reverse {missing[0]}: no such file")
        return list(files) * (count // len(files))

    def draw(self, pipe: Pipeline, advance: Advance) -> np.ndarray:
        files = self.files
        given = [_picture(file, pipe.recipe.data.prepare.background) for file in files]
        latents = pipe.encode(given)
        made = pipe.reverse(latents, self.prompts)
        errors = made.error.tolist()
        self.told["round_trip_error"] = errors
        for file, error in zip(files, errors, strict=True):
            self.lines.append(f"round-trip error {error:.2g}  {file}")
        if max(errors) > 0.05:
            keys = "--set sample.steps=100 --set sample.guidance_scale=1"
            self.lines.append(f"finer steps and no guidance come back closer: {keys}")
        shown = [pipe.prepared(given)]
        for each in (latents, made.z0, made.again):
            shown.append([np.asarray(image) for image in pipe.decode(each)])
            advance(len(each))
        advance(len(given))
        return np.stack([np.stack(column) for column in shown], axis=1)


def _picture(file: Path, background: tuple[int, int, int]) -> Image.Image:
    try:
        return Image.fromarray(decode_rgb(file.read_bytes(), background))
    except OSError as error:
        raise InputError(f"--reverse {file}: cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise InputError(f"--reverse {file}: {error}") from error


_KINDS: dict[str, type[_Sheet]] = {
    "between": Between,
    "strip": Strip,
    "plus": Arithmetic,
    "reverse": Reverse,
}


def kind_of(args: argparse.Namespace, prompts: list[str]) -> Kind | None:
    """What is asked for, None for plain pictures. InputError for what does not go together, and for
    a sheet of too many pictures.
    """
    given = {key for key in ("between", "strip", "plus", "reverse") if getattr(args, key)}
    given |= {"plus"} if args.minus else set()
    if len(given) > 1:
        several = " and ".join(f"--{key}" for key in _KINDS if key in given)
        raise InputError(f"{several}: a sheet shows one of them; type a command for each")
    name = "".join(given)
    for option in sorted({option for options in _WITH.values() for option in options}):
        if option not in _WITH[name] and _is_given(args, option):
            goes = [
                f"--{kind}" if kind else "plain pictures" for kind in _WITH if option in _WITH[kind]
            ]
            what = f"--{name}" if name else "plain pictures"
            raise InputError(f"--{option}: does not go with {what}; it goes with {', '.join(goes)}")
    if not name:
        _check_size(len(prompts), args.count, args.count)
        return None
    kind: Any = _KINDS[name](args, prompts)
    _check_size(kind.rows, kind.columns, args.count)
    found: Kind = kind
    return found


def _is_given(args: argparse.Namespace, option: str) -> bool:
    value = getattr(args, option)
    return value > 1 if option == "count" else value not in (None, False, [])


def _check_size(rows: int, columns: int, count: int) -> None:
    if rows * columns > MAX_SHEET:
        sheet = f"{rows:,} rows of {columns:,} make a sheet of {rows * columns:,} pictures"
        raise InputError(f"--count {count}: {sheet}, want at most {MAX_SHEET:,}")


def numbered(prompts: Sequence[str], count: int) -> list[tuple[str, int]]:
    """`count` pictures of every prompt, each with its number; a prompt that is given again goes on
    counting.
    """
    from flowray.sample.generate import numbers_of

    each = [prompt for prompt in prompts for _ in range(count)]
    return list(zip(each, numbers_of(each), strict=True))
