"""The sweep file: what it accepts, what it refuses and where it points."""

from pathlib import Path

import pytest

from flowray.cli.common import entry
from flowray.cli.tune import main, plan
from flowray.config.errors import InputError
from flowray.sweepconfig.check import base_recipe, check_trials
from flowray.sweepconfig.distributions import Categorical, IntUniform, LogUniform, QUniform, Uniform
from flowray.sweepconfig.file import dump_sweep, load_sweep, packaged_sweeps, text_sweep
from flowray.sweepconfig.sweep import Asha, Median

GOOD = """\
name: s
base: base.yaml
set:
  train.steps: 300
  flow: {time: {kind: log_snr}}
metric: {name: ema/shoot/nmse}
parameters:
  optim.lr: {distribution: log_uniform_values, min: 1e-4, max: 1e-2}
  loss.clip.weight: {min: 0, max: 2}
  train.batch_size: {min: 8, max: 64}
  model.head.kind: {values: [pooled, grid, conv]}
  flow.time.low: {distribution: q_uniform, min: -8, max: -2, q: 2}
early_terminate: {type: hyperband, min_iter: 50}
stop:
  - {metric: flow/cos, below: 0.3, after: 100, patience: 2}
"""


@pytest.fixture
def write(tmp_path):
    (tmp_path / "base.yaml").write_text(
        "name: b\ntrain: {steps: 900, batch_size: 32, probe_every: 50, checkpoint_every: 50}\n"
    )

    def to(text: str) -> str:
        path = tmp_path / "s.yaml"
        path.write_text(text)
        return str(path)

    return to


def test_a_good_sweep_with_values_of_the_recipes_types(write):
    sweep = load_sweep(
        write(GOOD),
        [
            "run_cap=3",
            "metric.goal=maximize",
            "set.optim.weight_decay=1e-3",
            "parameters.optim.lr.max=2e-2",
        ],
    )
    assert sweep.parameters == {
        "optim.lr": LogUniform(min=1e-4, max=2e-2),  # PyYAML reads 1e-4 as text
        "loss.clip.weight": Uniform(min=0, max=2),  # a float field, though both ends are whole
        "train.batch_size": IntUniform(min=8, max=64),
        "model.head.kind": Categorical(values=("pooled", "grid", "conv")),
        "flow.time.low": QUniform(min=-8, max=-2, q=2),
    }
    assert sweep.set == {
        "train.steps": 300,
        "flow.time.kind": "log_snr",
        "optim.weight_decay": 1e-3,
    }
    assert (sweep.run_cap, sweep.minimise, sweep.startup_trials, sweep.early_terminate.eta) == (
        3,
        False,
        4,
        3.0,
    )
    recipe = base_recipe(sweep)
    assert (recipe.train.steps, recipe.train.batch_size, recipe.flow.time.kind) == (
        300,
        32,
        "log_snr",
    )
    check_trials(sweep, recipe)
    assert text_sweep(dump_sweep(sweep), "again") == sweep


@pytest.mark.parametrize(
    ("old", "new", "line", "words"),
    [
        ("optim.lr:", "optim.lrr:", 8, "unknown key optim.lrr, did you mean optim.lr?"),
        ("optim.lr:", "learning_rate:", 8, "did you mean optim.lr?"),
        ("min: 1e-4", "min: abc", 8, "optim.lr: got 'abc', want a number > 0"),
        ("max: 1e-2", "max: 1e-5", 8, "min 0.0001 must lie below max 1e-05"),
        ("log_uniform_values", "beta", 8, "the nearest that can be drawn is uniform"),
        (
            "{min: 8, max: 64}",
            "{distribution: uniform, min: 8, max: 64}",
            10,
            "of which uniform draws none; type distribution: int_uniform",
        ),
        (
            "{min: 8, max: 64}",
            "{distribution: q_uniform, min: 8, max: 64, q: 0.5}",
            10,
            "got q 0.5; type a whole q",
        ),
        ("q: 2}", "q: 9}", 12, "q 9 is wider than the range -8 to -2"),
        ("[pooled, grid, conv]", "[pooled, grid, pooled]", 11, "values has 'pooled' twice"),
        (
            "optim.lr: {dist",
            "optim: {lr: {value: 1}}\n  optim.lr: {dist",
            7,
            "optim.lr is given twice, dotted and nested",
        ),
        (
            "min_iter: 50}",
            "max_iter: 27, s: 2}",
            13,
            "type min_iter, the first rung in steps, max_iter / eta^s; yours is min_iter: 3",
        ),
        ("{type: hyperband", "{type: bohb", 13, "with type one of hyperband, asha, median"),
        ("train.steps: 300", "storage_path: there", 4, "stand at the top of the file"),
        (
            "optim.lr:",
            "resources.num_workers: {values: [1, 2]}\n  optim.lr:",
            8,
            "resources.num_workers belongs to the whole sweep",
        ),
        ("log_uniform_values", "log_uniform_value", 8, "did you mean log_uniform_values?"),
        (
            "{min: 0, max: 2}",
            "{min: 0}",
            9,
            "loss.clip.weight: got min, want min and max, values or value",
        ),
        (
            "{min: 0, max: 2}",
            "{min: 0, max: 2, q: 1, distribution: uniform}",
            9,
            "q has no meaning for uniform",
        ),
        ("{min: 0, max: 2}", "{min: 0, maxx: 2}", 9, "unknown key maxx, did you mean max?"),
        (
            "[pooled, grid, conv]",
            "[pooled, gird]",
            11,
            "want one of pooled, grid, conv, transencoder, did you mean grid?",
        ),
        ("[pooled, grid, conv]", "[]", 11, "want a list of at least one value"),
        (
            "train.steps: 300",
            "train.steps: many",
            4,
            "train.steps: got 'many', want a whole number > 0",
        ),
        ("train.steps: 300", "optim.lr: 1e-3", 4, "optim.lr is both set and searched"),
        ("below: 0.3", "below: 0.3, above: 1", 14, "takes either below or above"),
        (
            "below: 0.3",
            "under: 0.3",
            14,
            "allowed: metric, finding, below, above, gains_less_than, after, patience",
        ),
        (
            "flow/cos, below: 0.3",
            "flow/cos, finding: bad, below: 0.3",
            14,
            "takes either metric or finding",
        ),
        (
            "metric: flow/cos, below",
            "finding: source_collapsed, below",
            14,
            "takes neither below nor above",
        ),
        ("min_iter: 50", "min_iter: 0", 13, "min_iter: got 0"),
        ("metric: {name: ema/shoot/nmse}", "metric: []", 6, "metric: got []"),
        (
            "metric: {name: ema/shoot/nmse}",
            "metric: ema/shoot/nmse",
            6,
            "such as metric: {name: ema/shoot/nmse, goal: minimize}",
        ),
        (
            "metric: {name: ema/shoot/nmse}",
            "metric: {name: val_loss}",
            6,
            "trials are judged by a probe, such as ema/shoot/nmse",
        ),
        (
            "metric: {name: ema/shoot/nmse}",
            "metric: [{name: loss/flow}, {name: loss/flow}]",
            6,
            "loss/flow is named twice",
        ),
        (
            "metric: {name: ema/shoot/nmse}",
            "metric: {name: loss/flow, target: 1}",
            6,
            "ends with run_cap or time_budget",
        ),
        ("name: s\n", "name: s\nnum_samples: 3\n", 2, "is called otherwise here; type run_cap"),
        ("name: s\n", "name: s\nmax_concurrent: 0\n", 2, "want a number > 0 or auto"),
        (
            "name: s\n",
            "name: s\npoints: [{optim: {lr: 1e-3}}, 3]\n",
            2,
            "points[1]: got 3, want a mapping",
        ),
        (
            "metric: {name: ema/shoot/nmse}",
            "metric: [{name: a/b}, {name: flow/cos}]",
            6,
            "unknown metric a/b",
        ),
        (
            "ema/shoot/nmse",
            "ema/shoot/nsme",
            6,
            "unknown metric ema/shoot/nsme, did you mean ema/shoot/nmse?",
        ),
        ("flow/cos, below", "flow/cosine, below", 14, "did you mean flow/cos?"),
        (
            "name: s\n",
            "name: s\ntask: sample\n",
            2,
            "task sample draws pictures of a trained run, got optim.lr",
        ),
        ("name: s\n", "name: s\nmethods: grid\n", 2, "unknown key methods, did you mean method?"),
        (
            "name: s\n",
            "name: s\noptim.lr: 3\n",
            2,
            "is a recipe key; for every trial type set.optim.lr=",
        ),
        ("name: s\n", "name: s\nprogram: train.py\n", 2, "known to W&B only"),
        ("name: s\n", "name: a/b\n", 1, "a name becomes a folder"),
    ],
)
def test_bad_sweeps_name_the_line(write, old, new, line, words):
    assert old in GOOD
    path = write(GOOD.replace(old, new, 1))
    with pytest.raises(InputError) as caught:
        load_sweep(path)
    assert str(caught.value).startswith(f"{path}:{line}: "), caught.value
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("run_capp=3", "unknown key run_capp, did you mean run_cap?"),
        ("optim.lr=3", "set.optim.lr="),
        ("run_cap", "want key=value"),
        ("set.optim.lrr=3", "did you mean optim.lr?"),
        ("run_cap=0", "run_cap: got 0"),
        ("parameters.optim.lr.max=abc", "want a number > 0"),
        ("early_terminate.type=asha", "early_terminate.rungs is missing"),
        ("early_terminate.type=hyperbnd", "type one of hyperband, asha, median"),
        ("early_terminate.eta=0", "early_terminate.eta: got 0"),
        ("early_terminate={type: median}", "early_terminate.min_iter is missing"),
        (
            "early_terminate.min_itre=3",
            "unknown key early_terminate.min_itre, did you mean min_iter?",
        ),
        ("search.kind=cmea", "with kind one of"),
        ("search.sigma=0.5", "search: got"),
    ],
)
def test_bad_overrides(write, text, words):
    with pytest.raises(InputError, match=r"^command line: ") as caught:
        load_sweep(write(GOOD), [text])
    assert words in str(caught.value)


@pytest.mark.parametrize(
    "typed",
    [
        ["early_terminate.type=asha"],
        ["early_terminate.rungs=[20, 60]", "early_terminate.type=asha"],
    ],
)
def test_a_typed_kind_begins_its_section_anew(write, typed):
    """As in a recipe: nothing of the kind in the file is left; the new one's keys may stand
    before it.
    """
    rungs, eta = "early_terminate.rungs=[20, 60]", "early_terminate.eta=[2, 3]"
    sweep = load_sweep(write(GOOD), [*typed, rungs, eta])
    assert sweep.early_terminate == Asha(rungs=(20, 60), eta=(2, 3))
    same = load_sweep(write(GOOD), ["early_terminate.type=hyperband"])
    assert same.early_terminate == load_sweep(write(GOOD)).early_terminate
    lines = [line for line in GOOD.splitlines() if not line.startswith("early_terminate")]
    bare = write("\n".join(lines))
    for missing in ("type=hyperband", "min_iter=50"):
        with pytest.raises(InputError, match=r"^command line: early_terminate"):
            load_sweep(bare, [f"early_terminate.{missing}"])
    sweep = load_sweep(bare, ["early_terminate.min_iter=50", "early_terminate.type=median"])
    assert sweep.early_terminate == Median(min_iter=50)


@pytest.mark.parametrize(
    ("added", "words"),
    [
        ("more_metrics: 3", "more_metrics: got 3, want a list"),
        ("more_metrics: [3]", r"more_metrics\[0\]: got 3, want a mapping"),
        ("stop: [{metric: flow/cos, below: 1, above: 2, foo: 3}]", r"unknown key stop\[0\].foo"),
        ("stop: [{metric: flow/cos, gains_less_than: 1, below: 2, foo: 3}]", r"stop\[0\].foo"),
    ],
)
def test_lists_are_named_as_the_file_has_them(write, added, words):
    with pytest.raises(InputError, match=words):
        load_sweep(write(f"{GOOD.partition('stop:')[0]}{added}\n"))


def test_missing_keys_and_grid_over_a_continuous_range(write):
    with pytest.raises(InputError, match="metric is missing, such as"):
        load_sweep(write(GOOD.replace("metric: {name: ema/shoot/nmse}\n", "")))
    with pytest.raises(InputError, match=r"method grid needs values for optim\.lr"):
        load_sweep(write(GOOD), ["method=grid"])


def test_a_range_that_the_recipe_refuses_is_found_before_anything_runs(write):
    sweep = load_sweep(write(GOOD), ["parameters.flow.time.low={min: 3, max: 9}"])
    with pytest.raises(
        InputError, match=r"no recipe can be made with flow.time.low=9.0.*must lie below high"
    ):
        check_trials(sweep, base_recipe(sweep))


def test_bad_input_ends_with_2_and_writes_nothing(write, tmp_path, capsys):
    before = sorted(tmp_path.iterdir())
    for text in (
        "name: s\n",
        GOOD.replace("base.yaml", "ring.yaml"),
        GOOD.replace("min: 1e-4", "min: 0"),
    ):
        (tmp_path / "ring.yaml").write_text("base: ring.yaml\n")
        with pytest.raises(SystemExit) as ended:
            entry(main, [write(text), f"storage_path={tmp_path}/out"])
        said = capsys.readouterr()
        assert (ended.value.code, said.out, said.err.count("\n")) == (2, "", 1)
        assert said.err.startswith("error: ")
    assert {path.name for path in tmp_path.iterdir()} == {path.name for path in before} | {
        "s.yaml",
        "ring.yaml",
    }


def test_plan_counts_steps_and_starts_nothing(write, tmp_path, capsys):
    # with a budget of time no step is timed
    changes = ["run_cap=9", "time_budget=1h", f"storage_path={tmp_path}/out"]
    sweep = load_sweep(write(GOOD), changes)
    facts = plan(sweep, base_recipe(sweep))
    assert facts["rungs"] == [50, 150]
    assert (facts["trials"], facts["steps_at_most"]) == (9, 2700)
    assert facts["steps_expected"] == 9 * 50 + 3 * 100 + 1 * 150
    assert main([write(GOOD), "--plan", *changes]) == 0
    assert "2700" in capsys.readouterr().out
    assert not (tmp_path / "out").exists()


def test_unknown_files_and_packaged_sweeps(tmp_path, monkeypatch):
    repo = Path(__file__).parents[2] / "sweeps"
    assert packaged_sweeps() == sorted(path.name for path in repo.glob("*.yaml"))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=r"no such sweep file, did you mean head\?"):
        load_sweep("sweeps/heads.yaml")
    # as `ray job submit -- python -m flowray.tune sweeps/head.yaml` finds it
    for source in ("sweeps/head.yaml", "head"):
        sweep = load_sweep(source)
        assert sweep.name == "head"


def test_head_sweep_fits_its_recipe():
    sweep = load_sweep("head")
    base = base_recipe(sweep)
    check_trials(sweep, base)
    assert set(sweep.parameters["model.head.kind"].values) == {"pooled", "grid", "conv"}
    # at least 40 % of the steps saved
    facts = plan(sweep, base)
    assert facts["steps_expected"] <= 0.6 * facts["steps_at_most"]


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["set.train.checkpoint_every=100"], "wait at step 50, 150 "),
        (["set.train.probe_every=60", "set.train.checkpoint_every=120"], "wait at step 60, 180 "),
        (["set.train.probe_every=100", "set.train.checkpoint_every=500"], "wait at step 100, 200 "),
        (
            ["parameters.train.probe_every={values: [10, 25]}", "set.train.checkpoint_every=20"],
            "wait at step 50, 150 ",
        ),
        (
            ["parameters.train.steps={values: [300, 1200]}", "set.train.checkpoint_every=100"],
            "wait at step 50, 150, 450 ",
        ),
    ],
)
def test_without_a_checkpoint_where_a_trial_waits_a_sweep_is_refused_with_what_cures_it(
    write, overrides, words
):
    path = write(
        GOOD.replace("  train.steps: 300\n", "") if "train.steps" in overrides[0] else GOOD
    )
    sweep = load_sweep(path, overrides)
    with pytest.raises(InputError) as caught:
        check_trials(sweep, base_recipe(sweep))
    assert str(caught.value).startswith("sweep s: train.checkpoint_every is ")
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)
    cure = str(caught.value).rpartition("type ")[2]
    assert cure.startswith("set.train.checkpoint_every=")
    cured = load_sweep(path, [*overrides, cure])
    check_trials(cured, base_recipe(cured))


def test_checkpoints_in_a_bucket_are_of_single_runs(write):
    sweep = load_sweep(write(GOOD), ["set.train.checkpoint_url=s3://bucket/runs"])
    with pytest.raises(InputError, match=r"train\.checkpoint_url is of single runs"):
        check_trials(sweep, base_recipe(sweep))


@pytest.mark.parametrize(
    "words",
    [
        "early_terminate={type: median, min_iter: 50}",
        "early_terminate=null",
        "set.train.probe_every=300",
    ],
)
def test_where_no_trial_waits_checkpoints_may_lie_anywhere(write, words):
    apart = "set.train.checkpoint_every=77"
    path = write(GOOD)
    sweep = load_sweep(path, [apart, words])
    check_trials(sweep, base_recipe(sweep))
    waits = load_sweep(path, [apart])
    with pytest.raises(InputError, match=r"train.checkpoint_every is 77"):
        check_trials(waits, base_recipe(waits))


@pytest.mark.parametrize(
    ("searched", "settings", "cure"),
    [
        ("data.shards={values: [shapes, digits]}", [], "early_terminate=null method=random"),
        (
            "data.shards={values: [shapes, digits]}",
            ["search={kind: gp}"],
            "early_terminate=null method=random search=null",
        ),
        ("data.val_shards={values: [null, digits]}", ["early_terminate=null"], "method=random"),
        (
            "model.autoencoder.path={values: [embedded, elsewhere]}",
            ["method=random"],
            "early_terminate=null",
        ),
        ("model.latent.height={values: [8, 16]}", ["method=random"], "early_terminate=null"),
    ],
)
def test_what_does_not_compare_is_not_ranked(write, searched, settings, cure):
    path = write(GOOD)
    sweep = load_sweep(path, [f"parameters.{searched}", *settings])
    with pytest.raises(InputError) as caught:
        check_trials(sweep, base_recipe(sweep))
    assert str(caught.value).startswith(
        f"sweep s: {searched.partition('=')[0]} sets the scale of every value, and "
    )
    assert f"would rank across it; type {cure}, or make a sweep for each value of it" in str(
        caught.value
    )
    cured = load_sweep(path, [f"parameters.{searched}", *settings, *cure.split()])
    check_trials(cured, base_recipe(cured))


def test_sets_that_are_judged_on_the_same_pictures_compare(write):
    searched, path = ["parameters.data.shards={values: [shapes, digits]}"], write(GOOD)
    for words in ("set.data.val_shards=digits", "parameters.data.shards={value: digits}"):
        sweep = load_sweep(path, [*searched, words])
        check_trials(sweep, base_recipe(sweep))
    apart = load_sweep(path, searched)
    with pytest.raises(InputError, match=r"data.shards sets the scale of every value"):
        check_trials(apart, base_recipe(apart))


def test_a_rule_on_a_finding_needs_a_doctor_who_comes(write):
    sweep = load_sweep(
        write(GOOD.replace("metric: flow/cos, below: 0.3", "finding: source_collapsed"))
    )
    assert (sweep.stop[0].finding, sweep.stop[0].patience) == ("source_collapsed", 2)
    with pytest.raises(InputError, match="no doctor comes"):
        check_trials(sweep, base_recipe(sweep))
    visited = load_sweep(
        write(GOOD.replace("metric: flow/cos, below: 0.3", "finding: bad")),
        ["set.probes.doctor_every=1"],
    )
    check_trials(visited, base_recipe(visited))


def test_a_typed_metric_meets_what_the_file_has_of_one(write):
    metric = "metric: {name: ema/shoot/nmse}"
    typed = ["metric.name=ema/shoot/energy"]
    for none in ("metric: []", "metric: [{name: flow/cos}]"):
        sweep = load_sweep(write(GOOD.replace(metric, none)), typed)
        assert [each.name for each in sweep.objectives] == ["ema/shoot/energy"]
    names = write(GOOD.replace(metric, "metric: [ema/shoot/nmse, flow/cos]"))
    with pytest.raises(InputError, match=r"metric\.name: metric is .*want a mapping.*such as"):
        load_sweep(names, typed)
