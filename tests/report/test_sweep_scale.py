"""Trials whose latents have another scale are not ranked against each other."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from sweep_records import METRIC, make

from flowray.report import analysis
from flowray.report.edges import edges
from flowray.report.load import load_run, load_sweep
from flowray.report.sweep_page import sweep_commands, write_sweep_report


def scaled(value: float, **autoencoder: Any) -> dict[str, Any]:
    config = {
        "model": {
            "autoencoder": {"kind": "kl", "path": "embedded", "scaling_factor": None} | autoencoder,
            "latent": {"height": 8},
        }
    }
    return {"params": {"k": value}, "metrics": {METRIC: value}, "config": config}


def test_trials_on_another_scale_are_not_ranked(tmp_path: Path) -> None:
    folder = make(tmp_path / "s", [scaled(0.5), scaled(0.3), scaled(0.1, scaling_factor=0.2)])
    sweep = load_sweep(folder)
    assert sweep.best is None
    assert sweep.scales == {
        "model.autoencoder.scaling_factor=null": (0, 1),
        "model.autoencoder.scaling_factor=0.2": (2,),
    }
    assert sweep_commands(sweep) == {}
    assert edges(sweep) == []
    page = write_sweep_report(folder).read_text()
    assert '<p class="big">Not ranked</p>' in page
    assert [
        (group.label, group.best.number if group.best else None)
        for group in analysis.scale_groups(sweep)
    ] == [("A", 1), ("B", 2)]
    assert "Trial 0, 1; best of these: trial 1, ema/shoot/nmse 0.300" in page
    assert re.findall(r"</span></td><td>([AB])</td>", page) == ["A", "A", "B"]
    assert "Trials (not ranked)" in page
    assert 'class="best"' not in page
    assert re.findall(r'<tr id="trial-(\d+)"', page) == ["0", "1", "2"]
    assert "do not compare" in (folder / "report.md").read_text()
    assert "<h2>Progress</h2>" not in page


@pytest.mark.parametrize(
    ("key", "other", "comparable"),
    [
        ("model.latent.height", 16, False),
        ("model.autoencoder.path", "elsewhere", False),
        ("data.shards", "digits", False),
        ("model.autoencoder.parameters", 7, True),
        ("model.head.kind", "grid", True),
    ],
)
def test_what_sets_the_scale(tmp_path: Path, key: str, other: Any, comparable: bool) -> None:
    trials = []
    for value in (None, other):
        config: dict[str, Any] = {
            "data": {"shards": "shapes"},
            "model": {"latent": {"height": 8}, "autoencoder": {"path": "embedded"}},
        }
        *sections, last = key.split(".")
        inner = config
        for name in sections:
            inner = inner.setdefault(name, {})
        inner[last] = value if value is not None else inner.get(last)
        trials.append({"metrics": {METRIC: 0.5}, "config": config})
    assert load_sweep(make(tmp_path / "s", trials)).comparable is comparable


def test_held_out_shards_of_their_own_make_training_shards_comparable(tmp_path: Path) -> None:
    configs = [{"data": {"shards": shards, "val_shards": "held"}} for shards in ("a", "b")]
    assert load_sweep(
        make(tmp_path / "s", [{"metrics": {METRIC: 0.5}, "config": c} for c in configs])
    ).comparable


def test_errors_in_the_unit_of_older_versions_are_not_ranked_beside_new_ones(
    tmp_path: Path,
) -> None:
    unit = {"old": {}, "new": {"ema/data/var": 0.9}}

    def trials(*kinds: str) -> list[dict[str, Any]]:
        made = [scaled(0.5) | {"metrics": {METRIC: 0.5} | unit[kind]} for kind in kinds]
        return [*made, scaled(0.4) | {"metrics": {}, "status": "failed"}]

    for kind in unit:
        assert load_sweep(make(tmp_path / kind, trials(kind, kind))).comparable
    sweep = load_sweep(make(tmp_path / "mixed", trials("old", "new", "old")))
    assert list(sweep.scales.values()) == [(0, 2), (1, 3)]
    assert sweep.best is None


def test_a_run_says_which_of_its_rows_have_the_unit_of_older_versions(tmp_path: Path) -> None:
    rows = [{"step": 10, METRIC: 0.5}, {"step": 20, METRIC: 0.4, "ema/data/var": 0.9}]
    for count, word in ((1, "cond_gain over"), (2, "up to step 10 over")):
        text = "".join(json.dumps(row) + "\n" for row in rows[:count])
        (tmp_path / "probes.jsonl").write_text(text)
        (note,) = load_run(tmp_path).notes
        assert word in note
    (tmp_path / "probes.jsonl").write_text(json.dumps(rows[1]) + "\n")
    assert load_run(tmp_path).notes == ()
