"""Runs under Ray Train whose machine is taken away with a notice: a checkpoint within the step, and
on elsewhere, which is no failure.
"""

import os
import re
import shutil
import signal
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from commands import Commands, commands, finish, until
from kills import LONG_S, logged, marked
from ray_nodes import Node, joined, running_head
from support import tiny_recipe

from flowray.config.load import dump_recipe
from flowray.store.checkpoint import list_checkpoints, step_of
from flowray.store.rows import read_rows
from flowray.store.run import RunDirectory

pytestmark = [pytest.mark.faults, pytest.mark.timeout(1800)]
STEPS = 120
# no checkpoint but that of the notice and the last one, no failure that would be forgiven
CADENCE = {
    "train.steps": STEPS,
    "train.log_every": 1,
    "train.probe_every": 100_000,
    "train.sample_every": 100_000,
    "train.checkpoint_every": 100_000,
    "train.keep_checkpoints": 5,
    "resources.num_workers": 2,
    "resources.max_failures": 0,
}


@pytest.fixture
def place(tmp_path) -> Iterator[Path]:
    (tmp_path / "tiny.yaml").write_text(dump_recipe(tiny_recipe(tmp_path, **CADENCE)))
    with pytest.MonkeyPatch.context() as patch:
        tmp = tempfile.mkdtemp(prefix="frp-")  # short, for Ray's sockets
        patch.setenv("TMPDIR", tmp)
        yield tmp_path
    shutil.rmtree(tmp, ignore_errors=True)


@pytest.fixture
def started(place) -> Iterator[Commands]:
    with commands(place) as made:
        yield made


def workers(pids: list[int]) -> list[int]:
    """Those in which Ray trains."""
    found = []
    for pid in pids:
        with suppress(OSError):
            if b"RayTrainWorker" in Path(f"/proc/{pid}/cmdline").read_bytes():
                found.append(pid)
    return found


def assert_saved_and_went_on(run: RunDirectory, before: int) -> None:
    """One checkpoint after `before` steps, the one that the second start went on from, and the last
    one; no step is missing or done twice.
    """
    noticed, last = (step_of(path) for path in list_checkpoints(run.checkpoints))
    assert before <= noticed < last
    assert [row["step"] for row in read_rows(run.metrics)] == list(range(1, last + 1))
    assert starts(run) == [0, noticed]


def starts(run: RunDirectory) -> list[int]:
    """The steps that starts of the run went on from."""
    return [row["step"] for row in read_rows(run.times) if row.get("what") == "ready"]


def test_a_sigterm_to_one_worker(place, started):
    run = RunDirectory(place / "runs" / "told")
    driver = started("name=told")
    until(lambda: logged(run) >= 20, "the first steps", driver, LONG_S)
    before = logged(run)
    os.kill(workers(marked(f"FLOWRAY_E2E={place}"))[-1], signal.SIGTERM)
    finish(driver, LONG_S)
    assert_saved_and_went_on(run, before)


def node_id(node: Node) -> str:
    """Ray's name for it, which its processes are started with."""
    lines = [Path(f"/proc/{pid}/cmdline").read_bytes().decode() for pid in node.pids]
    return next(found[1] for line in lines if (found := re.search(r"node[-_]id=(\w+)", line)))


def test_a_node_to_be_drained(place, tmp_path):
    run = RunDirectory(place / "runs" / "drained")
    (tmp_path / "head").mkdir()
    with (
        running_head(tmp_path / "head", "--num-cpus=1") as head,
        joined(head) as one,
        joined(head) as other,
        commands(place) as started,
    ):
        pointed = {key: value for key, value in head.as_driver.items() if key.startswith("RAY_")}
        driver = started("name=drained", "train.steps=1000000", **pointed)
        until(lambda: logged(run) >= 20, "the first steps", driver, LONG_S)
        busy = one if workers(one.pids) else other
        assert workers(busy.pids)
        before = logged(run)
        options = ["--node-id", node_id(busy), "--reason", "DRAIN_NODE_REASON_PREEMPTION"]
        options += ["--reason-message", "a spot notice", "--deadline-remaining-seconds", "600"]
        told = head.ray("drain-node", "--address", f"{head.host}:{head.port}", *options)
        assert told.returncode == 0, told.stderr
        until(lambda: len(starts(run)) == 2, "the second start", driver, LONG_S)
        assert not workers(busy.pids)
        driver.send_signal(signal.SIGTERM)
        assert driver.wait(LONG_S) == 75
    assert_saved_and_went_on(run, before)
