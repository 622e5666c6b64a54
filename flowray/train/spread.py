"""Work beside training that every rank has a share of, and that may fail on one of them without
another waiting for it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

from flowray.config.errors import last_line
from flowray.train.group import Group

Value = TypeVar("Value")


class RankFailed(RuntimeError):
    """Work that all ranks share failed on one of them; one line, with its rank."""


@dataclass(frozen=True)
class Attempt(Generic[Value]):
    """What came of a piece of work: a value, or the error in its place."""

    value: Value | None = None
    error: Exception | None = None

    def get(self) -> Value:
        """The value. Raises what was raised."""
        if self.error is not None:
            raise self.error
        assert self.value is not None
        return self.value


def attempted(work: Callable[[], Value]) -> Attempt[Value]:
    """`work` on this rank. An error loses its traceback, which would hold the work's tensors."""
    try:
        return Attempt(work())
    except Exception as error:
        return Attempt(error=error.with_traceback(None))


def attempted_by_all(group: Group, work: Callable[[], Value]) -> Attempt[Value]:
    """`work` on every rank, each with its own value; where one fails, all have failed. Every rank
    has to call it, and `work` must wait for no other rank: so what is raised in it leaves none
    waiting.
    """
    mine = attempted(work)
    if group.world == 1:
        return mine
    error = mine.error
    why = "" if error is None else f"{type(error).__name__}: {last_line(str(error))}"
    failed = [f"rank {rank}: {said}" for rank, said in enumerate(group.gathered(why)) if said]
    if not failed:
        return mine
    also = f" (and {len(failed) - 1} more)" if len(failed) > 1 else ""
    return Attempt(error=RankFailed(failed[0] + also))


def share_of(count: int, group: Group) -> slice:
    """This rank's rows of `count`; shares differ by one at most, and are empty where there are more
    ranks than rows.
    """
    return slice(count * group.rank // group.world, count * (group.rank + 1) // group.world)
