"""Successive halving by promotion: who goes on from a rung and when, and what study and account
hold of those that wait.
"""

from functools import partial

import pytest
from builders import make_sweep, open_session, probe, seen_by_samplers, study_trials
from optuna.trial import TrialState

from flowray.store.rows import read_rows
from flowray.sweepconfig.sweep import Asha, Hyperband, Median, Sweep, milestones
from flowray.tune.pruners import Rungs
from flowray.tune.session import SweepSession

METRIC, STEPS = "ema/shoot/nmse", 80
HALVE = Hyperband(min_iter=10, eta=2)
make = partial(
    make_sweep, metric={"name": METRIC}, early_terminate=HALVE, run_cap=6, startup_trials=3
)
row = partial(probe, budget=STEPS, metric=METRIC)


def run_session(
    sweep: Sweep, folder, *, most: int = 1000
) -> tuple[SweepSession, list[tuple[int, int, int]]]:
    """One after the other, at most `most` runs; the worth of a trial is its number's place in a
    fixed order. (trial, from, to) each.
    """
    judge, runs = open_session(sweep, folder, STEPS), []
    while len(runs) < most and (chosen := judge.next()):
        number, start = chosen[0], judge.ledger.trials[chosen[0]].last_step
        for step in range(start + 10, STEPS + 1, 10):
            if judge.report(number, row(folder, number, step, worth(number) + 10 / step)):
                break
        judge.end(number)
        runs.append((number, start, step))
    return judge, runs


def worth(number: int) -> float:
    return float([3, 1, 4, 2, 0, 5][number % 6])


@pytest.mark.parametrize(
    ("min_iter", "eta", "budget", "rungs"),
    [
        (10, 2, 80, [10, 20, 40]),
        (50, 3, 500, [50, 150]),
        (50, 4, 500, [50, 200]),
        (300, 3, 500, [300]),
        (500, 3, 500, []),
    ],
)
def test_rungs_end_at_half_the_budget_but_for_the_first(min_iter, eta, budget, rungs):
    assert milestones(Hyperband(min_iter=min_iter, eta=eta), budget) == dict.fromkeys(rungs, eta)


def test_rungs_of_ones_own_each_keep_their_share():
    halving = Asha(rungs=(10, 20), eta=(4, 2))
    assert milestones(halving, 80) == {10: 4, 20: 2}
    assert milestones(halving, 20) == {10: 4}  # the last step is no rung
    rungs = Rungs(make(early_terminate={"type": "asha", "rungs": [10, 20], "eta": [4, 2]}), STEPS)
    for number in range(8):
        rungs.judge(number, 10, float(number))
    first = [rungs.promote(set(range(8)), last=False)]
    first.append(rungs.promote(set(range(8)) - set(first), last=False))
    assert first == [0, 1]  # 8 / 4
    assert rungs.promote(set(range(2, 8)), last=False) is None
    assert rungs.judge(1, 20, 1.0) is not None  # one of one: of two one goes on
    assert rungs.judge(0, 20, 0.0) is None


@pytest.mark.parametrize(
    ("rungs", "eta"),
    [([10, 20], [2]), ([20, 10], [2, 2]), ([10, 10], [2, 2]), ([], []), ([10], [1])],
)
def test_rungs_that_make_no_sense_are_refused(rungs, eta):
    with pytest.raises(ValueError, match="early_terminate"):
        make(early_terminate={"type": "asha", "rungs": rungs, "eta": eta})


@pytest.mark.parametrize(("goal", "sign"), [("minimize", 1.0), ("maximize", -1.0)])
def test_the_best_of_a_rung_goes_on_once_enough_came_to_it(goal, sign):
    rungs = Rungs(make(metric={"name": METRIC, "goal": goal}), STEPS)
    assert (
        rungs.judge(0, 10, sign * 0.5)
        == f"{METRIC} {sign * 0.5:.3g} at step 10 is number 1 of 1 so far; the best 1/2 go on"
    )
    assert rungs.promote([0], last=False) is None
    assert rungs.judge(1, 10, sign * 0.7) is not None
    assert rungs.promote([0, 1], last=False) == 0  # the best of two
    assert rungs.judge(2, 10, sign * 0.4) is None  # the best of three, and one may go
    assert rungs.promote([1], last=False) is None
    assert rungs.judge(2, 20, sign * 0.3) is not None
    assert rungs.promote([1, 2], last=False) is None
    assert rungs.promote([1, 2], last=True) == 2  # the one that is furthest


def test_a_whole_sweep_trains_few_to_the_end_and_its_best_among_them(tmp_path):
    judge, runs = run_session(make(), tmp_path)
    records = judge.ledger.trials
    assert records[4].status == "finished"  # the best of all
    assert sum(to - start for _, start, to in runs) < 6 * STEPS / 2
    assert {number for number, start, _ in runs if start == 0} == set(range(6))
    assert any(start for _, start, _ in runs)
    for at, (number, start, _) in enumerate(runs):
        # from where it waited
        assert start == max([to for n, _, to in runs[:at] if n == number], default=0)
    states = {t.number: t.state for t in study_trials(tmp_path)}
    assert sorted(states) == list(range(6))
    for number, record in records.items():
        assert states[number] == (
            TrialState.COMPLETE if record.status == "finished" else TrialState.PRUNED
        )
        assert study_trials(tmp_path)[number].last_step == record.last_step
        assert not record.waits
    assert judge.next() is None


def test_few_trials_still_bring_one_to_the_end(tmp_path):
    judge, _ = run_session(make(run_cap=2, early_terminate=Hyperband(min_iter=10, eta=4)), tmp_path)
    assert [judge.ledger.trials[n].status for n in (0, 1)] == ["stopped", "finished"]
    assert (
        study_trials(tmp_path)[0]
        .user_attrs["flowray"]
        .endswith("is number 2 of 2; the best 1/4 went on")
    )


def test_the_sampler_learns_from_those_that_wait_and_the_journal_keeps_them_open(
    tmp_path, monkeypatch
):
    seen = seen_by_samplers(monkeypatch)
    judge, _ = run_session(make(early_terminate=Hyperband(min_iter=10, eta=4)), tmp_path, most=3)
    assert judge.ledger.waiting() == [0, 1, 2]
    assert [t.state for t in study_trials(tmp_path)] == [TrialState.RUNNING] * 3
    again, _ = run_session(make(early_terminate=Hyperband(min_iter=10, eta=4)), tmp_path, most=0)
    assert again.ledger.waiting() == [0, 1, 2]
    assert (again.remaining(), again.next()[0]) == (3, 3)
    judge.study.ask()
    for shown in seen[-2:]:
        assert [(t.state, t.value, t.last_step) for t in shown[:3]] == [
            (TrialState.PRUNED, worth(n) + 1, 10) for n in range(3)
        ]


def test_a_waiting_trial_can_be_finished_by_number(tmp_path):
    run_session(make(early_terminate=Hyperband(min_iter=10, eta=4)), tmp_path, most=3)
    sweep = make(early_terminate=Hyperband(min_iter=10, eta=4))
    judge = open_session(sweep, tmp_path, STEPS, finish=[2])
    assert judge.next()[0] == 2
    for step in range(20, STEPS + 1, 10):
        assert not judge.report(2, {"step": step, "budget_steps": STEPS, METRIC: 9.0})
    judge.end(2)
    assert judge.next() is None
    assert [t.state for t in study_trials(tmp_path)] == [
        TrialState.RUNNING,
        TrialState.RUNNING,
        TrialState.COMPLETE,
    ]
    assert judge.ledger.waiting() == [0, 1]


def test_a_trial_to_finish_whose_session_was_cut_off_is_finished_by_the_same_command(tmp_path):
    sweep = make(early_terminate=Hyperband(min_iter=10, eta=4))
    run_session(sweep, tmp_path, most=3)
    for until in (30, STEPS):  # the first session is killed
        judge = open_session(sweep, tmp_path, STEPS, finish=[1])
        assert judge.next()[0] == 1
        for step in range(judge.ledger.trials[1].last_step + 10, until + 1, 10):
            assert not judge.report(1, row(tmp_path, 1, step, 9.0))
    judge.end(1)
    assert judge.next() is None
    assert [judge.ledger.trials[n].status for n in range(3)] == ["waiting", "finished", "waiting"]
    assert [row["step"] for row in read_rows(tmp_path / "1" / "probes.jsonl")] == list(
        range(10, STEPS + 1, 10)
    )


# what a session leaves, and what the next makes of it


def story(folder) -> list[tuple]:
    """All that account and study hold, times left out."""
    account = [
        {key: value for key, value in row.items() if key != "seconds"}
        for row in read_rows(folder / "trials.jsonl")
    ]
    return [
        (row, t.params, t.state, t.value, t.intermediate_values, t.user_attrs)
        for row, t in zip(account, study_trials(folder), strict=True)
    ]


@pytest.mark.parametrize("count", [1, 2, 5])
def test_where_only_waiting_trials_are_left_the_next_session_goes_on(tmp_path, count):
    """The time budget ran out as the last of them came to its rung."""
    sweep = make(run_cap=count, early_terminate=Hyperband(min_iter=10, eta=8))
    for name in ("whole", "cut"):
        (tmp_path / name).mkdir()
    run_session(sweep, tmp_path / "whole")
    judge, _ = run_session(sweep, tmp_path / "cut", most=count)
    assert judge.ledger.waiting() == list(range(count))
    again = open_session(sweep, tmp_path / "cut", STEPS)
    assert (again.remaining(), again.due()) == (0, True)
    judge, more = run_session(sweep, tmp_path / "cut")
    assert len(more) == 1
    assert not judge.due()
    assert judge.ledger.waiting() == []
    assert story(tmp_path / "cut") == story(tmp_path / "whole")


def test_a_session_that_was_killed_before_it_told_how_the_waiting_ended_is_made_up_for(tmp_path):
    """Nothing is left to train, so no `next` comes: that there is nothing due tells the study."""
    sweep = make(run_cap=3, early_terminate=Hyperband(min_iter=10, eta=8))
    for name in ("whole", "cut"):
        (tmp_path / name).mkdir()
    run_session(sweep, tmp_path / "whole")
    run_session(sweep, tmp_path / "cut", most=4)
    assert [t.state for t in study_trials(tmp_path / "cut")].count(TrialState.RUNNING) == 2
    assert not open_session(sweep, tmp_path / "cut", STEPS).due()
    assert story(tmp_path / "cut") == story(tmp_path / "whole")


OTHERS = {
    "later rungs": Hyperband(min_iter=30, eta=2),
    "between": Hyperband(min_iter=5, eta=3),
    "no rungs": Hyperband(min_iter=STEPS, eta=2),
    "median": Median(min_iter=10, min_trials=2),
    "none": None,
}


@pytest.mark.parametrize("other", OTHERS.values(), ids=OTHERS)
def test_a_sweep_resumed_with_another_halving_brings_every_trial_to_an_end(tmp_path, other):
    """Three trials wait at step 10. None is lost, and none begins anew."""
    run_session(make(early_terminate=Hyperband(min_iter=10, eta=8)), tmp_path, most=3)
    judge, runs = run_session(make(early_terminate=other, run_cap=4), tmp_path)
    assert not judge.due()
    assert judge.ledger.waiting() == []
    assert {t.state for t in study_trials(tmp_path)} <= {TrialState.COMPLETE, TrialState.PRUNED}
    assert all(start == 10 for number, start, _ in runs[:2] if number < 3)
    for number, record in judge.ledger.trials.items():
        steps = [row["step"] for row in read_rows(tmp_path / str(number) / "probes.jsonl")]
        assert steps == list(range(10, record.last_step + 1, 10))
    statuses = [judge.ledger.trials[number].status for number in range(4)]
    assert set(statuses) <= {"finished", "stopped"}
    assert "finished" in statuses
    if other in (OTHERS["none"], OTHERS["no rungs"]):
        assert statuses == ["finished"] * 4


def test_by_the_median_a_stop_is_for_good(tmp_path):
    judge, runs = run_session(make(early_terminate=Median(min_iter=10, min_trials=2)), tmp_path)
    assert len(runs) == 6
    stopped = judge.ledger.by("stopped")
    assert stopped
    assert judge.ledger.waiting() == []
    assert all(
        study_trials(tmp_path)[record.trial].state == TrialState.PRUNED for record in stopped
    )
