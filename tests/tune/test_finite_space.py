"""A space that can be counted: every setting is trained once, then the sweep is over."""

import pytest
from builders import make_sweep, open_session

from flowray.config.errors import InputError
from flowray.sweepconfig.distributions import (
    Categorical,
    Constant,
    IntUniform,
    LogUniform,
    QLogUniform,
    QUniform,
    Uniform,
)
from flowray.sweepconfig.search import CmaEsSearch, GpSearch, Nsga2Search, TpeSearch
from flowray.sweepconfig.sweep import Sweep
from flowray.tune.space import left_to_begin, setting_count, setting_of, settings, trial_count
from flowray.tune.study import SweepStudy
from flowray.tune.warm import FROM

METRIC = "shoot/nmse"
HEAD = Categorical(values=("pooled", "grid"))
CONVS = Categorical(values=(0, 1, 2), when={"model.head.kind": ("grid",)})
DEEP = IntUniform(min=1, max=2, when={"model.head.convs": (2,)})
NESTED = {
    "model.head.kind": HEAD,
    "model.head.convs": CONVS,
    "model.head.layers": DEEP,
    "loss.kl.weight": Constant(value=2),
}
RANGES = {
    "model.head.layers": IntUniform(min=1, max=3),
    "loss.clip.weight": QUniform(min=0, max=0.2, q=0.1),
}
SEARCHES = {
    "tpe": {"search": TpeSearch()},
    "joint": {"search": TpeSearch(multivariate=True)},
    "gp": {"search": GpSearch()},
    "cmaes": {"search": CmaEsSearch(population=4)},
    "nsga2": {"search": Nsga2Search(population=3)},
    "random": {"method": "random"},
}


def make(parameters, **changes) -> Sweep:
    return make_sweep(**{"parameters": parameters, "run_cap": 50, "startup_trials": 2, **changes})


def drain(study: SweepStudy, count: int, *, tell: bool = True) -> list[dict]:
    drawn = []
    for i in range(count):
        number, params = study.ask()
        drawn.append(params)
        if not tell:
            continue
        if i % 3 == 1:
            study.report(number, 10, float(i))
            study.stop(number, "worse")
        else:
            study.fail(number, "boom") if i == 5 else study.finish(number, float(i % 4))
    return drawn


@pytest.mark.parametrize(
    ("parameters", "count"),
    [
        ({"model.head.kind": HEAD}, 2),
        (NESTED, 1 + 2 + 2),
        (RANGES, 9),
        ({"loss.clip.weight": QUniform(min=0.1, max=0.75, q=0.1)}, 7),
        ({"train.batch_size": QLogUniform(min=8, max=64, q=8)}, 8),
        ({"train.batch_size": QLogUniform(min=10, max=50, q=8)}, 6),  # 10, 16, 24, 32, 40, 48
        ({"loss.kl.weight": Constant(value=2)}, 1),
        ({"train.batch_size": IntUniform(min=1, max=10**9), "model.head.kind": HEAD}, 2 * 10**9),
        ({"optim.lr": LogUniform(min=1e-4, max=1e-2), "model.head.kind": HEAD}, None),
        (
            {
                "model.head.kind": HEAD,
                "loss.clip.weight": Uniform(min=0, max=1, when={"model.head.kind": ("grid",)}),
            },
            None,
        ),
    ],
)
def test_the_settings_of_a_space_are_counted(parameters, count):
    assert setting_count(parameters) == count
    if count is not None and count < 100:
        assert len({setting_of(setting) for setting in settings(parameters)}) == count
        assert trial_count(make(parameters)) == count
    assert trial_count(make(parameters, run_cap=1)) == 1


@pytest.mark.parametrize("parameters", [NESTED, RANGES], ids=["nested", "ranges"])
@pytest.mark.parametrize("kind", SEARCHES)
def test_every_sampler_draws_every_setting_once(kind, parameters, tmp_path):
    sweep = make(parameters, **SEARCHES[kind])
    total = trial_count(sweep)
    drawn = drain(SweepStudy(sweep, tmp_path / "j"), total - 3)
    # a later session, with three at once
    drawn += drain(SweepStudy(sweep, tmp_path / "j", concurrent=3), 3, tell=False)
    assert {setting_of(params) for params in drawn} == {
        setting_of(setting) for setting in settings(parameters)
    }
    assert left_to_begin(sweep, drawn) == 0


def test_what_a_killed_session_left_keeps_its_setting_and_is_not_drawn_by_others(tmp_path):
    """Of three that run one was killed before it had any of its parameters."""
    sweep = make(NESTED)
    study = SweepStudy(sweep, tmp_path / "j")
    drawn = drain(study, 2, tell=False)
    study._study.ask()
    again = SweepStudy(sweep, tmp_path / "j")
    left = dict(again.unfinished())
    assert [left[0], left[1]] == drawn
    everything = [*left.values(), *drain(again, 2)]
    assert len({setting_of(params) for params in everything}) == 5
    assert dict(SweepStudy(sweep, tmp_path / "j").unfinished()) == left


def test_a_point_or_a_prior_that_comes_again_gives_way_to_another_setting(tmp_path):
    """convs says nothing of a pooled head: the second point is the first again."""
    points = [
        {"model.head.kind": "pooled"},
        {"model.head.kind": "pooled", "model.head.convs": 1},
        *[{"model.head.convs": 2}] * 3,
    ]
    drawn = drain(SweepStudy(make(NESTED, points=points), tmp_path / "j"), 5)
    assert drawn[0]["model.head.kind"] == "pooled"
    assert len({setting_of(params) for params in drawn}) == 5
    lr = LogUniform(min=1e-4, max=1e-2, prior={"value": 1e-3, "sigma": 0.1})
    first, second, *_ = drain(
        SweepStudy(make({"optim.lr": lr}, points=[{"optim.lr": 1e-3}]), tmp_path / "k"), 4
    )
    assert first == {"optim.lr": 1e-3} != second


def test_a_branch_that_has_run_out_leaves_the_others(tmp_path):
    lr = LogUniform(min=1e-4, max=1e-2, when={"model.head.kind": ("grid",)})
    drawn = drain(SweepStudy(make({"model.head.kind": HEAD, "optim.lr": lr}), tmp_path / "j"), 12)
    assert [params["model.head.kind"] for params in drawn].count("pooled") == 1
    assert len({params.get("optim.lr") for params in drawn}) == 12


def test_settings_of_earlier_sweeps_come_last(tmp_path):
    old = SweepStudy(make({"model.head.layers": IntUniform(min=1, max=6)}), tmp_path / "old")
    told = {params["model.head.layers"] for params in drain(old, 3)}
    earlier = [t for t in old.trials() if t.values]
    for trial in earlier:
        trial.user_attrs[FROM] = f"old/{trial.number}"
    sweep = make({"model.head.layers": IntUniform(min=1, max=6)})
    drawn = [
        params["model.head.layers"]
        for params in drain(SweepStudy(sweep, tmp_path / "new", earlier=earlier), 6)
    ]
    assert set(drawn[:3]) == set(range(1, 7)) - told
    assert set(drawn) == set(range(1, 7))


def test_the_sweep_ends_with_its_last_setting_and_a_larger_cap_adds_none(tmp_path):
    def train(sweep):
        judge = open_session(sweep, tmp_path, 40)
        while given := judge.next():
            judge.report(given[0], {"step": 40, "budget_steps": 40, METRIC: 1.0})
            judge.end(given[0])
        return judge

    assert len(train(make({"model.head.kind": HEAD}, run_cap=1)).ledger.trials) == 1
    assert len(train(make({"model.head.kind": HEAD}, run_cap=4)).ledger.trials) == 2
    judge = train(make({"model.head.kind": HEAD}, run_cap=9))
    assert not judge.due()
    assert {r.params["model.head.kind"] for r in judge.ledger.by("finished")} == {"pooled", "grid"}


def test_a_folder_with_repeats_from_before_goes_on_with_what_it_lacks():
    """Three trials of one setting, of three settings: two are left, as far as the cap allows."""
    parameters = {"model.head.kind": Categorical(values=("pooled", "grid", "conv"))}
    begun = [{"model.head.kind": "grid"}] * 3
    assert left_to_begin(make(parameters, run_cap=9), begun) == 2
    assert left_to_begin(make(parameters, run_cap=4), begun) == 1


def test_a_grid_without_end_asks_for_a_cap():
    many = {f"train.{key}": IntUniform(min=1, max=400) for key in ("steps", "batch_size")}
    many["optim.lr"] = Categorical(
        values=(1e-3,), when={"train.steps": (1,), "train.batch_size": (1,)}
    )
    with pytest.raises(InputError, match="run_cap is missing"):
        trial_count(make(many, method="grid", run_cap=None))
    assert trial_count(make(many, method="grid", run_cap=5)) == 5
