"""What is drawn of the parameters of a sweep file: conditions, priors, points."""

import json

import numpy as np
import optuna
import pytest
from builders import refused, sweep_of

from flowray.config.errors import InputError
from flowray.config.load import override_recipe
from flowray.sweepconfig.check import base_recipe, check_trials
from flowray.sweepconfig.distributions import LogUniform, Prior
from flowray.tune.space import from_priors, settings, trial_count
from flowray.tune.study import SweepStudy

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
