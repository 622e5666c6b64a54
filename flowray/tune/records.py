"""One trial of a sweep: how far it came, its metrics, and why it ended."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, Literal

from flowray.config.rounding import finite
from flowray.config.rows import parse_rows

Status = Literal["running", "waiting", "finished", "stopped", "failed"]
StopKind = Literal["rule", "not_finite", "comparison"]
LAST_BYTES = 2**16  # of a file of rows, for its last one


@dataclass
class TrialRecord:
    """One trial. `stopped_by` says in words why it was stopped, `error` why it failed; `seconds` is
    wall time over all sessions.

    stop_kind, stop_rule: as in policy.Stop; None also in rows of older sweeps.

    Steps are counted over all seeds. repeats: the last probe's metrics of each seed, where a trial
    has several; `metrics` is then the mean over the seeds that are through (the first alone until
    then), `noise` the standard deviation over them.

    The status is `waiting` while a trial is paused until the next session, and while a rung holds
    it (`waits`) until it is among the best there.
    """

    trial: int
    params: dict[str, Any]
    status: Status = "running"
    last_step: int = 0
    budget_steps: int = 0
    stopped_by: str | None = None
    metrics: dict[str, float | None] = field(default_factory=dict)
    seconds: float = 0.0
    error: str | None = None
    repeats: list[dict[str, float | None]] = field(default_factory=list)
    noise: dict[str, float] = field(default_factory=dict)
    waits: bool = False
    stop_kind: StopKind | None = None
    stop_rule: int | None = None

    @property
    def number(self) -> int:
        return self.trial

    def value(self, key: str) -> float | None:
        """The metric's last value; None where missing or not finite."""
        return finite(self.metrics.get(key))

    def stop(self, why: str, kind: StopKind, rule: int | None = None, *, waits: bool) -> None:
        """Note why it stops, or waits at its rung; the status changes once it has ended."""
        self.stopped_by, self.waits, self.stop_kind, self.stop_rule = why, waits, kind, rule

    def resume(self) -> None:
        """It is stopped no more."""
        self.stopped_by, self.waits, self.stop_kind, self.stop_rule = None, False, None, None

    def update(self, row: Mapping[str, Any], seeds: int = 1) -> None:
        """Take over the step and the metrics of a newer probe row; `repeat` in it says which of
        the `seeds` it is from.
        """
        repeat, step = int(row.get("repeat", 0)), int(row["step"])
        budget = int(row.get("budget_steps", self.budget_steps // seeds))
        place = repeat * budget + step
        if place < self.last_step:
            return
        self.last_step, self.budget_steps = place, budget * seeds
        if seeds == 1:
            self.metrics = metrics_of(row)
            return
        self.repeats[repeat:] = [metrics_of(row)]
        through = self.repeats[: max(1, repeat + (step >= budget))]
        columns = {name: [metrics.get(name) for metrics in through] for name in through[0]}
        whole = {name: [x for x in held if x is not None] for name, held in columns.items()}
        # a mean over fewer seeds would not compare
        whole = {name: held for name, held in whole.items() if len(held) == len(through)}
        self.metrics = {name: fmean(whole[name]) if name in whole else None for name in columns}
        self.noise = {name: stdev(held) for name, held in whole.items()} if len(through) > 1 else {}


def metrics_of(row: Mapping[str, Any]) -> dict[str, float | None]:
    """The `group/name` numbers of a row; what is not finite becomes None, as JSON has no word
    for it.
    """
    numbers = {
        k: v
        for k, v in row.items()
        if "/" in k and isinstance(v, int | float) and not isinstance(v, bool)
    }
    return {k: float(v) if math.isfinite(v) else None for k, v in numbers.items()}


def repeat_dir(run_dir: Path, repeat: int) -> Path:
    """Where a trial trains with its seed number `repeat`: the first in the trial's run directory,
    the others below it.
    """
    return run_dir / "seeds" / str(repeat) if repeat else run_dir


def repeat_of(run_dir: Path) -> int:
    """The inverse of `repeat_dir`."""
    return int(run_dir.name) if run_dir.parent.name == "seeds" else 0


def last_row(path: Path) -> dict[str, Any] | None:
    """The last whole row of a file of JSON lines, None where there is none; reads only its end."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - LAST_BYTES))
            rows, _ = parse_rows(file.read().decode(errors="replace"))
    except OSError:
        return None
    return rows[-1] if rows else None
