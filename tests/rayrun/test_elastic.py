"""A run goes on with the workers that there is room for, on the same global batches."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from ray_nodes import Head, joined, offspring, running_head
from support import assert_refused, tiny_recipe

from flowray.config.errors import InputError
from flowray.config.load import dump_recipe, override_recipe
from flowray.config.recipe import Recipe
from flowray.config.train import ResourceConfig
from flowray.store.rows import read_rows
from flowray.tune.plan import Cluster
from flowray.tune.room import asked_words, refuse_without_room

WAIT_S = 300


def elastic(**overrides: object) -> Recipe:
    keys = {"train.batch_size": 24, "resources.num_workers": 4, "resources.min_workers": 2}
    return override_recipe(Recipe(), keys | overrides)


@pytest.mark.parametrize(
    ("accumulate", "workers", "parts"),
    [(1, 4, 1), (1, 3, 2), (1, 2, 2), (2, 4, 2), (2, 3, 4), (3, 2, 6)],
)
def test_fewer_workers_take_no_larger_micro_batches(accumulate, workers, parts):
    recipe = elastic(**{"train.accumulate": accumulate})
    left = recipe.for_workers(workers)
    assert left.train.accumulate == parts
    assert left.train.batch_size == 24
    assert 24 % (workers * parts) == 0
    assert 24 // (workers * parts) <= 24 // (4 * accumulate)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ({"train.batch_size": 32}, "batch_size 32 must be a multiple .* and is not of 3"),
        ({"resources.min_workers": 5}, "min_workers 5 must be at most num_workers 4"),
        ({"resources.shard": "hybrid"}, "min_workers does not go with shard hybrid"),
    ],
)
def test_what_no_number_of_workers_can_share_is_refused(overrides, words):
    assert_refused(lambda: elastic(**overrides), InputError, words)


def test_there_has_to_be_room_for_the_fewest():
    asked = ResourceConfig(num_workers=4, min_workers=2)
    assert asked_words(asked) == "2 to 4 worker(s) of 1 CPU"
    refuse_without_room(asked, Cluster(nodes=((2, 0.0),)))
    assert_refused(
        lambda: refuse_without_room(asked, Cluster(nodes=((1, 0.0),))),
        InputError,
        r"resources.num_workers: asked 2 to 4 worker\(s\)",
    )


def workers_of(head: Head, node: Path | None) -> int:
    """How many of Ray Train's workers are alive on the head's machine and on a node's."""
    pids = offspring(f"FLOWRAY_CLUSTER_TEST={head.folder}")
    pids += offspring(f"FLOWRAY_CLUSTER_TEST={node}") if node else []
    names = []
    for pid in set(pids):
        try:
            names.append(Path(f"/proc/{pid}/cmdline").read_bytes())
        except OSError:
            continue
    return sum(b"RayTrainWorker" in name for name in names)


def until(condition: Callable[[], bool], run: subprocess.Popen, log: Path) -> None:
    deadline = time.monotonic() + WAIT_S
    while not condition():
        assert run.poll() is None, log.read_text()[-3000:]
        assert time.monotonic() < deadline, log.read_text()[-3000:]
        time.sleep(0.5)


@pytest.mark.cluster
@pytest.mark.timeout(1500)
def test_two_workers_one_two_workers(tmp_path):
    """The node of one of two workers is lost, and another one joins."""
    with running_head(tmp_path, "--num-cpus=1") as head:
        cadence = {
            "train.steps": 200_000,
            "train.log_every": 1,
            "train.probe_every": 100_000,
            "train.sample_every": 200_000,
            "train.checkpoint_every": 20,
            "storage_path": str(head.shared / "runs"),
            "resources.num_workers": 2,
            "resources.min_workers": 1,
        }
        recipe = tiny_recipe(head.shared, **cadence)
        (head.shared / "tiny.yaml").write_text(dump_recipe(recipe))
        rows, log = head.shared / "runs" / "tiny" / "metrics.jsonl", tmp_path / "run.log"

        def steps() -> int:
            return len(read_rows(rows)) if rows.exists() else 0

        command = [sys.executable, "-m", "flowray.train", "tiny.yaml"]
        environment = {**head.as_driver, "PYTHONPATH": os.environ.get("PYTHONPATH", "")}
        with joined(head) as node, log.open("w") as out:
            streams = {"stdout": out, "stderr": out}
            run = subprocess.Popen(command, cwd=head.shared, env=environment, **streams)
            until(lambda: steps() > 60, run, log)
            assert workers_of(head, node.mark) == 2
        try:
            reached = steps()
            until(lambda: steps() > reached + 60, run, log)
            assert workers_of(head, None) == 1
            with joined(head) as node:
                until(lambda: workers_of(head, node.mark) == 2, run, log)
                reached = steps()
                until(lambda: steps() > reached + 60, run, log)
                run.send_signal(signal.SIGTERM)
                assert run.wait(WAIT_S) == 75, log.read_text()[-3000:]
        finally:
            run.kill()
        told = [row["step"] for row in read_rows(rows)]
    assert told == list(range(1, len(told) + 1))
