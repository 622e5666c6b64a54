"""What a row of the table of findings consists of."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from flowray.findings.checks import Check
from flowray.findings.finding import Severity
from flowray.findings.reading import Reading

Words = str | Callable[[Reading], str]


@dataclass(frozen=True)
class Rule:
    """One row of the table: when it holds, what it then says, and which other findings would follow
    from it.

    explains: ids of consequences, or an id with the condition under which it is one.
    last: said only where no warn or bad finding was.
    """

    id: str
    severity: Severity
    when: Check
    cause: Words
    fix: Words
    explains: tuple[str | tuple[str, Check], ...] = ()
    last: bool = False
