"""The argument parser of the commands: what is wrong with a command line is bad input like any
other, one line.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, NoReturn, TypeVar

from flowray.config.errors import InputError
from flowray.config.paths import argument

Value = TypeVar("Value", int, float)


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that raises InputError where argparse would print its usage and exit."""

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message}; see `python -m {self.prog} --help`")

    def add_argument(self, *names: Any, **options: Any) -> argparse.Action:
        """As argparse does; what may be none (`nargs="*"`) is not said to be missing."""
        action = super().add_argument(*names, **options)
        action.required = action.required and action.nargs != "*"
        return action

    def print_help(self, file: Any = None) -> None:
        """As argparse does, which says nothing where it cannot be written."""
        print(self.format_help(), end="", file=file)

    def parse_intermixed_args(  # type: ignore[override]  # of its overloads the commands use one
        self, args: Sequence[str] | None = None, namespace: Any = None
    ) -> Any:
        """As argparse does; a key that was typed like an option is told from an option that does
        not exist.
        """
        known, left = self.parse_known_intermixed_args(args, namespace)
        if left and any(action.dest == "overrides" for action in self._actions):
            key, _, value = left[0].lstrip("-").partition("=")
            if "." in key or "=" in left[0]:
                raise InputError(
                    f"command line: got {left[0]!r}, want no dashes before a key:"
                    f" {key}={value or 'VALUE'}"
                )
        if left:
            self.error(f"unrecognized arguments: {' '.join(left)}")
        return known


JSON = "print one JSON object on stdout"


def add_recipe(parser: argparse.ArgumentParser, example: str = "optim.lr=3e-4") -> None:
    """The arguments of a command on a recipe: which one, and keys over it."""
    parser.add_argument("recipe", help="a packaged recipe's name or the path of a YAML file")
    keys = f"dotted recipe keys, e.g. {example}"
    parser.add_argument("overrides", nargs="*", metavar="key=value", help=keys)


def add_run(parser: argparse.ArgumentParser) -> None:
    """The arguments of a command that paints with a run: which one, keys over its recipe, seed."""
    where = "a run directory or one of its checkpoints/step_* folders"
    parser.add_argument("run", type=argument, help=where)
    keys = "recipe keys, e.g. sample.guidance_scale=3"
    parser.add_argument("--set", action="append", default=[], metavar="key=value", help=keys)
    parser.add_argument("--seed", type=whole_number(0), default=0)
    parser.add_argument("--json", action="store_true", help=JSON)


def whole_number(low: int, high: int | None = None) -> Callable[[str], int]:
    """An argument's type: a whole number from `low` to `high`, without it of any size."""
    top = math.inf if high is None else high
    ends = f"of {low} or more" if high is None else f"from {low} to {high}"
    return _read(int, lambda value: low <= value <= top, f"a whole number {ends}")


def number(
    low: float = 0.0, high: float = math.inf, *, above: float = -math.inf
) -> Callable[[str], float]:
    """An argument's type: a finite number from `low` to `high` that lies above `above`."""
    begins = f"above {above:g}" if above >= low else f"from {low:g}"
    ends = f" to {high:g}" if high < math.inf else ""
    return _read(
        float,
        lambda value: low <= value <= high and above < value < math.inf,
        f"a number {begins}{ends}",
    )


def _read(
    kind: Callable[[str], Value], fits: Callable[[Value], bool], want: str
) -> Callable[[str], Value]:
    def parse(text: str) -> Value:
        with suppress(ValueError):
            if fits(value := kind(text)):
                return value
        raise argparse.ArgumentTypeError(f"got {text}, want {want}")

    return parse
