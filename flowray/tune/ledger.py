"""The sweep's ledger: trials.jsonl, one row a trial, and the probe rows that a trial left on disk.

Whether a trial has ended is the study's to say; the ledger adds how far it came, why it was
stopped, and what it costs to draw a verdict from.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from flowray.config.errors import InputError
from flowray.config.ranking import steps
from flowray.config.writing import write_whole
from flowray.store.rows import read_rows
from flowray.store.run import RunDirectory
from flowray.tune.records import Status, TrialRecord, repeat_dir

ProbeRow = dict[str, Any]  # `step`, `budget_steps`, `repeat`, metrics, `findings`


class Ledger:
    """All trials of a sweep, by number, mirrored in `<sweep_dir>/trials.jsonl`.

    seeds: how often the sweep trains each setting.
    """

    def __init__(self, path: Path, seeds: int = 1):
        self.path, self.seeds = path, seeds
        self.trials: dict[int, TrialRecord] = {
            row["trial"]: _record(row) for row in read_rows(path)
        }
        # the trials as they were last written: most of hundreds have ended and change no more
        self._lines: dict[int, str] = {}

    def save(self, *changed: int) -> None:
        """Rewrite the file in one step: a reader, or a session after a crash, sees the old rows or
        the new ones, never half of them.

        changed: the trials that differ from the last save, where the caller knows; without them all
        are taken to.
        """
        for number in [*(changed or self.trials), *(self.trials.keys() - self._lines.keys())]:
            self._lines[number] = json.dumps(vars(self.trials[number]), allow_nan=False) + "\n"
        text = "".join(self._lines[number] for number in sorted(self.trials))
        write_whole(self.path, text, durable=True)

    def by(self, *statuses: Status) -> list[TrialRecord]:
        return [self.trials[n] for n in sorted(self.trials) if self.trials[n].status in statuses]

    def waiting(self) -> list[int]:
        """The trials that wait at a rung."""
        return [trial.trial for trial in self.by("waiting") if trial.waits]

    def to_finish(self, number: int) -> TrialRecord:
        """A trial that can be trained to its last step.

        InputError where it has ended otherwise, or is none.
        """
        record = self.trials.get(number)
        if record is None or record.status in ("finished", "failed"):
            stopped = [str(trial.trial) for trial in self.by("stopped", "waiting")]
            what = f"its state is {record.status}" if record else "there is no such trial"
            raise InputError(
                f"--finish {number}: {what}; stopped trials: {', '.join(stopped) or 'none'}"
            )
        return record

    def saved(self) -> float:
        """Share of the full-budget steps that early stopping saved."""
        return steps(self.trials.values()).saved

    def complete(self, record: TrialRecord, row: Mapping[str, Any]) -> ProbeRow:
        """The row with the seed that it is from and that seed's budget, where it lacks them."""
        return {"repeat": 0, "budget_steps": record.budget_steps // self.seeds, **row}

    def rows(
        self, record: TrialRecord, *, after: float = -1, to: float = math.inf
    ) -> list[ProbeRow]:
        """The trial's probe rows on disk, of all its seeds: those at places after `after` and up to
        `to`.
        """
        found = [
            self.complete(record, {**row, "repeat": repeat})
            for repeat in range(self.seeds)
            for row in read_rows(self._run(record, repeat).probes)
        ]
        return [row for row in found if after < place_of(row) <= to]

    def as_reported(self, record: TrialRecord, rows: Sequence[ProbeRow]) -> list[ProbeRow]:
        """Rows from the disk as the trial reports them: the losses of a step stand in
        metrics.jsonl, what the doctor found in findings.jsonl, and NaN is kept as null.
        """
        beside: dict[tuple[int, int], ProbeRow] = {}
        for repeat in {row["repeat"] for row in rows}:
            run = self._run(record, repeat)
            for row in read_rows(run.metrics):
                losses = {key: value for key, value in row.items() if key.startswith("loss/")}
                beside[repeat, row["step"]] = losses
            for visit in read_rows(run.findings):
                found = {"findings": visit["findings"]}
                beside.setdefault((repeat, visit["step"]), {}).update(found)
        whole = [{**row, **beside.get((row["repeat"], row["step"]), {})} for row in rows]
        return [
            {key: math.nan if value is None else value for key, value in row.items()}
            for row in whole
        ]

    def _run(self, record: TrialRecord, repeat: int) -> RunDirectory:
        return RunDirectory(repeat_dir(self.path.parent / str(record.trial), repeat))


def place_of(row: Mapping[str, Any]) -> int:
    """The step of a complete row, counted over all seeds of its trial."""
    return int(row["repeat"]) * int(row["budget_steps"]) + int(row["step"])


def _record(row: Mapping[str, Any]) -> TrialRecord:
    """A row of trials.jsonl; older ones have a trial that waits at a rung as stopped."""
    record = TrialRecord(**row)
    if record.waits and record.status == "stopped":
        record.status = "waiting"
    return record
