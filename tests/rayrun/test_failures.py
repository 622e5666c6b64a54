"""What ends a run, from the worker that knows it to the process that tells it: by fields, whatever
the words are.
"""

import errno
import json
import pickle
from pathlib import Path

import pytest
import torch
from ray import cloudpickle
from ray.exceptions import RayActorError, RayTaskError
from ray.train import ControllerError, WorkerGroupError
from support import tiny_recipe

from flowray.cluster.ray_private import UserError
from flowray.cluster.storage import StorageNotShared, marker_file
from flowray.config.errors import InputError, OtherKind
from flowray.rayrun.failures import (
    OutOfMemory,
    RunFailed,
    failure_file,
    no_room,
    out_of_memory,
    raise_failure,
    write_failure,
)
from flowray.rayrun.lost import LossTold
from flowray.rayrun.trainer import _failure_of, train_worker
from flowray.store.rows import add_row, read_rows
from flowray.store.run import RunDirectory
from flowray.train.state import Halted

FULL = OSError(errno.ENOSPC, "kein Platz")  # as another locale, or another library, says it


def halted(why: OSError) -> Halted:
    """As the loop raises it where a checkpoint cannot be written."""
    try:
        raise Halted(f"step 14: {why.strerror}") from why
    except Halted as error:
        return error


@pytest.mark.parametrize(
    ("wrote", "kind", "full"),
    [
        (StorageNotShared("storage_path: /x"), StorageNotShared, False),
        (InputError("InputError: optim.lr"), InputError, False),
        (OtherKind("model.head.heads", "model.head", ["grid"]), InputError, False),
        (Halted("InputError: nan"), RunFailed, False),
        (Halted("caption 'No space left on device'"), RunFailed, False),
        (halted(FULL), RunFailed, True),
        (halted(OSError(errno.EDQUOT, "quota")), RunFailed, True),
        (halted(OSError(errno.EIO, "No space left on device")), RunFailed, False),
    ],
)
def test_what_a_worker_wrote_is_raised_as_what_it_was(
    tmp_path: Path, wrote: Exception, kind: type[Exception], full: bool
) -> None:
    run = RunDirectory(tmp_path)
    write_failure(run, wrote)
    with pytest.raises(kind) as caught:
        raise_failure(run)
    assert type(caught.value) is kind
    assert str(caught.value) == (f"{tmp_path}: " if kind is RunFailed else "") + str(wrote)
    assert (no_room(caught.value) is not None) is full
    raise_failure(run)  # once


def test_where_it_cannot_be_written_ray_carries_it(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    with pytest.raises(RunFailed) as caught:
        write_failure(RunDirectory(tmp_path / "none"), halted(FULL))
    travelled = pickle.loads(pickle.dumps(UserError(caught.value, "Traceback ...\nRunFailed: x")))
    driver = _failure_of(WorkerGroupError("died", {0: travelled}), run)
    assert isinstance(driver, RunFailed)
    assert no_room(driver).errno == errno.ENOSPC


def test_bad_input_stays_bad_input_where_it_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(StorageNotShared):
        write_failure(RunDirectory(tmp_path / "none"), StorageNotShared("storage_path: /x"))


def test_a_full_disk_that_rays_controller_meets(tmp_path: Path) -> None:
    told = _failure_of(ControllerError(FULL), RunDirectory(tmp_path))
    assert no_room(told).errno == errno.ENOSPC


@pytest.mark.parametrize("rank", [0, 1])
def test_bad_input_of_any_rank_is_told_as_that(tmp_path: Path, rank: int) -> None:
    """The others end with it, as a connection that is reset."""
    failures = [RuntimeError("reset"), RuntimeError("reset")]
    failures[rank] = UserError(StorageNotShared("storage_path: /x"), "Traceback ...")
    told = _failure_of(WorkerGroupError("died", dict(enumerate(failures))), RunDirectory(tmp_path))
    assert type(told) is StorageNotShared
    assert str(told) == "storage_path: /x"


def as_tune_raises() -> None:
    try:
        raise FULL
    except OSError:
        raise RuntimeError("the traceback as text")  # noqa: B904


def test_a_full_disk_is_known_through_what_ray_and_tune_wrap_it_in() -> None:
    task = RayTaskError("train", "Traceback ...", FULL)
    assert no_room(task).errno == errno.ENOSPC
    of_tune = pickle.loads(cloudpickle.dumps(task.as_instanceof_cause()))
    assert no_room(of_tune).errno == errno.ENOSPC
    with pytest.raises(RuntimeError) as caught:
        as_tune_raises()
    assert no_room(caught.value).errno == errno.ENOSPC
    assert no_room(RuntimeError("No space left on device")) is None


CUDA = (
    "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.1 GiB of"
    " which 1.1 GiB is free. Including non-PyTorch memory, this process has 78 GiB memory in use."
)


def test_a_gpu_that_is_full_is_one_line_and_no_reason_to_try_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the worker meets it: it returns, so that Ray starts nothing again."""

    def full(*_: object, **__: object) -> None:
        raise torch.cuda.OutOfMemoryError(CUDA)

    recipe, run = tiny_recipe(tmp_path), RunDirectory(tmp_path / "run")
    run.create()
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", full)
    with marker_file(run.path, sole=True) as marker:
        config = {"recipe": recipe.model_dump(mode="json"), "run_dir": str(run.path)}
        train_worker({**config, "marker": marker}, lambda row: None)
    with pytest.raises(OutOfMemory) as caught:
        raise_failure(run)
    assert "\n" not in str(caught.value)
    assert "Tried to allocate 2.00 GiB" in str(caught.value)


def test_what_ray_ends_for_its_memory_is_not_started_again(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    said = "1 worker(s) were killed due to the node running low on memory. ..."
    LossTold(tmp_path).after_exception(
        None, {0: ValueError("collateral"), 1: RayActorError(error_msg=said)}
    )
    assert failure_file(run).exists()
    assert not run.times.exists()
    with pytest.raises(OutOfMemory):
        raise_failure(run)


def test_of_others_it_is_told_that_they_are_lost(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    LossTold(tmp_path).after_exception(None, {1: RayActorError(), 0: RayActorError()})
    assert not failure_file(run).exists()
    (row,) = read_rows(run.times)
    assert (row["step"], row["lost"]) == (0, [0, 1])
    assert out_of_memory(ValueError("out of memory")) is None


def test_that_the_kernel_has_ended_a_process_for_lack_of_memory_is_told(tmp_path: Path) -> None:
    run, kernel = RunDirectory(tmp_path), tmp_path / "vmstat"
    kernel.write_text("pgfault 10\noom_kill 3\n")
    told = LossTold(tmp_path, kernel)
    told.after_exception(None, {0: RayActorError()})
    kernel.write_text("pgfault 12\noom_kill 4\n")
    told.after_exception(None, {0: RayActorError()})
    told.after_exception(None, {0: RayActorError()})
    assert ["memory" in row["why"] for row in read_rows(run.times)] == [False, True, False]


@pytest.mark.parametrize(
    ("steps", "error", "ends"),
    [
        ((6, 6, 6), RayActorError(), True),
        ((6, 6), RayActorError(), False),  # two unlike kills may come between logged steps
        ((6, 6, 7), RayActorError(), False),
        ((6, 6, 7, 6, 6), RayActorError(), False),  # in a row
        ((6, 6, 6), RayActorError(preempted=True), False),
        ((6, 6, 6), RayActorError(error_msg="The actor died because its node has died."), False),
        ((6, 6, 6), ValueError("shapes"), False),
        ((6, None, None), RayActorError(), False),  # heard of twice, or killed while it loaded
    ],
)
def test_a_worker_that_is_killed_at_one_place_again_and_again_ends_the_run(
    tmp_path: Path, steps: tuple[int | None, ...], error: Exception, ends: bool
) -> None:
    run, told = RunDirectory(tmp_path), LossTold(tmp_path, tmp_path / "no kernel")
    for step in steps:
        assert not failure_file(run).exists()
        if step is not None:
            add_row(run.times, {"step": 0, "start": 1, "what": "ready"})
            add_row(run.times, {"step": step, "start": 1})
        told.after_exception(None, {0: error})
    assert failure_file(run).exists() is ends
    if ends:
        with pytest.raises(OutOfMemory, match="killed three times after step 6"):
            raise_failure(run)


def test_one_that_the_kernel_ends_while_it_loads_too(tmp_path: Path) -> None:
    run, kernel = RunDirectory(tmp_path), tmp_path / "vmstat"
    kernel.write_text("oom_kill 3\n")
    told = LossTold(tmp_path, kernel)
    for count in (4, 5):
        assert not failure_file(run).exists()
        kernel.write_text(f"oom_kill {count}\n")
        told.after_exception(None, {0: RayActorError()})
    with pytest.raises(OutOfMemory, match="killed twice before its first step"):
        raise_failure(run)


def test_ranks_that_ended_as_one_was_stuck_are_not_the_lost_ones(tmp_path: Path) -> None:
    run, told = RunDirectory(tmp_path), LossTold(tmp_path, tmp_path / "no kernel")
    for _ in range(2):
        run.stuck.write_text(json.dumps({"ranks": [1], "why": "stuck in step 7"}))
        told.after_exception(None, {0: RayActorError()})
        assert not run.stuck.exists()
    assert [(row["lost"], row["why"]) for row in read_rows(run.times)] == [
        ([1], "stuck in step 7")
    ] * 2
    assert not failure_file(run).exists()
