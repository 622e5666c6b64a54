"""A recorded sweep of `sweeps/head.yaml`, 30 trials: one judge for doctor, page and card, and what
stands at its end.
"""

from __future__ import annotations

import json
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest

from flowray.cli.tune import _report
from flowray.config.card import render_card
from flowray.config.load import load_recipe
from flowray.findings.facts import recipe_facts
from flowray.findings.judge import Judge
from flowray.rayrun.tuner import SweepResult
from flowray.report.analysis import heat_map
from flowray.report.ending import ending, failures, stop_reasons
from flowray.report.load import load_sweep
from flowray.report.results import Sweep
from flowray.report.sweep_page import sweep_verdict, write_sweep_report
from flowray.sweepconfig.stop import rule_words

RECORDED = Path(__file__).parent / "recorded" / "head"
BEST = 27
ROWS = 40  # of a terminal


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return Path(shutil.copytree(RECORDED, tmp_path / "a sweep" / "head"))


@pytest.fixture
def sweep(folder: Path) -> Sweep:
    return load_sweep(folder)


def change(folder: Path, number: int, **fields: Any) -> Sweep:
    path = folder / "trials.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    metrics = fields.pop("metrics", {})
    for row in rows:
        if row["trial"] == number:
            row |= {**fields, "metrics": row["metrics"] | metrics}
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return load_sweep(folder)


def test_the_cells_of_the_best_trial_are_the_doctors_verdict(sweep: Sweep) -> None:
    """27-doctor.json is what `flowray.doctor` measured on that trial, healthy for it; its source
    is anchored.
    """
    said = json.loads((RECORDED / "27-doctor.json").read_text())
    assert said["healthy"]
    best = sweep.best
    assert best is not None
    assert best.number == BEST
    facts = {**recipe_facts(best.run.config), "step": best.last_step}
    doctor = Judge(said["metrics"], facts, [*best.run.metrics, *best.run.probes])
    assert [finding.id for finding in doctor.findings] == said["findings"]
    keys, ((trial, cells),) = heat_map([best])
    assert trial is best
    assert len(keys) >= 10
    assert [(cell.key, cell.word) for cell in cells] == [(key, doctor(key).word) for key in keys]
    assert {cell.word for cell in cells} == {"good", ""}
    by_key = dict(zip(keys, cells, strict=True))
    assert by_key["std/mean"].good == (0.05, 1.6)  # an anchored source is narrow
    assert by_key["shoot/skill"].word == "good"  # at -0.3, as a drawn picture has it


def test_the_card_of_a_run_says_what_the_doctor_says(sweep: Sweep, tmp_path: Path) -> None:
    best = sweep.best
    assert best is not None
    last = best.run.probes[-1]
    judge = best.run.judge(last, int(last["step"]))
    said = {key: judge(key).text for key in ("ema/std/mean", "ema/shoot/skill", "ema/mu/rms")}
    loaded = load_recipe(str(RECORDED / str(BEST) / "config.yaml"))
    card, values = tmp_path / "card.md", {key: float(last[key]) for key in said}
    known = {"exp_id": "x", "commit": "", "hardware": "", "step": 500}
    render_card(card, loaded.recipe, loaded.diffs, **known, metrics=values, verdicts=said)
    lines = {
        line.split("`")[1]: line for line in card.read_text().splitlines() if line.startswith("| `")
    }
    assert lines["ema/std/mean"].endswith("| good (0.05 to 1.6) |")
    assert lines["ema/shoot/skill"].endswith("| good (-1 to 1) |")
    assert lines["ema/mu/rms"].endswith("|  |")  # of which nothing is claimed


def test_without_its_recipe_the_same_numbers_were_condemned(folder: Path) -> None:
    (folder / str(BEST) / "config.yaml").unlink()
    best = load_sweep(folder).best
    assert best is not None
    _, ((_, cells),) = heat_map([best])
    words = {cell.key: cell.word for cell in cells}
    assert words["std/mean"] == words["shoot/skill"] == "bad"


@pytest.mark.parametrize(
    ("metrics", "key", "word"),
    [
        ({"ema/mu/rms": 6.0}, "mu/rms", "bad"),
        (
            {"ema/flow/cos": 0.9, "ema/flow/speed_ratio": 0.3, "ema/flow/nmse": 0.55},
            "flow/cos",
            "good",
        ),
        (
            {"ema/flow/cos": 0.9, "ema/flow/speed_ratio": 0.3, "ema/flow/nmse": 0.55},
            "flow/speed_ratio",
            "bad",
        ),
        ({"ema/std/mean": 0.01}, "flow/cos", "good"),  # named in the evidence of the collapse
        ({"ema/std/mean": 0.01}, "std/mean", "bad"),
        ({"ema/text/snr": 1e-9}, "text/snr", "bad"),  # by the nats that follow from it
        ({"ema/scale/ratio": 4.0}, "scale/ratio", "bad"),
    ],
)
def test_a_number_has_the_colour_of_what_it_is_at_fault_in(
    folder: Path, metrics: dict, key: str, word: str
) -> None:
    probes = folder / str(BEST) / "probes.jsonl"
    rows = [json.loads(line) for line in probes.read_text().splitlines()]
    probes.write_text("".join(json.dumps(row | metrics) + "\n" for row in rows))
    best = next(
        trial for trial in change(folder, BEST, metrics=metrics).trials if trial.number == BEST
    )
    keys, ((_, cells),) = heat_map([best])
    assert dict(zip(keys, cells, strict=True))[key].word == word


@pytest.mark.parametrize("width", [80, 100, 120])
def test_the_end_is_whole_on_a_screen_and_the_verdict_is_last(sweep: Sweep, width: int) -> None:
    page = sweep.path / "report.html"
    lines = ending(sweep, page, width)
    whole = [line for line in lines if len(line) > width]
    for line in whole:  # what is to be copied stays on one line
        assert line.startswith("  python -m flowray.") or line == f"  {page}"
        assert line[2:] == f"{page}" or shlex.split(line)[2].startswith("flowray.")
    assert sum(-(-max(len(line), 1) // width) for line in lines) <= ROWS
    words = " ".join(" ".join(lines).split())
    assert words.endswith(" ".join(f"{sweep_verdict(sweep)}.".split()))
    assert "22 stopped: not among the best (asha) at step 50" in words
    assert sum(line.startswith(("  trial ", "trial ")) for line in lines) == 0


def test_a_sweep_that_ends_is_read_once(folder: Path, sweep: Sweep) -> None:
    """A sweep of hundreds of trials ends in seconds: its page and its last lines are of what was
    read to find its best trial.
    """
    page = write_sweep_report(folder).read_text()
    wanted = ending(sweep, folder / "report.html", 80)
    shutil.rmtree(folder / str(BEST))
    (folder / "trials.jsonl").unlink()
    lines = _report(SweepResult(sweep, (), None, sweep.saved, False))
    assert (folder / "report.html").read_text() == page
    assert " ".join(lines).split() == " ".join(wanted).split()


def test_stops_and_failures_are_counted_by_reason(folder: Path) -> None:
    floor = {"ema/flow/cos": 0.1}
    change(
        folder,
        0,
        last_step=250,
        metrics=floor,
        stopped_by="ema/flow/cos 0.1 stayed below 0.15 for 2 probes",
    )
    change(
        folder,
        1,
        last_step=300,
        metrics=floor,
        stopped_by="ema/flow/cos 0.1 stayed below 0.15 for 2 probes",
    )
    change(
        folder, 2, metrics={"ema/shoot/nmse": None}, stopped_by="ema/shoot/nmse is nan at step 50"
    )
    for number in (3, 4):
        change(folder, number, status="failed", stopped_by=None, error="OutOfMemoryError: 3 GiB")
    sweep = change(folder, 5, waits=True)
    assert dict(stop_reasons(sweep)) == {
        "not among the best (asha) at step 50": 16,
        "not among the best (asha) at step 100": 2,
        "ema/flow/cos below 0.15 at 2 probes from step 200": 2,
        "ema/shoot/nmse is not finite": 1,
    }
    assert failures(sweep) == [("OutOfMemoryError: 3 GiB", 2)]
    assert "(6 finished, 21 stopped, 1 waiting, 2 failed)" in sweep_verdict(sweep)


def test_what_the_engine_noted_counts_and_not_what_the_last_numbers_look_like(folder: Path) -> None:
    """A floor that the last probe meets had not been met long enough; a metric may be missing."""
    looks = {"metrics": {"ema/flow/cos": 0.1, "text/snr": None}, "last_step": 250}
    change(folder, 0, **looks, stop_kind="comparison")
    change(folder, 1, **looks, stop_kind="rule", stop_rule=0)
    low = {"metrics": {"ema/flow/cos": 0.9, "ema/shoot/nmse": None}, "last_step": 250}
    sweep = change(folder, 2, **low, stop_kind="not_finite")
    assert {
        "not among the best (asha) at step 250": 1,
        rule_words(sweep.settings["stop"][0]): 1,
        "ema/shoot/nmse is not finite": 1,
    }.items() <= dict(stop_reasons(sweep)).items()


def test_a_waiting_trial_is_neither_stopped_nor_done(folder: Path) -> None:
    before = load_sweep(folder)
    sweep = change(folder, 5, waits=True)
    assert (len(before.by("stopped")), len(sweep.by("stopped"))) == (24, 23)
    assert [trial.number for trial in sweep.by("waiting")] == [5]
    assert sweep.budget_steps == before.budget_steps - 500
    assert "(6 finished, 23 stopped, 1 waiting)" in sweep_verdict(sweep)
