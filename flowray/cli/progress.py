"""Live progress of a run, read from its row files, so that it works wherever the workers are."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any, TextIO

from flowray.store.rows import parse_rows
from flowray.store.run import RunDirectory

BEAT_S = 5.0
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
        rows = [row for row in parse_rows(text.decode()) if row["step"] > self.step]
        self.step = rows[-1]["step"] if rows else self.step
        return rows


class RunProgress:
    """Prints a line for every probe and, in between, one with the loss and speed every few seconds."""

    def __init__(self, run: RunDirectory, steps: int, start: int, stream: TextIO):
        self._steps, self._stream = steps, stream
        self._metrics, self._probes = RowTail(run.metrics, start), RowTail(run.probes, start)
        self._started = False
        self._last = self._began = time.monotonic()

    def show(self, *, now: bool = False) -> None:
        """Print what is new every BEAT_S, or `now`; cheap when nothing is."""
        if not now and time.monotonic() - self._last < BEAT_S:
            return
        self._last = time.monotonic()
        rows, probes = self._metrics.new(), self._probes.new()
        for row in probes:
            keys = ("ema/shoot/nmse", "ema/flow/cos", "ema/std/mean", "vae/psnr")
            shown = [f"{key} {row[key]:.3f}" for key in keys if row.get(key) is not None]
            self._say(f"probe {row['step']}/{self._steps}  {'  '.join(shown)}")
        if rows:
            self._started = True
            flow, speed = rows[-1].get("loss/flow"), rows[-1].get("perf/images_per_s")
            self._say(f"step  {rows[-1]['step']}/{self._steps}  loss/flow {_show(flow)}  {_show(speed, 0)} images/s")
        elif not self._started and not now:
            self._say("starting workers")

    def _say(self, text: str) -> None:
        print(f"[{time.monotonic() - self._began:5.0f} s] {text}", file=self._stream, flush=True)


def _show(value: float | None, digits: int = 3) -> str:
    return "not finite" if value is None else f"{value:.{digits}f}"
