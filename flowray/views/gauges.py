"""Gauges for Prometheus and Grafana: every name that flowray exports stands here, so that a
dashboard's file can be checked against it.

Ray's metrics agent adds `ray_` and serves them on each node; `ray_flowray_shoot_nmse{run="head/3"}`
is what a query asks for.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from ray.util.metrics import Gauge

from flowray.config.keys import describe
from flowray.store.run import RunDirectory
from flowray.sweepconfig.sweep import Sweep
from flowray.tune.observers import Observer
from flowray.tune.records import TrialRecord, last_row
from flowray.views.standing import Standing

EXPORTED = "ray_"  # what Ray puts before every name
SPEED = "perf/images_per_s"


@dataclass(frozen=True)
class GaugeSpec:
    """One gauge: its name without Ray's prefix, the metric key or the fact that it shows, its
    words and its labels.
    """

    name: str
    shows: str
    words: str
    labels: tuple[str, ...]


def _probe(key: str) -> GaugeSpec:
    found = describe(key)
    assert found is not None, key
    return GaugeSpec(
        "flowray_" + re.sub(r"\W", "_", key),
        key,
        f"{key} at the last probe, EMA where it is measured: {found.formula}",
        ("run",),
    )


RUN_GAUGES: tuple[GaugeSpec, ...] = (
    GaugeSpec("flowray_step", "step", "steps trained at the last probe", ("run",)),
    GaugeSpec("flowray_budget_steps", "budget_steps", "steps that the run is to train", ("run",)),
    GaugeSpec(
        "flowray_images_per_s",
        SPEED,
        "training images per second at the last step that was logged, probes left out",
        ("run",),
    ),
    *map(
        _probe,
        (
            "shoot/energy",
            "shoot/diversity",
            "shoot/diversity_all",
            "shoot/nmse",
            "shoot/skill",
            "shoot/cond_gain",
            "flow/cos",
            "flow/nmse",
            "std/mean",
            "text/cos_mu",
            "source/separation@0.25",
            "source/width",
            "source/width_all",
            "loss/flow",
            "loss/total",
        ),
    ),
)
TRIALS = GaugeSpec("flowray_trials", "trials", "trials of the sweep by state", ("sweep", "state"))
BEST = GaugeSpec(
    "flowray_best", "best", "the sweep's metric of its best trial so far", ("sweep", "metric")
)
GAUGES: tuple[GaugeSpec, ...] = (*RUN_GAUGES, TRIALS, BEST)


def exported_names() -> frozenset[str]:
    """The names as Prometheus knows them."""
    return frozenset(EXPORTED + spec.name for spec in GAUGES)


@cache
def _open(spec: GaugeSpec) -> Gauge:
    """One object a name and process: a process may train one trial after the other."""
    return Gauge(spec.name, description=spec.words, tag_keys=spec.labels)


def run_label(run_dir: Path) -> str:
    """The name of a run; of a trial, whose name is a number, with its sweep: head/3, of its
    further seeds head/3/seeds/1.
    """
    parts = run_dir.absolute().parts
    further = len(parts) > 3 and parts[-2] == "seeds"
    return "/".join(parts[-4:] if further else parts[-2:] if parts[-1].isdigit() else parts[-1:])


def leave_link(sweep_dir: Path, url: str) -> None:
    """Write down where Ray's own dashboard is, for `flowray.dashboard`, in
    `<sweep_dir>/.ray/dashboard`.
    """
    if url:
        (sweep_dir / ".ray").mkdir(exist_ok=True)
        (sweep_dir / ".ray" / "dashboard").write_text(f"http://{url}\n")


class RunGauges:
    """The last probe of one run.

    A process that trains one trial after the other goes on exporting the last values of the earlier
    ones until it ends.
    """

    def __init__(self, run_dir: Path):
        self._run, self._labels = RunDirectory(run_dir), {"run": run_label(run_dir)}
        self._gauges = {spec.shows: _open(spec) for spec in RUN_GAUGES}

    def show(self, row: Mapping[str, Any]) -> None:
        """Set the gauges to a reported row; what it lacks stays as it was. Speed is from the
        run's metrics: rows of training have none.
        """
        speed = row if SPEED in row else last_row(self._run.metrics) or {}
        shown = {SPEED: speed.get(SPEED), **row}
        for key, gauge in self._gauges.items():
            value = shown.get(f"ema/{key}", shown.get(key))
            if isinstance(value, int | float):
                gauge.set(float(value), tags=self._labels)


class SweepGauges(Observer):
    """The sweep as a whole, the trials of earlier sessions too: an observer of the session."""

    def __init__(self, sweep: Sweep):
        self._sweep, self._metric, self._standing = sweep.name, sweep.metric, Standing(sweep)
        self._named = False  # whether the gauge names a best value
        self._trials, self._best = _open(TRIALS), _open(BEST)
        self._records: dict[int, TrialRecord] = {}

    def _show(self, trial: TrialRecord) -> None:
        self._records[trial.trial] = trial
        counts = Counter(record.status for record in self._records.values())
        for state in ("running", "waiting", "finished", "stopped", "failed"):
            self._trials.set(counts[state], tags={"sweep": self._sweep, "state": state})
        first = self._standing.best(self._records.values())
        value = first.value(self._metric.name) if first else None
        if value is not None or self._named:  # NaN once there is none any more
            tags = {"sweep": self._sweep, "metric": self._metric.name}
            self._best.set(math.nan if value is None else value, tags=tags)
        self._named = value is not None

    known = started = probed = ended = _show
