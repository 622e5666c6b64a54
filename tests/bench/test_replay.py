"""The replay of sweeps on pools whose ranks are known in closed form."""

import json
import math
from dataclasses import replace

import numpy as np
import optuna
import pytest
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from pools import BUDGET, LOSS, METRIC, make_pool, make_sweep, write_pool
from scipy.stats import spearmanr

from benchmarks.__main__ import main
from benchmarks.pool import Entry, Space, read_pool, spearman, value_at
from benchmarks.replay import Correction, one_rung, random_search, sweep_search
from benchmarks.sweep import ORACLE, correlations, foretold, half, ratio
from flowray.config.errors import InputError
from flowray.sweepconfig.sweep import Metric
from flowray.tune.policy import Policy
from flowray.tune.session import SweepSession

POOL = make_pool()
GOAL = POOL.best(3)
PROBE = Metric(name=METRIC)
SMALL = make_pool(24)  # where the real study runs
SMALL_GOAL = SMALL.best(3)


def test_the_best_are_those_with_the_best_pictures_and_who_ties_with_the_last():
    ranks = sorted(POOL.entries, key=lambda e: -e.score["mean_attribute_accuracy"])
    assert frozenset(e.number for e in ranks[:3]) == GOAL
    twin = replace(ranks[2], number=99)
    assert replace(POOL, entries=(*POOL.entries, twin)).best(3) == GOAL | {99}
    with pytest.raises(InputError, match="has 60 finished configurations, want at least 61"):
        POOL.best(61)


def test_random_search_costs_what_draws_without_replacement_cost():
    """The first of k among n drawn without replacement comes at (n + 1) / (k + 1) on average."""
    hits = [random_search(POOL, GOAL, seed).hit / BUDGET for seed in range(1000)]
    assert np.mean(hits) == pytest.approx(61 / 4, abs=4 * np.std(hits) / math.sqrt(len(hits)))
    replay = random_search(POOL, GOAL, 0)
    assert (replay.spent, replay.lost, len(replay.finished)) == (60 * BUDGET, {}, 60)
    assert len({random_search(POOL, GOAL, seed).finished for seed in range(3)}) == 3


def test_one_rung_with_a_perfect_probe_finds_one_of_the_best_in_the_round_that_has_one():
    """The best of a round is trained first: 9 first rungs of 100 steps and 3 rests of 400 a
    round, one rest in the last.
    """
    for seed in range(50):
        order = [
            e.number for e in (POOL.entries[i] for i in np.random.default_rng(seed).permutation(60))
        ]
        rounds = min(order.index(number) for number in GOAL) // 9
        size = min(9, 60 - 9 * rounds)
        assert (
            one_rung(POOL, GOAL, seed, PROBE, 100).hit
            == rounds * (9 * 100 + 3 * 400) + size * 100 + 400
        )


def test_a_search_that_stops_all_of_the_best_finishes_them_in_its_own_order():
    """The probe is upside down: the best of every round are stopped, and are the last to be
    finished afterwards.
    """
    upside = replace(
        POOL,
        entries=tuple(
            replace(e, rows=tuple({**r, METRIC: -r[METRIC]} for r in e.rows)) for e in POOL.entries
        ),
    )
    replay = one_rung(upside, GOAL, 0, PROBE, 100)
    assert set(replay.lost) == GOAL
    assert replay.spent == 60 * 100 + 21 * 400  # 6 rounds of 9 and one of 6, three of each in full
    assert replay.hit == replay.spent + (39 - 3 + 1) * 400
    assert {number for _, number in replay.finished} & GOAL == set()


def test_failed_configurations_cost_what_they_trained_and_are_never_found():
    broken = [
        replace(e, rows=e.rows[:3], score={}, error="not finite") if e.number < 12 else e
        for e in SMALL.entries
    ]
    pool = replace(SMALL, entries=tuple(broken))
    goal = pool.best(3)
    assert min(goal) >= 12
    replays = (
        random_search(pool, goal, 1),
        one_rung(pool, goal, 1, PROBE, 100),
        sweep_search(pool, goal, 1, make_sweep(stop=()), 50),
    )
    assert replays[0].spent == 12 * 150 + 12 * BUDGET
    assert all(number >= 12 for replay in replays for _, number in replay.finished)


def test_a_perfect_probe_saves_and_never_loses_the_best_and_a_useless_one_saves_nothing():
    sweep, seeds = make_sweep(), range(2)
    good = [sweep_search(SMALL, SMALL_GOAL, seed, sweep, 100) for seed in seeds]
    useless = make_pool(24, probe=0.0)
    poor = [sweep_search(useless, SMALL_GOAL, seed, sweep, 100) for seed in seeds]
    assert np.mean([r.hit for r in good]) < 25 / 4 * BUDGET  # what random search takes
    assert np.mean([r.hit for r in poor]) > 1.5 * np.mean([r.hit for r in good])
    first = max(SMALL.entries, key=lambda e: e.rank).number
    assert all(first not in r.lost for r in good)
    assert sum(len(r.lost) for r in poor) > sum(len(r.lost) for r in good)
    assert all(r.spent < 0.7 * 24 * BUDGET for r in (*good, *poor))


def test_rule_stops_are_the_sweeps_own_and_are_told_in_its_words():
    """All of the best collapse after step 150; the rule's patience of 2 ends them at the second
    probe from there on.
    """
    pool = make_pool(8)
    goal = pool.best(3)
    rows = {
        e.number: tuple({**r, "ema/std/mean": 0.05 if r["step"] >= 150 else 0.8} for r in e.rows)
        for e in pool.entries
    }
    pool = replace(
        pool,
        entries=tuple(
            replace(e, rows=rows[e.number]) if e.number in goal else e for e in pool.entries
        ),
    )
    fine = sweep_search(pool, goal, 0, make_sweep(early_terminate=None), 50)
    assert sweep_search(pool, goal, 0, make_sweep(early_terminate=None), 50) == fine
    # sees every other probe
    coarse = sweep_search(pool, goal, 0, make_sweep(early_terminate=None), 100)
    assert set(fine.lost.values()) == {
        "ema/std/mean 0.05 stayed below 0.1 for 2 probes, to step 200"
    }
    assert set(coarse.lost.values()) == {
        "ema/std/mean 0.05 stayed below 0.1 for 2 probes, to step 300"
    }
    assert (fine.spent, coarse.spent) == (5 * BUDGET + 3 * 200, 5 * BUDGET + 3 * 300)
    assert fine.hit == fine.spent + BUDGET - 200


def test_the_study_learns_from_the_configurations_that_were_trained(tmp_path):
    sweep = make_sweep()
    session = SweepSession(sweep, tmp_path, Policy(sweep, BUDGET))
    number, _ = session.next()
    Correction(tmp_path / "study.journal", sweep)(number, POOL.entries[7])
    session.report(number, {"step": BUDGET, "budget_steps": BUDGET, METRIC: 1.0})
    session.end(number)
    storage = JournalStorage(JournalFileBackend(str(tmp_path / "study.journal")))
    (trial,) = optuna.load_study(study_name=sweep.name, storage=storage).trials
    assert (trial.params, trial.value) == (POOL.entries[7].params, 1.0)


def test_distance_is_in_decades_on_a_log_range_and_a_choice_counts_whole():
    def entry(number, lr, clip, head):
        return Entry(
            number, {"optim.lr": lr, "loss.clip.weight": clip, "model.head.kind": head}, (), {}
        )

    space, here = (
        Space(make_sweep().parameters),
        {"optim.lr": 1e-3, "loss.clip.weight": 1.0, "model.head.kind": "grid"},
    )
    other, decade, unit = (
        entry(0, 1e-3, 1.0, "pooled"),
        entry(1, 1e-2, 1.0, "grid"),
        entry(2, 1e-3, 1.9, "grid"),
    )
    assert space.nearest(here, [other, decade, unit]) == unit  # 0.45 against 0.5 and 1
    assert space.nearest(here, [other, decade]) == decade
    assert space.nearest(here, [replace(decade, number=5), decade]) == decade


def test_spearman_agrees_with_scipy_also_where_values_tie():
    rng = np.random.default_rng(0)
    for a, b in (
        (rng.normal(size=40), rng.normal(size=40)),
        (rng.integers(0, 5, 40), rng.integers(0, 3, 40)),
    ):
        assert spearman(a, b) == pytest.approx(spearmanr(a, b).statistic)
    assert math.isnan(spearman(np.ones(5), np.arange(5)))
    assert math.isnan(spearman(np.arange(2), np.arange(2)))


def test_correlations_are_taken_at_the_last_probe_up_to_the_share():
    """At a tenth of the budget the probe ranks as the score does, later it is constant."""
    rows = {
        e.number: tuple({**r, METRIC: r[METRIC] if r["step"] < 100 else 1.0} for r in e.rows)
        for e in POOL.entries
    }
    changed = tuple(replace(e, rows=rows[e.number]) for e in POOL.entries)
    found = correlations(replace(POOL, entries=changed), "mean_attribute_accuracy")
    assert found[METRIC][0.1] == pytest.approx(-1)
    assert math.isnan(found[METRIC][0.33])
    assert abs(found[LOSS][0.33]) < 0.4
    holes = Entry(0, {}, ({"step": 50, METRIC: None}, {"step": 100, METRIC: 2.0}), {})
    assert math.isnan(value_at(holes, METRIC, 50))
    assert value_at(holes, METRIC, 165) == 2.0


def test_captions_that_leave_things_open_are_ranked_by_what_is_named_then_by_coverage():
    scores = [(0.5, 0.3), (0.5, 0.1), (0.7, 0.4), (0.2, 0.0)]
    entries = tuple(
        replace(e, score={"named": named, "coverage_excess": coverage, **e.score})
        for e, (named, coverage) in zip(POOL.entries, scores, strict=False)
    )
    left_open = replace(POOL, entries=entries)
    assert left_open.judged_by == ("named", "coverage_excess")
    assert POOL.judged_by == ("mean_attribute_accuracy", "all_correct")
    order = [entries[i].number for i in (2, 1, 0, 3)]
    assert [e.number for e in sorted(entries, key=lambda e: e.rank, reverse=True)] == order
    assert left_open.best(2) == set(order[:2])
    told = foretold(left_open).entries
    assert all(row[ORACLE] == e.score["named"] for e in told for row in e.rows)


def test_ratio_of_computes_with_its_interval():
    class Took:
        def __init__(self, hit):
            self.hit = hit

    ours, rng = [Took(100 + i) for i in range(40)], np.random.default_rng(0)
    found = ratio([Took(3 * r.hit) for r in ours], ours, rng)
    assert (found["median"], found["min"], found["max"], found["rounds"]) == pytest.approx(
        (3, 3, 3, 40)
    )
    assert found["interval"] == pytest.approx([3, 3])
    spread = ratio(
        [Took(float(x)) for x in np.random.default_rng(1).exponential(500, 40)],
        [Took(100)] * 40,
        rng,
    )
    assert spread["of_means_interval"][0] < spread["of_means"] < spread["of_means_interval"][1]
    assert spread["of_means_interval"][1] / spread["of_means_interval"][0] < 2.5


def test_the_oracle_sees_the_final_score_and_nothing_else_changes():
    told = foretold(POOL)
    assert all(
        row[ORACLE] == e.score["mean_attribute_accuracy"] for e in told.entries for row in e.rows
    )
    assert [e.params for e in told.entries] == [e.params for e in POOL.entries]


@pytest.fixture(scope="module")
def on_disk(tmp_path_factory):
    """(pool file, sweep file) with 12 configurations."""
    folder = tmp_path_factory.mktemp("pool")
    sweep = {
        **make_sweep(set={"train.probe_every": 50}).model_dump(
            mode="json", include={"name", "base", "set", "metric"}
        )
    }
    spec = {
        "optim.lr": {"distribution": "log_uniform_values", "min": 1e-4, "max": 1e-2},
        "loss.clip.weight": {"distribution": "uniform", "min": 0, "max": 2},
        "model.head.kind": {"values": ["pooled", "grid"]},
    }
    (folder / "s.yaml").write_text(
        json.dumps(
            {**sweep, "parameters": spec, "early_terminate": {"type": "hyperband", "min_iter": 100}}
        )
    )
    return write_pool(make_pool(12, loss=1.0), folder / "pool.jsonl"), folder / "s.yaml"


def test_command_prints_the_contract_and_writes_page_and_figure(on_disk, tmp_path, capsys):
    pool, sweep = on_disk
    page = tmp_path / "docs" / "bench.md"
    code = main(
        [
            "sweep",
            "--pool",
            str(pool),
            "--sweep",
            str(sweep),
            "--seeds",
            "2",
            "--page",
            str(page),
            "--json",
        ]
    )
    facts = json.loads(capsys.readouterr().out)
    assert (facts["bench"], set(facts["ratios"])) == (
        "sweep",
        {"vs_random", "vs_one_rung", "vs_loss"},
    )
    assert all(
        {"median", "min", "max", "rounds"} <= set(r) and r["rounds"] == 2
        for r in facts["ratios"].values()
    )
    assert facts["ratios"]["vs_loss"]["median"] == 1.0  # the loss ranks as the probe does
    assert facts["guards"] == {"seeds_30": False, "configurations_60": False, "minutes_20": True}
    assert code == 1
    assert facts["correlations"][METRIC]["0.1"] == pytest.approx(-1)
    assert facts["arms"]["random"]["best_lost"] == 0
    assert set(facts["arms"]) == {"random", "one_rung", "loss", "default", "oracle"}
    assert facts["pool"]["best"] == sorted(read_pool(pool).best(3))
    text = page.read_text()
    assert f"| vs_loss | {facts['ratios']['vs_loss']['median']:.2f} |" in text
    assert f"| {METRIC} | -1.00 | -1.00 | -1.00 |" in text
    assert page.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


def test_what_the_pool_lacks_is_said_in_one_line(on_disk, tmp_path):
    pool, sweep = on_disk
    given = ["sweep", "--pool", str(pool), "--sweep", str(sweep), "--seeds", "1"]
    with pytest.raises(
        InputError,
        match=(
            r"ema/text/snr is not in the record; recorded are ema/shoot/nmse, ema/std/mean,"
            r" loss/flow"
        ),
    ):
        main([*given, "metric.name=ema/text/snr"])  # behind options
    with pytest.raises(InputError, match="unrecognized arguments: --sed"):
        main([*given, "--sed"])
    with pytest.raises(InputError, match="loss/total is not in the record"):
        main([*given, "--loss", "loss/total"])
    with pytest.raises(
        InputError, match="its parameters are not those that the pool was drawn from"
    ):
        main([*given, "parameters.optim.lr.max=0.1"])
    with pytest.raises(InputError, match=r"no such record; type python -m benchmarks record"):
        main(["sweep", "--pool", str(tmp_path / "none.jsonl")])
    (tmp_path / "rows.jsonl").write_text('{"step": 1}\n')
    with pytest.raises(InputError, match=r"rows.jsonl:1: not a record"):
        read_pool(tmp_path / "rows.jsonl")


def test_halves_of_a_pool_differ_by_seed_and_have_their_own_best():
    halves = [half(POOL, seed) for seed in range(20)]
    assert {len(part.entries) for part in halves} == {30}
    assert half(POOL, 3) == halves[3]
    assert len({part.best(3) for part in halves}) > 10
    known = {entry.number: entry for entry in POOL.entries}
    assert all(entry == known[entry.number] for part in halves for entry in part.entries)
    times_drawn = np.bincount(
        [entry.number for part in halves for entry in part.entries], minlength=60
    )
    assert times_drawn.min() > 0
