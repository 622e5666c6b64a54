"""What a sweep takes over from earlier ones."""

import json
from pathlib import Path

import pytest
from builders import study_trials, sweep_of

from flowray.config.errors import InputError
from flowray.config.load import dump_recipe, override_recipe
from flowray.config.recipe import Recipe
from flowray.config.scale import OLDER_UNIT
from flowray.sweepconfig.check import base_recipe
from flowray.tune.ledger import Ledger
from flowray.tune.records import TrialRecord
from flowray.tune.study import FROM, SweepStudy
from flowray.tune.warm import earlier_trials

UNIT = {"ema/data/var": 1.0}


def earlier(folder: Path, base: Recipe, *trials, unit=UNIT) -> Path:
    """A sweep directory as a sweep leaves it: (overrides, status, values at steps 20, 40)."""
    records = None
    for number, (overrides, status, values) in enumerate(trials):
        run = folder / str(number)
        run.mkdir(parents=True)
        place = {"name": str(number), "storage_path": str(folder)}
        (run / "config.yaml").write_text(dump_recipe(override_recipe(base, {**overrides, **place})))
        told = [{"ema/shoot/nmse": value, **unit} for value in values]
        rows = [{"step": 20 * (i + 1), **row} for i, row in enumerate(told)]
        (run / "probes.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        records = records or Ledger(folder / "trials.jsonl")
        records.trials[number] = TrialRecord(
            number, {}, status, 20 * len(values), 40, metrics=told[-1]
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
    study = SweepStudy(sweep, tmp_path / "study.journal", earlier=found.trials)
    assert study.trials() == []  # they are not the sweep's own
    assert study.ask()[0] == 2
    SweepStudy(sweep, tmp_path / "study.journal", earlier=found.trials)  # resumed
    told = study_trials(tmp_path, sweep.name)
    assert [(t.state.name, t.value, t.intermediate_values) for t in told[:2]] == [
        ("COMPLETE", 0.5, {20: 2.0, 40: 0.5}),
        ("PRUNED", 3.0, {20: 3.0}),
    ]
    assert len(told) == 3  # not added twice
    assert told[0].params == {"optim.lr": 1e-3, "model.head.kind": "pooled"}
    with pytest.raises(InputError, match="holds no sweep"):
        earlier_trials(sweep_of(plain, "warm_start: [nowhere]"), base)


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


def test_a_warm_start_takes_no_errors_in_the_unit_of_older_versions(tmp_path):
    base = base_recipe(sweep_of(plain := "  optim.lr: {min: 1e-4, max: 1e-2}"))
    trial = {"optim.lr": 1e-3}, "finished", [2.0, 0.5]
    for name, unit in {"old": {}, "new": UNIT}.items():
        earlier(tmp_path / name, base, trial, unit=unit)
    folders = f"warm_start: [{tmp_path / 'old'}, {tmp_path / 'new'}]"
    found = earlier_trials(sweep_of(plain, folders), base)
    assert [trial.user_attrs[FROM] for trial in found.trials] == [str(tmp_path / "new" / "0")]
    assert list(found.left_out) == [f"ema/shoot/nmse {OLDER_UNIT}"]
