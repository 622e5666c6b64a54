"""What a sweep's report concludes: runner-up and noise, front, hours, the best recipe as
YAML, refusals, what a person wrote.
"""

from __future__ import annotations

import html
import itertools
import json
import math
import re
import shlex
import statistics
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from sweep_records import LR, METRIC, make

from flowray.cli.dashboard import main as dashboard
from flowray.config.load import dump_recipe, load_recipe, override_recipe
from flowray.report import analysis
from flowray.report.ending import ending
from flowray.report.load import load_sweep
from flowray.report.results import Sweep
from flowray.report.sweep_page import (
    hand_written,
    sweep_commands,
    sweep_verdict,
    write_sweep_report,
)
from flowray.sweepconfig.file import dump_sweep
from flowray.sweepconfig.file import load_sweep as load_file
from flowray.sweepconfig.sweep import Metric


def seeded(lr: float, values: list[float]) -> dict[str, Any]:
    repeats = [{METRIC: value} for value in values]
    return {
        "params": {"optim.lr": lr},
        "metrics": {METRIC: statistics.fmean(values)},
        "repeats": repeats,
    }


@pytest.mark.parametrize(
    ("second", "words"), [([0.62, 0.66, 0.64], "a clear win"), ([0.36, 0.52, 0.44], "a tie")]
)
def test_runner_up_is_held_against_the_noise_between_seeds(
    tmp_path: Path, second: list[float], words: str
) -> None:
    first = [0.40, 0.44, 0.36]
    sweep = load_sweep(
        make(tmp_path / "s", [seeded(1e-3, second), seeded(2e-3, first), seeded(3e-3, [0.9])])
    )
    assert sweep.best is not None
    assert sweep.best.number == 1
    pooled = math.sqrt((statistics.variance(first) + statistics.variance(second)) / 2)
    assert analysis.noise(sweep.arms()) == pytest.approx(pooled)
    gap, error = statistics.fmean(second) - statistics.fmean(first), pooled * math.sqrt(2 / 3)
    assert (gap > 2 * error) is (words == "a clear win")
    said = analysis.runner_up_words(sweep)
    assert said.startswith(
        f"Runner-up: trial 0, {METRIC} {statistics.fmean(second):.3g}, behind by {gap:.2g}. "
    )
    assert words in said
    assert f"{METRIC} 0.4 ± 0.04 over 3 seeds, with" in sweep_verdict(sweep)


def test_trials_that_differ_in_the_seed_are_one_setting(tmp_path: Path) -> None:
    """A lucky seed does not win: the setting with the better mean does."""
    values = [(1e-3, 0, 0.30), (1e-3, 1, 0.70), (2e-3, 0, 0.40), (2e-3, 1, 0.44)]
    trials = [
        {"params": {"optim.lr": lr, "seed": seed}, "metrics": {METRIC: value}}
        for lr, seed, value in values
    ]
    sweep = load_sweep(make(tmp_path / "s", trials))
    assert [arm.values for arm in sweep.arms()] == [(0.40, 0.44), (0.30, 0.70)]
    assert "(mean 0.42 ± 0.028 over 2 seeds)" in sweep_verdict(sweep)
    assert sweep.best is not None
    assert sweep.best.number == 2


def test_without_repeats_the_noise_is_not_known(tmp_path: Path) -> None:
    sweep = load_sweep(make(tmp_path / "s", [seeded(1e-3, [0.5]), seeded(2e-3, [0.4])]))
    assert analysis.noise(sweep.arms()) is None
    assert "is not known" in analysis.runner_up_words(sweep)
    alone = load_sweep(make(tmp_path / "s", [seeded(1e-3, [0.5])]))
    assert analysis.runner_up_words(alone) == ""


def test_what_the_dashboards_draw_is_named_with_the_command(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = make(tmp_path / "a sweep", [seeded(1e-3, [0.5]), seeded(2e-3, [0.4])])
    page = write_sweep_report(folder).read_text()
    words = "What each parameter did, parallel coordinates and importance are in optuna-dashboard: "
    (shown,) = re.findall(rf"{words}<code>(.*?)</code>", page)
    (said,) = re.findall(rf"{words}`(.*?)`", (folder / "report.md").read_text())
    assert html.unescape(shown) == said
    program, flag, module, *typed = shlex.split(said)
    assert (program, flag, module) == ("python", "-m", "flowray.dashboard")
    assert dashboard([*typed, "--plan"]) == 0  # it takes the folder
    assert str(folder) in capsys.readouterr().out
    alone = write_sweep_report(make(tmp_path / "s", [{"metrics": {METRIC: 0.4}}])).read_text()
    assert words not in alone  # of a sweep without parameters there is nothing to draw


def test_a_long_error_is_short_in_the_table_and_whole_among_the_failures(tmp_path: Path) -> None:
    """In the table a long one made its row as high as a page, with the error itself off a
    phone's screen.
    """
    error = "OutOfMemoryError: " + "no memory " * 60
    trials = [
        {"params": {"w": 1}, "metrics": {METRIC: 0.4}},
        {"params": {"w": 2}, "status": "failed", "error": error},
    ]
    page = write_sweep_report(make(tmp_path / "s", trials)).read_text()
    assert page.count(f'<td class="words"><span title="{error}">') == 1
    assert f'<td class="error">{error}</td>' in page
    assert re.search(r"td\.words span \{[^}]*-webkit-line-clamp: 2", page)


def two_metrics(tmp_path: Path, points: np.ndarray) -> Sweep:
    trials = [
        {"params": {"k": float(i)}, "metrics": {METRIC: float(a), "eval/all_correct": float(b)}}
        for i, (a, b) in enumerate(points)
    ]
    metrics = [
        {"name": METRIC, "goal": "minimize"},
        {"name": "eval/all_correct", "goal": "maximize"},
    ]
    return load_sweep(make(tmp_path / "s", trials, metric=metrics[0], more_metrics=metrics[1:]))


def test_front_is_what_no_other_trial_beats(tmp_path: Path) -> None:
    points = np.random.default_rng(1).normal(size=(40, 2))
    sweep = two_metrics(tmp_path, points)
    beaten = [any((a <= x and b >= y) and (a, b) != (x, y) for a, b in points) for x, y in points]
    wanted = {number for number, is_beaten in enumerate(beaten) if not is_beaten}
    assert {trial.number for trial in analysis.front(sweep)} == wanted
    assert 1 < len(wanted) < 40
    page = write_sweep_report(sweep.path).read_text()
    assert "<h2>Pareto front</h2>" in page
    assert f"eval/all_correct over {METRIC}, the front joined" in page
    assert len(re.findall(r'<th scope="row">\d+ (?:best|front)</th>', page)) >= len(wanted)


def test_the_verdict_of_several_metrics_says_which_it_is_by(tmp_path: Path) -> None:
    points = np.array([[0.5, 0.9], [0.4, 0.8], [0.6, 0.7], [0.45, 0.85]])
    sweep = two_metrics(tmp_path, points)
    assert "best is trial 1" in sweep_verdict(sweep)
    assert (
        "That is by the first metric; trial 3, 0 trade it for eval/all_correct (the front). "
        in sweep_verdict(sweep)
    )
    alone = two_metrics(tmp_path, points[1:3])
    assert "no other finished trial is better in eval/all_correct. " in sweep_verdict(alone)


def test_the_best_setting_for_at_most_so_many_calls(tmp_path: Path) -> None:
    """Of equal score the cheaper one, of equal calls the better one; no trial that has not
    finished, none without a value.
    """
    points = [(5, 0.6), (10, 0.8), (10, 0.7), (20, 0.8), (40, 0.7), (80, 0.9), (4, None)]
    trials = [
        {"params": {"k": i}, "metrics": {"eval/named": named, analysis.CALLS: float(calls)}}
        for i, (calls, named) in enumerate(points)
    ]
    trials.append(trials[0] | {"status": "failed", "metrics": {"eval/named": 1.0}})
    metrics = [{"name": "eval/named"}, {"name": analysis.CALLS}]
    metrics = [dict(Metric(**each)) for each in metrics]
    folder = make(tmp_path / "s", trials, metric=metrics[0], more_metrics=metrics[1:])
    sweep = load_sweep(folder)
    found = [(calls, trial.number) for calls, trial in analysis.best_for_calls(sweep)]
    assert found == [(5, 0), (10, 1), (80, 5)]
    page = write_sweep_report(folder).read_text()
    line = analysis.best_for_calls_words(sweep)
    assert line.endswith("calls a picture: 5: 0.6 (trial 0), 10: 0.8 (trial 1), 80: 0.9 (trial 5).")
    assert line in page
    assert line in (folder / "report.md").read_text()
    assert " ".join(" ".join(ending(sweep, folder / "report.html", 80)).split()).count(line) == 1
    assert f"eval/named over {analysis.CALLS}, the front joined" in page
    assert analysis.best_for_calls(load_sweep(make(tmp_path / "t", [seeded(1e-3, [0.5])]))) == []


def test_three_metrics_are_drawn_in_pairs(tmp_path: Path) -> None:
    names = (METRIC, "ema/flow/cos", "ema/std/mean")
    trials = [
        {"metrics": dict(zip(names, values, strict=True))}
        for values in ((0.5, 0.9, 0.8), (0.4, 0.8, 0.7), (0.6, 0.7, 0.9))
    ]
    metrics = [
        {"name": name, "goal": goal}
        for name, goal in zip(names, ("minimize", "maximize", "maximize"), strict=True)
    ]
    page = write_sweep_report(make(tmp_path / "s", trials, metric=metrics)).read_text()
    assert [f"{y} over {x}" in page for x, y in itertools.combinations(names, 2)] == [True] * 3
    assert "the front joined" not in page  # of three metrics a pair shows no edge


def test_a_setting_that_was_trained_again_from_the_same_seed_says_nothing_of_the_noise(
    tmp_path: Path,
) -> None:
    """Of such sweeps there are folders from before no setting was drawn twice."""
    grid, pooled = {"model.head.kind": "grid"}, {"model.head.kind": "pooled"}
    trials = [
        {"params": params, "metrics": {METRIC: value}}
        for params, value in ((grid, 0.4), (pooled, 0.5), (grid, 0.4), (grid, 0.4))
    ]
    sweep = load_sweep(make(tmp_path / "s", trials))
    assert [arm.values for arm in sweep.arms()] == [(0.4,), (0.5,)]
    assert analysis.noise(sweep.arms()) is None
    assert "clear win" not in analysis.runner_up_words(sweep)


def test_a_searched_seed_tells_the_trials_of_a_setting_apart(tmp_path: Path) -> None:
    values = {(0, 1): 0.4, (1, 1): 0.44, (0, 2): 0.6, (1, 2): 0.64, (1, 3): 0.61}
    trials = [
        {"params": {"seed": seed, "optim.lr": lr / 1e3}, "metrics": {METRIC: value}}
        for (seed, lr), value in values.items()
    ]
    # again, on another machine
    trials += [{"params": {"seed": 1, "optim.lr": 1e-3}, "metrics": {METRIC: 0.9}}]
    sweep = load_sweep(make(tmp_path / "s", trials))
    assert [arm.values for arm in sweep.arms()] == [(0.4, 0.44), (0.61,), (0.6, 0.64)]


def test_the_table_and_the_next_command_know_of_seeds(tmp_path: Path) -> None:
    folder = make(
        tmp_path / "s",
        [seeded(1e-3, [0.40, 0.44, 0.36]) | {"budget_steps": 1200, "last_step": 1200}],
        seeds=3,
    )
    (folder / "best.yaml").write_text("base: sweep_proxy\n")
    page = write_sweep_report(folder).read_text()
    assert '0.400 <span class="soft">± 0.04</span>' in page
    assert "| 0.400 ± 0.04 |" in (folder / "report.md").read_text()
    assert "train.steps=1600" in page  # four times the 400 steps of one seed


def test_where_all_trials_failed_the_first_error_is_the_verdict(tmp_path: Path) -> None:
    folder = make(
        tmp_path / "s",
        [{"status": "failed", "last_step": 7, "error": "ValueError: latent is (4, 8, 8)"}],
    )
    page = write_sweep_report(folder).read_text()
    verdict = page.partition("<h2>Verdict</h2>")[2].partition("<h2>Trials")[0]
    assert "No trial has a value of ema/shoot/nmse</p>" in verdict
    assert "Trial 0 failed at step 7: ValueError: latent is (4, 8, 8)" in verdict
    assert "best trial first" not in page


def test_what_was_expected_stands_beside_what_came_out(tmp_path: Path) -> None:
    """From the comment block on top of a sweep file to the verdict of its report."""
    sweep = load_file("kl")
    expects = "a flat best region between 0.1 and 4, worse on both sides."
    assert sweep.card.expects.startswith(expects)
    assert sweep.card.tags == ("ablation", "kl")
    folder = make(tmp_path / "s", [seeded(1e-3, [0.5])])
    (folder / "sweep.yaml").write_text(dump_sweep(sweep))
    page = write_sweep_report(folder).read_text()
    assert (
        f"Expected beforehand: {expects}"
        in page.partition("<h2>Verdict</h2>")[2].partition("<h2>Trials")[0]
    )
    text = (folder / "report.md").read_text()
    assert (
        "- KEY_DIFFS: loss.kl.weight 0 to 40 (mean over latent dims), loss.kl.form box or"
        " gaussian\n" in text
    )
    assert "- PURPOSE: the weight and the form of the KL on the source" in text


def test_one_metric_has_no_front(tmp_path: Path) -> None:
    assert analysis.front(load_sweep(make(tmp_path / "s", [seeded(1e-3, [0.5])]))) == []


def test_hours_count_devices_and_what_early_stops_saved(tmp_path: Path) -> None:
    resources = {"resources": {"num_workers": 2, "cpus_per_worker": 4, "gpus_per_worker": 0.5}}
    trials = [
        {"seconds": 3600.0, "metrics": {METRIC: 0.5}, "config": resources},
        {
            "seconds": 1800.0,
            "status": "stopped",
            "last_step": 100,
            "metrics": {METRIC: 0.9},
            "config": resources,
        },
    ]
    assert analysis.hours(load_sweep(make(tmp_path / "s", trials))) == analysis.Hours(
        "GPU-hours", 1.5, 0.5 * 3
    )
    for trial in trials:
        trial["config"] = {
            "resources": {"num_workers": 2, "cpus_per_worker": 4, "gpus_per_worker": 0}
        }
    assert analysis.hours(load_sweep(make(tmp_path / "t", trials))) == analysis.Hours(
        "core-hours", 12.0, 4.0 * 3
    )


def test_best_recipe_as_yaml_and_as_a_command_is_the_best_trial(tmp_path: Path) -> None:
    """Both are read back by the recipe loader and make the recipe that the trial had."""
    fixed = {"flow.time.kind": "log_snr"}
    params = {
        "optim.lr": 1e-05,
        "model.head.kind": "conv",
        "flow.time.low": -7.25,
        "train.ema": 0.99,
        "data.limit": 128,
    }
    sweep = load_sweep(
        make(tmp_path / "s", [{"params": params, "metrics": {METRIC: 0.4}}], set=fixed)
    )
    base = load_recipe("sweep_proxy").recipe
    wanted = override_recipe(base, {**fixed, **params})
    text = analysis.best_diff(sweep)
    (tmp_path / "best.yaml").write_text(text)
    assert load_recipe(str(tmp_path / "best.yaml")).recipe == wanted
    assert f"lr: 1.0e-05  # {base.optim.lr} in the base" in text
    program, module, verb, source, *overrides = shlex.split(
        sweep_commands(sweep)["The same recipe from its base"]
    )
    assert (program, module, verb) == ("python", "-m", "flowray.train")
    assert load_recipe(source, overrides).recipe == override_recipe(wanted, {"name": "s-best"})


def test_a_sweep_over_pictures_ends_with_the_way_to_draw_them(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    base = load_recipe("sweep_proxy").recipe
    (run / "config.yaml").write_text(dump_recipe(base))
    trials = [
        {
            "params": {"sample.guidance_scale": s},
            "metrics": {"eval/all_correct": 0.1 * s, "eval/size": 1.0},
        }
        for s in (1.0, 3.0)
    ]
    metric = {"name": "eval/all_correct", "goal": "maximize"}
    sweep = load_sweep(make(tmp_path / "s", trials, task="sample", base=str(run), metric=metric))
    command = (
        "python -m flowray.sample {} 'a small red circle on a white background' --set"
        " sample.guidance_scale=3"
    )
    assert sweep_commands(sweep) == {"Sample with the best setting": command.format(run)}
    assert f"guidance_scale: 3  # {base.sample.guidance_scale} in the base" in analysis.best_diff(
        sweep
    )


def test_what_a_person_wrote_stays_and_shows(tmp_path: Path) -> None:
    folder = make(tmp_path / "s", [seeded(1e-3, [0.5])])
    page = write_sweep_report(folder).read_text()
    report = folder / "report.md"
    assert "keep / reject / re-verify: not judged yet" in page
    assert list(hand_written(report)) == ["Conclusion", "Next step"]
    text = report.read_text().replace(
        "- keep / reject / re-verify: not judged yet", "**keep** <script>x</script>"
    )
    report.write_text(text + "\n## Doubts\n\n- only one seed\n")
    make(folder, [seeded(1e-3, [0.5]), seeded(2e-3, [0.25])])
    page = write_sweep_report(folder).read_text()
    assert "Trial 1: ema/shoot/nmse 0.250" in page  # the rest is new
    assert "<strong>keep</strong> &lt;script&gt;" in page
    assert "<h3>Doubts</h3>" in page
    assert "only one seed" in page
    again = report.read_text()
    assert hand_written(report) == {
        "Conclusion": "**keep** <script>x</script>",
        "Next step": "- not written yet",
        "Doubts": "- only one seed",
    }
    write_sweep_report(folder)
    assert report.read_text() == again


def test_markdown_has_a_row_for_every_trial(tmp_path: Path) -> None:
    trials = [
        seeded(1e-3, [0.5]),
        seeded(2e-3, [0.25]),
        {"status": "failed", "error": "ValueError: a|b", "params": {"optim.lr": 1.0}},
    ]
    write_sweep_report(make(tmp_path / "s", trials))
    text = (tmp_path / "s" / "report.md").read_text()
    rows = re.findall(r"(?m)^\| (\d+)( \*\*best\*\*)? \|.*$", text)
    assert rows == [("1", " **best**"), ("0", ""), ("2", "")]
    assert "ValueError: a\\|b |" in text
    assert "- trial 2 at step 400: ValueError: a|b" in text
    head, rule = re.findall(r"(?m)^\|(?: trial |---).*$", text)
    assert head.count("|") == rule.count("|")


def test_heat_map_takes_the_colours_of_the_findings(tmp_path: Path) -> None:
    healthy = {METRIC: 0.4, "ema/flow/cos": 0.8, "ema/std/mean": 0.9, "ema/mu/rms": 0.5}
    healthy |= {"ema/shoot/energy": 0.7, "ema/source/separation@0.25": 0.6}
    collapsed = {
        METRIC: 1.4,
        "ema/shoot/skill": -0.8,
        "ema/flow/cos": 0.99,
        "ema/std/mean": 0.05,
        "ema/mu/rms": 0.01,
    }
    folder = make(
        tmp_path / "s",
        [{"metrics": healthy}, {"metrics": collapsed}, {"metrics": healthy, "config": {}}],
    )
    judged = [{"key": "flow/cos", "value": 0.8, "side": "below", "bound": 0.9, "of": ""}]
    visit = {
        "id": "plateau",
        "severity": "warn",
        "evidence": "flow/cos 0.8; std/mean 0.9",
        "cause": "",
        "fix": "",
        "judged": judged,
    }
    (folder / "2" / "findings.jsonl").write_text(
        json.dumps({"step": 400, "findings": [visit]}) + "\n"
    )
    keys, rows = analysis.heat_map(load_sweep(folder).trials)
    cells = {trial.number: dict(zip(keys, row, strict=True)) for trial, row in rows}
    squared = ["shoot/nmse", "shoot/skill", "flow/cos", "std/mean", "mu/rms"]
    assert keys == ["shoot/energy", *squared, "source/separation@0.25"]
    assert [cells[0][key].word for key in keys] == ["good", "good", "", "good", "good", "", ""]
    assert cells[1]["std/mean"].word == "bad"
    assert cells[1]["std/mean"].why.startswith("source_collapsed: std/mean 0.05, below 0.3")
    assert cells[1]["shoot/skill"].word == "bad"
    assert cells[1]["flow/cos"].word == "good"  # named in the evidence, and not what is wrong
    # above 1, of which no rule says more than its skill does
    assert cells[1]["shoot/nmse"].word == ""
    assert cells[2]["flow/cos"].word == "warn"  # as the doctor said; and it judged nothing else
    assert cells[2]["std/mean"].word == "good"
    page = write_sweep_report(folder).read_text()
    assert re.search(
        r'<td class="num heat bad" title="std/mean, source_collapsed[^"]*">0\.050</td>', page
    )
    head = re.search(r'aria-label="trials">.*?<thead><tr>(.*?)</tr>', page, re.S)
    assert head is not None
    assert "shoot/energy" in re.sub(r"<wbr>", "", head[1])


def test_pictures_of_another_seed_are_not_compared(tmp_path: Path) -> None:
    seeds = (1234, 1234, 7)
    folder = make(
        tmp_path / "s",
        [{"metrics": {METRIC: 0.5 + s}, "config": {"probes": {"seed": s}}} for s in seeds],
    )
    for number in range(3):
        (folder / str(number) / "samples").mkdir()
        Image.fromarray(np.zeros((8, 16, 3), np.uint8)).save(
            folder / str(number) / "samples" / "step_000400.png"
        )
        (folder / str(number) / "samples" / "prompts.txt").write_text("a\nb\n")
    page = write_sweep_report(folder).read_text()
    shown = re.findall(r'<th scope="row">trial (\d+)<span>', page)
    assert shown == ["2"]  # the best one's seed counts
    assert "Not shown (another seed of the pictures, so not comparable): trial 0, 1." in page


def test_long_sweeps_fold_the_rest_of_the_table(tmp_path: Path) -> None:
    trials = [{"params": {"k": float(n)}, "metrics": {METRIC: 0.1 + n}} for n in range(45)]
    page = write_sweep_report(make(tmp_path / "s", trials)).read_text()
    assert "<summary>15 more trials</summary>" in page
    assert len(re.findall(r'<tr id="trial-', page)) == 45


def test_the_card_says_what_was_searched(tmp_path: Path) -> None:
    config = {
        "data": {"shards": "shapes"},
        "model": {"head": {"kind": "conv"}},
        "train": {"batch_size": 32, "steps": 400},
    }
    card = {
        "title": "Heads",
        "purpose": "which head",
        "tags": ["a", "b"],
        "notes": "read shoot/nmse",
        "expects": "pooled wins",
    }
    stop = [{"metric": "ema/flow/cos", "below": 0.3, "after": 150, "patience": 2}]
    more = {
        "early_terminate": {"type": "hyperband", "min_iter": 100, "eta": 3.0},
        "stop": stop,
        "seeds": 3,
        "card": card,
    }
    trials = [{"metrics": {METRIC: 0.5}, "config": config}]
    space = {
        "optim.lr": LR,
        "model.head.convs": {"values": [0, 1], "when": {"model.head.kind": ["grid", "conv"]}},
    }
    text = (
        write_sweep_report(make(tmp_path / "s", trials, parameters=space, **more)).parent
        / "report.md"
    ).read_text()
    for line in (
        "# Heads",
        (
            "- SEARCHED: model.head.convs {0, 1} when model.head.kind is grid or conv; optim.lr"
            " 0.0001 .. 0.01 log"
        ),
        "- METHOD: bayes, seed 0, 3 seeds a setting",
        (
            "- STOPS: hyperband from step 100, the best 1/3 go on; ema/flow/cos below 0.3 at 2"
            " probes from step 150"
        ),
        "- DATASET: shapes",
        "- CORE PARAMS: head conv, batch 32, steps 400",
        "- TAGS: a, b",
        "- NOTES: read shoot/nmse",
        "- EXPECTS: pooled wins",
    ):
        assert f"{line}\n" in text
