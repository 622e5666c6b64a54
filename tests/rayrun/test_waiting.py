"""What is said while a cluster has no room yet."""

import os
import time

import pytest

from flowray.cluster.waiting import RoomWatch, is_active, told_of_waiting
from flowray.config.recipe import Recipe
from flowray.store.doing import WrittenProgress, doing
from flowray.store.run import STALE_S, RunDirectory, RunLock
from flowray.tune.plan import Cluster


def said(waiting_until: int, count: int, seconds: int) -> list[str]:
    """The lines of so many seconds, of which `count` wait up to a second."""
    lines, clock = [], [0.0]
    watch = RoomWatch(
        Recipe().resources, lines.append, lambda: clock[0], lambda: Cluster(((4, 0), (8, 2)))
    )
    for tenth in range(10 * seconds):
        clock[0] = tenth / 10
        watch.look(lambda: count if clock[0] < waiting_until else 0)
    return lines


def test_a_line_a_minute_says_what_is_asked_and_what_is_there():
    lines = said(waiting_until=150, count=3, seconds=400)
    assert len(lines) == 2
    for line, seconds in zip(lines, (60, 120), strict=True):
        assert f" {seconds} s" in line
        assert "3 x (1 worker(s) of 1 CPU)" in line
        assert "12 CPUs and 2 GPUs on 2 nodes" in line


def test_a_start_that_takes_seconds_says_nothing():
    assert said(waiting_until=50, count=1, seconds=200) == []


def test_a_run_has_begun_while_a_worker_of_it_is_at_work(tmp_path):
    run = RunDirectory(tmp_path)
    run.create()
    assert not is_active(run)
    with WrittenProgress(run).task("encoding"):
        assert is_active(run)
    with RunLock(run):
        assert is_active(run)
        long_ago = time.time() - 2 * STALE_S
        os.utime(run.lock, (long_ago, long_ago))  # of a node that was lost
        assert not is_active(run)


def test_what_a_killed_worker_was_doing_is_soon_nothing(tmp_path):
    run = RunDirectory(tmp_path)
    with WrittenProgress(run).task("encoding", 7):
        left = run.doing.read_text()
    assert left == "encoding 0/7"
    assert not run.doing.exists()
    run.doing.write_text(left)  # the worker was killed within its task
    assert doing(run) == left
    long_ago = time.time() - 2 * STALE_S
    os.utime(run.doing, (long_ago, long_ago))
    assert doing(run) == ""
    assert not is_active(run)


@pytest.mark.parametrize("failing", [False, True])
def test_the_watch_ends_with_what_it_watches(tmp_path, failing):
    import threading

    before = set(threading.enumerate())  # of which some may end meanwhile: other tests' of Ray
    try:
        with told_of_waiting(Recipe().resources, RunDirectory(tmp_path), lambda line: None):
            watching = set(threading.enumerate()) - before
            assert len(watching) == 1
            if failing:
                raise ValueError
    except ValueError:
        assert failing
    assert not watching & set(threading.enumerate())
