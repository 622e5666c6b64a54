"""The captions of a shard as one column: mapped with its index, and read without parsing JSON."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate
from struct import Struct
from typing import BinaryIO, NamedTuple

import numpy as np

CaptionsOf = Callable[[bytes | None, bytes | None], list[str]]
"""The captions of a sample by the bytes of its .json and .txt; ValueError where it has none."""

PAIR = Struct("qq").unpack_from
"""Two int64 side by side in mapped bytes, several times faster than by numpy."""


class CaptionColumn(NamedTuple):
    """text: all captions in UTF-8 end to end, bytes; starts: where each begins in it and, at last,
    where the last one ends, (captions + 1,) int64; firsts: the first caption of each sample and, at
    last, how many there are, (samples + 1,) int64. A sample without captions has none here.
    """

    text: memoryview
    starts: memoryview
    firsts: memoryview

    def captions(self, row: int) -> list[str]:
        """All captions of a sample."""
        first, end = PAIR(self.firsts, 8 * row)
        return [self._caption(number) for number in range(first, end)]

    def _caption(self, number: int) -> str:
        start, end = PAIR(self.starts, 8 * number)
        return str(self.text[start:end], "utf-8")


def chosen(
    columns: Mapping[int, CaptionColumn | None],
    shards: Sequence[int],
    rows: Sequence[int],
    u: Sequence[float],
) -> list[str | None]:
    """Of each sample's captions number int(u * count), the sample a shard and a row in its column;
    None where it has none.
    """
    found = list[str | None]()
    # without calls of our own: every sample of every batch comes here
    for shard, row, x in zip(shards, rows, u, strict=True):
        first, end, column = 0, 0, columns[shard]
        if column:
            text, starts, firsts = column
            first, end = PAIR(firsts, 8 * row)
        if first == end:
            found.append(None)
            continue
        if end - first > 1:
            first += int(x * (end - first))
        start, stop = PAIR(starts, 8 * first)
        found.append(str(text[start:stop], "utf-8"))
    return found


def column_of(arrays: Mapping[str, np.ndarray]) -> CaptionColumn | None:
    """The column among the arrays of an index, as `caption_arrays` has made it; None: no column."""
    if "firsts" not in arrays:
        return None
    return CaptionColumn(*(arrays[name].data for name in ("texts", "starts", "firsts")))


def caption_arrays(
    tar: BinaryIO, samples: int, members: Mapping[str, np.ndarray], captions_of: CaptionsOf
) -> dict[str, np.ndarray]:
    """The column of a tar's captions, as arrays of its index; members: extension -> (samples, 2) as
    TarIndex has them.
    """

    def member(name: str, row: int) -> bytes | None:
        offset, size = members[name][row].tolist() if name in members else (-1, -1)
        if offset < 0:
            return None
        tar.seek(offset)
        return tar.read(size)

    texts, counts = list[bytes](), [0]
    for row in range(samples):
        try:
            found = captions_of(member("json", row), member("txt", row))
        except ValueError:  # whoever asks for them is told why
            found = []
        texts += (text.encode() for text in found)
        counts.append(len(found))
    starts = accumulate(map(len, texts), initial=0)
    return {
        "texts": np.frombuffer(b"".join(texts), dtype=np.uint8),
        "starts": np.fromiter(starts, dtype=np.int64, count=len(texts) + 1),
        "firsts": np.cumsum(counts, dtype=np.int64),
    }
