"""What a sweep shows while it runs: a line per event, a sign of life in between, on a terminal
also a live table; at the end the best trials. A trial is running, waiting (at a rung, or for the
next session), stopped, finished or failed.
"""

from __future__ import annotations

import textwrap
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TextIO

from rich import box
from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from flowray.config.progress import duration
from flowray.config.ranking import steps
from flowray.report.lines import columns, wrapped
from flowray.store.doing import doing
from flowray.store.run import RunDirectory
from flowray.sweepconfig.distributions import Constant
from flowray.sweepconfig.sweep import Sweep
from flowray.tune.observers import Observer
from flowray.tune.records import TrialRecord, last_row, repeat_dir
from flowray.views.standing import Standing

# a quiet sweep says where it is after HEARTBEAT_S, then after twice as long, at last every QUIET_S
HEARTBEAT_S, QUIET_S = 2.5, 300.0
GENERIC = {"kind", "weight", "low", "high"}  # last parts of a key that say nothing alone
METRICS = 4
ROWS = 16  # of the live table; the report has them all
END_ROWS = 10  # of the last table
REASON = 28  # columns of a reason beside the trial
NARROW_REASONS = 6  # of trials that ended, below the table of a narrow terminal
STATES = {
    "running": "cyan",
    "waiting": "blue",
    "finished": "green",
    "stopped": "yellow",
    "failed": "red",
}
INDENT = " " * 9  # of an event's second line: below its words


class SweepConsole(Observer):
    """Prints to `stream`; use it as a context manager around the sweep. No Ray: between probes
    it reads each run's metrics.jsonl.
    """

    def __init__(self, sweep: Sweep, sweep_dir: Path, total: int, stream: TextIO):
        self._sweep, self._dir, self._total = sweep, sweep_dir, total
        self._standing = Standing(sweep)
        self._names = short_names(
            [
                key
                for key, parameter in sweep.parameters.items()
                if not isinstance(parameter, Constant)
            ]
        )
        prefix = "ema/" if sweep.metric.name.startswith("ema/") else ""
        shown = [metric.name for metric in sweep.objectives] + list(sweep.rule_metrics)
        shown += [f"{prefix}flow/cos", f"{prefix}std/mean", "loss/flow"]
        self._shown = list(dict.fromkeys(shown))[:METRICS]
        self._trials: dict[int, TrialRecord] = {}
        self._paused: set[int] = set()  # trials to be continued, in this session or by a later one
        self._before = 0  # trials that were through when this session began
        self._begin = self._last = time.monotonic()
        self._pause = HEARTBEAT_S
        self._console = Console(file=stream, highlight=False, soft_wrap=True)
        if not self._console.is_terminal:
            self._console.width = columns()
        self._live = Live(
            get_renderable=self._view, console=self._console, refresh_per_second=1, transient=True
        )

    def __enter__(self) -> SweepConsole:
        if self._console.is_terminal:
            self._live.start()
        return self

    def __exit__(self, *exc: object) -> None:
        if self._console.is_terminal:
            self._live.stop()
        if self._trials:
            self._console.print(
                self.table(END_ROWS, why=False), *self._more(END_ROWS), soft_wrap=False
            )

    def known(self, trial: TrialRecord) -> None:
        self._trials[trial.trial] = trial
        self._paused.add(trial.trial)
        self._before = self._through()

    def started(self, trial: TrialRecord) -> None:
        self._paused.discard(trial.trial)
        how = f"resumed at step {trial.last_step}" if trial.last_step else "started"
        params = "  ".join(
            f"{self._names[key]}={_brief(value)}"
            for key, value in trial.params.items()
            if key in self._names
        )
        self._say(trial, f"{how:<10} {params}")

    def probed(self, trial: TrialRecord) -> None:
        self._say(
            trial, f"{trial.last_step}/{trial.budget_steps}".ljust(10) + f" {self._metrics(trial)}"
        )

    def ended(self, trial: TrialRecord) -> None:
        self._paused.add(trial.trial)
        words = _why(trial) or self._metrics(trial)
        place = f"({trial.last_step} of {trial.budget_steps} steps, {trial.seconds:.0f} s)"
        self._say(trial, f"{self._state(trial).upper():<10} {words}  {place}")

    def heartbeat(self) -> None:
        """Called often; prints a line when nothing was printed for a while, ever longer while
        nothing happens.
        """
        if not self._console.is_terminal and time.monotonic() - self._last >= self._pause:
            self._pause = min(2 * self._pause, QUIET_S)
            running = [
                f"{t.trial} at {self._progress(t)}"
                for t in self._trials.values()
                if self._state(t) == "running"
            ]
            waiting = sum(self._state(t) == "waiting" for t in self._trials.values())
            beside = f"; {waiting} waiting" if waiting else ""
            self._print(
                f"{self._done()} of {self._total} done{beside}; running:"
                f" {', '.join(running) or 'none yet'}"
            )

    def remark(self, words: str) -> None:
        """A line of its own, such as what the sweep waits for."""
        self._print(words)

    def table(self, rows: int, *, why: bool = True) -> Group:
        """At most `rows` trials, a line each: those that run, then best first, with changed
        parameters, metrics and why they ended.

        Where the terminal is narrow the reasons go below the table, then the last parameters are
        left out; a trial's event has them all.
        """
        trials = self._ranked()[:rows]
        changed = [key for key in self._names if any(key in trial.params for trial in trials)]
        plain = self._grid(trials, changed, why=0)
        room = self._console.width - self._wide(plain) - 2
        if why and room >= REASON:
            return Group(self._grid(trials, changed, why=room))
        while changed and self._wide(plain) > self._console.width:
            changed.pop()
            plain = self._grid(trials, changed, why=0)
        ended = [trial for trial in trials if _why(trial)][:NARROW_REASONS] if why else []
        below = [f"trial {trial.trial} {self._state(trial)}: {_why(trial)}" for trial in ended]
        return Group(plain, *(Text(_cut(line, self._console.width)) for line in below))

    def _wide(self, table: Table) -> int:
        """Columns that the table takes uncut."""
        return self._console.measure(
            table, options=self._console.options.update(width=10_000)
        ).maximum

    def _grid(self, trials: Sequence[TrialRecord], changed: Sequence[str], *, why: int) -> Table:
        """why: columns for the reasons, 0 for none."""
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=0, expand=False)
        table.add_column("trial", no_wrap=True)
        table.add_column("state", no_wrap=True)
        for name in ("step", *self._shown, *(self._names[key] for key in changed)):
            table.add_column(_stacked(name.removeprefix("ema/")), justify="right", no_wrap=True)
        if why:
            table.add_column("why it ended", width=why)
        first = self._best()
        for trial in trials:
            step = (
                self._progress(trial, brief=True)
                if self._state(trial) == "running"
                else f"{trial.last_step}/{trial.budget_steps}"
            )
            values = [
                _with_noise(trial, name) if trial.metrics.get(name) is not None else ""
                for name in self._shown
            ]
            params = [
                _brief(trial.params[key], 2) if key in trial.params else "" for key in changed
            ]
            row: list[str | Text] = [f"{trial.trial}*" if trial is first else str(trial.trial)]
            row += [Text(self._state(trial), style=STATES[self._state(trial)]), step]
            reason = Text(_cut(_why(trial), why))
            table.add_row(
                *row,
                *values,
                *params,
                *([reason] if why else []),
                style="bold" if trial is first else "",
            )
        return table

    def _view(self) -> Group:
        rows = max(3, min(ROWS, self._console.height - 8 - NARROW_REASONS))
        headline = wrapped(self._headline(), self._console.width, rest="  ")
        return Group(Text("\n".join(headline), style="bold"), self.table(rows), *self._more(rows))

    def _more(self, rows: int) -> list[Text]:
        """That there are more trials than rows, if there are."""
        hidden = len(self._trials) - rows
        return (
            [Text(f"and {hidden} more, all of them in the report", style="dim")]
            if hidden > 0
            else []
        )

    def _headline(self) -> str:
        """Where the sweep is: trials done, the best, steps spent and when it should end at this
        pace.
        """
        trials, seconds = self._trials.values(), time.monotonic() - self._begin
        through, first = steps(trials), self._best()
        parts = [
            f"{self._sweep.name}: {self._done()} of {self._total} trials done",
            f"{sum(t.last_step for t in trials):,} steps",
        ]
        if waiting := sum(self._state(t) == "waiting" for t in trials):
            parts.insert(1, f"{waiting} waiting")
        if first is not None:
            value = _brief(first.value(self._sweep.metric.name))
            parts.append(f"best {value} (trial {first.trial})")
        if through.budget:
            parts.append(f"{through.saved:.0%} of the steps saved")
        done = self._through() - self._before
        if done > 0 and self._through() < self._total:
            parts.append(f"about {duration(seconds / done * (self._total - self._through()))} left")
        return ", ".join([*parts, duration(seconds)])

    def _state(self, trial: TrialRecord) -> str:
        held = trial.status == "running" and trial.trial in self._paused
        return "waiting" if held else trial.status

    def _done(self) -> int:
        return sum(self._state(t) not in ("running", "waiting") for t in self._trials.values())

    def _through(self) -> int:
        """Trials that run no more for now: few of those that wait at a rung go on."""
        return sum(t.waits or t.status not in ("running", "waiting") for t in self._trials.values())

    def _best(self) -> TrialRecord | None:
        return self._standing.best(self._trials.values())

    def _ranked(self) -> list[TrialRecord]:
        order = self._standing.in_order(self._trials.values())
        return sorted(order, key=lambda trial: trial.status != "running")

    def _say(self, trial: TrialRecord, words: str) -> None:
        self._trials[trial.trial], self._pause = trial, HEARTBEAT_S
        self._print(f"trial {trial.trial:<3} {words}")

    def _print(self, words: str) -> None:
        self._last = time.monotonic()
        lines = wrapped(words, self._console.width, f"{self._last - self._begin:5.0f} s  ", INDENT)
        self._console.print("\n".join(lines), markup=False)

    def _metrics(self, trial: TrialRecord) -> str:
        return "  ".join(
            f"{name} {_with_noise(trial, name)}" for name in self._shown if name in trial.metrics
        )

    def _doing(self, trial: TrialRecord) -> str:
        """What its worker does before the first step."""
        runs = (repeat_dir(self._dir / str(trial.trial), n) for n in range(self._sweep.seeds))
        return next(filter(None, (doing(RunDirectory(run)) for run in runs)), "")

    def _progress(self, trial: TrialRecord, *, brief: bool = False) -> str:
        seeds, row, before = self._sweep.seeds, None, 0
        for repeat in range(seeds):  # one after the other
            found = last_row(repeat_dir(self._dir / str(trial.trial), repeat) / "metrics.jsonl")
            row, before = (found, repeat * trial.budget_steps // seeds) if found else (row, before)
        if row is None:
            return ", ".join(filter(None, ["start-up", "" if brief else self._doing(trial)]))
        loss = (
            f" (loss/flow {_brief(row['loss/flow'])})" if "loss/flow" in row and not brief else ""
        )
        return f"{before + row.get('step', 0)}/{trial.budget_steps}{loss}"


def short_names(keys: Sequence[str]) -> dict[str, str]:
    """Each dotted key's shortest tail that is not generic and that no other key ends with."""
    names = {}
    for key in keys:
        parts = key.split(".")
        tails = [".".join(parts[-n:]) for n in range(1, len(parts) + 1)]
        clear = [
            t
            for t in tails
            if t not in GENERIC and not any(k != key and f".{k}".endswith(f".{t}") for k in keys)
        ]
        names[key] = clear[0] if clear else key
    return names


def _brief(value: Any, digits: int = 3) -> str:
    return f"{value:.{digits}g}" if isinstance(value, float) else str(value)


def _with_noise(trial: TrialRecord, name: str) -> str:
    """A metric, with its standard deviation over seeds where there are several."""
    noise = trial.noise.get(name)
    return _brief(trial.metrics[name]) + (f" ±{noise:.2g}" if noise is not None else "")


def _stacked(name: str) -> str:
    """A key over as many lines as it has parts: a column is as narrow as its numbers."""
    return name.replace("/", "/\n").replace(".", ".\n")


def _why(trial: TrialRecord) -> str:
    """Why it ended early, '' where it did not."""
    return (
        ""
        if trial.status == "running"
        else (trial.error if trial.status == "failed" else trial.stopped_by) or ""
    )


def _cut(text: str, width: int) -> str:
    """On one line of this width, cut between words."""
    return textwrap.shorten(text, max(width, 4), placeholder=" …")
