"""Live progress of a run, read from its row files, so that it works wherever the workers are."""

from __future__ import annotations

import time
from typing import TextIO

from flowray.store.rows import read_rows
from flowray.store.run import RunDirectory

BEAT_S = 5.0


class RunProgress:
    """Prints a line for every probe and, in between, one with the loss and speed every few seconds."""

    def __init__(self, run: RunDirectory, steps: int, stream: TextIO):
        self._run, self._steps, self._stream = run, steps, stream
        self._probed = self._logged = -1
        self._last = self._began = time.monotonic()

    def show(self) -> None:
        """Print what is new; cheap when nothing is."""
        now = time.monotonic()
        if now - self._last < BEAT_S:
            return
        self._last = now
        for row in (r for r in read_rows(self._run.probes) if r["step"] > self._probed):
            self._probed = row["step"]
            parts = [f"{key} {row[key]:.3f}" for key in ("ema/shoot/nmse", "ema/flow/cos", "ema/std/mean", "vae/psnr") if row.get(key)]
            self._say(f"probe {row['step']}/{self._steps}  {'  '.join(parts)}")
        rows = read_rows(self._run.metrics)
        if rows and rows[-1]["step"] != self._logged:
            row = rows[-1]
            self._logged = row["step"]
            flow, speed = row.get("loss/flow"), row.get("perf/images_per_s")
            self._say(f"step  {row['step']}/{self._steps}  loss/flow {_show(flow)}  {_show(speed, 0)} images/s")
        elif not rows:
            self._say("starting workers")

    def _say(self, text: str) -> None:
        print(f"[{time.monotonic() - self._began:5.0f} s] {text}", file=self._stream, flush=True)


def _show(value: float | None, digits: int = 3) -> str:
    return "not finite" if value is None else f"{value:.{digits}f}"
