"""Recording a pool: what a line holds, and that a recording that was ended goes on where it was."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from support import tiny_recipe

from benchmarks.pool import read_pool
from benchmarks.record import draw, record
from flowray.config.errors import InputError
from flowray.config.load import dump_recipe
from flowray.store.rows import read_rows
from flowray.sweepconfig.file import load_sweep
from flowray.sweepconfig.sweep import Sweep

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def sweep(tmp_path_factory) -> Sweep:
    folder = tmp_path_factory.mktemp("tiny")
    (folder / "tiny.yaml").write_text(dump_recipe(tiny_recipe(folder)))
    parameters = {
        "optim.lr": {"distribution": "log_uniform_values", "min": 1e-4, "max": 1e-2},
        "model.head.kind": {"values": ["pooled", "conv"]},
    }
    (folder / "sweep.yaml").write_text(
        json.dumps(
            {
                "name": "tiny",
                "base": "tiny.yaml",
                "metric": {"name": "ema/shoot/nmse"},
                "parameters": parameters,
                "seed": 3,
            }
        )
    )
    return load_sweep(str(folder / "sweep.yaml"), ["set.train.probe_every=4"])


def judge(run: Path) -> dict[str, float]:
    """A score that follows from what was trained."""
    return {
        "mean_attribute_accuracy": -read_rows(run / "probes.jsonl")[-1]["ema/shoot/nmse"],
        "all_correct": 0.0,
    }


@pytest.fixture(scope="module")
def whole(sweep, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    return folder, record(folder, sweep, 2, judge)


def test_a_line_holds_parameters_rows_and_score(sweep, whole):
    folder, pool = whole
    assert [e.params for e in pool.entries] == draw(sweep, 2) == draw(sweep, 3)[:2]
    assert (pool.budget_steps, pool.drawn) == (12, 2)
    for entry in pool.entries:
        run = folder / "runs" / str(entry.number)
        assert [row["step"] for row in entry.rows] == [4, 8, 12]
        last, logged = read_rows(run / "probes.jsonl")[-1], read_rows(run / "metrics.jsonl")
        assert entry.rows[-1]["ema/shoot/nmse"] == pytest.approx(last["ema/shoot/nmse"], rel=1e-5)
        since = [row["loss/flow"] for row in logged if 8 < row["step"] <= 12]
        # logged at every step
        assert entry.rows[-1]["loss/flow"] == pytest.approx(sum(since) / 4, rel=1e-5)
        assert entry.score["mean_attribute_accuracy"] == -last["ema/shoot/nmse"]
        assert not any("trivial" in key for key in entry.rows[-1])
        assert not (run / "checkpoints").exists()


def test_a_recording_that_was_ended_goes_on_and_gives_what_an_unbroken_one_gives(
    sweep, whole, tmp_path
):
    judged = []

    def ended_at_the_second(run: Path) -> dict[str, float]:
        judged.append(run.name)
        if len(judged) == 2:
            raise KeyboardInterrupt
        return judge(run)

    with pytest.raises(KeyboardInterrupt):
        record(tmp_path, sweep, 2, ended_at_the_second)
    assert [e.number for e in read_pool(tmp_path / "pool.jsonl").entries] == [0]
    with (tmp_path / "pool.jsonl").open("a") as file:
        file.write('{"number": 1, "par')  # a writer killed in the middle of its line
    trained = (tmp_path / "runs" / "1" / "metrics.jsonl").stat().st_ino
    pool = record(tmp_path, sweep, 2, ended_at_the_second)
    assert judged == ["0", "1", "1"]
    assert pool.entries == whole[1].entries
    assert len((tmp_path / "pool.jsonl").read_text().splitlines()) == 3
    assert trained != 0
    before = (tmp_path / "pool.jsonl").read_bytes()
    record(tmp_path, sweep, 2, ended_at_the_second)
    assert (judged, (tmp_path / "pool.jsonl").read_bytes()) == (["0", "1", "1"], before)


def test_a_configuration_that_cannot_be_trained_is_a_line_with_its_error(sweep, tmp_path):
    pool = record(
        tmp_path, sweep.model_copy(update={"set": {**sweep.set, "loss.kl.weight": 1e38}}), 1, judge
    )
    (entry,) = pool.entries
    assert entry.error is not None
    assert "not finite" in entry.error
    assert entry.score == {}


def test_another_sweep_or_count_is_refused(sweep, whole):
    folder, _ = whole
    for other, count in (
        (sweep, 3),
        (sweep.model_copy(update={"seed": 4}), 2),
        (sweep.model_copy(update={"set": {}}), 2),
    ):
        with pytest.raises(InputError, match="a record of another sweep or count"):
            record(folder, other, count, judge)


@pytest.mark.faults
def test_kill_9_of_two_real_recording_processes(tmp_path):
    """The command itself on the packaged proxy, two configurations at a time, killed as soon as
    both have a checkpoint.
    """
    settings = [
        "set.train.steps=20",
        "set.train.checkpoint_every=4",
        "set.train.probe_every=4",
        "--count",
        "2",
        "--processes",
        "2",
    ]
    command = [sys.executable, "-m", "benchmarks", "record", str(tmp_path), *settings]

    def checkpoints() -> int:
        return len({path.parts[-3] for path in tmp_path.glob("runs/*/checkpoints/step_*")})

    first = subprocess.Popen(command, cwd=ROOT, start_new_session=True)
    deadline = time.monotonic() + 240
    while checkpoints() < 2 and first.poll() is None and time.monotonic() < deadline:
        time.sleep(0.1)
    os.killpg(first.pid, signal.SIGKILL)
    first.wait()
    done = {row["number"] for row in read_rows(tmp_path / "pool.jsonl")[1:]}
    steps = {
        n: [row["step"] for row in read_rows(tmp_path / "runs" / n / "probes.jsonl")] for n in "01"
    }
    assert checkpoints() == 2
    assert len(done) < 2
    subprocess.run(command, cwd=ROOT, check=True, timeout=400)
    pool = read_pool(tmp_path / "pool.jsonl")
    assert [e.number for e in pool.entries] == [0, 1]
    for entry in pool.entries:
        assert [row["step"] for row in entry.rows] == [4, 8, 12, 16, 20]
        assert steps[str(entry.number)] == [4, 8, 12, 16, 20][: len(steps[str(entry.number)])]
        assert 0 <= entry.score["mean_attribute_accuracy"] <= 1
