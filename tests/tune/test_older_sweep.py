"""A sweep directory that an earlier version left, killed in its middle, goes on as it would have
there: `older/left` was written before sessions were parted from their policy, `older/after` is what
the version that wrote it made of it. `older/cmaes` is of the version whose CMA-ES was its own.
"""

import json
import math
import shutil
from pathlib import Path

from builders import make_sweep, open_session, study_trials

from flowray.sweepconfig.distributions import LogUniform, Uniform
from flowray.sweepconfig.search import CmaEsSearch
from flowray.sweepconfig.stop import BoundRule
from flowray.sweepconfig.sweep import Hyperband, Sweep
from flowray.tune.cmaes import GENERATION

METRIC, STEPS = "ema/shoot/nmse", 80
OLDER = Path(__file__).parent / "older"
TIMES = ("datetime_start", "datetime_complete", "worker_id", "seconds")


def without_times(path: Path) -> list[dict]:
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return [{key: value for key, value in row.items() if key not in TIMES} for row in rows]


def run_through(sweep: Sweep, folder: Path, every: int) -> int:
    """Run the sweep to its end; how often a trial was handed out."""
    session, handed_out = open_session(sweep, folder, STEPS), 0
    while chosen := session.next():
        number, lr = chosen[0], chosen[1]["optim.lr"]
        handed_out += 1
        start = session.ledger.trials[number].last_step
        for step in range(start + every, STEPS + 1, every):
            value = (math.log10(lr) + 3) ** 2 + 10 / step
            row = {"step": step, METRIC: value, "ema/flow/cos": 0.2 if lr > 5e-3 else 0.9}
            if session.report(number, {**row, "budget_steps": STEPS, "start": start}):
                break
        session.end(number)
    return handed_out


def test_it_goes_on_as_it_would_have(tmp_path):
    folder = shutil.copytree(OLDER / "left", tmp_path / "sweep")
    sweep = make_sweep(
        metric={"name": METRIC},
        early_terminate=Hyperband(min_iter=20, eta=2),
        stop=(BoundRule(metric="ema/flow/cos", below=0.3, after=30, patience=2),),
        run_cap=9,
        startup_trials=3,
    )
    handed_out = run_through(sweep, folder, every=10)
    assert handed_out > 4
    assert without_times(folder / "trials.jsonl") == without_times(OLDER / "after.jsonl")
    assert without_times(folder / "study.journal") == without_times(OLDER / "after.journal")


def test_one_with_another_cma_es_goes_on_and_learns_from_what_it_drew(tmp_path):
    """Of its 12 trials the first was drawn at random, the others are generations of 4."""
    folder = shutil.copytree(OLDER / "cmaes", tmp_path / "sweep")
    before = {row["trial"]: row["params"] for row in without_times(folder / "trials.jsonl")}
    ranges = {"optim.lr": LogUniform(min=1e-5, max=1e-1), "loss.clip.weight": Uniform(min=0, max=4)}
    sweep = make_sweep(
        metric={"name": METRIC},
        parameters=ranges,
        early_terminate=Hyperband(min_iter=20, eta=2),
        search=CmaEsSearch(population=4),
        run_cap=20,
    )
    assert run_through(sweep, folder, every=20) > 8
    after = {row["trial"]: row["params"] for row in without_times(folder / "trials.jsonl")}
    assert len(before) == 12
    assert before.items() <= after.items()
    generations = [trial.system_attrs.get(GENERATION) for trial in study_trials(folder)]
    assert generations == [None] + [(number - 1) // 4 for number in range(1, 20)]
