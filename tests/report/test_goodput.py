"""Where a run's time went, by its rows alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from flowray.report.goodput import spent
from flowray.report.load import load_run
from flowray.report.page import write_run_report


def row(start: int, step: int, at: float, *seconds: float, **more: Any) -> dict[str, Any]:
    """seconds: of steps, of saving, of probes."""
    names = ("steps_s", "saving_s", "probes_s")
    return {
        "start": start,
        "step": step,
        "at": at,
        **dict(zip(names, seconds, strict=True)),
        **more,
    }


KILLED = [
    row(1, 0, 110.0, 0, 0, 0, what="ready", began=100.0, workers=2),
    row(1, 10, 121.0, 10, 1, 0),  # the checkpoint that the second start goes on from
    row(1, 18, 132.0, 18, 1, 3),  # cut off some time after this one
    {"step": 10, "lost": [1], "why": "its process ended", "at": 133.0},
    row(2, 10, 142.0, 0, 0, 0, what="ready", began=138.0, workers=2),
    row(2, 30, 164.0, 20, 2, 0, ended="stopped"),
    # typed again the next day
    row(3, 30, 90_003.0, 0, 0, 0, what="ready", began=90_000.0, workers=2),
    row(3, 40, 90_014.0, 10, 1, 0, ended="finished"),
]


def test_of_a_run_that_was_killed_and_stopped():
    told = spent(KILLED)
    assert told is not None
    assert (told.starts, told.kept, told.redone) == (3, 40.0, 8.0)
    assert (told.saving, told.probes) == (4.0, 3.0)
    assert (told.starting, told.restarts) == (10.0, 10.0 + 3.0)  # not the night between
    assert told.total == pytest.approx(78.0)
    assert told.goodput == pytest.approx(40 / 78)


def test_of_a_run_that_nobody_touched():
    told = spent(KILLED[:3])
    assert told is not None
    assert (told.starts, told.kept, told.redone, told.restarts) == (1, 18.0, 0.0, 0.0)


def test_without_rows_there_is_none(tmp_path: Path):
    assert spent([]) is None
    assert spent([{"step": 0, "lost": [0], "why": "", "at": 1.0}, {"step": 3}]) is None
    (tmp_path / "config.yaml").write_text("")
    assert load_run(tmp_path).spent is None


def test_on_the_page(tmp_path: Path):
    (tmp_path / "config.yaml").write_text("name: a\n")
    write_run_report(tmp_path)
    assert "51.3 %" not in (tmp_path / "report.html").read_text()
    (tmp_path / "times.jsonl").write_text("".join(json.dumps(each) + "\n" for each in KILLED))
    write_run_report(tmp_path)
    page = (tmp_path / "report.html").read_text()
    assert "51.3 %" in page  # 40 / 78
    assert "10.3 %" in page  # 8 / 78 done twice
