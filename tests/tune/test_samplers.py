"""The contract of every sampler, inherited, and what CMA-ES does to a quadratic."""

import json

import numpy as np
import optuna
import pytest
from optuna.samplers import TPESampler

from flowray.config.schema import members
from flowray.sweepconfig.distributions import Categorical, LogUniform, QUniform, Uniform
from flowray.sweepconfig.search import (
    CmaEsSearch,
    GpSearch,
    GridSearch,
    LearningSearch,
    Nsga2Search,
    RandomSearch,
    TpeSearch,
)
from flowray.sweepconfig.sweep import Sweep
from flowray.tune.cmaes import Strategy
from flowray.tune.samplers import SAMPLERS, Setting, make_sampler
from flowray.tune.space import suggest
from flowray.tune.study import SweepStudy

METRIC = "shoot/nmse"
SPACE = {
    "optim.lr": LogUniform(min=1e-5, max=1e-1),
    "loss.clip.weight": Uniform(min=0, max=4),
    "model.head.kind": Categorical(values=("grid", "conv")),
    "model.head.convs": Categorical(values=(0, 1), when={"model.head.kind": ("grid",)}),
}
RANGES = {"optim.lr": LogUniform(min=1e-5, max=1e-1), "loss.clip.weight": Uniform(min=0, max=4)}


def sweep_of(search, parameters=None, **changes) -> Sweep:
    plain = {
        "name": "s",
        "base": "b",
        "metric": {"name": METRIC},
        "parameters": parameters or SPACE,
        "run_cap": 100,
        "startup_trials": 4,
    }
    how = (
        {"method": search.kind}
        if isinstance(search, RandomSearch | GridSearch)
        else {"search": search}
    )
    return Sweep(**{**plain, **how, **changes})


def loss(params) -> float:
    """A bowl with its minimum, 0, at lr 1e-3 and weight 1."""
    return (np.log10(params["optim.lr"]) + 3) ** 2 + (params.get("loss.clip.weight", 1.0) - 1) ** 2


def run(study: SweepStudy, count: int, first: int = 0) -> list[dict]:
    """Ask and tell; every fifth trial is stopped, the third fails."""
    drawn = []
    for i in range(first, first + count):
        number, params = study.ask()
        drawn.append(params)
        if i == 2:
            study.fail(number, "boom")
        elif i % 5 == 4:
            study.report(number, 10, loss(params))
            study.stop(number, "worse")
        else:
            study.finish(number, loss(params))
    return drawn


def in_memory(search, space, count: int, seed: int = 0) -> list[dict]:
    """The same without a file, which costs more than all else."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    study, drawn = optuna.create_study(), []
    for number in range(count):
        study.sampler = make_sampler(search, Setting(1000 * seed + number, startup_trials=4))
        trial = study.ask()
        drawn.append(suggest(trial, space))
        study.tell(trial, loss(drawn[-1]))
    return drawn


class SamplerContract:
    """What every sampler does.

    search: its config; count: how many trials a test of it can afford.
    """

    search = RandomSearch()
    count = 30
    learns: dict | None = None  # the space on which it is better than chance after `count` trials

    def test_draws_are_in_range_and_conditions_hold(self):
        for params in in_memory(self.search, SPACE, 8):
            assert 1e-5 <= params["optim.lr"] <= 1e-1
            assert 0 <= params["loss.clip.weight"] <= 4
            assert ("model.head.convs" in params) == (params["model.head.kind"] == "grid")

    def test_sessions_leave_no_trace(self, tmp_path):
        """The same trials in one session and in two, the second of them finding an unfinished
        trial.
        """
        sweep = sweep_of(self.search)
        whole = run(SweepStudy(sweep, tmp_path / "a"), 7)
        split = run(SweepStudy(sweep, tmp_path / "b"), 5)
        split.append(SweepStudy(sweep, tmp_path / "b").ask()[1])
        study = SweepStudy(sweep, tmp_path / "b")
        assert study.unfinished() == [(5, split[5])]
        study.finish(5, loss(split[5]))
        split += run(study, 1, first=6)
        assert split == whole
        assert len({json.dumps(params) for params in whole}) == 7

    def test_the_state_is_plain_json(self, tmp_path):
        run(SweepStudy(sweep_of(self.search, RANGES), tmp_path / "j"), 6)
        text = (tmp_path / "j").read_text()
        assert all(isinstance(json.loads(line), dict) for line in text.splitlines())
        assert "800495" not in text  # how a pickle begins, in hexadecimal
        assert "gASV" not in text  # and in base 64

    def test_it_learns_where_it_should(self):
        """The later half of its trials is better than random ones."""
        if self.learns is None:
            return
        random = [loss(params) for params in in_memory(RandomSearch(), self.learns, 100)]
        late = [
            loss(params)
            for params in in_memory(self.search, self.learns, self.count)[self.count // 2 :]
        ]
        assert np.median(late) < 0.6 * np.median(random)

    def test_several_metrics(self, tmp_path):
        if isinstance(self.search, CmaEsSearch):
            with pytest.raises(ValueError, match="cmaes has one metric"):
                sweep_of(
                    self.search, RANGES, more_metrics=({"name": "text/snr", "goal": "maximize"},)
                )
            return
        sweep = sweep_of(
            self.search, RANGES, more_metrics=({"name": "text/snr", "goal": "maximize"},)
        )
        study = SweepStudy(sweep, tmp_path / "j")
        for i in range(6):
            number, params = study.ask()
            study.report(number, 10, 1.0)
            study.stop(number, "worse") if i == 3 else study.finish(
                number, loss(params), params["loss.clip.weight"]
            )
        told = SweepStudy(sweep, tmp_path / "j").trials()
        assert [t.state.name for t in told] == ["COMPLETE"] * 3 + ["PRUNED"] + ["COMPLETE"] * 2
        assert len(told[0].values) == 2


class TestRandom(SamplerContract):
    pass


class TestTpe(SamplerContract):
    search, learns = TpeSearch(), RANGES


class TestGp(SamplerContract):
    search, learns, count = GpSearch(deterministic=True), {"optim.lr": RANGES["optim.lr"]}, 9


class TestCmaEs(SamplerContract):
    search, learns, count = CmaEsSearch(population=6), RANGES, 60

    def test_one_range_is_enough(self):
        only = {"optim.lr": RANGES["optim.lr"]}
        drawn = [params["optim.lr"] for params in in_memory(self.search, only, 24)]
        assert len(set(drawn)) == 24


class TestNsga2(SamplerContract):
    search, learns, count = Nsga2Search(population=8), RANGES, 60


def test_every_search_has_one_entry_and_options_reach_the_sampler():
    assert set(SAMPLERS) == {*members(LearningSearch), RandomSearch, GridSearch}
    assert make_sampler(Nsga2Search(population=7), Setting(0, 4)).population_size == 7


@pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning")
def test_groups_leave_the_draws_of_an_unconditional_space_as_they_were():
    """TPE with groups, without conditions, is plain multivariate TPE."""
    space = {
        **RANGES,
        "model.head.kind": Categorical(values=("grid", "conv")),
        "train.batch_size": QUniform(min=8, max=64, q=8),
    }

    def drawn(group):
        study, out = optuna.create_study(), []
        for number in range(12):
            study.sampler = TPESampler(
                seed=number, multivariate=True, group=group, n_startup_trials=4
            )
            trial = study.ask()
            out.append(suggest(trial, space))
            study.tell(trial, loss(out[-1]))
        return out

    assert drawn(True) == drawn(False)


def test_cma_es_finds_the_minimum_of_a_rotated_ellipsoid_and_adapts_to_it():
    """Condition number 100 in 4 dimensions: within 150 generations below 1e-8, where random
    search stays above 1e-3.
    """
    rng = np.random.default_rng(0)
    turn, _ = np.linalg.qr(rng.normal(size=(4, 4)))
    matrix = turn @ np.diag([1.0, 4.6, 21.5, 100.0]) @ turn.T
    centre = np.array([0.3, 0.6, 0.45, 0.7])

    def f(x):
        return (x - centre) @ matrix @ (x - centre)

    strategy = Strategy(4, 0.25, None, seed=0)
    assert strategy.population_size == 8
    for _ in range(150):
        strategy.learn(sorted((strategy.ask() for _ in range(8)), key=f))
    assert f(strategy.mean) < 1e-8
    drawn = np.array([strategy.ask() for _ in range(1000)])
    values = np.linalg.eigvalsh(np.cov(drawn.T))
    assert 10 < values[-1] / values[0] < 1000  # the inverse Hessian's, 100
    assert min(f(rng.random(4)) for _ in range(1200)) > 1e-3


def test_cma_es_comes_to_a_best_value_at_the_end_of_a_range():
    """What is drawn beyond an end counts there: drawn again, as the package does with bounds,
    points near it would stay rare.
    """
    strategy = Strategy(2, 0.25, None, seed=0)
    for _ in range(12):
        points = [strategy.ask() for _ in range(strategy.population_size)]
        assert np.all(np.array(points) >= 0)
        assert np.all(np.array(points) <= 1)
        strategy.learn(sorted(points, key=lambda x: float(np.sum((x - [0, 1]) ** 2))))
    assert strategy.mean == pytest.approx([0, 1], abs=0.01)
