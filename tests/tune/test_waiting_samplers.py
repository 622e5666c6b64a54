"""What each sampler learns where halving lets most trials wait: a whole sweep with every one of
them, and NSGA-II's grades by hand.
"""

import math
import os
import tempfile
from itertools import pairwise
from pathlib import Path

import numpy as np
import optuna
import pytest
from builders import METRIC, make_sweep, open_session, seen_by_samplers
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState, create_trial

from flowray.config.schema import members
from flowray.sweepconfig.distributions import LogUniform, Uniform
from flowray.sweepconfig.search import CmaEsSearch, GpSearch, LearningSearch, Nsga2Search, TpeSearch
from flowray.sweepconfig.sweep import Hyperband, Metric, Sweep
from flowray.tune.cmaes import GENERATION
from flowray.tune.nsga import STEP, RungNsga, graded
from flowray.tune.session import SweepSession
from flowray.tune.study import SweepStudy

PROBES, STEPS, TRIALS = (10, 40, 80), 80, 60
GENERATION_OF_NSGA = "RungNsga:generation"  # as studies on disk have it
DOWN, UP = StudyDirection.MINIMIZE, StudyDirection.MAXIMIZE


def make(search, **changes) -> Sweep:
    plain = {
        "parameters": {
            "optim.lr": LogUniform(min=1e-5, max=1e-1),
            "loss.clip.weight": Uniform(min=0, max=4),
        },
        "early_terminate": Hyperband(min_iter=10, eta=4),
        "run_cap": TRIALS,
        "search": search,
        "method": "bayes" if search else "random",
    }
    return make_sweep(**{**plain, **changes})


def worth(params) -> float:
    """A bowl with its minimum, 0, at lr 1e-3 and weight 1."""
    return (math.log10(params["optim.lr"]) + 3) ** 2 + (params["loss.clip.weight"] - 1) ** 2


@pytest.fixture
def folder():
    """In memory where the system has such a place: a study syncs every line that it writes."""
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(
        prefix="flowray-test-", dir=memory if os.access(memory, os.W_OK) else None
    ) as made:
        yield Path(made)


def sweep_through(sweep: Sweep, folder: Path) -> tuple[SweepSession, list[dict]]:
    """The session at the end, and every trial's parameters by number."""
    judge, drawn = open_session(sweep, folder, STEPS), {}
    while chosen := judge.next():
        number, drawn[chosen[0]] = chosen
        start = judge.ledger.trials[number].last_step
        for step in (step for step in PROBES if step > start):
            row = {
                "step": step,
                METRIC: worth(drawn[number]) + 1 / step,
                "text/snr": drawn[number]["loss.clip.weight"],
            }
            if judge.report(number, {**row, "budget_steps": STEPS}):
                break
        judge.end(number)
    return judge, [drawn[number] for number in range(sweep.run_cap)]


def late(drawn: list[dict]) -> float:
    return float(np.median([worth(params) for params in drawn[len(drawn) // 2 :]]))


def draws_at_random(folder: Path) -> list[dict]:
    """The same trials without a sampler that learns; they are not trained."""
    study = SweepStudy(make(None), folder / "random.journal")
    return [study.ask()[1] for _ in range(TRIALS)]


@pytest.mark.parametrize(
    "search",
    [TpeSearch(), CmaEsSearch(population=5), Nsga2Search(population=5)],
    ids=lambda search: search.kind,
)
def test_it_learns_though_hardly_a_trial_finishes(folder, search):
    judge, drawn = sweep_through(make(search), folder)
    assert len(judge.ledger.by("finished")) < TRIALS / 2
    assert late(drawn) < 0.6 * late(draws_at_random(folder))
    trials = judge.study.trials()
    if isinstance(search, CmaEsSearch):
        assert [GENERATION in trial.system_attrs for trial in trials] == [False] + [True] * (
            TRIALS - 1
        )
        assert trials[-1].system_attrs[GENERATION] == (TRIALS - 2) // 5
    if isinstance(search, Nsga2Search):
        assert [trial.system_attrs[GENERATION_OF_NSGA] for trial in trials] == [
            number // 5 for number in range(TRIALS)
        ]


def test_a_gaussian_process_takes_finished_trials_only(folder):
    """With fewer of them than startup_trials it draws at random, as the documentation says."""
    judge, drawn = sweep_through(make(GpSearch(), startup_trials=TRIALS), folder)
    assert drawn == draws_at_random(folder)
    assert len(judge.ledger.by("finished")) < TRIALS


def test_the_cases_are_all_samplers_that_learn():
    assert set(members(LearningSearch)) == {TpeSearch, GpSearch, CmaEsSearch, Nsga2Search}


def test_several_metrics_of_those_that_wait(folder, monkeypatch):
    """The study of several metrics holds no value of a trial that has not finished; the account
    does, and so does a new session.
    """
    sweep = make(
        Nsga2Search(population=4),
        more_metrics=(Metric(name="text/snr", goal="maximize"),),
        run_cap=12,
    )
    judge, drawn = sweep_through(sweep, folder)
    again = open_session(sweep, folder, STEPS)
    stopped = judge.ledger.by("stopped")
    assert len(stopped) > 6
    generations = [trial.system_attrs[GENERATION_OF_NSGA] for trial in judge.study.trials()]
    assert generations == [number // 4 for number in range(12)]
    seen = seen_by_samplers(monkeypatch)
    for session in (judge, again):
        session.study.ask()
        for record in stopped:
            assert seen[-1][record.trial].values == [
                record.metrics[METRIC],
                drawn[record.trial]["loss.clip.weight"],
            ]
            assert seen[-1][record.trial].system_attrs[STEP] == record.last_step


def trial(number: int, state: TrialState, *values: float, step: int | None = None) -> FrozenTrial:
    made = create_trial(
        state=state, values=values or None, system_attrs={} if step is None else {STEP: step}
    )
    made.number = number
    return made


def test_a_stopped_trial_is_worse_in_every_metric_than_all_that_went_further():
    done, cut = TrialState.COMPLETE, TrialState.PRUNED
    trials = [
        trial(0, done, 5.0, 1.0),
        trial(1, cut, 0.0, 9.0, step=10),
        trial(2, cut, 1.0, 9.5, step=10),
        trial(3, cut, 0.5, 3.0, step=20),
    ]
    trials += [trial(4, TrialState.FAIL), trial(5, cut)]
    places = graded(trials, [DOWN, UP])
    assert [t.state for t in places] == [done] * 4 + [TrialState.FAIL, cut]
    assert places[0].values == [5.0, 1.0]
    assert trials[1].values == [0.0, 9.0]  # as it was
    order = [places[0], places[3], places[1]]
    for better, worse in pairwise(order):
        assert better.values[0] < worse.values[0]
        assert better.values[1] > worse.values[1]
    # of equals the values count, and neither dominates
    assert places[2].values[0] - places[1].values[0] == pytest.approx(1.0)
    assert places[2].values[1] - places[1].values[1] == pytest.approx(0.5)


def test_without_stopped_trials_it_is_optunas_own():
    def run(sampler_of):
        study, drawn = optuna.create_study(), []
        for number in range(20):
            study.sampler = sampler_of(number)
            asked = study.ask()
            drawn.append((asked.suggest_float("x", 0, 1), asked.suggest_float("y", 0, 1)))
            study.tell(asked, sum(drawn[-1]))
        return drawn

    assert run(lambda n: RungNsga(seed=n, population_size=4)) == run(
        lambda n: optuna.samplers.NSGAIISampler(seed=n, population_size=4)
    )
