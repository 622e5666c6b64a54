"""Pictures of a large set painted by several processes, each its share, into one folder."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from flowray.config.errors import InputError
from flowray.config.progress import Advance, Progress
from flowray.sample.pipeline import open_pipeline
from flowray.sample.pngs import Told, file_name, kept_picture, painted, save_list
from flowray.store.found import Found

SAMPLING = "sampling"


@dataclass(frozen=True)
class Painting:
    """Pictures of one run to paint; it can be pickled, and called in any process.

    told, folder, how: as for `painted`. cores: for it to use.
    """

    found: Found
    told: tuple[Told, ...]
    folder: Path
    how: Mapping[str, Any]
    cores: int

    def __call__(self, progress: Progress) -> int:
        """Paint those that do not lie in the folder yet; returns how many pictures lie there."""
        torch.set_num_threads(self.cores)
        pipe = open_pipeline(self.found)
        with progress.task(SAMPLING, len(self.told)) as advance:
            for _ in painted(pipe, self.told, self.folder, **self.how):
                advance()
        return len(self.told)


class Painters(Protocol):
    """Where paintings are called, all at once; `flowray.rayrun.encoder.RayTasks` is one.

    count: how many there are at most. cores: of each.
    """

    @property
    def count(self) -> int: ...

    @property
    def cores(self) -> int: ...

    def __call__(self, works: Sequence[Painting], progress: Progress) -> Sequence[int]: ...


def shares(told: Sequence[Told], count: int, batch: int) -> list[tuple[Told, ...]]:
    """Pictures for at most `count` processes, in batches, dealt out in turn; none without any."""
    batches = [told[start : start + batch] for start in range(0, len(told), batch)]
    dealt = [batches[i::count] for i in range(min(count, len(batches)))]
    return [tuple(one for part in parts for one in part) for parts in dealt]


def save_each_apart(
    found: Found,
    told: Sequence[Told],
    folder: Path,
    painters: Painters,
    progress: Progress,
    **how: Any,
) -> np.ndarray:
    """`save_each` by painters: the same files, and to the last bit the same pictures uint8
    (B, H, W, 3) where all compute on one kind of machine.

    What lies in the folder already is not painted, so that an interrupted set goes on; a process
    that is lost leaves what it has painted to the one that takes over its share.
    """
    made: list[np.ndarray | None] = [None] * len(told)

    def look() -> int:
        """How many pictures lie there; those that were not there before are read."""
        for i, one in enumerate(told):
            if made[i] is None:
                made[i] = kept_picture(folder / file_name(one), one)
        return sum(picture is not None for picture in made)

    batch = found.recipe.sample.batch_size
    folder.mkdir(parents=True, exist_ok=True)
    with progress.task(SAMPLING, len(told), look()) as advance:
        todo = [one for one, picture in zip(told, made, strict=True) if picture is None]
        works = [
            Painting(found, share, folder, how, painters.cores)
            for share in shares(todo, painters.count, batch)
        ]
        try:
            if works:
                painters(works, _InOne(progress, advance))
        finally:
            if look():
                kept = zip(told, made, strict=True)
                save_list(folder, [one for one, picture in kept if picture is not None])
    whole = [picture for picture in made if picture is not None]
    if missing := len(told) - len(whole):
        raise InputError(
            f"{folder}: {missing} of {len(told)} pictures are not there; want a folder that all"
            " workers share"
        )
    return np.stack(whole)


class _InOne:
    """Progress of several processes whose sampling is one task, told of by `advance`; other tasks,
    such as starting Ray, are their own.
    """

    def __init__(self, progress: Progress, advance: Advance):
        self.say, self._progress, self._advance = progress.say, progress, advance

    @contextmanager
    def task(self, what: str, total: int | None = None, done: int = 0) -> Iterator[Advance]:
        if what == SAMPLING:
            yield self._advance
            return
        with self._progress.task(what, total, done) as own:
            yield own
