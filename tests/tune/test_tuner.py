"""A real sweep under Ray Tune and Optuna with a tiny trial: what the study, the records and a
resume hold afterwards.
"""

import json
import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import optuna
import pytest
import ray
from builders import open_session
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import TrialState
from ray.util.state import list_actors

from flowray.cluster import session
from flowray.config.errors import InputError
from flowray.config.load import load_recipe, override_recipe
from flowray.config.recipe import Recipe
from flowray.rayrun.trainer import RunFailed
from flowray.rayrun.tuner import run_sweep, train_trial
from flowray.store.rows import read_rows
from flowray.sweepconfig.distributions import LogUniform
from flowray.sweepconfig.sweep import Sweep
from flowray.tune.plan import Cluster, share_cluster
from flowray.tune.records import repeat_of

METRIC = "ema/shoot/nmse"
ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers cannot import a test file


def make(folder: Path, **changes) -> Sweep:
    plain = {
        "name": "tiny",
        "storage_path": str(folder),
        "base": "unused",
        "metric": {"name": METRIC},
        "parameters": {
            "optim.lr": {"distribution": "log_uniform_values", "min": 1e-4, "max": 1e-2}
        },
        "stop": [{"metric": "flow/cos", "below": 0.3, "after": 20}],
        "early_terminate": {"type": "hyperband", "min_iter": 10, "eta": 2},
        "method": "random",
        "max_concurrent": 2,
        "seed": 0,
    }
    return Sweep.model_validate({**plain, **changes})


def trial(recipe: Recipe, run_dir: Path, report: Callable | None = None) -> None:
    """nmse is 1000 * lr + seed whatever the step; the direction is lost where lr is under 3e-4; lr
    above 8e-3 crashes. It goes on from its last row.
    """
    from ray import tune

    report = report or tune.report
    run_dir.mkdir(parents=True, exist_ok=True)
    with (run_dir / "starts").open("a") as file:
        file.write("started\n")
    for step in range(
        10 * len(read_rows(run_dir / "probes.jsonl")) + 10, recipe.train.steps + 1, 10
    ):
        value = 1000 * recipe.optim.lr + recipe.seed
        row = {
            "step": step,
            "budget_steps": recipe.train.steps,
            "repeat": repeat_of(run_dir),
            METRIC: value,
            "ema/data/var": 1.0,
            "flow/cos": 0.9,
        }
        if recipe.optim.lr < 3e-4 and step > 10:
            row["flow/cos"] = 0.1
        if recipe.optim.lr > 8e-3:
            raise ValueError("the learning rate exploded")
        with (run_dir / "probes.jsonl").open("a") as file:
            file.write(json.dumps(row) + "\n")
        report(row)


def dying(recipe: Recipe, run_dir: Path) -> None:
    """Trial 0 is killed at its first start, as by the kernel; trial 1 says that it cannot go on."""
    if run_dir.name == "1":
        raise RunFailed("loss/flow is nan at step 7")
    if not (run_dir / "starts").exists():
        run_dir.mkdir(exist_ok=True)
        (run_dir / "starts").touch()
        os.kill(os.getpid(), signal.SIGKILL)
    trial(recipe, run_dir)


def alone(recipe: Recipe, run_dir: Path) -> None:
    """A trial of one worker under Ray Train."""
    train_trial(recipe, run_dir, worker=lambda config, report: trial(recipe, run_dir, report))


def leave_waiting(sweep: Sweep, folder: Path) -> None:
    """What a session leaves whose time budget ran out as the second of two trials came to its
    rung.
    """
    folder.mkdir()
    judge = open_session(sweep, folder, 40)
    for _ in range(2):
        number, params = judge.next()
        row = {"step": 10, "budget_steps": 40, METRIC: 1000 * params["optim.lr"]}
        row |= {"flow/cos": 0.9, "ema/data/var": 1.0}
        (folder / str(number)).mkdir()
        (folder / str(number) / "probes.jsonl").write_text(json.dumps(row) + "\n")
        assert judge.report(number, row)
        judge.end(number)
    assert judge.ledger.waiting() == [0, 1]


def records(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "trials.jsonl").read_text().splitlines()]


def study(folder: Path) -> list[optuna.trial.FrozenTrial]:
    storage = JournalStorage(JournalFileBackend(str(folder / "study.journal")))
    return optuna.load_study(study_name="tiny", storage=storage).trials


def check_states(rows: list[dict], told: list, folder: Path) -> dict[str, list[dict]]:
    """The account and the study agree on every trial; the account by status."""
    by = {
        status: [row for row in rows if row["status"] == status]
        for status in ("finished", "stopped", "failed")
    }
    assert sum(map(len, by.values())) == 8
    assert by["finished"]
    assert by["stopped"]
    for row in by["finished"]:
        assert (told[row["trial"]].state, told[row["trial"]].value) == (
            TrialState.COMPLETE,
            row["metrics"][METRIC],
        )
        assert row["last_step"] == 40
    for row in by["stopped"]:
        trial_ = told[row["trial"]]
        assert trial_.state == TrialState.PRUNED
        assert trial_.last_step == row["last_step"] < row["budget_steps"] == 40
        assert (
            trial_.value
            == trial_.intermediate_values[row["last_step"]]
            == pytest.approx(1000 * row["params"]["optim.lr"])
        )
        assert trial_.user_attrs["flowray"] == row["stopped_by"]
    for row in by["failed"]:
        assert told[row["trial"]].state == TrialState.FAIL
        assert (
            row["error"]
            == f"ValueError: the learning rate exploded (traceback: {row['trial']}/error.txt)"
        )
        assert "raise ValueError" in (folder / str(row["trial"]) / "error.txt").read_text()
    assert by["failed"] == [row for row in rows if row["params"]["optim.lr"] > 8e-3]
    return by


@pytest.mark.timeout(900)  # several sessions of a real sweep
def test_sweep_stops_tells_and_resumes(tmp_path):
    base = Recipe.model_validate({"train": {"steps": 40}, "resources": {"max_failures": 0}})
    try:
        with session.started(num_cpus=2), (tmp_path / "log").open("w") as log:
            result = run_sweep(
                make(tmp_path, run_cap=6), base, resume=False, trial_fn=trial, stream=log
            )
            same = run_sweep(
                make(tmp_path, run_cap=6), base, resume=False, trial_fn=trial, stream=log
            )
            with pytest.raises(
                InputError, match=r"run_cap differs .* 6 trials are done; type --resume"
            ):
                run_sweep(make(tmp_path, run_cap=8), base, resume=False, trial_fn=trial, stream=log)
            with pytest.raises(InputError, match=r"train.steps differs"):
                run_sweep(
                    make(tmp_path, run_cap=6),
                    override_recipe(base, {"train.steps": 50}),
                    resume=True,
                    trial_fn=trial,
                    stream=log,
                )
            with pytest.raises(InputError, match="seed differs"):
                run_sweep(
                    make(tmp_path, run_cap=6, seed=4), base, resume=True, trial_fn=trial, stream=log
                )
            assert result.report.best
            assert result.report.best.number == result.best.trial
            before = records(tmp_path / "tiny")
            more = run_sweep(
                make(tmp_path, run_cap=8), base, resume=True, trial_fn=trial, stream=log
            )
            again = run_sweep(
                make(tmp_path, run_cap=8), base, resume=True, trial_fn=trial, stream=log
            )
            mortal = override_recipe(base, {"resources.max_failures": 1})
            run_sweep(
                make(tmp_path, name="mortal", run_cap=2, stop=[]),
                mortal,
                resume=False,
                trial_fn=dying,
                stream=log,
            )
            kept = records(tmp_path / "tiny"), study(tmp_path / "tiny")
            late = next(row["trial"] for row in kept[0] if row["status"] == "stopped")
            shutil.copytree(tmp_path / "tiny", tmp_path / "copy")
            done = run_sweep(
                make(tmp_path, run_cap=9),
                base,
                resume=True,
                finish=(late,),
                trial_fn=trial,
                stream=log,
            )
            two = make(
                tmp_path,
                name="two",
                run_cap=2,
                early_terminate={"type": "hyperband", "min_iter": 10, "eta": 4},
                stop=[],
            )
            leave_waiting(two, tmp_path / "two")
            went_on = run_sweep(two, base, resume=False, trial_fn=trial, stream=log)
            seeds = run_sweep(
                make(tmp_path, name="seeds", seeds=2, run_cap=1),
                base,
                resume=False,
                trial_fn=alone,
                stream=log,
            )
            here = ray.get_runtime_context().gcs_address  # other Rays may run beside it
            actors = {actor.class_name for actor in list_actors(here, limit=1000)}  # dead ones too
    finally:
        ray.shutdown()
    assert (done.interrupted, done.left) == (False, 1)  # of the nine
    assert sorted((t.status, t.last_step) for t in went_on.trials) == [
        ("finished", 40),
        ("stopped", 10),
    ]
    assert (went_on.interrupted, went_on.left, went_on.best.status) == (False, 0, "finished")
    finished = done.trials[late]
    assert (finished.status, finished.last_step, finished.metrics[METRIC]) == (
        "finished",
        40,
        pytest.approx(1000 * finished.params["optim.lr"]),
    )
    assert [t.status for t in done.trials if t.trial != late] == [
        row["status"] for row in kept[0] if row["trial"] != late
    ]
    assert [row["step"] for row in read_rows(tmp_path / "tiny" / str(late) / "probes.jsonl")] == [
        10,
        20,
        30,
        40,
    ]
    assert actors
    # of TuneReportCallback, which trials of several workers need
    assert "_QueueActor" not in actors
    (one,) = seeds.trials
    assert (one.status, one.last_step, one.budget_steps) == ("finished", 80, 80)
    assert one.noise[METRIC] == pytest.approx(0.5**0.5)
    assert one.metrics[METRIC] == pytest.approx(1000 * one.params["optim.lr"] + 0.5)
    assert (tmp_path / "seeds" / "0" / "seeds" / "1" / "probes.jsonl").is_file()

    folder = tmp_path / "copy"
    rows, told = kept
    assert [row["trial"] for row in rows] == list(range(8)) == [trial.number for trial in told]
    assert rows[:6] == before  # a resume adds, and touches nothing that has ended
    for row in rows:  # a trial that waited at a rung went on from there
        steps = [probe["step"] for probe in read_rows(folder / str(row["trial"]) / "probes.jsonl")]
        assert steps == list(range(10, 10 * len(steps) + 1, 10))
        assert len(steps) >= row["last_step"] // 10
    starts = [(folder / str(n) / "starts").read_text().count("started") for n in range(8)]
    assert min(starts) == 1 < max(starts)
    assert all(starts[row["trial"]] == 1 for row in rows if row["last_step"] <= 10)
    assert [r.interrupted for r in (result, more, again)] == [False] * 3
    assert same.trials == result.trials
    assert len(again.trials) == 8

    by = check_states(rows, told, folder)

    survivor, halted = records(tmp_path / "mortal")
    assert (survivor["status"], survivor["last_step"]) == ("finished", 40)
    # nothing that a retry would cure
    assert (halted["status"], halted["error"]) == (
        "failed",
        "RunFailed: loss/flow is nan at step 7",
    )

    best = min(by["finished"], key=lambda row: row["metrics"][METRIC])
    assert more.best is not None
    assert more.best.trial == best["trial"]
    recipe = load_recipe(str(folder / "best.yaml")).recipe
    assert (recipe.name, recipe.optim.lr, recipe.train.steps) == (
        "tiny-best",
        best["params"]["optim.lr"],
        40,
    )


@pytest.mark.parametrize(
    ("resources", "concurrent", "cpus", "gpus", "takes", "at_once"),
    [
        ({}, 2, 8, 0, (1, 1, 0), 2),
        ({}, "auto", 8, 0, (1, 1, 0), 8),
        ({"cpus_per_worker": "auto"}, 2, 8, 0, (1, 4, 0), 2),
        ({"gpus_per_worker": "auto"}, "auto", 32, 4, (1, 1, 1), 4),
        (
            {"gpus_per_worker": "auto", "num_workers": "auto", "cpus_per_worker": "auto"},
            2,
            32,
            8,
            (4, 4, 1),
            2,
        ),
        ({}, "auto", 0, 0, (1, 1, 0), 1),  # an autoscaling head
    ],
)
def test_auto_resources_follow_the_cluster(resources, concurrent, cpus, gpus, takes, at_once):
    sweep = make(Path("x"), resources=resources, max_concurrent=concurrent)
    keys = ("resources.num_workers", "resources.cpus_per_worker", "resources.gpus_per_worker")
    assert share_cluster(sweep, Recipe(), Cluster(((cpus, gpus),))) == (
        dict(zip(keys, takes, strict=True)),
        at_once,
    )


def test_parameter_classes_are_the_schema():
    assert make(Path("x")).parameters == {"optim.lr": LogUniform(min=1e-4, max=1e-2)}
