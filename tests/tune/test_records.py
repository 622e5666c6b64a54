"""trials.jsonl as it is written: what it holds after every event of a sweep, and what a process
that is killed leaves of it.
"""

import json
import math
import os
import signal
import subprocess
import sys
import time
from dataclasses import asdict

import pytest
from builders import METRIC, make_sweep, open_session

from flowray.config.errors import InputError
from flowray.sweepconfig.stop import BoundRule
from flowray.tune.ledger import Ledger
from flowray.tune.records import TrialRecord

SEEDS = 2


def open_it(folder):
    stop = [BoundRule(metric=METRIC, above=5)]
    return open_session(make_sweep(stop=stop, method="random", run_cap=4, seeds=SEEDS), folder, 20)


def row(step, value, repeat=0):
    return {"step": step, "budget_steps": 20, "repeat": repeat, METRIC: value, "flow/cos": 0.9}


def test_the_file_is_all_trials_after_every_event(tmp_path):
    judge = open_it(tmp_path)

    def whole():
        trials = judge.ledger.trials
        expected = "".join(
            json.dumps(asdict(trials[number]), allow_nan=False) + "\n" for number in sorted(trials)
        )
        assert (tmp_path / "trials.jsonl").read_text() == expected
        return [(trial.status, trial.last_step) for _, trial in sorted(trials.items())]

    events = [(judge.next,), (judge.next,)]
    events += [
        (judge.report, 0, row(10, 0.5)),
        (judge.report, 1, row(10, 9.0)),
        (judge.end, 1),
        (judge.next,),
    ]
    events += [
        (judge.report, 2, {**row(10, 1.0), "flow/cos": math.nan}),
        (judge.report, 0, row(20, 0.4)),
        (judge.end, 2, "ValueError: no"),
    ]
    events += [
        (judge.report, 0, row(10, 0.3, 1)),
        (judge.report, 0, row(20, 0.2, 1)),
        (judge.end, 0),
        (judge.next,),
        (judge.report, 3, row(10, 1.0)),
    ]
    for call, *given in events:
        call(*given)
        last = whole()
    assert last == [("finished", 40), ("stopped", 10), ("failed", 10), ("running", 10)]
    assert judge.ledger.trials[0].noise[METRIC] == pytest.approx(0.2 / 2**0.5)

    judge = open_it(tmp_path)  # a new session has the file alone
    assert judge.next()[0] == 3
    assert [status for status, _ in whole()] == ["finished", "stopped", "failed", "running"]


def test_a_save_that_names_trials_writes_those_and_the_new_ones(tmp_path):
    records = Ledger(tmp_path / "trials.jsonl")
    records.trials = {0: TrialRecord(0, {}), 1: TrialRecord(1, {})}
    records.save(0)
    records.trials[0].last_step, records.trials[1].last_step = 10, 20
    records.trials[2] = TrialRecord(2, {})
    records.save(1)
    assert [t.last_step for t in Ledger(tmp_path / "trials.jsonl").trials.values()] == [0, 20, 0]
    records.save()
    assert Ledger(tmp_path / "trials.jsonl").trials == records.trials


SAVES = """
import sys
from pathlib import Path
from flowray.tune.ledger import Ledger
from flowray.tune.records import TrialRecord

records = Ledger(Path(sys.argv[1]))
METRICS = {f"m/{i}": 1 / 3 for i in range(50)}
records.trials = {n: TrialRecord(n, {"a": n}, metrics=METRICS) for n in range(100)}
step = 0
while True:
    step += 1
    for trial in records.trials.values():
        trial.last_step = step
    records.save()
"""


def test_a_reader_and_a_killed_writer_leave_it_whole(tmp_path):
    path = tmp_path / "trials.jsonl"
    writer = subprocess.Popen([sys.executable, "-c", SAVES, str(path)])
    try:
        deadline = time.monotonic() + 60
        seen = 0
        while seen < 5 and time.monotonic() < deadline:
            rows = (
                [json.loads(line) for line in path.read_text().splitlines()]
                if path.exists()
                else []
            )
            steps = {row["last_step"] for row in rows}
            assert len(steps) <= 1  # all from one save
            assert len(rows) in (0, 100)
            seen = max(steps, default=0)
        assert seen >= 5
    finally:
        os.kill(writer.pid, signal.SIGKILL)
        writer.wait()
    left = Ledger(path)
    assert len(left.trials) == 100
    assert len({trial.last_step for trial in left.trials.values()}) == 1
    left.save(0)  # a new session writes over what the killed one left half done
    assert sorted(p.name for p in tmp_path.iterdir()) == ["trials.jsonl"]


def test_a_trial_that_waits_is_neither_stopped_nor_done_also_in_older_files(tmp_path):
    path = tmp_path / "trials.jsonl"
    older = [
        {
            "trial": 0,
            "params": {},
            "status": "stopped",
            "last_step": 20,
            "budget_steps": 40,
            "waits": True,
        }
    ]
    older += [
        {
            "trial": 1,
            "params": {},
            "status": "stopped",
            "last_step": 20,
            "budget_steps": 40,
            "stopped_by": "worse",
        }
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in older))
    records = Ledger(path)
    assert ([trial.trial for trial in records.by("stopped")], records.waiting()) == ([1], [0])
    assert records.saved() == 0.5  # of the one that is through
    records.save()
    assert [json.loads(line)["status"] for line in path.read_text().splitlines()] == [
        "waiting",
        "stopped",
    ]
    assert [records.to_finish(number).trial for number in (0, 1)] == [0, 1]
    records.trials[1].status = "finished"
    for number in (1, 7):
        with pytest.raises(InputError, match=f"--finish {number}"):
            records.to_finish(number)
