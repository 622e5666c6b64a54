"""Where a run's wall time went, over all its starts: from times.jsonl alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from flowray.config.progress import duration
from flowray.config.rounding import finite
from flowray.config.rows import Row

ENDED = ("finished", "stopped", "failed")  # the pause until the next start is the reader's own


@dataclass(frozen=True)
class Spent:
    """Seconds of wall time; their sum is `total`.

    kept: in steps that the weights still have; redone: in steps after the checkpoint that a start
    went on from; saving: waited for checkpoints; probes: with pictures and the doctor's visits;
    starting: until the first start's first step; restarts: from a start's last row to the next
    one's first step, where it was cut off, and a later start's own way there where it had ended.
    """

    starts: int
    kept: float = 0.0
    redone: float = 0.0
    saving: float = 0.0
    probes: float = 0.0
    starting: float = 0.0
    restarts: float = 0.0

    @property
    def total(self) -> float:
        return sum(seconds for _, seconds in self.causes)

    @property
    def goodput(self) -> float:
        """The share of the time that went into steps that were kept."""
        return self.kept / self.total if self.total else 0.0

    @property
    def causes(self) -> list[tuple[str, float]]:
        """Each cause in words, and its seconds."""
        return [
            ("steps that were kept", self.kept),
            ("steps done twice", self.redone),
            ("waiting for checkpoints", self.saving),
            ("probes and pictures", self.probes),
            ("the first start", self.starting),
            ("restarts", self.restarts),
        ]

    @property
    def words(self) -> str:
        """On one line."""
        times = "1 start" if self.starts == 1 else f"{self.starts} starts"
        lost = [
            f"{words} {duration(seconds)}" for words, seconds in self.causes[1:] if seconds >= 1
        ]
        tail = f"; {', '.join(lost)}" if lost else ""
        return f"{times}, {duration(self.total)}, goodput {100 * self.goodput:.1f} %{tail}"


def spent(rows: Sequence[Row]) -> Spent | None:
    """Of the rows of times.jsonl; None where no start has come to its first step."""
    starts: list[list[Row]] = []
    for row in rows:
        if not {"step", "start", "at", "steps_s"} <= row.keys():
            continue
        if row.get("what") == "ready":
            starts.append([])
        if starts:
            starts[-1].append(row)
    if not starts:
        return None
    sums = dict.fromkeys(("kept", "redone", "saving", "probes", "starting", "restarts"), 0.0)
    for index, own in enumerate(starts):
        first, last = own[0], own[-1]
        began = max(0.0, first["at"] - (finite(first.get("began")) or first["at"]))
        if index == 0:
            sums["starting"] += began
        else:
            before = starts[index - 1][-1]
            cut_off = before.get("ended") not in ENDED
            sums["restarts"] += max(0.0, first["at"] - before["at"]) if cut_off else began
        back_to = starts[index + 1][0]["step"] if index + 1 < len(starts) else last["step"]
        kept = max((row["steps_s"] for row in own if row["step"] <= back_to), default=0.0)
        sums["kept"] += kept
        sums["redone"] += last["steps_s"] - kept
        sums["saving"] += last["saving_s"]
        sums["probes"] += last["probes_s"]
    return Spent(len(starts), **sums)
