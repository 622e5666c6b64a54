"""The argument parser of the commands: what is wrong with a command line is bad input like any
other, one line.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from flowray.config.errors import InputError


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


def whole_number(low: int, high: int | None = None) -> Callable[[str], int]:
    """An argument's type: a whole number from `low` to `high`, without it of any size."""
    ends = f"of {low} or more" if high is None else f"from {low} to {high}"

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = low - 1
        if value < low or (high is not None and value > high):
            raise argparse.ArgumentTypeError(f"got {text}, want a whole number {ends}")
        return value

    return parse
