"""A part of a set's shards as one text, so that a recipe can name it: `0-11,14/40@1a2b3c4d` is the
shards 0 to 11 and 14 of 40, in their order, and a checksum of their content.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import groupby

PATTERN = r"^\d+(-\d+)?(,\d+(-\d+)?)*/\d+@[0-9a-f]{8}$"


@dataclass(frozen=True)
class Part:
    """places: of the shards, rising; of: how many the set had; check: of the content."""

    places: tuple[int, ...]
    of: int
    check: str

    @property
    def told(self) -> str:
        return f"trained on {len(self.places):,} of {self.of:,} shards, those encoded when it began"

    def __str__(self) -> str:
        return f"{','.join(_ranges(self.places))}/{self.of}@{self.check}"


def parse_part(text: str) -> Part:
    """What `str` of a Part gave; ValueError for anything else."""
    fault = "want true, false or a part of a set, such as 0-11,14/40@1a2b3c4d"
    if not re.fullmatch(PATTERN, text):
        raise ValueError(fault)
    which, _, rest = text.partition("/")
    of, _, check = rest.partition("@")
    places = list[int]()
    for piece in which.split(","):
        first, _, last = piece.partition("-")
        places += range(int(first), min(int(last or first), int(of)) + 1)
    part = Part(tuple(places), int(of), check)
    rising = places == sorted(set(places))
    if not places or not rising or places[-1] >= part.of or str(part) != text:
        raise ValueError(fault)
    return part


def _ranges(places: Iterable[int]) -> Iterable[str]:
    for _, group in groupby(enumerate(places), lambda pair: pair[1] - pair[0]):
        run = [place for _, place in group]
        yield str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}"
