"""What a sweep file says beside its parameters, and the schema by which editors check it."""

import json
from pathlib import Path

import jsonschema
import pytest
import yaml
from builders import HEAD, refused, sweep_of

from flowray.cli.tune import main
from flowray.config.errors import InputError
from flowray.sweepconfig.check import base_recipe
from flowray.sweepconfig.file import dump_sweep, load_sweep, packaged_sweeps, text_sweep
from flowray.sweepconfig.schema import sweep_schema
from flowray.sweepconfig.sweep import Metric


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ("search: {kind: gp}\nmethod: random", "s.yaml:5: search belongs to method: bayes"),
        ("search: {kind: gpp}", "search"),
        ("search: {kind: tpe, population: 3}", "allowed: kind, candidates"),
        (
            "search: {kind: cmaes}\nmore_metrics: [{name: flow/cos}]",
            "search.kind cmaes has one metric",
        ),
        ("time_budget: soon", "s.yaml:5: time_budget: got 'soon', want a time such as 90s"),
        ("seeds: 3\nset: {seed: 4}", "leave seed out of set and parameters"),
        ("seeds: 0", "seeds: got 0"),
        ("early_terminate: {type: median}", "early_terminate.min_iter is missing"),
        (
            "early_terminate: {type: median, min_iter: 5, eta: 3}",
            "allowed: type, min_iter, min_trials",
        ),
        (
            "stop: [{metric: flow/cos, gains_less_than: 0.1, below: 3}]",
            "either below or above or gains_less_than",
        ),
    ],
)
def test_bad_settings_in_one_line(more, words):
    assert words in refused("  optim.lr: {min: 1e-4, max: 1e-2}", more)


@pytest.mark.parametrize(
    ("text", "seconds"), [("90", 90), ("90s", 90), ("1h30m", 5400), ("2d", 172800)]
)
def test_time_budgets(text, seconds):
    assert (
        sweep_of("  optim.lr: {min: 1e-4, max: 1e-2}", f"time_budget: {text}").time_budget
        == seconds
    )


@pytest.mark.parametrize("name", ["lr_restart", "logsnr", "structure", "kl", "source_grad"])
def test_the_notes_sweeps_ask_about_a_free_source(name):
    """Their expected readings are of the notes' text latent, which no anchor holds at the
    pictures.
    """
    loss = base_recipe(load_sweep(name)).loss
    assert (loss.anchor.weight, loss.clip.weight, loss.kl.weight) == (0, 0.3, 0.5)


def test_a_metric_without_a_goal_has_its_own_better_side():
    found = {
        name: Metric(name=name).goal
        for name in (
            "ema/shoot/nmse",
            "ema/flow/cos",
            "loss/flow",
            "eval/all_correct",
            "perf/images_per_s",
            "ema/shoot/energy",
            "source/separation@0.25",
        )
    }
    less, more = "minimize", "maximize"
    assert found == dict(zip(found, (less, more, less, more, more, less, more), strict=True))
    assert Metric(name="ema/flow/cos", goal="minimize").goal == "minimize"


def test_several_metrics_survive_the_dump():
    text = HEAD.replace(
        "metric: {name: ema/shoot/nmse}",
        "metric: [{name: ema/shoot/nmse}, {name: ema/text/snr, goal: maximize}]",
    )
    sweep = text_sweep(f"{text}parameters:\n  optim.lr: {{min: 1e-4, max: 1e-2}}", "s.yaml")
    assert [metric.goal for metric in sweep.objectives] == ["minimize", "maximize"]
    assert isinstance(yaml.safe_load(dump_sweep(sweep))["metric"], list)
    assert text_sweep(dump_sweep(sweep), "again") == sweep


def test_a_picture_against_a_blur_ranks_trials_and_stops_them():
    text = HEAD.replace("shoot/nmse", "shoot/energy")
    rules = [
        {"metric": "ema/shoot/energy", "above": 1.0, "after": 100},
        {"metric": "ema/shoot/diversity", "below": 0.1, "after": 100, "patience": 2},
        {"metric": "ema/source/separation@0.25", "below": 0.2, "after": 100},
    ]
    text += f"parameters:\n  optim.lr: {{min: 1e-4, max: 1e-2}}\nstop: {json.dumps(rules)}"
    sweep = text_sweep(text, "s.yaml")
    assert sweep.minimise
    assert [rule.metric for rule in sweep.stop] == [rule["metric"] for rule in rules]
    check = jsonschema.Draft202012Validator(sweep_schema())
    assert [error.message for error in check.iter_errors(yaml.safe_load(text))] == []


def test_the_schema_takes_every_packaged_sweep_and_refuses_slips(capsys):
    assert main(["--schema"]) == 0
    schema = json.loads(capsys.readouterr().out)
    assert schema == json.loads(json.dumps(sweep_schema()))
    check = jsonschema.Draft202012Validator(schema)
    jsonschema.Draft202012Validator.check_schema(schema)
    folder = Path(__file__).parents[2] / "sweeps"
    for name in packaged_sweeps():
        assert [
            error.message
            for error in check.iter_errors(yaml.safe_load((folder / name).read_text()))
        ] == []
    good = {
        "name": "s",
        "base": "b",
        "metric": {"name": "ema/shoot/nmse"},
        "parameters": {"optim.lr": {"min": "1e-4", "max": 0.1}},
    }
    assert check.is_valid(good)
    for slip in (
        {"methods": "grid"},
        {"metric": {"name": "ema/shoot/nsme"}},
        {"parameters": {"optim.lrr": {"min": 0, "max": 1}}},
        {"parameters": {"optim.lr": {"min": 0, "maxx": 1}}},
        {"parameters": {"optim.lr": {"distribution": "log_unform", "min": 1, "max": 2}}},
        {"set": {"train.stepz": 3}},
        {"search": {"kind": "tpee"}},
        {"time_budget": "soon"},
    ):
        assert not check.is_valid({**good, **slip}), slip


def test_which_sweep_is_asked_in_one_line():
    with pytest.raises(InputError, match=r"which sweep\? type a file, or one of"):
        main(["--plan"])
