"""Live progress of a run, read from its row files, so that it works wherever the workers are."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TextIO

from flowray.config.rows import parse_rows
from flowray.store.run import RunDirectory

BEAT_S = 5.0
SILENT_S = 60.0  # after that long without a row a line says so, and again after twice, four times as long
_QUIET = {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "TRANSFORMERS_VERBOSITY": "error", "DIFFUSERS_VERBOSITY": "error"}


def quiet_libraries() -> None:
    """No bars and hints of the model libraries between our own lines; before they are imported, and unless the user set it."""
    for key, value in _QUIET.items():
        os.environ.setdefault(key, value)


class RowTail:
    """The rows added to a row file since the last look, after step `start`.

    What lies there at the beginning is no news: whoever continues a run puts a new file in its place.
    """

    def __init__(self, path: Path, start: int):
        self._path, self.step = path, start
        self._file = self._inode()
        self._offset = path.stat().st_size if path.exists() else 0

    def _inode(self) -> int:
        return self._path.stat().st_ino if self._path.exists() else 0

    def new(self) -> list[dict[str, Any]]:
        """Rows not seen before, each step once."""
        try:
            with self._path.open("rb") as file:
                if self._inode() != self._file:
                    self._file, self._offset = self._inode(), 0
                file.seek(self._offset)
                text, end, _ = file.read().rpartition(b"\n")
        except OSError:  # not there yet
            return []
        self._offset += len(text) + len(end)
        rows = [row for row in parse_rows(text.decode())[0] if row["step"] > self.step]
        self.step = rows[-1]["step"] if rows else self.step
        return rows


class RunProgress:
    """Prints a line for every probe and every new finding and, in between, one with the loss and speed every few seconds."""

    def __init__(self, run: RunDirectory, steps: int, start: int, stream: TextIO):
        self._steps, self._stream = steps, stream
        self._metrics, self._probes, self._visits = (RowTail(path, start) for path in (run.metrics, run.probes, run.findings))
        self._found: set[str] = set()
        self._started = False
        self._last = self._began = self._news = time.monotonic()
        self._silence = SILENT_S

    def show(self, *, now: bool = False) -> None:
        """Print what is new every BEAT_S, or `now`; cheap when nothing is."""
        if not now and time.monotonic() - self._last < BEAT_S:
            return
        self._last = time.monotonic()
        rows, probes, visits = self._metrics.new(), self._probes.new(), self._visits.new()
        for row in probes:
            keys = ("ema/shoot/nmse", "ema/flow/cos", "ema/std/mean", "vae/psnr")
            shown = [f"{key} {row[key]:.3f}" for key in keys if row.get(key) is not None]
            self._say(f"probe {row['step']}/{self._steps}  {'  '.join(shown)}")
        for visit in visits:
            self._show_findings(visit)
        if rows or probes:
            self._news, self._silence = self._last, SILENT_S
        if rows:
            self._started = True
            flow, speed = rows[-1].get("loss/flow"), rows[-1].get("perf/images_per_s")
            self._say(f"step  {rows[-1]['step']}/{self._steps}  loss/flow {_show(flow)}  {_show(speed, 0)} images/s")
        elif not self._started and not now:
            self._say("starting workers")
        elif not now and (silent := self._last - self._news) > self._silence:
            self._silence *= 2
            self._say(f"no step for {silent:.0f} s: a slow probe, or lost workers, which start again from the last checkpoint")

    def _show_findings(self, visit: dict[str, Any]) -> None:
        """A line for each finding that the visit before did not have."""
        for finding in visit["findings"]:
            if finding["id"] not in self._found:
                self._say(f"doctor {visit['step']}/{self._steps}  {finding['severity']}: {finding['id']}: {finding['evidence']}")
        self._found = {finding["id"] for finding in visit["findings"]}

    def _say(self, text: str) -> None:
        print(f"[{time.monotonic() - self._began:5.0f} s] {text}", file=self._stream, flush=True)


def watch(work: Callable[[], None], progress: RunProgress) -> None:
    """Run `work` in a thread and show progress; the main thread stays free for signals, which Ray Train would abort on."""
    thread = threading.Thread(target=work, name="training", daemon=True)
    thread.start()
    while thread.is_alive():
        thread.join(0.5)
        progress.show()
    progress.show(now=True)


def _show(value: float | None, digits: int = 3) -> str:
    return "not finite" if value is None else f"{value:.{digits}f}"
