"""What a command shows on stderr while it works, and the live progress of a run, read from its
row files.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import Any, TextIO

from rich.console import Console
from rich.progress import BarColumn, ProgressColumn, SpinnerColumn, Task
from rich.progress import Progress as Bars
from rich.table import Column
from rich.text import Text

from flowray.config.background import beside
from flowray.config.progress import TRAINING, Advance, Progress, duration
from flowray.config.rows import parse_rows
from flowray.store.doing import doing
from flowray.store.run import RunDirectory

FIRST_S = 0.5  # a task that is over sooner says nothing
BEAT_S, QUIET_S = 2.5, 60.0  # the shortest and longest pause between the lines of a task
LOOK_S = 0.5  # how often a run's files are looked at
# after that long without a row a line says so, and again after twice, four times as long
SILENT_S = 60.0
START_S = 25.0  # imports, Ray, loading the models, the report: measured on two cores
IMPORTING, LOOKING = "importing the libraries", "looking for the newest checkpoint"
_QUIET = {
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "DIFFUSERS_VERBOSITY": "error",
    "TQDM_DISABLE": "1",
}


def quiet_libraries() -> None:
    """No bars and hints of the model libraries between our own lines; before they are imported,
    and unless the user set it.
    """
    for key, value in _QUIET.items():
        os.environ.setdefault(key, value)


class ConsoleProgress:
    """Live bars on a terminal; elsewhere, as in a job's log, a line soon after a task starts, ever
    fewer while it lasts.

    Lines begin with the seconds since the command started. stream: stderr unless given; stdout is
    for what a command prints.
    """

    def __init__(self, stream: TextIO | None = None):
        self._console = Console(file=stream or sys.stderr, highlight=False, soft_wrap=True)
        self._started = time.monotonic()
        self._open: list[Task] = []
        self._bars = Bars(
            SpinnerColumn(),
            BarColumn(bar_width=20),
            _StateColumn(table_column=Column(no_wrap=True, overflow="ellipsis")),
            console=self._console,
            transient=True,
        )

    def say(self, text: str) -> None:
        """A line, above the bars where there are any."""
        self._console.print(f"[{time.monotonic() - self._started:5.0f} s] {text}", markup=False)

    @contextmanager
    def task(self, what: str, total: int | None = None, done: int = 0) -> Iterator[Advance]:
        """A bar, or lines, for the block.

        Tasks may lie in one another: lines come from the innermost alone.
        """
        number = self._bars.add_task(what, total=total, completed=done, note="")
        task = next(task for task in self._bars.tasks if task.id == number)
        self._open.append(task)

        def advance(count: int = 1, note: str = "") -> None:
            self._bars.update(number, advance=count, note=note)

        with ExitStack() as closing:
            closing.callback(self._bars.remove_task, number)
            closing.callback(self._open.remove, task)
            if not self._console.is_terminal:
                closing.enter_context(self._beats(task))
            elif len(self._open) == 1:
                closing.enter_context(self._bars)
            yield advance

    def _beats(self, task: Task) -> AbstractContextManager[None]:
        """Lines in between, of a thread: whatever the block does, a reader sees that it goes on."""

        def beat(over: threading.Event) -> None:
            pause, started, told = FIRST_S, time.monotonic(), False
            while not over.wait(pause):
                if self._open and self._open[-1] is task:
                    self.say(_state(task) if told else _count(task))
                    told = True
                pause = min(max(BEAT_S, (time.monotonic() - started) / 5), QUIET_S)

        return beside(beat, "progress")


def _count(task: Task) -> str:
    return (
        task.description
        if task.total is None
        else f"{task.description} {task.completed:.0f}/{task.total:.0f}"
    )


def _state(task: Task) -> str:
    """Where a task is, on one line: "encoding train pictures 3200/12000, about 45 s left"."""
    left = task.time_remaining
    when = f"about {duration(left)} left" if left else f"for {duration(task.elapsed or 0)} so far"
    return ", ".join(filter(None, (_count(task), task.fields["note"], when)))


class _StateColumn(ProgressColumn):
    """What a line in a log would say, beside the bar."""

    def render(self, task: Task) -> Text:
        return Text(_state(task))


class RowTail:
    """The rows added to a row file since the last look, after step `start`.

    What lies there at the beginning is no news: whoever continues a run puts a new file in its
    place.
    """

    def __init__(self, path: Path, start: int, *, several: bool = False):
        self._path, self.step, self._several = path, start, several
        self._file = self._inode()
        self._offset = path.stat().st_size if path.exists() else 0

    def _inode(self) -> int:
        return self._path.stat().st_ino if self._path.exists() else 0

    def new(self) -> list[dict[str, Any]]:
        """Rows not seen before, each step once unless there may be several of one."""
        after = self.step - self._several
        rows = [row for row in self.added() if row["step"] > after]
        self.step = rows[-1]["step"] if rows else self.step
        return rows

    def added(self) -> list[dict[str, Any]]:
        """Rows not seen before, of whatever step."""
        try:
            with self._path.open("rb") as file:
                if self._inode() != self._file:
                    self._file, self._offset = self._inode(), 0
                file.seek(self._offset)
                text, end, _ = file.read().rpartition(b"\n")
        except OSError:  # not there yet
            return []
        self._offset += len(text) + len(end)
        return parse_rows(text.decode())[0]


class RunProgress:
    """What the row files of a run tell: where it is, with loss and speed; a line for every probe
    and every new finding.
    """

    def __init__(self, run: RunDirectory, steps: int, start: int, progress: Progress):
        self.steps, self.start, self._progress = steps, start, progress
        files = (run.metrics, run.probes, run.findings)
        self._metrics, self._probes, self._visits = (RowTail(path, start) for path in files)
        self._gaps = RowTail(run.gaps, start, several=True)
        self._times, self._cut_off = RowTail(run.times, start), 0.0
        self.run, self._step, self._found = run, start, set[str]()
        self._news, self._silence, self._note = time.monotonic(), SILENT_S, ""

    def show(self, advance: Advance) -> None:
        """Tell what is new; cheap when nothing is. advance: of the task of training."""
        rows, probes, visits = self._metrics.new(), self._probes.new(), self._visits.new()
        if rows or probes:
            self._news, self._silence = time.monotonic(), SILENT_S
            # a step may be probed that is not logged
            step = max(self._step, *(row["step"] for row in (*rows, *probes)))
            if rows:
                flow, speed = rows[-1].get("loss/flow"), rows[-1].get("perf/images_per_s")
                self._note = f"loss/flow {_show(flow)}  {_show(speed, 0)} images/s"
            advance(step - self._step, self._note)
            self._step = step
        elif self._step == self.start:
            advance(0, doing(self.run) or "starting workers")
        elif (silent := time.monotonic() - self._news) > self._silence:
            self._silence *= 2
            why = "a slow probe, or lost workers, which start again from the last checkpoint"
            self._progress.say(f"no step for {silent:.0f} s: {why}")
        for row in probes:
            keys = (
                "ema/shoot/energy",
                "ema/shoot/nmse",
                "ema/flow/cos",
                "ema/std/mean",
                "vae/psnr",
            )
            shown = [f"{key} {row[key]:.3f}" for key in keys if row.get(key) is not None]
            self._progress.say(f"probe {row['step']}/{self.steps}  {'  '.join(shown)}")
        for row in self._times.added():
            self._show_start(row)
        for gap in self._gaps.new():
            self._progress.say(f"step {gap['step']}: {gap['what']} failed: {gap['why']}")
        for visit in visits:
            self._show_findings(visit)

    def _show_start(self, row: dict[str, Any]) -> None:
        """A line where workers are lost or told to go, and one when training is back."""
        if ranks := row.get("lost"):
            who = f"worker {ranks[0]}" if len(ranks) == 1 else f"workers {_listed(ranks)}"
            self._progress.say(
                f"lost {who}: {row['why']}; the last checkpoint is of step {row['step']}"
            )
        elif row.get("ended") == "preempted":
            what = "a worker was told that it goes: checkpoint written"
            self._progress.say(f"step {row['step']}: {what}; training starts again elsewhere")
        elif row.get("what") == "ready" and self._cut_off:
            where = f"at step {row['step']} on {row['workers']} worker(s)"
            pause = duration(max(0.0, row["at"] - self._cut_off))
            self._progress.say(f"training is back {where}, {pause} after it was cut off")
        # of several losses before it is back the first one counts
        going = "start" in row and row.get("ended") != "preempted"
        self._cut_off = 0.0 if going else self._cut_off or row["at"]

    def _show_findings(self, visit: dict[str, Any]) -> None:
        """A line for each finding that the visit before did not have."""
        for found in visit["findings"]:
            if found["id"] not in self._found:
                what = f"{found['severity']}: {found['id']}: {found['evidence']}"
                self._progress.say(f"doctor {visit['step']}/{self.steps}  {what}")
        self._found = {found["id"] for found in visit["findings"]}


def run_shown(work: Callable[[], None], seen: RunProgress, progress: Progress) -> None:
    """Run `work` in a thread and show its progress.

    The main thread stays free for signals, which Ray Train would abort on. KeyboardInterrupt leaves
    the thread behind, as the process is about to end.
    """
    thread = threading.Thread(target=work, name=TRAINING, daemon=True)
    thread.start()
    with progress.task(TRAINING, seen.steps, seen.start) as advance:
        while thread.is_alive():
            thread.join(LOOK_S)
            seen.show(advance)
        seen.show(advance)


def _listed(numbers: list[int]) -> str:
    return f"{', '.join(map(str, numbers[:-1]))} and {numbers[-1]}"


def _show(value: float | None, digits: int = 3) -> str:
    return "not finite" if value is None else f"{value:.{digits}f}"
