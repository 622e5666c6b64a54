"""What a sweep's files are worth after SIGKILL: a real process, killed at seeded moments, must
end as if nobody had touched it. No Ray.
"""

import contextlib
import errno
import json
import math
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import deque as consume
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import optuna
import pytest
from builders import make_sweep, open_session
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend

from flowray.cluster import session
from flowray.config.errors import InputError
from flowray.store.rows import RowWriter, read_rows
from flowray.sweepconfig.search import CmaEsSearch, Nsga2Search
from flowray.sweepconfig.stop import BoundRule
from flowray.sweepconfig.sweep import Hyperband, Sweep
from flowray.tune import study
from flowray.tune.session import SweepSession

METRIC, STEPS, EVERY, TRIALS = "ema/shoot/nmse", 80, 20, 6
FORK = multiprocessing.get_context("fork")  # a killed process a few milliseconds old


make = partial(
    make_sweep,
    metric={"name": METRIC},
    early_terminate=Hyperband(min_iter=20, eta=2),
    stop=(BoundRule(metric="ema/flow/cos", below=0.3, after=30, patience=2),),
    run_cap=TRIALS,
    startup_trials=3,
)


def rows_at(lr: float, step: int) -> tuple[dict, dict]:
    """What a run logs and probes: better towards lr 1e-3, the direction lost above 5e-3."""
    value = (math.log10(lr) + 3) ** 2 + 10 / step
    return {"step": step, "loss/flow": 2 * value}, {
        "step": step,
        METRIC: value,
        "ema/flow/cos": 0.2 if lr > 5e-3 else 0.9,
    }


def train(judge: SweepSession, number: int, lr: float) -> None:
    """A run as the training loop keeps it: rows first, a checkpoint at every 20 steps, then the
    report.
    """
    run = judge.sweep_dir / str(number)
    run.mkdir(exist_ok=True)
    checkpoint = run / "checkpoint"
    start = int(checkpoint.read_text()) if checkpoint.exists() else 0
    metrics, probes = (
        RowWriter(run / "metrics.jsonl", start),
        RowWriter(run / "probes.jsonl", start),
    )
    for step in range(start + 10, STEPS + 1, 10):
        logged, probed = rows_at(lr, step)
        metrics.write(logged)
        probes.write(probed)
        if step % EVERY == 0:
            (run / "part").write_text(str(step))
            (run / "part").replace(checkpoint)
        with (run / "trained").open("a") as file:
            file.write(f"{step}\n")
        if judge.report(
            number,
            {
                **probed,
                **{key: value for key, value in logged.items() if "/" in key},
                "budget_steps": STEPS,
                "start": start,
            },
        ):
            return


def whole_session(sweep: Sweep, folder: Path) -> None:
    judge = open_session(sweep, folder, STEPS)
    while chosen := judge.next():
        number, params = chosen
        train(judge, number, params["optim.lr"])
        judge.end(number)


def mortal_session(sweep: Sweep, folder: Path, last: int) -> None:
    """A session that is killed before its file operation `last` in the sweep's folder."""
    done, deeds = 0, ("open", "os.rename", "os.remove", "os.symlink", "os.mkdir", "os.truncate")

    def count(event: str, arguments: tuple) -> None:
        nonlocal done
        if event in deeds and str(arguments[0]).startswith(str(folder)):
            done += 1
            if done == last:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(count)
    whole_session(sweep, folder)


def run_until_done(sweep: Sweep, folder: Path, seed: int) -> int:
    """The same session again and again, until one comes to its end; how many were killed."""
    moments = random.Random(seed)
    folder.mkdir(exist_ok=True)
    for kills in range(100):
        process = FORK.Process(
            target=mortal_session, args=(sweep, folder, moments.randrange(20, 120))
        )
        process.start()
        process.join(60)
        if process.exitcode == 0:
            return kills
        assert process.exitcode == -signal.SIGKILL
    pytest.fail("no session came to its end")


def outcome(folder: Path) -> list[tuple]:
    """All that a sweep decided: the account, the study, the rows."""
    storage = JournalStorage(JournalFileBackend(str(folder / "study.journal")))
    told = optuna.load_study(study_name="s", storage=storage).trials
    account = [json.loads(line) for line in (folder / "trials.jsonl").read_text().splitlines()]
    assert (
        [row["trial"] for row in account]
        == [trial.number for trial in told]
        == list(range(len(told)))
    )
    return [
        (
            {key: value for key, value in row.items() if key != "seconds"},
            (trial.params, trial.state, trial.value, trial.intermediate_values, trial.user_attrs),
            [probe["step"] for probe in read_rows(folder / str(trial.number) / "probes.jsonl")],
            [logged["step"] for logged in read_rows(folder / str(trial.number) / "metrics.jsonl")],
        )
        for row, trial in zip(account, told, strict=True)
    ]


@pytest.fixture(autouse=True)
def _short_locks(monkeypatch):
    monkeypatch.setattr(study, "LOCK_S", 0.05)


@pytest.mark.parametrize(
    "changes",
    [
        {"method": "bayes"},
        {"method": "random", "metric": {"name": "loss/flow"}},
        {"search": CmaEsSearch(population=4)},
        {"search": Nsga2Search(population=2)},
    ],
    ids=["tpe", "by a loss", "cmaes", "nsga2"],
)
def test_a_sweep_killed_at_any_file_operation_ends_as_if_it_had_not_been(tmp_path, changes):
    sweep = make(**changes)
    (tmp_path / "whole").mkdir()
    whole_session(sweep, tmp_path / "whole")
    kills = run_until_done(sweep, tmp_path / "killed", seed=len(str(changes)))
    assert kills >= 4
    expected, found = outcome(tmp_path / "whole"), outcome(tmp_path / "killed")
    assert found == expected
    assert {row["status"] for row, *_ in found} == {"finished", "stopped"}
    repeated = 0
    for number in range(TRIALS):
        trained = [
            int(step)
            for step in (tmp_path / "killed" / str(number) / "trained").read_text().split()
        ]
        # from a checkpoint
        assert all(
            step % EVERY == 10
            for step, before in zip(trained[1:], trained, strict=False)
            if step <= before
        )
        repeated += len(trained) - len(set(trained))
    assert repeated <= kills * EVERY // 10


@pytest.fixture(scope="module")
def untouched(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("untouched")
    whole_session(make(method="random"), folder)
    return folder


@pytest.fixture(scope="module")
def halfway(tmp_path_factory) -> Path:
    """The folder of a sweep that was killed in its fourth trial or so."""
    folder = tmp_path_factory.mktemp("halfway")
    process = FORK.Process(target=mortal_session, args=(make(method="random"), folder, 150))
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    return folder


@pytest.mark.parametrize(
    ("name", "cut"),
    [("study.journal", 1), ("study.journal", 9), ("trials.jsonl", 1), ("trials.jsonl", 40)],
)
def test_a_last_line_that_is_cut_off_or_spoilt_costs_nothing(
    tmp_path, untouched, halfway, name, cut
):
    subprocess.run(["cp", "-a", halfway, tmp_path / "cut"], check=True)
    file = tmp_path / "cut" / name
    assert file.stat().st_size > 2 * cut
    os.truncate(file, file.stat().st_size - cut)
    if cut == 9:
        with file.open("ab") as spoilt:
            spoilt.write(b"\0\0\0\0\n")
    whole_session(make(method="random"), tmp_path / "cut")
    assert outcome(tmp_path / "cut") == outcome(untouched)


@pytest.mark.parametrize("lost", ["study.journal", "trials.jsonl"])
def test_without_one_of_its_files_a_sweep_is_rebuilt_or_refused_but_never_run_twice(
    tmp_path, untouched, lost
):
    sweep, folder = make(method="random"), tmp_path / "copy"
    subprocess.run(["cp", "-a", untouched, folder], check=True)
    kept = (folder / lost).read_bytes()
    (folder / lost).unlink()
    if lost == "study.journal":
        with pytest.raises(
            InputError, match=r"study.journal: lacks trial 0, which trials.jsonl has"
        ):
            whole_session(sweep, folder)
        (folder / lost).write_bytes(kept[:1000] + b"\n" + kept[1000:])
        with pytest.raises(InputError, match=r"study.journal: cannot be read: .*name=OTHER"):
            whole_session(sweep, folder)
        (folder / lost).write_bytes(kept)
    whole_session(sweep, folder)
    assert outcome(folder) == outcome(untouched)
    assert [len((folder / str(n) / "trained").read_text().split()) for n in range(TRIALS)] == [
        row[0]["last_step"] // 10 for row in outcome(folder)
    ]


def test_the_lock_of_a_killed_writer_does_not_stop_a_sweep_that_was_moved(tmp_path):
    os.symlink(tmp_path / "gone" / "study.journal", tmp_path / "study.journal.lock")
    whole_session(make(method="random", run_cap=1), tmp_path)
    assert len(outcome(tmp_path)) == 1
    assert not (tmp_path / "study.journal.lock").is_symlink()


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 256 KB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=256k", "none", folder], capture_output=True
    ).returncode:
        pytest.skip("this machine lets no process mount")
    yield folder
    subprocess.run(["umount", folder], check=True)


def test_a_full_disk_costs_no_finished_trial_and_leaves_a_journal_that_goes_on(
    untouched, small_disk
):
    sweep = make(method="random")
    judge = open_session(sweep, small_disk, STEPS)
    for _ in range(3):
        number, params = judge.next()
        train(judge, number, params["optim.lr"])
        judge.end(number)
    with contextlib.suppress(OSError), (small_disk / "filler").open("wb", buffering=0) as filler:
        while True:
            filler.write(b"0" * 512)
    journal = (small_disk / "study.journal").read_bytes()
    with pytest.raises(OSError, match="No space left"):
        # the last page of the file may hold a little more
        consume(iter(judge.next, None), maxlen=0)
    assert (small_disk / "study.journal").read_bytes().startswith(journal)
    judge.suspend(OSError(errno.ENOSPC, "No space left on device"))
    assert judge.next() is None
    (small_disk / "filler").unlink()
    whole_session(sweep, small_disk)
    assert outcome(small_disk) == outcome(untouched)


def hold_a_folder(pipe) -> None:
    with session.local_folder() as folder:
        (folder / "session_2026").mkdir()
        (folder / "session_2026" / "log").touch()
        pipe.send(folder)
        time.sleep(300)


@pytest.fixture
def short_folder(monkeypatch) -> Iterator[Path]:
    """Where temporary files go: in a longer one Ray's sockets would not fit."""
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        monkeypatch.setattr("tempfile.tempdir", folder)
        yield Path(folder)


def test_the_folder_of_a_killed_driver_is_removed_by_the_next_and_that_of_a_live_one_stays(
    short_folder,
):
    tmp_path = short_folder
    (tmp_path / "fr-foreign").mkdir()  # without a lock: not known to be ours
    here, there = multiprocessing.Pipe()
    drivers, folders = [], []
    try:
        for _ in range(2):
            drivers.append(FORK.Process(target=hold_a_folder, args=(there,)))
            drivers[-1].start()
            assert here.poll(60)
            folders.append(here.recv())
        killed, alive = folders
        drivers[0].kill()
        drivers[0].join()
        assert killed.is_dir()
        with session.local_folder() as mine:
            assert sorted(tmp_path.iterdir()) == sorted([alive, mine, tmp_path / "fr-foreign"])
            assert (alive / "session_2026" / "log").is_file()
    finally:
        for driver in drivers:
            driver.kill()
            driver.join()
    # a process of its Ray that still writes
    waits = [sys.executable, "-c", "print(flush=True); input()", str(alive)]
    left = subprocess.Popen(waits, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert left.stdout.readline()  # it is there under its own command
    with left, session.local_folder() as mine:
        assert sorted(tmp_path.iterdir()) == sorted([alive, mine, tmp_path / "fr-foreign"])
        left.communicate(b"\n")
    assert list(tmp_path.iterdir()) == [tmp_path / "fr-foreign"]  # gone with that session
    assert not mine.exists()
