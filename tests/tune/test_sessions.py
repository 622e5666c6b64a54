"""Sessions over seeds, several metrics, a time budget and trials finished by hand; what
compares trials with each other.
"""

import json
import math
import time
from functools import partial
from pathlib import Path

import pytest
from builders import METRIC, make_sweep, open_session, probe, study_trials
from optuna.trial import TrialState

from flowray.config.errors import InputError
from flowray.sweepconfig.stop import BoundRule
from flowray.sweepconfig.sweep import Asha, Hyperband, Median
from flowray.tune.ledger import Ledger
from flowray.tune.pruners import PRUNERS, MedianRule, Rungs, make_pruner
from flowray.tune.records import repeat_dir, repeat_of

make = partial(make_sweep, method="random", run_cap=3)


class Diary:
    def __init__(self):
        self.heard = []

    def known(self, trial):
        self.heard.append(("known", trial.trial, trial.status))

    def started(self, trial):
        self.heard.append(("started", trial.trial, trial.status))

    def probed(self, trial): ...

    def ended(self, trial): ...


def test_who_looks_on_hears_first_of_the_trials_that_there_were(tmp_path):
    """As the session finds them: the account is rebuilt from the study where it is lost."""
    judge = open_session(make(), tmp_path, 40)
    for number in range(2):
        judge.next()
        judge.report(number, probe(tmp_path, number, 40 - 20 * number, 1.0))
    judge.end(0)
    for lost in (False, True):
        if lost:
            (tmp_path / "trials.jsonl").unlink()
        diary = Diary()
        again = open_session(make(), tmp_path, 40, observers=[diary])
        assert again.next()[0] == 1
        assert diary.heard == [
            ("known", 0, "finished"),
            ("known", 1, "running"),
            ("started", 1, "running"),
        ]


def test_a_configuration_is_judged_by_its_mean_over_seeds_and_the_noise_is_kept(tmp_path):
    sweep = make(seeds=3)
    judge = open_session(sweep, tmp_path, 40)
    judge.next()
    for repeat, values in enumerate([(2.0, 1.0), (2.0, 4.0), (3.0, 1.0)]):
        judge.report(0, probe(tmp_path, 0, 20, values[0], repeat))
        judge.report(0, probe(tmp_path, 0, 40, values[1], repeat))
    record = judge.ledger.trials[0]
    assert (record.last_step, record.budget_steps) == (120, 120)
    judge.end(0)
    (row,) = [json.loads(line) for line in (tmp_path / "trials.jsonl").read_text().splitlines()]
    assert row["metrics"] == {METRIC: 2.0}
    assert row["noise"] == {METRIC: pytest.approx(math.sqrt(3))}
    assert [one[METRIC] for one in row["repeats"]] == [1.0, 4.0, 1.0]
    assert study_trials(tmp_path)[0].value == 2.0
    # stops look at the first seed
    assert study_trials(tmp_path)[0].intermediate_values == {20: 2.0, 40: 1.0}


def test_only_the_first_seed_can_be_stopped_and_a_killed_session_goes_on_with_the_right_seed(
    tmp_path,
):
    sweep = make(seeds=2, stop=[BoundRule(metric=METRIC, above=5)])
    judge = open_session(sweep, tmp_path, 40)
    judge.next()
    judge.report(0, probe(tmp_path, 0, 20, 1.0))
    judge.report(0, probe(tmp_path, 0, 40, 1.0))
    assert judge.report(0, probe(tmp_path, 0, 20, 9.0, 1)) is False
    assert judge.ledger.trials[0].metrics == {METRIC: 1.0}  # of the seeds that are through
    again = open_session(sweep, tmp_path, 40)
    assert again.next()[0] == 0
    assert again.ledger.trials[0].last_step == 60
    again.report(0, probe(tmp_path, 0, 40, 3.0, 1))
    again.end(0)
    assert (again.ledger.trials[0].status, again.ledger.trials[0].metrics) == (
        "finished",
        {METRIC: 2.0},
    )
    (tmp_path / "other").mkdir()
    judge = open_session(sweep, tmp_path / "other", 40)
    judge.next()
    assert judge.report(0, probe(tmp_path / "other", 0, 20, 9.0)) is True
    judge.end(0)
    assert judge.ledger.saved() == pytest.approx(1 - 20 / 80)


def test_places_of_seeds():
    run = Path("/s/7")
    assert [repeat_of(repeat_dir(run, repeat)) for repeat in range(3)] == [0, 1, 2]
    assert repeat_dir(run, 0) == run


def test_several_metrics_are_all_told_and_a_stopped_trial_is_pruned(tmp_path):
    sweep = make(
        more_metrics=({"name": "text/snr", "goal": "maximize"},),
        stop=[BoundRule(metric=METRIC, above=5)],
    )
    judge = open_session(sweep, tmp_path, 40)
    for number, value in enumerate([1.0, 9.0, 2.0]):
        judge.next()
        judge.report(number, probe(tmp_path, number, 20, value, **{"text/snr": 3.0}))
        if number == 0:
            judge.report(number, probe(tmp_path, number, 40, 0.5, **{"text/snr": 4.0}))
        if number == 2:
            judge.report(number, probe(tmp_path, number, 40, 0.5))
        judge.end(number)
    first, second, third = study_trials(tmp_path)
    assert (first.state, first.values) == (TrialState.COMPLETE, [0.5, 4.0])
    assert (second.state, judge.ledger.trials[1].last_step) == (TrialState.PRUNED, 20)
    assert third.state == TrialState.FAIL
    assert judge.ledger.trials[2].error == "it reported no text/snr at its last step"


def test_after_the_time_budget_nothing_begins_and_what_runs_pauses_and_goes_on_later(tmp_path):
    sweep = make()
    judge = open_session(sweep, tmp_path, 40, deadline=time.monotonic() + 1000)
    judge.next()
    judge._deadline = time.monotonic()  # now
    assert judge.next() is None
    assert judge.report(0, probe(tmp_path, 0, 20, 1.0)) is True
    judge.end(0)
    assert (judge.ledger.trials[0].status, study_trials(tmp_path)[0].state) == (
        "waiting",
        TrialState.RUNNING,
    )
    again = open_session(sweep, tmp_path, 40)
    number, _ = again.next()
    assert (number, again.ledger.trials[0].last_step) == (0, 20)
    assert again.report(0, probe(tmp_path, 0, 40, 0.5)) is False
    again.end(0)
    assert (again.ledger.trials[0].status, study_trials(tmp_path)[0].value) == ("finished", 0.5)


def test_the_time_budget_does_not_pause_a_trial_at_its_end_or_one_that_is_stopped(tmp_path):
    sweep = make(stop=[BoundRule(metric=METRIC, above=5)])
    judge = open_session(sweep, tmp_path, 40, deadline=time.monotonic() + 1000)
    judge.next(), judge.next()
    judge._deadline = time.monotonic()
    assert judge.report(0, probe(tmp_path, 0, 40, 1.0)) is False
    assert judge.report(1, probe(tmp_path, 1, 20, 9.0)) is True
    judge.end(0), judge.end(1)
    assert [t.status for t in judge.ledger.trials.values()] == ["finished", "stopped"]


def test_a_stopped_trial_is_finished_by_number_and_the_study_learns_its_value(tmp_path):
    sweep = make(stop=[BoundRule(metric=METRIC, above=5)])
    judge = open_session(sweep, tmp_path, 40)
    params = {}
    for _ in range(3):
        number, params[number] = judge.next()
        judge.report(number, probe(tmp_path, number, 20, 9.0 if number == 1 else 1.0))
        if number != 1:
            judge.report(number, probe(tmp_path, number, 40, 1.0))
        judge.end(number)
    assert judge.next() is None
    for wrong, words in (
        (0, "--finish 0: its state is finished; stopped trials: 1"),
        (7, "there is no such trial"),
    ):
        with pytest.raises(InputError, match=words):
            open_session(sweep, tmp_path, 40, finish=(wrong,))

    killed = open_session(sweep, tmp_path, 40, finish=(1,))
    assert killed.next() == (1, params[1])
    # trained again since its checkpoint
    assert killed.report(1, {"step": 20, "budget_steps": 40, METRIC: 9.0}) is False
    assert (
        open_session(sweep, tmp_path, 40).ledger.trials[1].status == "stopped"
    )  # nothing was told yet

    last = open_session(sweep, tmp_path, 40, finish=(1,))
    assert last.remaining() == 1
    last.next()
    assert last.report(1, probe(tmp_path, 1, 30, 9.5)) is False  # no rule stops it now
    last.report(1, probe(tmp_path, 1, 40, 0.25))
    last.end(1)
    assert last.next() is None
    assert (last.ledger.trials[1].status, last.ledger.trials[1].stopped_by) == ("finished", None)
    told = study_trials(tmp_path)
    assert (told[1].state, told[3].state, told[3].value, told[3].params) == (
        TrialState.PRUNED,
        TrialState.COMPLETE,
        0.25,
        told[1].params,
    )
    assert told[1].last_step == 20

    more = open_session(make(stop=sweep.stop, run_cap=4), tmp_path, 40)
    assert [t.status for t in Ledger(tmp_path / "trials.jsonl").trials.values()] == ["finished"] * 3
    assert more.next()[0] == 4  # 3 is the value of trial 1, not a trial


# what compares trials with each other


class HalvingContract:
    """What every rule between trials does: the best is never stopped, the reason has words, a
    replay leaves the same state.
    """

    rule = Hyperband(min_iter=10, eta=2)

    def build(self, goal="minimize"):
        return make_pruner(
            make(metric={"name": METRIC, "goal": goal}, early_terminate=self.rule), 80
        )

    def rows(self, sign=1.0):
        return [
            (number, step, sign * (1 + number) * (1 - step / 200))
            for step in (10, 20, 40)
            for number in range(5)
        ]

    @pytest.mark.parametrize(("goal", "sign"), [("minimize", 1.0), ("maximize", -1.0)])
    def test_the_worst_is_stopped_in_words_and_the_best_goes_on(self, goal, sign):
        rule, stopped = self.build(goal), {}
        for number, step, value in self.rows(sign):
            if number not in stopped and (why := rule.judge(number, step, value)):
                stopped[number] = why
                if isinstance(rule, Rungs):
                    stopped.pop(rule.promote(stopped, last=False), None)
        assert 0 not in stopped or rule.promote(stopped, last=True) == 0
        assert 4 in stopped
        assert all(METRIC in why and "step" in why for why in stopped.values())

    def test_a_replay_leaves_the_same_state(self):
        first, second = self.build(), self.build()
        rows = self.rows()
        for row in rows[:12]:
            first.judge(*row), second.judge(*row)
        assert [first.judge(*row) for row in rows[12:]] == [second.judge(*row) for row in rows[12:]]

    def test_alone_nobody_is_stopped_for_good(self):
        rule = self.build()
        for step in (10, 20, 40):
            if rule.judge(0, step, float(step)):
                assert isinstance(rule, Rungs)
                assert rule.promote([0], last=True) == 0


class TestRungs(HalvingContract):
    pass


class TestMedian(HalvingContract):
    rule = Median(min_iter=10, min_trials=2)


def test_every_rule_between_trials_has_one_entry():
    assert {Hyperband: Rungs, Asha: Rungs, Median: MedianRule} == PRUNERS


def test_rungs_compare_at_their_very_step():
    """Trial 0 probes at 10, 20, ...; trial 1 at 8, 16, 24: at the rung of 20 its value is
    halfway between those at 16 and 24.
    """
    rungs = Rungs(make(early_terminate=Hyperband(min_iter=20, eta=2)), 80)
    rungs.judge(0, 10, 1.0)
    rungs.judge(0, 20, 0.5)
    rungs.judge(1, 8, 2.0)
    rungs.judge(1, 16, 1.0)
    assert (
        rungs.judge(1, 24, 0.2)
        == f"{METRIC} 0.6 at step 20 is number 2 of 2 so far; the best 1/2 go on"
    )
    rungs.judge(2, 16, 0.6)
    assert rungs.judge(2, 24, 0.2) is None  # 0.4 at step 20


def test_the_median_rule_by_hand():
    rule = MedianRule(make(early_terminate=Median(min_iter=20, min_trials=3)), 80)
    for number, (early, late) in enumerate([(1.0, 0.5), (1.0, 0.7), (2.0, 0.9)]):
        assert rule.judge(number, 10, early) is None
        assert rule.judge(number, 20, late) is None  # too early, then too few others
    assert rule.judge(3, 10, 5.0) is None
    # of 0.75, 0.85, 1.45
    assert (
        rule.judge(3, 20, 0.86)
        == f"{METRIC} at best 0.86 by step 20 is worse than the median 0.85 of 3 trials"
    )
    assert rule.judge(4, 20, 0.84) is None
    assert rule.judge(0, 30, 9.0) is None  # nobody else has come that far
