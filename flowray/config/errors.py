"""The one exception for bad input: one line that says where, what was got, what is allowed and
what to type.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence


class InputError(Exception):
    """The user's input is wrong; the command line prints the message as one line and exits with
    2.
    """

    def __init__(self, message: str):
        super().__init__(" ".join(message.split()))


class OtherKind(InputError):
    """A key belongs to other kinds of its section than the one that was chosen."""

    def __init__(self, message: str, section: str, kinds: Sequence[str]):
        super().__init__(message)
        self.section, self.kinds = section, tuple(kinds)


class RuleError(ValueError):
    """A rule over several keys of one section is broken.

    keys: those that it is about, dotted from that section on, the one to blame first. exclusive:
    at most one of them may be given.
    """

    def __init__(self, message: str, *keys: str, exclusive: bool = False):
        super().__init__(message)
        self.keys, self.exclusive = keys, exclusive


class Notice(UserWarning):
    """What the user should know while all goes on; a command prints it as one line."""


def last_line(text: str) -> str:
    """Of a traceback or a log its last line that says something, without the way there; '' of
    none.
    """
    return next((line.strip() for line in reversed(text.splitlines()) if line.strip()), "")


def did_you_mean(got: str, known: Iterable[str]) -> str:
    """', did you mean X?' for the nearest known name, or '' where nothing is near."""
    near = difflib.get_close_matches(got, list(known), n=1, cutoff=0.6)
    return f", did you mean {near[0]}?" if near else ""
