"""Reports of synthetic sweep and run directories: what the pages say, and that broken files do
not break them.
"""

from __future__ import annotations

import base64
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from markupsafe import escape
from PIL import Image

from flowray.cli.report import main
from flowray.config.errors import InputError
from flowray.config.keys import describe
from flowray.config.load import dump_recipe
from flowray.config.recipe import Recipe
from flowray.report import figures
from flowray.report.load import load_run, load_sweep
from flowray.report.page import number_text, write_run_report
from flowray.report.results import Metric
from flowray.report.sweep_page import write_sweep_report

PROMPTS = ["a small red circle", "<b>bold</b> & a $5 square"]
METRIC = "ema/shoot/nmse"


def jsonl(path: Path, rows: list[dict[str, Any]], tail: str = "") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + tail)


def strip(path: Path, colours: list[int], side: int = 8) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pictures = [np.full((side, side, 3), colour, np.uint8) for colour in colours]
    Image.fromarray(np.concatenate(pictures, axis=1)).save(path)


def make_run(folder: Path, nmse: list[float], *, prompts: list[str] = PROMPTS) -> dict[str, float]:
    """A run probed every 100 steps; returns its last probe."""
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(
        "# EXP_ID: t-1\n# PURPOSE: see <why>\nname: t\n# not the header\n"
    )
    (folder / "card.md").write_text("# Card\n\n## Goal\nSee it.\n\n## Next step\n")
    steps = [100 * (index + 1) for index in range(len(nmse))]
    losses = [
        {
            "step": step,
            "loss/flow": 2.0 - step / 1000,
            "loss/total": 2.5,
            "lr/head": 1e-3,
            "perf/step_s": 0.1,
        }
        for step in steps
    ]
    jsonl(folder / "metrics.jsonl", losses, tail='{"step": 999, "loss/fl')
    probes = [
        {
            "step": step,
            "shoot/nmse": value + 0.1,
            METRIC: value,
            "flow/cos": 0.7,
            "flow/nmse_t0": 0.9,
            "flow/nmse_t9": 0.4,
        }
        for step, value in zip(steps, nmse, strict=True)
    ]
    jsonl(folder / "probes.jsonl", probes)
    strip(folder / "samples" / f"step_{steps[-1]:06d}.png", [10, 200])
    (folder / "samples" / "prompts.txt").write_text("\n".join(prompts) + "\n")
    return {key: value for key, value in probes[-1].items() if key != "step"}


def row(
    number: int, status: str, last: int, metrics: dict[str, Any], **more: Any
) -> dict[str, Any]:
    params = {
        "model.head.kind": ["pooled", "grid", "conv"][number % 3],
        "optim.lr": 1e-4 * 4**number,
        "flow.time.kind": "log_snr",
    }
    base = {
        "trial": number,
        "params": params,
        "status": status,
        "last_step": last,
        "budget_steps": 400,
        "metrics": metrics,
    }
    return base | {"stopped_by": "", "seconds": 30.0, "error": ""} | more


@pytest.fixture
def sweep(tmp_path: Path) -> Path:
    folder = tmp_path / "head"
    folder.mkdir()
    card = "{title: 'Heads <compared>', purpose: Which head is best}"
    (folder / "sweep.yaml").write_text(
        f"name: head\nbase: sweep_proxy\nmetric: {{name: {METRIC}, goal: minimize}}\ncard: {card}\n"
    )
    (folder / "best.yaml").write_text("name: head-best\n")
    rows = [
        row(0, "finished", 400, make_run(folder / "0", [1.2, 0.9, 0.7, 0.62])),
        row(
            1,
            "stopped",
            200,
            make_run(folder / "1", [1.6, 1.41]),
            stopped_by="flow/cos 0.08 stayed below 0.3 for 2 probes",
        ),
        row(2, "finished", 400, make_run(folder / "2", [1.1, 0.8, 0.5, 0.312])),
        row(3, "failed", 0, {}, error="RuntimeError: <shape> mismatch"),
    ]
    jsonl(folder / "trials.jsonl", rows)
    return folder


def trial_order(page: str) -> list[int]:
    return [int(number) for number in re.findall(r'<tr id="trial-(\d+)"', page)]


def pictures(page: str) -> list[str]:
    return re.findall(r'src="data:image/png;base64,([^"]+)"', page)


def test_sweep_is_ranked_with_values_and_steps_saved(sweep: Path) -> None:
    path = write_sweep_report(sweep)
    page = path.read_text()
    assert path == sweep / "report.html"
    assert trial_order(page) == [2, 0, 1, 3]
    assert load_sweep(sweep).varied() == ["model.head.kind", "optim.lr"]
    assert f"Trial 2: {METRIC} 0.312" in page
    assert (
        f"head: best is trial 2, {METRIC} 0.312, with model.head.kind=conv, optim.lr=0.0016,"
        " flow.time.kind=log_snr." in page
    )
    assert (
        "4 trials (2 finished, 1 stopped, 1 failed); early stopping saved 17% of the full-budget"
        " steps" in page
    )
    # 1 - 1000 / 1200, the failed trial apart
    assert "<b>17 %</b><span>of the full budget saved" in page
    assert "1,000</b><span>steps trained of 1,200" in page
    assert "not in it: 1 failed after 0 steps." in page
    assert "4</b><span>trials: 2 finished, 1 stopped, 1 failed" in page
    assert "flow/cos 0.08 stayed below 0.3 for 2 probes" in page
    assert "The same in all trials: flow.time.kind = log_snr." in page
    assert "Heads &lt;compared&gt;" in page


def test_loss_column_falls_back_to_the_training_rows(sweep: Path) -> None:
    trial = load_sweep(sweep).trials[0]
    assert "loss/flow" not in trial.metrics
    assert trial.value("loss/flow") == pytest.approx(1.6)
    cells = re.search(r'<tr id="trial-2".*?</tr>', write_sweep_report(sweep).read_text(), re.S)
    assert cells is not None
    assert "1.600" in cells[0]


def test_page_is_self_contained_and_escaped(sweep: Path) -> None:
    page = write_sweep_report(sweep).read_text()
    assert "<b>bold</b>" not in page
    assert "&lt;b&gt;bold&lt;/b&gt; &amp; a $5 square" in page
    assert "RuntimeError: &lt;shape&gt; mismatch" in page
    assert not re.search(r'(?:src|href)="(?!data:)', page)
    assert "url(" not in page
    assert "<script" not in page
    assert not list(sweep.glob(".report-*"))


def test_sample_grid_rows_are_trials_best_first(sweep: Path) -> None:
    strip(sweep / "2" / "samples" / "step_000200.png", [1, 2])  # older than the one shown
    strip(sweep / "2" / "samples" / "step_000400.png", [33, 44])
    page = write_sweep_report(sweep).read_text()
    assert re.findall(r'<th scope="row">trial (\d+)<span>', page) == ["2", "0", "1"]
    assert "0.312 at step 400" in page
    drawn = pictures(page)
    assert len(drawn) == 6
    for encoded, colour in zip(drawn[:2], (33, 44), strict=True):
        (sweep / "tile.png").write_bytes(base64.b64decode(encoded))
        picture = np.asarray(Image.open(sweep / "tile.png"))
        assert picture.shape == (8, 8, 3)
        assert (picture == colour).all()
    assert "Not shown (no pictures): trial 3." in page


def test_other_prompts_are_not_compared(sweep: Path) -> None:
    (sweep / "0" / "samples" / "prompts.txt").write_text("another\nprompt\n")
    page = write_sweep_report(sweep).read_text()
    assert re.findall(r'<th scope="row">trial (\d+)<span>', page) == ["2", "1"]
    assert "Not shown (other prompts, so not comparable): trial 0." in page


def test_goal_maximize_turns_the_order(sweep: Path) -> None:
    text = (sweep / "sweep.yaml").read_text().replace("minimize", "maximize")
    (sweep / "sweep.yaml").write_text(text)
    assert trial_order(write_sweep_report(sweep).read_text()) == [1, 0, 2, 3]
    loaded = load_sweep(sweep)
    assert loaded.best is not None
    assert loaded.best.number == 0  # a finished trial goes before a stopped one


def test_first_of_several_metrics_ranks(sweep: Path) -> None:
    (sweep / "sweep.yaml").write_text(
        "metric: [{name: shoot/nmse, goal: minimize}, {name: flow/cos, goal: maximize}]\n"
    )
    loaded = load_sweep(sweep)
    assert loaded.metric == Metric("shoot/nmse", "minimize")
    assert loaded.name == "head"


def test_nan_metric_ranks_after_numbers(sweep: Path) -> None:
    rows = [json.loads(line) for line in (sweep / "trials.jsonl").read_text().splitlines()]
    rows[2]["metrics"][METRIC] = float("nan")
    jsonl(sweep / "trials.jsonl", rows)
    assert trial_order(write_sweep_report(sweep).read_text()) == [0, 1, 2, 3]


def test_running_sweep_without_a_value(tmp_path: Path) -> None:
    (tmp_path / "sweep.yaml").write_text("metric: {name: shoot/nmse}\n")
    page = write_sweep_report(tmp_path).read_text()
    assert "No trial has a value of shoot/nmse yet" in page
    jsonl(
        tmp_path / "trials.jsonl",
        [row(0, "running", 100, {"shoot/nmse": 0.9})],
        tail='{"trial": 1, "par',
    )
    page = write_sweep_report(tmp_path).read_text()
    assert trial_order(page) == [0]
    assert "this is the best so far, at step 100" in page
    assert "not in it: 1 running at 100 steps." in page


def test_default_commands_name_the_best_trial(sweep: Path) -> None:
    page = write_sweep_report(sweep).read_text()
    assert f"python -m flowray.train {sweep}/best.yaml train.steps=1600" in page
    assert f"python -m flowray.sample {sweep}/2 &#39;a small red circle&#39;" in page
    assert f"python -m flowray.dashboard {sweep}" in page


def test_curves_mark_early_stops_only(sweep: Path) -> None:
    loaded = load_sweep(sweep)
    svg = figures.sweep_curves("nmse", loaded.trials, loaded.best, METRIC).decode()
    assert "ended early" in svg
    assert "1: predicting the mean" in svg
    whole = [trial for trial in loaded.trials if trial.status == "finished"]
    assert "ended early" not in figures.sweep_curves("nmse", whole, loaded.best, METRIC).decode()


def test_figures_take_any_text_and_repeat_byte_for_byte() -> None:
    text = r"$\frac_2$"  # would fail as a formula
    curves = {f"{name} {text}": [(1, 0.5), (2, 0.4)] for name in "ab"}
    first = figures.lines(f"title {text}", curves, xlabel=f"x {text}")
    assert first.count(text.encode()) >= 4
    assert first == figures.lines(f"title {text}", curves, xlabel=f"x {text}")


def test_run_page_shows_card_numbers_and_samples(tmp_path: Path) -> None:
    make_run(tmp_path / "run", [1.2, 0.9, 0.4])
    strip(tmp_path / "run" / "samples" / "step_000100.png", [5, 6])
    page = write_run_report(tmp_path / "run").read_text()
    assert "PURPOSE: see &lt;why&gt;" in page
    assert "not the header" not in page
    assert "<h3>Goal</h3>" in page
    assert "<h3>Next step</h3>" not in page  # nothing was written there
    assert re.findall(r'<th scope="row">(step \d+)<span>', page) == ["step 100", "step 300"]
    assert len(pictures(page)) == 4
    assert re.search(
        r'<th scope="row">shoot/nmse</th><td class="num">0.500</td><td class="num">0.400</td>', page
    )
    assert "shoot/nmse over steps against 1 (predicting the mean)" in page
    assert "flow/nmse in ten bins of t" in page
    assert page.index(">flow/nmse_t0<") > page.index("By time bin")
    assert "Last row at step 300." in page


@pytest.mark.parametrize("over", ["", "_all"])
def test_a_picture_against_a_blur_stands_before_squared_error(tmp_path: Path, over: str) -> None:
    make_run(tmp_path / "run", [1.2, 0.4])
    path = tmp_path / "run" / "probes.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    own = {f"shoot/diversity{over}": 0.5, f"source/width{over}": 0.2}
    told = {f"source/separation@{t}": 1 - float(t) for t in ("0", "0.25", "0.5")}
    blind = dict.fromkeys(told, 0.125) | {"shoot/energy": 1.25}
    for row, energy in zip(rows, (1.1, 0.75), strict=True):
        row |= {
            f"ema/{key}": value for key, value in (own | told | {"shoot/energy": energy}).items()
        }
        row |= {f"ema/trivial/{key}": value for key, value in blind.items()}
        row |= {"ema/trivial/shoot/nmse": 2.0}
    jsonl(path, rows)
    page = write_run_report(tmp_path / "run").read_text()
    tiles = re.findall(r'<div class="tile"><b>([^<]*)</b><span>([^<]*)', page)
    assert tiles[:3] == [
        ("0.750", "shoot/energy"),
        ("0.500", f"shoot/diversity{over}"),
        ("0.400", "shoot/nmse"),
    ]
    panels = dict(re.findall(r'<img src="([^"]*)" alt="(\w+/\w+) over steps', page))
    drawn = {name: base64.b64decode(src.split(",")[1]).decode() for src, name in panels.items()}
    assert list(drawn)[:3] == ["shoot/energy", f"shoot/diversity{over}", "shoot/nmse"]
    assert {f"source/width{over}", "source/separation"} <= drawn.keys()
    assert "without the flow" in drawn["shoot/energy"]
    levels = ("@0", "@0.25", "@0.5", "0.125: a blind source")
    assert all(words in drawn["source/separation"] for words in levels)
    stage = re.search(r'<th scope="row">200</th>(.*?)</tr>', page)
    assert stage is not None
    assert re.findall(r">([^<]+)</td>", stage[1]) == ["0.400", "–", "2.000", "0.750"]


def test_scores_of_pictures_stand_on_the_page(tmp_path: Path) -> None:
    make_run(tmp_path / "run", [1.0])
    closed = {"shapes": {"all_correct": 0.37, "mean_attribute_accuracy": 0.61}}
    both = closed | {"open": {"named": 0.43, "coverage_excess": 0.127}}
    for told, shown in (
        (closed, ["37 %", "61 %"]),
        (both, ["43 %", "0.127", "37 %", "61 %"]),
        ({"neighbours": {"caption_accuracy": 0.29}}, ["29 %"]),
        ({"shapes": None, "open": {"named": None}}, []),
        ([], []),
    ):
        (tmp_path / "run" / "eval.json").write_text(json.dumps(told))
        page = write_run_report(tmp_path / "run").read_text()
        assert re.findall(r"<b>([^<]*)</b><span>[^<]*\(flowray.eval\)", page) == shown


def test_the_card_is_rendered_and_nothing_in_it_is_live(tmp_path: Path) -> None:
    make_run(tmp_path / "run", [1.0])
    table = "| metric | value |\n|---|---|\n| `flow/cos` | 0.7 |\n"
    words = (
        "- **keep** it\n- <script>alert(1)</script>\n- [x](javascript:alert(2)) &amp; <img src=x"
        " onerror=y>\n\n![strip](samples/s.png)"
    )
    (tmp_path / "run" / "card.md").write_text(
        f"# Card\n\n## Metrics\n\n{table}\n## Conclusion\n\n{words}\n"
    )
    page = write_run_report(tmp_path / "run").read_text()
    assert "<td><code>flow/cos</code></td>" in page
    assert "<strong>keep</strong> it" in page
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page
    assert "&lt;img src=x onerror=y&gt;" in page
    assert not re.search(r'<script|<img src=x|href="javascript|src="(?!data:)', page)
    assert "<p>strip</p>" in page


def test_last_numbers_say_what_is_normal(tmp_path: Path) -> None:
    key = describe("flow/cos")
    assert key is not None
    assert key.good is not None
    jsonl(tmp_path / "metrics.jsonl", [{"step": 1, "own/number": 3.0}])
    low = key.good[0]
    for step, value, marked in (
        (500, low - 0.1, True),
        (500, low + 0.1, False),
        (50, low - 0.1, False),
    ):
        jsonl(
            tmp_path / "probes.jsonl", [{"step": step, "ema/flow/cos": value, "ema/flow/nmse": 0.6}]
        )
        page = write_run_report(tmp_path).read_text()
        line = re.search(r'<th scope="row">flow/cos</th>.*?</tr>', page, re.S)
        assert line is not None
        # as the doctor says, who does not blame a run of its first steps
        assert (">warn<" in line[0]) is marked
        assert str(escape(key.formula)) in line[0]
        assert f"{key.good[0]:g} to {key.good[1]:g}" in line[0]
    assert '<th scope="row">own/number</th><td class="num">3.000</td>' in page


def test_long_runs_show_first_and_last_samples(tmp_path: Path) -> None:
    make_run(tmp_path / "run", [1.0])
    for step in range(100, 4100, 100):
        strip(tmp_path / "run" / "samples" / f"step_{step:06d}.png", [1, 2], side=4)
    page = write_run_report(tmp_path / "run").read_text()
    shown = re.findall(r'<th scope="row">step ([\d,]+)<span>', page)
    assert (shown[0], shown[4], len(shown)) == ("100", "4,000", 24)  # five open, the rest folded
    assert "24 of 40 strips" in page


def test_run_with_nothing_but_a_config(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("name: x\n")
    (tmp_path / "samples").mkdir()
    (tmp_path / "samples" / "step_000100.png").write_bytes(b"\x89PNG\r\n\x1a\nhalf")
    page = write_run_report(tmp_path).read_text()
    for words in ("No training rows were written", "No probe has run", "No pictures were written"):
        assert words in page


def test_truncated_last_line_is_dropped_and_a_bad_middle_line_noted(tmp_path: Path) -> None:
    path = tmp_path / "7" / "metrics.jsonl"
    jsonl(path, [{"step": 1}, {"step": 2}], tail='{"step": 3, "lo')
    run = load_run(path.parent)
    assert (run.metrics, run.notes) == (({"step": 1}, {"step": 2}), ())
    path.write_bytes(b'{"step": 1}\n\xff\xfe{"st\n{"step": 2}\n')
    run = load_run(path.parent)
    assert [r["step"] for r in run.metrics] == [1, 2]
    assert list(run.notes) == ["7/metrics.jsonl: skipped 1 unreadable line(s), the first is line 2"]
    assert run.notes[0] in write_run_report(path.parent).read_text()
    assert load_run(tmp_path / "absent").metrics == ()


def test_samples_that_were_left_out_are_told(tmp_path: Path) -> None:
    bad = [{"split": "train", "cause": cause} for cause in ("no caption", "cut off", "cut off")]
    jsonl(tmp_path / "bad_samples.jsonl", [*bad, {"split": "val", "cause": "no caption"}])
    run = load_run(tmp_path)
    assert run.notes == (
        "bad_samples.jsonl: 3 train samples left out: cut off x2, no caption x1",
        "bad_samples.jsonl: 1 val samples left out: no caption x1",
    )
    assert all(note in write_run_report(tmp_path).read_text() for note in run.notes)


def test_large_pictures_are_scaled_down(tmp_path: Path) -> None:
    strip(tmp_path / "s.png", [9, 8, 7], side=300)
    tiles = figures.tiles(tmp_path / "s.png")
    (tmp_path / "t.png").write_bytes(tiles[0])
    assert len(tiles) == 3
    assert Image.open(tmp_path / "t.png").size == (256, 256)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "–"),
        (0.0, "0"),
        (0.3121, "0.312"),
        (-0.25, "-0.250"),
        (1e-9, "1.00e-09"),
        (12345.6, "12,346"),
        (3e7, "3.00e+07"),
    ],
)
def test_numbers_read_well(value: float | None, text: str) -> None:
    assert number_text(value) == text


def test_command_tells_sweep_from_run(sweep: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(sweep)]) == 0
    (sweep / "0" / "config.yaml").write_text(dump_recipe(Recipe()))
    assert main([str(sweep / "0")]) == 0
    assert capsys.readouterr().out.split() == [
        str(sweep / "report.html"),
        str(sweep / "report.md"),
        str(sweep / "0" / "report.html"),
    ]
    assert "Sweep report" in (sweep / "report.html").read_text()
    assert "<h1>head/0</h1>" in (sweep / "0" / "report.html").read_text()


def test_command_refuses_other_folders(sweep: Path) -> None:
    with pytest.raises(
        InputError, match=r"neither a sweep nor a run; .*type flowray.report .*head$"
    ):
        main([str(sweep.parent)])
    with pytest.raises(InputError, match="no such folder, did you mean head\\?"):
        main([str(sweep.parent / "heads")])
    with pytest.raises(InputError, match="a file; want a sweep"):
        main([str(sweep / "sweep.yaml")])


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("metric: [\n", r"sweep.yaml:\d: not valid YAML"),
        ("name: x\n", "metric: got None, want"),
        ("metric: {name: a, goal: least}\n", "metric.goal: got 'least', want minimize or maximize"),
        ("- 1\n", "want a mapping with the key metric, got list"),
    ],
)
def test_bad_sweep_file_is_one_line(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "sweep.yaml").write_text(text)
    with pytest.raises(InputError, match=said) as error:
        write_sweep_report(tmp_path)
    assert "\n" not in str(error.value)


def test_a_page_that_cannot_be_written_leaves_the_old_one(sweep: Path) -> None:
    (sweep / "report.html").mkdir()  # os.replace refuses, even for root
    with pytest.raises(InputError, match="cannot be written"):
        write_sweep_report(sweep)
    assert not list(sweep.glob(".report-*"))


@pytest.mark.parametrize("page", ["report.html", "report.md"])
def test_command_looks_first_whether_it_can_write(sweep: Path, page: str) -> None:
    (sweep / page).mkdir()
    with pytest.raises(InputError, match=f"{page}: is a folder"):
        main([str(sweep)])
    assert not any((sweep / name).is_file() for name in ("report.html", "report.md"))
