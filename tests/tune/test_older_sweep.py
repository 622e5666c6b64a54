"""A sweep directory that an earlier version left, killed in its middle, goes on as it would have
there: `older/left` was written before sessions were parted from their policy, `older/after` is what
the version that wrote it made of it.
"""

import json
import math
import shutil
from pathlib import Path

from builders import make_sweep, open_session

from flowray.sweepconfig.sweep import Hyperband, StopRule

METRIC, STEPS = "ema/shoot/nmse", 80
OLDER = Path(__file__).parent / "older"
TIMES = ("datetime_start", "datetime_complete", "worker_id", "seconds")


def without_times(path: Path) -> list[dict]:
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return [{key: value for key, value in row.items() if key not in TIMES} for row in rows]


def test_it_goes_on_as_it_would_have(tmp_path):
    folder = shutil.copytree(OLDER / "left", tmp_path / "sweep")
    sweep = make_sweep(
        metric={"name": METRIC},
        early_terminate=Hyperband(min_iter=20, eta=2),
        stop=(StopRule(metric="ema/flow/cos", below=0.3, after=30, patience=2),),
        run_cap=9,
        startup_trials=3,
    )
    session, handed_out = open_session(sweep, folder, STEPS), 0
    while chosen := session.next():
        number, lr = chosen[0], chosen[1]["optim.lr"]
        handed_out += 1
        start = session.ledger.trials[number].last_step
        for step in range(start + 10, STEPS + 1, 10):
            value = (math.log10(lr) + 3) ** 2 + 10 / step
            row = {"step": step, METRIC: value, "ema/flow/cos": 0.2 if lr > 5e-3 else 0.9}
            if session.report(number, {**row, "budget_steps": STEPS, "start": start}):
                break
        session.end(number)
    assert handed_out > 4
    assert without_times(folder / "trials.jsonl") == without_times(OLDER / "after.jsonl")
    assert without_times(folder / "study.journal") == without_times(OLDER / "after.journal")
