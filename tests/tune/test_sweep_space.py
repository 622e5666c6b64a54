"""What a sweep file can say of its parameters, and what is then drawn: spellings, conditions,
priors, points, earlier trials.
"""

import json
import math
from pathlib import Path

import jsonschema
import numpy as np
import optuna
import pytest
import yaml

from flowray.cli.tune import main
from flowray.config.errors import InputError
from flowray.config.load import dump_recipe, override_recipe
from flowray.config.recipe import Recipe
from flowray.sweepconfig.check import base_recipe, check_trials
from flowray.sweepconfig.distributions import (
    Categorical,
    Constant,
    IntUniform,
    LogUniform,
    Prior,
    QLogUniform,
    QUniform,
    Uniform,
)
from flowray.sweepconfig.file import dump_sweep, load_sweep, packaged_sweeps, text_sweep
from flowray.sweepconfig.schema import sweep_schema
from flowray.sweepconfig.sweep import Metric, Sweep
from flowray.tune.ledger import Ledger
from flowray.tune.records import TrialRecord
from flowray.tune.space import from_priors, settings, trial_count
from flowray.tune.study import SweepStudy
from flowray.tune.warm import earlier_trials

HEAD = """\
name: s
base: base
metric: {name: ema/shoot/nmse}
run_cap: 6
"""


def sweep_of(parameters: str, more: str = "") -> Sweep:
    return text_sweep(f"{HEAD}{more}\nparameters:\n{parameters}", "s.yaml")


def one(spec: str, key: str = "optim.lr"):
    return sweep_of(f"  {key}: {spec}").parameters[key]


def refused(parameters: str, more: str = "", cap: int = 6) -> str:
    with pytest.raises(InputError) as caught:
        text_sweep(f"{HEAD.replace('6', str(cap))}{more}\nparameters:\n{parameters}", "s.yaml")
    return str(caught.value)


@pytest.mark.parametrize(
    ("spec", "key", "made"),
    [
        (
            "{distribution: loguniform, lower: 1e-4, upper: 1e-2}",
            "optim.lr",
            LogUniform(min=1e-4, max=1e-2),
        ),
        ("{distribution: uniform, lower: 0, upper: 2}", "loss.clip.weight", Uniform(min=0, max=2)),
        (
            "{distribution: quniform, lower: 0, upper: 2, q: 0.5}",
            "loss.clip.weight",
            QUniform(min=0, max=2, q=0.5),
        ),
        (
            "{distribution: qloguniform, lower: 8, upper: 64, q: 8}",
            "train.batch_size",
            QLogUniform(min=8, max=64, q=8),
        ),
        # upper is not drawn
        (
            "{distribution: randint, lower: 1, upper: 5}",
            "model.head.layers",
            IntUniform(min=1, max=4),
        ),
        (
            "{distribution: qrandint, lower: 8, upper: 64, q: 8}",
            "train.batch_size",
            QUniform(min=8, max=64, q=8),
        ),
        (
            "{distribution: lograndint, lower: 8, upper: 65}",
            "train.batch_size",
            QLogUniform(min=8, max=64, q=1),
        ),
        (
            "{distribution: choice, categories: [grid, conv]}",
            "model.head.kind",
            Categorical(values=("grid", "conv")),
        ),
        ("{value: null}", "data.limit", Constant(value=None)),
        (
            "{distribution: inv_log_uniform_values, min: 1e-4, max: 1e-2}",
            "optim.lr",
            LogUniform(min=1e-4, max=1e-2),
        ),
        # e^2 to e^4
        (
            "{distribution: q_log_uniform, min: 2, max: 4, q: 8}",
            "train.batch_size",
            QLogUniform(min=8, max=56, q=8),
        ),
    ],
)
def test_rays_and_wandbs_spellings(spec, key, made):
    assert one(spec, key) == made


@pytest.mark.parametrize(
    ("spec", "key", "made"),
    [
        ("{lower: 1e-4, upper: 1e-2}", "optim.lr", Uniform(min=1e-4, max=1e-2)),
        # it is Ray's randint that leaves the upper end out
        ("{lower: 1, upper: 4}", "model.head.layers", IntUniform(min=1, max=4)),
        ("{categories: [grid, conv]}", "model.head.kind", Categorical(values=("grid", "conv"))),
    ],
)
def test_rays_fields_say_as_much_without_a_distribution(spec, key, made):
    assert one(spec, key) == made
    check = jsonschema.Draft202012Validator(sweep_schema())
    whole = {"name": "s", "base": "b", "metric": {"name": "ema/shoot/nmse"}}
    assert check.is_valid({**whole, "parameters": {key: yaml.safe_load(spec)}})


def test_rays_fields_beside_wandbs_names_are_refused_by_the_file_and_by_the_schema():
    assert "unknown key lower, did you mean min?" in refused(
        "  optim.lr: {distribution: log_uniform_values, lower: 1, upper: 2}"
    )
    assert "lower is Ray's word for min; leave one of them out" in refused(
        "  optim.lr: {lower: 1, min: 1, max: 2}"
    )
    check = jsonschema.Draft202012Validator(sweep_schema())
    wandb = {"optim.lr": {"distribution": "log_uniform_values", "lower": 1, "upper": 2}}
    assert not check.is_valid(
        {"name": "s", "base": "b", "metric": {"name": "ema/shoot/nmse"}, "parameters": wandb}
    )


def test_exponents_are_values_of_e_and_a_likely_slip_is_refused():
    made = one("{distribution: log_uniform, min: -9.21, max: -4.6}")
    assert (made.min, made.max) == (pytest.approx(math.exp(-9.21)), pytest.approx(math.exp(-4.6)))
    # log(1/x) from 4.6 to 9.21
    inverse = one("{distribution: inv_log_uniform, min: 4.6, max: 9.21}")
    assert (inverse.min, inverse.max) == (made.min, made.max)
    assert "so this is 1 to 1.01; for values type distribution: log_uniform_values" in refused(
        "  optim.lr: {distribution: log_uniform, min: 1e-4, max: 1e-2}"
    )


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        (
            "{distribution: normal, mu: 3, sigma: 0.5}",
            "is {distribution: uniform, min: 2, max: 4, prior: {value: 3, sigma: 0.5}}",
        ),
        (
            "{mu: 3, sigma: 0.5}",
            "is {distribution: uniform, min: 2, max: 4, prior: {value: 3, sigma: 0.5}}",
        ),
        (
            "{distribution: qrandn, mean: 3, sd: 0.5, q: 1}",
            "is {distribution: q_uniform, min: 2, max: 4, q: 1, prior: {value: 3, sigma: 0.5}}",
        ),
        (
            "{distribution: log_normal, mu: -7, sigma: 1}",
            "min: 0.0001234, max: 0.006738, prior: {value: 0.0009119, sigma: 0.434}}",
        ),
        (
            "{values: [1e-4, 1e-3], probabilities: [0.1, 0.9]}",
            "leave them out, and to begin with one type prior: {value: '1e-3'}",
        ),
        ("{grid_search: [1e-4, 1e-3]}", "type values: ['1e-4', '1e-3'] and, above, method: grid"),
        ("{distribution: sample_from}", "with when: {other.key: its value}"),
        ("{distribution: normal}", "with prior: {value: mean, sigma: standard deviation}"),
        ("{distribution: randint, min: 1, max: 4}", "randint takes lower and upper"),
        ("{distribution: log_uniform_values, lower: 1, upper: 2}", "unknown key lower"),
        ("{min: 1e-4, max: 1e-2, prior: 1e-3}", "want {value: ..., sigma: ...}"),
        (
            "{min: 1e-4, max: 1e-2, prior: {value: 1e-1, sigma: 1}}",
            "prior.value 0.1 must lie between",
        ),
        ("{min: 1e-4, max: 1e-2, prior: {value: 1e-3}}", "needs sigma"),
        (
            "{values: [1e-4, 1e-3], prior: {value: 1e-2}}",
            "prior.value 0.01 must be one of the values",
        ),
        ("{value: 1e-4, prior: {value: 1e-4}}", "prior"),
        ("{min: 1e-4, max: 1e-2, when: grid}", "want another parameter and its values"),
        (
            "{min: 1e-4, max: 1e-2, when: {model.head.kind: grid}}",
            "model.head.kind is not searched",
        ),
        ("{values: [1e-4, 1e-3], when: {optim.lr: 1e-3}}", "lead back to optim.lr itself"),
        (
            "{min: 1e-4, max: 1e-2, when: {optim.lr: 1e-3}}",
            "optim.lr is drawn from a range, which hits no single value",
        ),
    ],
)
def test_bad_parameters_in_one_line(spec, words):
    text = refused(f"  optim.lr: {spec}")
    assert text.startswith("s.yaml:7: ")
    assert words in text


def test_a_prior_of_the_field_notes():
    log = "{distribution: log_uniform_values, min: 0.1, max: 5, prior: field_notes}"
    assert one(log, "loss.clip.weight").prior == Prior(value=2.0, sigma=0.3)
    assert "the field notes say nothing of train.batch_size; they do of optim.lr" in refused(
        "  train.batch_size: {min: 8, max: 64, prior: field_notes}"
    )


@pytest.mark.parametrize(
    ("key", "spec", "spread"),
    [
        ("optim.schedule.t0", "{min: 1000, max: 80000, prior: field_notes}", 0.3),
        ("optim.lr", "{min: 1e-7, max: 1e-4, prior: field_notes}", 0.3),
        ("loss.tv.weight", "{min: 0, max: 1e-5, prior: field_notes}", 0.35),
    ],
)
def test_the_notes_decades_are_a_spread_of_the_value_on_an_even_range(key, spec, spread):
    """Half of the way from 10^-s to 10^s times the value: not s itself, beside which 20000 is
    one value and 2e-6 any.
    """
    parameter = one(spec, key)
    value, sigma = parameter.prior.value, parameter.prior.sigma
    assert sigma == pytest.approx(value * (10**spread - 10**-spread) / 2)
    drawn = [from_priors({key: parameter}, np.random.default_rng(seed))[key] for seed in range(200)]
    assert 0.5 * sigma < np.std(drawn) < 1.1 * sigma  # cut at the ends of the range


def test_the_notes_own_units_are_decades_on_a_log_range_and_values_take_the_value_alone():
    even = one("{min: 1, max: 9, prior: field_notes}", "sample.guidance_scale").prior
    log = one(
        "{distribution: log_uniform_values, min: 1, max: 9, prior: field_notes}",
        "sample.guidance_scale",
    ).prior
    assert even == Prior(value=4.0, sigma=1.5)
    assert 4 * (10**log.sigma - 10**-log.sigma) / 2 == pytest.approx(1.5)
    assert one("{values: [0, 1, 2], prior: field_notes}", "loss.clip.weight").prior == Prior(
        value=2.0
    )


STEPPED = """\
  loss.kl.weight: {distribution: q_uniform, min: 0.1, max: 0.5, q: 0.1}
  optim.lr: {min: 1e-4, max: 1e-3, when: {loss.kl.weight: 0.3}}
"""


def test_a_condition_on_a_step_of_a_range_holds_at_that_step(tmp_path):
    """The steps are sums, and 0.1 + 2 x 0.1 is not the float 0.3."""
    study = SweepStudy(sweep_of(STEPPED, "method: random"), tmp_path / "j")
    drawn = [study.ask()[1] for _ in range(40)]
    for params in drawn:
        assert ("optim.lr" in params) == (round(params["loss.kl.weight"], 3) == 0.3)
    assert any("optim.lr" in params for params in drawn)
    fixed = sweep_of(STEPPED.replace("min: 1e-4, max: 1e-3", "values: [1e-4, 1e-3]")).parameters
    assert [len(point) for point in settings(fixed)].count(2) == 2


NESTED = """\
  model:
    head:
      kind: {values: [pooled, grid]}
      convs: {values: [0, 1], when: {model: {head: {kind: grid}}}}
  optim: {parameters: {lr: {distribution: log_uniform_values, min: 1e-4, max: 1e-2}}}
  loss.kl.weight: {value: 2}
"""


def test_nested_keys_are_dotted_keys_and_survive_the_dump():
    sweep = sweep_of(NESTED)
    assert list(sweep.parameters) == [
        "model.head.kind",
        "model.head.convs",
        "optim.lr",
        "loss.kl.weight",
    ]
    assert sweep.parameters["model.head.convs"].when == {"model.head.kind": ("grid",)}
    assert text_sweep(dump_sweep(sweep), "again") == sweep
    with pytest.raises(
        InputError,
        match=(
            r"^s\.yaml:10: parameters: unknown key model\.head\.convz, did you mean"
            r" model\.head\.convs"
        ),
    ):
        sweep_of(NESTED.replace("convs", "convz"))


CONDITIONAL = """\
  model.head.convs: {values: [0, 1, 2], when: {model.head.kind: grid}}
  model.head.kind: {values: [pooled, grid, conv]}
  model.head.mlp: {values: [64, 128], when: {model.head.kind: [conv]}}
  optim.lr: {distribution: log_uniform_values, min: 1e-4, max: 1e-2}
"""


def test_a_heads_own_options_are_drawn_with_that_head_alone_and_every_recipe_stands(tmp_path):
    sweep = sweep_of(CONDITIONAL, "startup_trials: 4")
    base = base_recipe(sweep)
    check_trials(sweep, base)
    study, seen = SweepStudy(sweep, tmp_path / "j"), set()
    for i in range(12):
        number, params = study.ask()
        kind = params["model.head.kind"]
        assert ("model.head.convs" in params, "model.head.mlp" in params) == (
            kind == "grid",
            kind == "conv",
        )
        assert list(params)[-1] == "optim.lr"  # in the file's order
        override_recipe(base, params)
        seen.add(kind)
        study.finish(number, float(i)) if i % 2 else study.stop(number, "worse")
    assert seen == {"pooled", "grid", "conv"}
    again = SweepStudy(sweep, tmp_path / "j")
    assert again.trials()[0].params.keys() == study.trials()[0].params.keys()


def test_a_condition_that_is_missing_is_found_before_anything_runs_and_typed_out():
    sweep = sweep_of(CONDITIONAL.replace(", when: {model.head.kind: grid}", ""))
    with pytest.raises(
        InputError, match=r"belongs to kind grid.*type when: \{model\.head\.kind: \[grid\]\}"
    ):
        check_trials(sweep, base_recipe(sweep))
    assert "want one of pooled, grid, conv, transencoder, did" in refused(
        CONDITIONAL.replace("kind: grid}}", "kind: gridd}}")
    )
    assert "model.head.kind is never 'transencoder'" in refused(
        CONDITIONAL.replace("kind: grid}}", "kind: transencoder}}")
    )


def test_a_grid_has_no_point_twice_for_options_that_do_not_apply(tmp_path):
    discrete = "".join(line + "\n" for line in CONDITIONAL.splitlines() if "optim.lr" not in line)
    sweep = sweep_of(discrete, "method: grid").model_copy(update={"run_cap": None})
    points = list(settings(sweep.parameters))
    assert len(points) == 1 + 3 + 2 == trial_count(sweep)
    assert len({json.dumps(point, sort_keys=True) for point in points}) == 6
    study = SweepStudy(sweep, tmp_path / "j")
    drawn = [study.ask()[1] for _ in range(6)]
    assert sorted(map(len, drawn)) == [1, 2, 2, 2, 2, 2]


PRIORS = """\
  optim.lr: {distribution: log_uniform_values, min: 1e-5, max: 1, prior: {value: 1e-3, sigma: 0.1}}
  loss.clip.weight: {min: 0, max: 100}
  train.batch_size: {min: 8, max: 1024, prior: {value: 32, sigma: 4}}
  model.head.kind: {values: [pooled, grid], prior: {value: grid}}
"""


def test_the_start_is_at_the_priors_then_near_them_and_then_the_sampler_is_free(tmp_path):
    sweep = sweep_of(PRIORS, "startup_trials: 6\nmethod: random")
    study = SweepStudy(sweep, tmp_path / "j")
    drawn = [study.ask()[1] for _ in range(12)]
    first = drawn[0]
    assert (first["optim.lr"], first["train.batch_size"], first["model.head.kind"]) == (
        1e-3,
        32,
        "grid",
    )
    near = np.log10([params["optim.lr"] for params in drawn[1:6]])
    assert np.abs(near + 3).max() < 0.5  # of a range of 5 decades
    assert len(set(near)) == 5
    assert all(abs(params["train.batch_size"] - 32) < 20 for params in drawn[1:6])
    assert np.abs(np.log10([params["optim.lr"] for params in drawn[6:]]) + 3).max() > 0.5
    assert {params["loss.clip.weight"] > 50 for params in drawn[:6]} == {True, False}


def test_draws_from_a_prior_stay_inside_the_range():
    at_the_edge = {"optim.lr": LogUniform(min=1e-3, max=1e-2, prior=Prior(value=1e-3, sigma=1.0))}
    rng = np.random.default_rng(0)
    drawn = [from_priors(at_the_edge, rng)["optim.lr"] for _ in range(50)]
    assert 1e-3 <= min(drawn) < 2e-3 < max(drawn) <= 1e-2


def test_points_come_first_as_given_and_are_checked(tmp_path):
    points = (
        "points:\n  - {optim.lr: 5e-3, model.head.kind: conv}\n  - {model: {head: {kind: grid}}}"
    )
    sweep = sweep_of(CONDITIONAL, points)
    study = SweepStudy(sweep, tmp_path / "j")
    first = study.ask()[1]
    assert (first["optim.lr"], first["model.head.kind"], "model.head.mlp" in first) == (
        5e-3,
        "conv",
        True,
    )
    second = SweepStudy(sweep, tmp_path / "j").ask()[1]  # a new session goes on where the first was
    assert second["model.head.kind"] == "grid"
    assert "got 5.0, want 0.0001 to 0.01" in refused(CONDITIONAL, "points: [{optim.lr: 5.0}]")
    assert "optim.weight_decay is not searched" in refused(
        CONDITIONAL, "points: [{optim.weight_decay: 0.1}]"
    )
    assert "points[2] is points[0] again; seeds: 2 trains every setting twice" in refused(
        "  optim.lr: {min: 1e-4, max: 1e-2}", "points: [{optim.lr: 1e-3}, {}, {optim.lr: 1e-3}, {}]"
    )
    assert "run_cap 1 is less than the 2 points" in refused(
        CONDITIONAL, points + "\nstartup_trials: 1", cap=1
    )


def earlier(folder: Path, base: Recipe, *trials) -> Path:
    """A sweep directory as a sweep leaves it: (overrides, status, values at steps 20, 40)."""
    records = None
    for number, (overrides, status, values) in enumerate(trials):
        run = folder / str(number)
        run.mkdir(parents=True)
        place = {"name": str(number), "storage_path": str(folder)}
        (run / "config.yaml").write_text(dump_recipe(override_recipe(base, {**overrides, **place})))
        rows = [{"step": 20 * (i + 1), "ema/shoot/nmse": value} for i, value in enumerate(values)]
        (run / "probes.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        records = records or Ledger(folder / "trials.jsonl")
        records.trials[number] = TrialRecord(
            number, {}, status, 20 * len(values), 40, metrics={"ema/shoot/nmse": values[-1]}
        )
    records.save()
    return folder


def test_a_warm_start_takes_what_compares_and_says_what_it_leaves_out(tmp_path):
    plain = (
        "  optim.lr: {distribution: log_uniform_values, min: 1e-4, max: 1e-2}\n  model.head.kind:"
        " {values: [pooled, grid]}"
    )
    base = base_recipe(sweep_of(plain))
    old = earlier(
        tmp_path / "old",
        base,
        (
            {"optim.lr": 1e-3, "model.head.kind": "pooled", "train.log_every": 5, "seed": 3},
            "finished",
            [2.0, 0.5],
        ),
        ({"optim.lr": 2e-3}, "stopped", [3.0]),
        ({"optim.lr": 1e-1}, "finished", [3.0, 1.0]),  # out of range
        ({"loss.kl.form": "gaussian"}, "finished", [0.1, 0.1]),  # another objective
        ({"model.latent.channels": 8}, "finished", [0.1, 0.1]),  # another latent
        ({"optim.lr": 3e-3}, "failed", [0.1, 0.1]),
    )
    sweep = sweep_of(plain, f"warm_start: [{old}]\nstartup_trials: 2")
    found = earlier_trials(sweep, base)
    left_out = ("optim.lr out of range", "loss.kl.form differs", "model.latent.channels differs")
    assert (
        str(found)
        == f"warm start with 2 trials ({'; '.join(f'1 left out: {why}' for why in left_out)})"
    )
    study = SweepStudy(sweep, tmp_path / "j", earlier=found.trials)
    assert study.trials() == []  # they are not the sweep's own
    assert study.ask()[0] == 2
    resumed = SweepStudy(sweep, tmp_path / "j", earlier=found.trials)
    told = resumed._all()
    assert [(t.state.name, t.value, t.intermediate_values) for t in told[:2]] == [
        ("COMPLETE", 0.5, {20: 2.0, 40: 0.5}),
        ("PRUNED", 3.0, {20: 3.0}),
    ]
    assert len(told) == 3  # not added twice
    assert told[0].params == {"optim.lr": 1e-3, "model.head.kind": "pooled"}
    with pytest.raises(InputError, match="holds no sweep"):
        earlier_trials(sweep_of(plain, "warm_start: [nowhere]"), base)


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
        )
    }
    assert found == dict(
        zip(found, ("minimize", "maximize", "minimize", "maximize", "maximize"), strict=True)
    )
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


def test_a_warm_start_keeps_the_trials_whose_value_is_null(tmp_path):
    plain = (
        "  data.limit: {values: [null, 500]}\n  optim.lr: {distribution: log_uniform_values, min:"
        " 1e-4, max: 1e-2}"
    )
    base = base_recipe(sweep_of(plain))
    trials = [
        ({"data.limit": limit, "optim.lr": 1e-3}, "finished", [2.0, 0.5])
        for limit in (None, 500, 9)
    ]
    found = earlier_trials(
        sweep_of(plain, f"warm_start: [{earlier(tmp_path / 'old', base, *trials)}]"), base
    )
    assert [trial.params["data.limit"] for trial in found.trials] == [None, 500]
    assert found.left_out == {"data.limit out of range": 1}
    ranged = sweep_of("  data.limit: {min: 10, max: 500}", f"warm_start: [{tmp_path / 'old'}]")
    # null lies in no range
    assert "data.limit out of range" in earlier_trials(ranged, base).left_out


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


def test_optuna_holds_what_conditions_allow(tmp_path):
    """Another reader of the study sees the parameters of a trial, and no others."""
    sweep = sweep_of(CONDITIONAL, "method: random")
    study = SweepStudy(sweep, tmp_path / "j")
    drawn = dict(study.ask() for _ in range(5))
    storage = optuna.storages.JournalStorage(
        optuna.storages.journal.JournalFileBackend(str(tmp_path / "j"))
    )
    assert {
        t.number: t.params for t in optuna.load_study(study_name="s", storage=storage).trials
    } == drawn
