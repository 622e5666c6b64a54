"""The study on disk, the records and a session, without Ray: how trials end, and what a new
session makes of a killed one.
"""

import json

import optuna
import pytest
from builders import METRIC, make_sweep, open_session, probe, study_trials
from optuna.trial import TrialState

from flowray.sweepconfig.distributions import Categorical, IntUniform, LogUniform, QLogUniform
from flowray.sweepconfig.stop import BoundRule, FindingRule
from flowray.tune.ledger import Ledger
from flowray.tune.records import TrialRecord
from flowray.tune.space import settings, suggest, trial_count
from flowray.tune.study import SweepStudy


def make(**changes):
    plain = {
        "parameters": {
            "optim.lr": LogUniform(min=1e-4, max=1e-2),
            "model.head.kind": Categorical(values=("grid", "conv")),
        },
        "stop": [BoundRule(metric=METRIC, above=5)],
        "run_cap": 4,
        "startup_trials": 2,
    }
    return make_sweep(**{**plain, **changes})


def open_it(folder, sweep=None, pruner=None):
    return open_session(sweep or make(), folder, 40, pruner=pruner)


def rows_of(folder):
    return [json.loads(line) for line in (folder / "trials.jsonl").read_text().splitlines()]


def test_finished_stopped_and_failed_trials_in_the_study_and_the_records(tmp_path):
    judge = open_it(tmp_path)
    for number, values in enumerate([(2.0, 0.5), (1.0, 9.0), (1.0,)]):
        assert judge.next()[0] == number
        for i, value in enumerate(values):
            judge.report(
                number,
                {
                    "step": 20 * (i + 1) if number != 1 else 10 * (i + 1),
                    "budget_steps": 40,
                    METRIC: value,
                },
            )
        judge.end(number, error="ValueError: boom" if number == 2 else None)
    done, pruned, failed = study_trials(tmp_path)
    assert (done.state, done.value, done.intermediate_values) == (
        TrialState.COMPLETE,
        0.5,
        {20: 2.0, 40: 0.5},
    )
    assert (pruned.state, pruned.value, pruned.intermediate_values) == (
        TrialState.PRUNED,
        9.0,
        {10: 1.0, 20: 9.0},
    )
    assert pruned.user_attrs["flowray"] == "shoot/nmse 9 is above 5 at step 20"
    assert (failed.state, failed.user_attrs["flowray"]) == (TrialState.FAIL, "ValueError: boom")
    rows = rows_of(tmp_path)
    assert [row["status"] for row in rows] == ["finished", "stopped", "failed"]
    assert [row["last_step"] for row in rows] == [40, 20, 20]
    assert rows[1]["stopped_by"] == pruned.user_attrs["flowray"]
    assert rows[0]["metrics"] == {METRIC: 0.5}
    assert judge.ledger.saved() == pytest.approx(20 / 80)  # a failed trial saves nothing


def test_a_trial_is_stopped_by_a_finding_also_after_a_replay(tmp_path):
    sweep = make(stop=[FindingRule(finding="scale_twice", patience=2)])
    judge = open_it(tmp_path, sweep)
    judge.next()

    def visit(step, *ids):
        row = {
            "step": step,
            "findings": [{"id": i, "severity": "bad", "evidence": "0.55 of 1"} for i in ids],
        }
        with (tmp_path / "0" / "findings.jsonl").open("a") as file:
            file.write(json.dumps(row) + "\n")
        return row["findings"]

    (tmp_path / "0").mkdir()
    found = {"findings": visit(10, "scale_twice")}
    assert not judge.report(0, probe(tmp_path, 0, 10, 1.0) | found)
    # a killed session: the first strike is replayed from the files
    again = open_it(tmp_path, sweep)
    assert again.next()[0] == 0
    found = {"findings": visit(20, "lr_too_low", "scale_twice")}
    assert again.report(0, probe(tmp_path, 0, 20, 1.0) | found)
    again.end(0)
    assert (
        rows_of(tmp_path)[0]["stopped_by"]
        == "the doctor at step 20, 2 times in a row: scale_twice: 0.55 of 1"
    )


def test_a_trial_is_not_stopped_at_its_last_step(tmp_path):
    judge = open_it(tmp_path)
    judge.next()
    assert judge.report(0, {"step": 39, "budget_steps": 40, METRIC: 1.0}) is False
    assert judge.report(0, {"step": 40, "budget_steps": 40, METRIC: 9.0}) is False


def test_a_trial_that_ends_early_without_a_word_has_failed(tmp_path):
    judge = open_it(tmp_path)
    judge.next()
    judge.report(0, {"step": 20, "budget_steps": 40, METRIC: 1.0})
    judge.end(0)
    assert rows_of(tmp_path)[0]["error"] == "it ended at step 20 of 40 without an error"


def test_new_session_continues_the_unfinished_trial_under_its_number_and_params(tmp_path):
    first = open_it(tmp_path)
    first.next()
    first.report(0, probe(tmp_path, 0, 40, 1.0))
    first.end(0)
    number, params = first.next()
    first.report(number, probe(tmp_path, number, 10, 2.0))
    probe(tmp_path, number, 20, 1.5)  # written, but the driver was killed before it saw the row

    second = open_it(tmp_path)
    assert second.remaining() == 3  # one unfinished, two new
    assert second.next() == (number, params)
    assert second.ledger.trials[number].last_step == 20
    # seen in the replay
    assert second.report(number, {"step": 20, "budget_steps": 40, METRIC: 1.5}) is False
    second.report(number, {"step": 40, "budget_steps": 40, METRIC: 0.9})
    second.end(number)
    assert [second.next()[0], second.next()[0], second.next()] == [2, 3, None]
    trial = study_trials(tmp_path)[number]
    assert (trial.state, trial.value, trial.intermediate_values) == (
        TrialState.COMPLETE,
        0.9,
        {10: 2.0, 20: 1.5, 40: 0.9},
    )


def test_resume_reads_a_study_whose_last_line_is_torn_and_rebuilds_lost_records(tmp_path):
    first = open_it(tmp_path)
    first.next()
    first.report(0, {"step": 20, "budget_steps": 40, METRIC: 9.0})
    first.end(0)
    with (tmp_path / "study.journal").open("ab") as file:
        file.write(b'{"op_code": 4, "wor')
    (tmp_path / "trials.jsonl").unlink()
    second = open_it(tmp_path)
    assert second.next()[0] == 1
    second.end(1, error="x")
    assert [row["status"] for row in rows_of(tmp_path)] == ["stopped", "failed"]
    assert len(study_trials(tmp_path)) == 2


class Recorder:
    def __init__(self):
        self.seen = []

    def judge(self, number, step, value):
        self.seen.append((number, step, value))
        return "worse" if value > 3 else None


def test_replay_fills_the_rungs_of_ended_and_unfinished_trials(tmp_path):
    first = open_it(tmp_path, pruner=Recorder())
    for number, value in enumerate([4.0, 2.0]):
        first.next()
        first.report(number, probe(tmp_path, number, 20, value))
    first.end(0)
    rungs = Recorder()
    second = open_it(tmp_path, pruner=rungs)
    assert sorted(rungs.seen) == [(0, 20, 4.0), (1, 20, 2.0)]
    assert second.ledger.trials[0].stopped_by == "worse"
    assert second.ledger.trials[1].status == "running"


def test_sweep_gives_up_when_its_first_trials_all_fail(tmp_path):
    judge = open_it(tmp_path)
    for number in range(3):
        judge.next()
        judge.end(number, error="InputError: no shards")
    assert judge.next() is None


def test_grid_has_every_point_once_over_two_sessions(tmp_path):
    parameters = {
        "model.head.kind": Categorical(values=("grid", "conv")),
        "train.batch_size": IntUniform(min=8, max=9),
    }
    sweep = make(method="grid", parameters=parameters, run_cap=None)
    assert trial_count(sweep) == 4
    study = SweepStudy(sweep, tmp_path / "study.journal")
    points = [study.ask()[1]]
    study.finish(0, 1.0)
    study = SweepStudy(sweep, tmp_path / "study.journal")
    for _ in range(3):
        number, params = study.ask()
        points.append(params)
        study.finish(number, 1.0)
    assert points == list(settings(parameters))
    assert len({tuple(p.values()) for p in points}) == 4


def test_draws_do_not_repeat_in_a_new_session_and_do_not_depend_on_it(tmp_path):
    sweep = make(method="random")

    def lrs(path, sessions):
        return [
            p["optim.lr"]
            for n in sessions
            for study in [SweepStudy(sweep, path)]
            for p in [study.ask()[1] for _ in range(n)]
        ]

    whole, split = lrs(tmp_path / "a", [4]), lrs(tmp_path / "b", [2, 2])
    assert whole == split
    assert len(set(whole)) == 4
    assert all(1e-4 <= lr <= 1e-2 for lr in whole)


def test_lists_as_values_and_stepped_log_ranges(tmp_path):
    parameters = {
        "optim.betas": Categorical(values=([0.9, 0.95],)),
        "train.batch_size": QLogUniform(min=8, max=64, q=8),
    }
    sweep = make(method="random", parameters=parameters)
    study = SweepStudy(sweep, tmp_path / "j")
    drawn = [study.ask()[1] for _ in range(8)]
    assert all(p["optim.betas"] == [0.9, 0.95] for p in drawn)
    assert {p["train.batch_size"] % 8 for p in drawn} == {0}
    assert len({p["train.batch_size"] for p in drawn}) > 1
    again = [params for _, params in SweepStudy(sweep, tmp_path / "j").unfinished()]
    assert again == drawn


def test_bayes_learns_from_pruned_trials(tmp_path):
    """After start-up the draws move to where the value is low: the best lr of 1e-4..1e-2 is at
    the low end.
    """
    sweep = make(parameters={"optim.lr": LogUniform(min=1e-4, max=1e-2)}, startup_trials=4)
    study = SweepStudy(sweep, tmp_path / "j")
    drawn = []
    for _ in range(24):
        number, params = study.ask()
        drawn.append(params["optim.lr"])
        study.report(number, 10, params["optim.lr"])
        if params["optim.lr"] > 1e-3:
            study.stop(number, "worse")
        else:
            study.finish(number, params["optim.lr"])
    late = drawn[12:]
    assert sum(lr < 1e-3 for lr in late) >= 9  # 6 of 12 at random


def test_records_are_strict_json_and_survive_a_round_trip(tmp_path):
    records = Ledger(tmp_path / "trials.jsonl")
    trial = records.trials[3] = TrialRecord(3, {"a": 1}, budget_steps=40)
    trial.update(
        {"step": 10, METRIC: float("nan"), "flow/cos": 0.5, "note": "x", "time_total_s": 1.0}
    )
    records.save()
    assert trial.metrics == {METRIC: None, "flow/cos": 0.5}
    assert Ledger(tmp_path / "trials.jsonl").trials == {3: trial}
    assert [path.name for path in tmp_path.iterdir()] == ["trials.jsonl"]


def test_suggest_returns_what_a_trial_has(tmp_path):
    study = optuna.create_study()
    study.enqueue_trial({"optim.lr": 2e-3, "model.head.kind": "conv"})
    assert suggest(study.ask(), make().parameters) == {"optim.lr": 2e-3, "model.head.kind": "conv"}


def test_a_new_session_takes_the_parameters_of_an_ended_trial_from_the_ledger(tmp_path):
    """The study of a trial that ended while it was drawn lacks a part of them."""
    first = open_it(tmp_path)
    number, params = first.next()
    first.end(number, error="ValueError: boom")
    journal = tmp_path / "study.journal"
    drawn = [line for line in journal.read_text().splitlines() if '"model.head.kind"' not in line]
    journal.write_text("\n".join(drawn) + "\n")
    second = open_it(tmp_path)
    record = second.ledger.trials[number]
    assert (record.status, record.params) == ("failed", params)
