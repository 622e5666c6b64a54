"""Charts: round ticks, limits that one outlier does not stretch, labels apart, colours for light
and dark.
"""

from __future__ import annotations

import json
import math
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from flowray.report import figures
from flowray.report.axes import (
    LINE,
    end_labels,
    fence,
    free_labels,
    limit,
    mark_edges,
    ticks_between,
)
from flowray.report.doctor_page import DoctorData, write_doctor_page
from flowray.report.load import load_run, load_sweep
from flowray.report.page import write_run_report
from flowray.report.paint import DARK
from flowray.report.stages import stages
from flowray.report.sweep_page import write_sweep_report

RECORDED = Path(__file__).parent / "recorded" / "head"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return Path(shutil.copytree(RECORDED, tmp_path / "head"))


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """The page of the recorded sweep, with a strip of two pictures for some of its trials, and
    that of its best trial.
    """
    copy = Path(shutil.copytree(RECORDED, tmp_path_factory.mktemp("s") / "head"))
    for number in (27, 25, 22, 7):
        (copy / str(number) / "samples").mkdir(parents=True)
        Image.fromarray(np.full((8, 16, 3), number, np.uint8)).save(
            copy / str(number) / "samples" / "step_000500.png"
        )
        (copy / str(number) / "samples" / "prompts.txt").write_text("a red circle\na blue square\n")
    return write_sweep_report(copy).read_text(), write_run_report(copy / "27").read_text()


def is_round(value: float, digits: int) -> bool:
    return float(f"{value:.{digits}g}") == pytest.approx(value, rel=1e-9, abs=1e-12)


def test_log_ticks_are_round_and_enough_whatever_the_range() -> None:
    """From a tenth of a decade, which has no tick of its own, to fifteen decades."""
    rng = np.random.default_rng(0)
    for span in (0.04, 0.1, 0.3, 0.7, 1.0, 1.4, 2.2, 3.0, 6.0, 15.0):
        for start in rng.uniform(-9, 3, 40):
            low, high = 10.0**start, 10.0 ** (start + span)
            ticks = ticks_between(low, high)
            assert 3 <= len(ticks) <= 10, (low, high, ticks)
            assert all(low * 0.999 <= tick <= high * 1.001 for tick in ticks)
            assert ticks == sorted(set(ticks))
            assert all(is_round(tick, 4) for tick in ticks)


def test_one_outlier_does_not_squeeze_the_rest() -> None:
    values = [0.37 + 0.01 * i for i in range(20)]
    assert fence(values) == (values[0], values[-1])
    assert fence([*values, 40.0]) == (values[0], values[-1])
    assert fence([*values, -9.0, 40.0]) == (values[0], values[-1])
    assert fence([*values, 1e4], log=True) == (values[0], values[-1])
    assert fence([1.0, 50.0]) == (1.0, 50.0)  # of two none is the outlier
    assert fence([2.0] * 9) == (2.0, 2.0)


def test_an_outlier_is_marked_at_the_edge_with_its_value() -> None:
    ax = Figure().add_subplot()
    limit(ax, 0.3, 0.5)
    mark_edges(ax, [(1, 0.4, "k"), (2, 40.0, "k"), (2, 35.0, "k"), (3, -2.0, "k")])
    marked = {(line.get_xdata()[0], line.get_ydata()[0], line.get_marker()) for line in ax.lines}
    low, high = ax.get_ylim()
    assert marked == {(2, high, "^"), (3, low, "v")}
    assert {text.get_text() for text in ax.texts} == {"40", "-2"}


def test_a_sweep_with_a_diverged_trial_still_shows_the_others_apart() -> None:
    sweep = load_sweep(RECORDED)
    trials = [
        replace(trial, run=load_run(RECORDED / "none"), metrics={"ema/shoot/nmse": 25.0})
        if trial.number == 8
        else trial
        for trial in sweep.trials
    ]
    plain = figures.sweep_curves("nmse", trials, sweep.best, "ema/shoot/nmse").decode()
    assert "<!-- 25 -->" in plain  # beside its mark at the edge
    assert "<!-- 0.4 -->" in plain
    assert "<!-- 20 -->" not in plain  # no tick of an axis that reaches that far


def test_stacked_labels_are_spread_in_the_order_of_their_curves() -> None:
    figure = Figure(figsize=(9, 4))
    ax = figure.add_subplot()
    ax.set_xlim(0, 500)
    limit(ax, 0.2, 1.0)
    ends = [(f"{n}", 500.0, 0.371 + 0.001 * n, "#334155") for n in range(6)]
    end_labels(ax, [*ends, ("far", 500.0, 0.9, "#334155")])
    heights = {text.get_text(): text.get_position()[1] for text in ax.texts if text.get_text()}
    at = [heights[f"{n}"] for n in range(6)]
    assert at == sorted(at)
    assert min(np.diff([*at, heights["far"]])) >= LINE - 1e-9
    assert at[0] >= 0
    leaders = [text for text in ax.texts if not text.get_text()]
    assert 5 <= len(leaders) <= 6  # none to the label that stands where its curve ends


def test_labels_of_a_crowd_are_left_out_and_the_others_lie_on_nothing() -> None:
    figure = Figure(figsize=(4, 3))
    ax = figure.add_subplot()
    ax.set_xlim(0, 1)
    ax.set_ylim(0, 1)
    crowd = {f"{n}": (0.5 + 0.005 * (n % 6), 0.5 + 0.005 * (n // 6)) for n in range(36)}
    points = crowd | {"alone": (0.2, 0.2)}
    free_labels(ax, points, list(points.values()), "k")
    shown = [text.get_text() for text in ax.texts]
    assert "alone" in shown
    assert len(shown) < 20
    centres = [np.add(ax.transData.transform(text.xy), text.get_position()) for text in ax.texts]
    apart = [(abs(a - b)[0], abs(a - b)[1]) for i, a in enumerate(centres) for b in centres[:i]]
    assert all(x > 5 or y > 7 for x, y in apart)


def test_every_colour_of_a_figure_has_its_dark_one(written: tuple[str, str]) -> None:
    sweep = load_sweep(RECORDED)
    svg = figures.sweep_curves("nmse", sweep.trials, sweep.best, "ema/shoot/nmse").decode()
    style, _, drawn = svg.partition("</style>")
    assert "@media(prefers-color-scheme:dark)" in style
    assert all(dark in style for dark in DARK.values())
    colours = set(re.findall(r"(?<!, )#[0-9a-f]{6}\b", drawn))
    assert colours == set()  # all go by name
    page = written[0]
    assert "color-scheme: light dark" in page
    assert page.count("prefers-color-scheme") == 1  # figures carry theirs inside, encoded


def test_pictures_come_before_tables_and_plots(written: tuple[str, str]) -> None:
    page, run = written
    assert (
        page.index("data:image/png") < page.index("data:image/svg") < page.index('<tr id="trial-')
    )
    assert page.index("<thead><tr><th></th>") < page.index("data:image/png")  # under their captions
    assert run.index("data:image/png") < run.index("data:image/svg")


def test_the_state_stands_right_beside_the_trial(written: tuple[str, str]) -> None:
    head = re.search(r'aria-label="trials">.*?<thead><tr>(.*?)</tr>', written[0], re.S)
    assert head is not None
    assert re.findall(r">([^<>]+)</th>", head[1])[:2] == ["trial", "status"]


def test_the_stages_of_a_run_are_those_of_its_probes() -> None:
    best = load_sweep(RECORDED).best
    assert best is not None
    found = {stage.step: stage for stage in stages(best.run, "ema/shoot/nmse")}
    assert list(found) == [50, 150, 200, 500]  # first, least, first with a direction, last
    # the flow does nothing yet
    assert found[150].value == pytest.approx(found[150].still, abs=1e-3)
    assert found[150].cos == pytest.approx(0, abs=0.05)
    assert found[500].value > 1.2 * found[500].still  # and later pays for what it draws
    assert found[500].value < 2 * found[500].still
    assert stages(best.run, "ema/flow/cos") == stages(best.run, "ema/shoot/energy") == []
    assert {stage.energy for stage in found.values()} == {None}  # an older run
    assert math.isclose(found[500].value, best.value("ema/shoot/nmse") or 0, rel_tol=1e-3)


def test_a_sweep_of_an_older_flowray_opens(folder: Path) -> None:
    """Rows without the newer fields, a recipe with keys that are no more, a doctor's visit that
    names no numbers.
    """
    path = folder / "trials.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    newer = {"waits", "repeats", "noise", "seconds", "error"}
    path.write_text(
        "".join(json.dumps({k: v for k, v in row.items() if k not in newer}) + "\n" for row in rows)
    )
    config = folder / "27" / "config.yaml"
    config.write_text(config.read_text() + "gone:\n  section: 1\n")
    visit = {
        "id": "field_weak",
        "severity": "warn",
        "evidence": "flow/cos 0.4, below 0.5",
        "cause": "",
        "fix": "",
    }
    (folder / "27" / "findings.jsonl").write_text(
        json.dumps({"step": 500, "findings": [visit]}) + "\n"
    )
    page = write_sweep_report(folder).read_text()
    assert len(re.findall(r'<tr id="trial-', page)) == 30
    assert "field weak" in write_run_report(folder / "27").read_text()


def test_the_doctors_pictures_stand_under_what_they_are_pictures_of(tmp_path: Path) -> None:
    held_out, drawn = ["a red circle", "a blue square"], ["a green triangle", "a large red square"]
    pictures = {name: np.zeros((2, 8, 8, 3), np.uint8) for name in ("orig", "trace_end", "samples")}
    facts = {"captions": held_out, "prompts": drawn}
    page = write_doctor_page(
        tmp_path / "d.html", DoctorData("r", 1, [], {}, facts, [], pictures, {})
    ).read_text()
    heads = re.findall(r"<thead><tr><th></th>\s*(.*?)</tr>", page, re.S)
    assert [re.findall(r"<span>(.*?)</span>", head) for head in heads] == [held_out, drawn]
    assert (
        page.index("held-out pictures")
        < page.index("a green triangle")
        < page.index("as sampling makes them")
    )
    same = write_doctor_page(
        tmp_path / "s.html",
        DoctorData("r", 1, [], {}, facts | {"prompts": held_out}, [], pictures, {}),
    )
    assert same.read_text().count("<thead><tr><th></th>") == 1
