"""What a sweep shows while it runs: a line per event, a sign of life in between, on a terminal also a live table."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TextIO

from rich.console import Console
from rich.live import Live
from rich.table import Table

from flowray.config.sweep import Sweep
from flowray.tune.records import TrialRecord

BEAT_S = 10.0  # a quiet sweep says at least this often where it is
GENERIC = {"kind", "weight", "low", "high"}  # last parts of a key that say nothing alone


class SweepConsole:
    """Prints to `stream`; use it as a context manager around the sweep. No Ray: between probes it reads each run's metrics.jsonl."""

    def __init__(self, sweep: Sweep, sweep_dir: Path, total: int, stream: TextIO):
        self._sweep, self._dir, self._total = sweep, sweep_dir, total
        self._names = short_names(list(sweep.parameters))
        cosine = "ema/flow/cos" if sweep.metric.name.startswith("ema/") else "flow/cos"
        self._shown = list(dict.fromkeys([sweep.metric.name, *(r.metric for r in sweep.stop if r.metric), cosine, "loss/flow"]))[:5]
        self._trials: dict[int, TrialRecord] = {}
        self._begin = self._last = time.monotonic()
        self._console = Console(file=stream, highlight=False, soft_wrap=True)
        self._live = Live(get_renderable=self._table, console=self._console, refresh_per_second=1, transient=True)

    def __enter__(self) -> SweepConsole:
        if self._console.is_terminal:
            self._live.start()
        return self

    def __exit__(self, *exc: object) -> None:
        if self._console.is_terminal:
            self._live.stop()

    def started(self, trial: TrialRecord) -> None:
        how = f"resumed at step {trial.last_step}" if trial.last_step else "started"
        self._say(trial, f"{how:<10} {self._params(trial)}")

    def probed(self, trial: TrialRecord) -> None:
        self._say(trial, f"{trial.last_step}/{trial.budget_steps}".ljust(10) + f" {self._metrics(trial)}")

    def ended(self, trial: TrialRecord) -> None:
        words = trial.stopped_by or trial.error or self._metrics(trial)
        self._say(trial, f"{trial.status.upper():<10} {words}  ({trial.last_step} of {trial.budget_steps} steps, {trial.seconds:.0f} s)")

    def beat(self) -> None:
        """Called often; prints a line when nothing was printed for a while."""
        if not self._console.is_terminal and time.monotonic() - self._last >= BEAT_S:
            running = [f"{t.trial} at {self._progress(t)}" for t in self._trials.values() if t.status == "running"]
            done = sum(t.status != "running" for t in self._trials.values())
            self._print(f"{done} of {self._total} done; running: {', '.join(running) or 'none yet'}")

    def _say(self, trial: TrialRecord, words: str) -> None:
        self._trials[trial.trial] = trial
        self._print(f"trial {trial.trial:<3} {words}")

    def _print(self, words: str) -> None:
        self._last = time.monotonic()
        self._console.print(f"{self._last - self._begin:5.0f} s  {words}", markup=False)

    def _params(self, trial: TrialRecord) -> str:
        return "  ".join(f"{self._names.get(key, key)}={_brief(value)}" for key, value in trial.params.items())

    def _metrics(self, trial: TrialRecord) -> str:
        known = [(name, trial.metrics[name]) for name in self._shown if name in trial.metrics]
        return "  ".join(f"{name} {_brief(value)}" for name, value in known)

    def _progress(self, trial: TrialRecord) -> str:
        row = last_row(self._dir / str(trial.trial) / "metrics.jsonl")
        if row is None:
            return "start-up"
        loss = f" (loss/flow {_brief(row['loss/flow'])})" if "loss/flow" in row else ""
        return f"{row.get('step', 0)}/{trial.budget_steps}{loss}"

    def _table(self) -> Table:
        table = Table(title=f"{self._sweep.name}: {sum(t.status != 'running' for t in self._trials.values())} of {self._total} trials done")
        for column in ["trial", "state", "step", *self._shown, "parameters"]:
            table.add_column(column)
        for trial in sorted(self._trials.values(), key=lambda t: (t.status != "running", t.trial)):
            step = self._progress(trial) if trial.status == "running" else f"{trial.last_step}/{trial.budget_steps}"
            values = [_brief(trial.metrics[name]) if name in trial.metrics else "" for name in self._shown]
            table.add_row(str(trial.trial), trial.status, step, *values, self._params(trial))
        return table


def short_names(keys: Sequence[str]) -> dict[str, str]:
    """Each dotted key's shortest tail that is not generic and that no other key ends with."""
    names = {}
    for key in keys:
        parts = key.split(".")
        tails = [".".join(parts[-n:]) for n in range(1, len(parts) + 1)]
        clear = [t for t in tails if t not in GENERIC and not any(k != key and f".{k}".endswith(f".{t}") for k in keys)]
        names[key] = clear[0] if clear else key
    return names


def last_row(path: Path) -> dict[str, Any] | None:
    """The last whole row of a JSON-lines file, or None; reads only its end."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - 16_384))
            lines = file.read().split(b"\n")[:-1]
        row: dict[str, Any] = json.loads(lines[-1])
    except (OSError, IndexError, json.JSONDecodeError):
        return None
    return row


def _brief(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)
