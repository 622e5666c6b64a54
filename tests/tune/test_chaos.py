"""Real sweeps of real training, killed at seeded moments: the driver, a trial's process, a train
worker, a node, the disk.

What was killed is simply started again, as a user or a cluster's retry would. Where one trial runs
at a time all of it repeats bit for bit, so a killed sweep must come to the very account, study and
losses of one that nobody touched.
"""

import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import optuna
import pytest
import yaml
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import TrialState
from ray_nodes import joined, running_head
from support import tiny_recipe

from flowray.cluster import session
from flowray.config.load import dump_recipe
from flowray.store.rows import read_rows

pytestmark = [pytest.mark.faults, pytest.mark.timeout(1800)]
STEPS, EVERY, TRIALS = 240, 20, 4
TIMEOUT_S = 900  # a session, on a busy machine
STATES = {"finished": TrialState.COMPLETE, "stopped": TrialState.PRUNED}


class Place:
    """A folder with tiny.yaml and sweep.yaml, and the commands that run there; `tmp` is for
    Ray's own files.
    """

    def __init__(self, folder: Path, tmp: Path):
        self.folder, self.tmp, self.processes = folder, tmp, []
        cadence = {
            "train.log_every": 1,
            "train.probe_every": 40,
            "train.sample_every": 1000,
            "train.checkpoint_every": EVERY,
        }
        recipe = tiny_recipe(folder, **cadence, **{"train.steps": STEPS})
        (folder / "tiny.yaml").write_text(dump_recipe(recipe))
        sweep = {
            "name": "unset",
            "storage_path": str(folder / "sweeps"),
            "base": "tiny.yaml",
            "metric": {"name": "ema/shoot/nmse"},
            "parameters": {
                "optim.lr": {"distribution": "log_uniform_values", "min": 1e-5, "max": 3e-2}
            },
            "early_terminate": {"type": "hyperband", "min_iter": 40, "eta": 2},
            "startup_trials": 2,
            "run_cap": TRIALS,
            "max_concurrent": 1,
        }
        (folder / "sweep.yaml").write_text(yaml.safe_dump(sweep))

    def sweep(self, name: str) -> Path:
        return self.folder / "sweeps" / name

    def start(self, name: str, *arguments: str, **environment: str) -> subprocess.Popen:
        kept = {
            key: value
            for key, value in os.environ.items()
            if not key.startswith(("RAY_", "FLOWRAY_"))
        }
        given = {**kept, "TMPDIR": str(self.tmp), "FLOWRAY_CHAOS": str(self.folder), **environment}
        command = [sys.executable, "-m", "flowray.tune", "sweep.yaml", f"name={name}", *arguments]
        with (self.folder / f"{name}.log").open("w") as log:
            self.processes.append(
                subprocess.Popen(command, cwd=self.folder, env=given, stdout=log, stderr=log)
            )
        return self.processes[-1]

    def live(
        self, name: str, until: Callable[[], Any], *arguments: str, **environment: str
    ) -> subprocess.Popen:
        """Start the command and wait until something is so.

        A Ray that does not start within its 30 s is started again.
        """
        for _ in range(6):
            process, deadline = (
                self.start(name, *arguments, **environment),
                time.monotonic() + TIMEOUT_S,
            )
            while process.poll() is None and not until():
                assert time.monotonic() < deadline, (self.folder / f"{name}.log").read_text()[
                    -3000:
                ]
                time.sleep(0.05)
            if process.poll() is None or "timed out during startup" not in self.log(name):
                break
        return process

    def finish(self, name: str, *arguments: str, **environment: str) -> None:
        process = self.live(name, lambda: False, *arguments, **environment)
        assert process.returncode == 0, self.log(name)[-3000:]

    def log(self, name: str) -> str:
        return (self.folder / f"{name}.log").read_text()

    def steps(self, name: str) -> int:
        """How many steps all trials together have logged."""
        return sum(
            path.read_bytes().count(b"\n") for path in self.sweep(name).glob("[0-9]*/metrics.jsonl")
        )


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Iterator[Place]:
    tmp = Path(tempfile.mkdtemp(prefix="frt-"))  # short, for Ray's sockets
    made = Place(tmp_path_factory.mktemp("chaos"), tmp)
    try:
        yield made
    finally:
        for process in made.processes:
            process.kill()
            process.wait()
        for pid in marked(made.folder):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        shutil.rmtree(tmp, ignore_errors=True)


@pytest.fixture(scope="module")
def whole(place) -> Path:
    """The sweep that nobody touched."""
    place.finish("whole")
    folder = place.sweep("whole")
    assert {row["status"] for row in account(folder)} == {"finished", "stopped"}
    return folder


def marked(folder: Path) -> list[int]:
    """Processes that carry the test's mark in their environment."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if f"FLOWRAY_CHAOS={folder}".encode() in (process / "environ").read_bytes().split(
                b"\0"
            ):
                found.append(int(process.name))
    return found


def below(pid: int) -> dict[int, str]:
    """The live descendants of a process and what they call themselves."""
    parents, names = {}, {}
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            state, parent = (process / "stat").read_text().rpartition(")")[2].split()[:2]
            if state != "Z":
                parents[int(process.name)] = int(parent)
                names[int(process.name)] = (process / "cmdline").read_text().replace("\0", " ")
    found, ring = {}, {pid}
    while ring := {child for child, parent in parents.items() if parent in ring}:
        found |= {child: names[child] for child in ring}
    return found


def account(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "trials.jsonl").read_text().splitlines()]


def told(folder: Path) -> list[optuna.trial.FrozenTrial]:
    return optuna.load_study(
        study_name=folder.name,
        storage=JournalStorage(JournalFileBackend(str(folder / "study.journal"))),
    ).trials


def losses(folder: Path, number: int) -> list[tuple[int, float]]:
    return [
        (row["step"], row["loss/total"])
        for row in read_rows(folder / str(number) / "metrics.jsonl")
    ]


def starts(folder: Path, number: int) -> list[int]:
    """The steps at which the trial was started: the loop names its TensorBoard files by them."""
    files = (folder / str(number) / "tensorboard").glob("events.out.*")
    return sorted(int(file.suffix[1:]) for file in files if file.suffix[1:].isdigit())


def all_starts(folder: Path) -> list[int]:
    return [step for number in range(TRIALS) for step in starts(folder, number)]


def sound(folder: Path) -> None:
    """No trial lost, none twice, no step twice or left out, and the study says what the account
    says.
    """
    rows, trials = account(folder), told(folder)
    assert (
        [row["trial"] for row in rows]
        == [trial.number for trial in trials]
        == list(range(len(rows)))
    )
    for row, trial in zip(rows, trials, strict=True):
        assert trial.state == STATES[row["status"]], row
        assert trial.last_step == row["last_step"]
        assert (
            trial.value
            == trial.intermediate_values[row["last_step"]]
            == row["metrics"]["ema/shoot/nmse"]
        )
        steps = [step for step, _ in losses(folder, row["trial"])]
        assert steps == list(range(1, len(steps) + 1))
        assert len(steps) >= row["last_step"]
        probes = [probe["step"] for probe in read_rows(folder / str(row["trial"]) / "probes.jsonl")]
        assert probes == sorted(set(probes))
        assert row["last_step"] == STEPS or row["status"] == "stopped"
        assert all(step % EVERY == 0 for step in starts(folder, row["trial"]))


def same(folder: Path, whole: Path) -> None:
    """The killed sweep decided, trained and remembered what the untouched one did."""
    sound(folder)
    for row, expected in zip(account(folder), account(whole), strict=True):
        assert {**row, "seconds": 0} == {**expected, "seconds": 0}
        assert losses(folder, row["trial"]) == losses(whole, row["trial"])
    facts = [
        [(t.params, t.state, t.value, t.intermediate_values, t.user_attrs) for t in told(one)]
        for one in (folder, whole)
    ]
    assert facts[0] == facts[1]


def lead(folder: Path) -> int | None:
    """The process that trains in the sweep's folder just now, once its run has a checkpoint."""
    for lock in folder.glob("[0-9]*/.lock"):
        with contextlib.suppress(OSError, ValueError):
            pid = json.loads(lock.read_text())["pid"]
            # a zombie has none
            if (
                any((lock.parent / "checkpoints").glob("step_*"))
                and Path(f"/proc/{pid}/cmdline").read_bytes()
            ):
                return pid
    return None


def test_a_driver_killed_three_times_and_typed_again_ends_as_if_untouched(
    place, whole, monkeypatch
):
    folder, total = place.sweep("driver"), place.steps("whole")
    moments = sorted(random.Random(7).sample(range(total // 10, total * 9 // 10), 3))
    for kill, moment in enumerate(moments):
        driver = place.live(
            "driver",
            lambda moment=moment: place.steps("driver") >= moment,
            *(["--resume"] if kill == 1 else []),
        )
        assert driver.poll() is None, place.log("driver")[-3000:]
        driver.kill()
        driver.wait()  # its Ray may still be about to die: the next command does not wait for it
    place.finish("driver")
    same(folder, whole)
    again = all_starts(folder)
    untouched = all_starts(whole)  # with those of trials that waited at a rung and were taken up
    # a trial that had finished was not begun again
    assert len(untouched) <= len(again) <= len(untouched) + 3
    # and one of those cut off went on from a checkpoint
    assert sum(map(bool, again)) > sum(map(bool, untouched))
    monkeypatch.setattr("tempfile.tempdir", str(place.tmp))
    deadline = time.monotonic() + 60  # for the last of their Rays to have ended
    while list(place.tmp.glob("fr-*")) and time.monotonic() < deadline:
        with session.local_folder():  # the next start leaves nothing of the killed drivers' Rays
            time.sleep(0.5)
    assert not list(place.tmp.glob("fr-*"))

    before = account(folder)
    began = time.monotonic()
    place.finish("driver")  # a finished sweep returns at once
    assert account(folder) == before
    assert all_starts(folder) == again
    assert time.monotonic() - began < TIMEOUT_S
    other = place.live("driver", lambda: False, "seed=9")
    assert other.returncode == 2
    assert [line for line in place.log("driver").splitlines() if line.startswith("error: ")] == [
        f"error: {folder}/sweep.yaml: seed differs from the sweep to resume (9, there it is 0);"
        " take it back, or type name=OTHER for a new sweep"
    ]


def test_a_trial_whose_process_is_killed_goes_on_from_its_checkpoint(place, whole):
    folder, total = place.sweep("trial"), place.steps("whole")
    moments = sorted(random.Random(3).sample(range(total // 10, total * 9 // 10), 2))
    driver = place.live("trial", lambda: place.steps("trial") >= moments[0] and lead(folder))
    for moment in moments:
        while driver.poll() is None and not (place.steps("trial") >= moment and lead(folder)):
            time.sleep(0.05)
        os.kill(lead(folder), signal.SIGKILL)
        time.sleep(1)
    assert driver.wait(TIMEOUT_S) == 0, place.log("trial")[-3000:]
    same(folder, whole)
    again, untouched = all_starts(folder), all_starts(whole)
    assert len(untouched) < len(again) <= len(untouched) + 2
    assert sum(map(bool, again)) > sum(map(bool, untouched))


def test_of_a_trial_of_two_workers_a_worker_and_the_trial_itself_are_killed(place):
    folder = place.sweep("pair")
    arguments = ("resources.num_workers=2", "run_cap=2", "early_terminate=null")
    driver = place.live("pair", lambda: lead(folder), *arguments)
    assert driver.poll() is None, place.log("pair")[-3000:]
    workers = [pid for pid, name in below(driver.pid).items() if "RayTrainWorker" in name]
    assert len(workers) == 2
    # the one that does not lead
    os.kill(next(pid for pid in workers if pid != lead(folder)), signal.SIGKILL)
    while driver.poll() is None and not (
        any((folder / "1" / "checkpoints").glob("step_*")) and lead(folder)
    ):
        time.sleep(0.05)
    (actor,) = [pid for pid, name in below(driver.pid).items() if "ImplicitFunc" in name]
    os.kill(actor, signal.SIGKILL)
    assert driver.wait(TIMEOUT_S) == 0, place.log("pair")[-3000:]
    sound(folder)
    assert [row["status"] for row in account(folder)] == ["finished"] * 2
    for number in range(2):
        first, *again = starts(folder, number)
        assert first == 0
        assert again
        assert min(again) > 0


def test_trials_of_a_lost_node_go_on_on_another(place, tmp_path):
    folder = place.sweep("node")
    with running_head(tmp_path, "--num-cpus=0") as head, joined(head) as one, joined(head) as other:
        pointed = {key: value for key, value in head.as_driver.items() if key.startswith("RAY_")}
        driver = place.live("node", lambda: lead(folder), "max_concurrent=2", **pointed)
        assert driver.poll() is None, place.log("node")[-3000:]
        victim = lead(folder)
        (lost,) = [node for node in (one, other) if victim in node.pids]
        number = next(
            lock.parent.name
            for lock in folder.glob("[0-9]*/.lock")
            if json.loads(lock.read_text())["pid"] == victim
        )
        lost.kill()
        assert driver.wait(TIMEOUT_S) == 0, place.log("node")[-3000:]
    sound(folder)
    assert len(account(folder)) == TRIALS
    first, *again = starts(folder, int(number))
    assert first == 0
    assert again
    assert min(again) > 0


def test_a_full_disk_is_one_line_and_with_room_the_same_command_goes_on(place, whole):
    disk = place.folder / "disk"
    disk.mkdir()
    size = sum(path.stat().st_size for path in whole.rglob("*") if path.is_file())
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size // 2}", "none", disk], capture_output=True
    ).returncode:
        pytest.skip("this machine lets no process mount")
    try:
        full = place.live("full", lambda: False, f"storage_path={disk}")
        text = place.log("full")
        assert full.returncode == 2, text[-3000:]
        (line,) = [line for line in text.splitlines() if line.startswith("error: ")]
        assert "No space left on device" in line
        assert "Traceback" not in text
        subprocess.run(["mount", "-o", f"remount,size={size * 4}", disk], check=True)
        place.finish("full", f"storage_path={disk}")
        same(disk / "full", whole)
    finally:
        subprocess.run(["umount", "-l", disk], check=True)
