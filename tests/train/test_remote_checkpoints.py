"""Checkpoints in a bucket: beside training, whole or absent, and a resume on an empty disk."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from remote_servers import BUCKET, Failing, client, s3_server, use
from shares import save_shares
from support import assert_refused, tiny_recipe

from flowray.cli.train import main
from flowray.config.errors import InputError
from flowray.config.load import dump_recipe, override_recipe
from flowray.config.recipe import Recipe
from flowray.store.checkpoint import DAMAGED, STATE, list_checkpoints, load_tensors, step_of
from flowray.store.remote_run import RemoteRun
from flowray.store.rows import add_row, read_rows
from flowray.store.run import RunDirectory
from flowray.train.group import Group
from flowray.train.loop import is_finished, train
from flowray.train.state import Halted
from flowray.train.uploading import Uploader

CPU = Group(0, 1, torch.device("cpu"))
SOUND = "SOUND_ENDPOINT"  # of the tests' own client
FILES = ("model.safetensors", "ema.safetensors", "optim.safetensors", STATE)


@pytest.fixture(scope="module")
def server() -> Iterator[tuple[str, Failing]]:
    with s3_server() as found:
        yield found


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    """Twelve steps, a checkpoint every two."""
    every = {"train.checkpoint_every": 2, "train.probe_every": 4, "train.sample_every": 100}
    every |= {"optim.schedule.kind": "constant"}
    return tiny_recipe(tmp_path_factory.mktemp("base"), **every)


@pytest.fixture(scope="module")
def whole(base: Recipe) -> RunDirectory:
    """The run that no bucket takes part in."""
    return go(override_recipe(base, {"name": "whole", "train.keep_checkpoints": 6}))


@pytest.fixture
def failing(server: tuple[str, Failing], monkeypatch: pytest.MonkeyPatch) -> Iterator[Failing]:
    endpoint, failing = server
    use(endpoint, monkeypatch)
    monkeypatch.setenv(SOUND, failing.behind)
    failing.seen.clear()
    yield failing
    failing.every = 0


@pytest.fixture
def recipe(base: Recipe, tmp_path: Path, failing: Failing) -> Recipe:
    """The same run, sent to a place of its own."""
    place = {"train.checkpoint_url": f"s3://{BUCKET}/{tmp_path.name}", "name": tmp_path.name}
    return override_recipe(base, {**place, "train.checkpoint_patience_s": 60.0})


def run_of(recipe: Recipe) -> RunDirectory:
    return RunDirectory(Path(recipe.storage_path) / recipe.name)


def go(recipe: Recipe, **changes: Any) -> RunDirectory:
    train(override_recipe(recipe, changes), run_of(recipe), CPU, lambda row: None)
    return run_of(recipe)


def begun(recipe: Recipe) -> tuple[RunDirectory, int, int]:
    """The run, stopped after its probe at 4, and the two steps that the bucket has of it."""
    run = run_of(recipe)

    def stop(row: dict[str, Any]) -> None:
        run.stop_request.touch()

    assert train(recipe, run, CPU, stop) == "stopped"
    run.stop_request.unlink()
    early, late = steps_there(recipe)
    assert late > 4
    return run, early, late


def keys(recipe: Recipe) -> dict[str, bytes]:
    """What the bucket has of the run, by the path in a run directory."""
    asked, prefix = client(os.environ[SOUND]), f"{recipe.name}/{recipe.name}/"
    rows = asked.list_objects_v2(Bucket=BUCKET, Prefix=prefix).get("Contents", [])
    return {
        row["Key"].removeprefix(prefix): asked.get_object(Bucket=BUCKET, Key=row["Key"])[
            "Body"
        ].read()
        for row in rows
    }


def put(recipe: Recipe, path: str, content: bytes | None) -> None:
    asked, key = client(os.environ[SOUND]), f"{recipe.name}/{recipe.name}/{path}"
    if content is None:
        asked.delete_object(Bucket=BUCKET, Key=key)
    else:
        asked.put_object(Bucket=BUCKET, Key=key, Body=content)


def steps_there(recipe: Recipe) -> list[int]:
    found = (path.split("/") for path in keys(recipe))
    return sorted(int(path[1][5:]) for path in found if path[-1] == STATE)


def rows(run: RunDirectory) -> list[dict[str, Any]]:
    """Without the clock's numbers."""
    found = read_rows(run.metrics) + read_rows(run.probes)
    return [{key: row[key] for key in row if not key.startswith("perf/")} for row in found]


def assert_same(run: RunDirectory, whole: RunDirectory, step: int) -> None:
    for name in FILES[:3]:
        here, there = (each.checkpoint(step) / name for each in (run, whole))
        assert here.read_bytes() == there.read_bytes(), name
    assert rows(run) == rows(whole)


def test_a_run_on_an_empty_disk_goes_on_bit_for_bit(
    recipe: Recipe, whole: RunDirectory, failing: Failing
) -> None:
    failing.every, failing.failed = 5, 0
    run, _, late = begun(recipe)
    sent = keys(recipe)
    for name in FILES:
        there = sent[f"checkpoints/{run.checkpoint(late).name}/{name}"]
        assert there == (run.checkpoint(late) / name).read_bytes()
    assert sent["metrics.jsonl"] == run.metrics.read_bytes()
    assert sent["probes.jsonl"] == run.probes.read_bytes()
    shutil.rmtree(run.path)
    failing.seen.clear()
    assert_same(go(recipe), whole, 12)
    ready = [row for row in read_rows(run.times) if row.get("what") == "ready"]
    assert [(row["start"], row["step"]) for row in ready] == [(1, 0), (2, late)]
    got = [path.partition("?")[0] for method, path in failing.seen if method == "GET"]
    weights = next(path for path in got if path.endswith(f"{late:06d}/model.safetensors"))
    rows_first = next(path for path in got if path.endswith("metrics.jsonl"))
    assert got.index(rows_first) < got.index(weights)  # a kill between them loses none
    assert len(steps_there(recipe)) == 2
    assert steps_there(recipe)[-1] == 12
    assert keys(recipe)["probes.jsonl"] == run.probes.read_bytes()  # its last row came later
    assert failing.failed > 5


def test_of_a_disk_and_a_bucket_the_later_step_is_taken(recipe: Recipe) -> None:
    run, early, late = begun(recipe)
    remote = RemoteRun(str(recipe.train.checkpoint_url), run)
    damage(recipe, run.checkpoint(early))  # nobody asks for it
    assert remote.newest() == run.checkpoint(late)
    shutil.rmtree(run.checkpoint(late))
    assert remote.newest() == run.checkpoint(late)
    shutil.rmtree(run.checkpoint(late))
    put(recipe, f"checkpoints/{run.checkpoint(late).name}/{STATE}", None)
    assert remote.newest() == list_checkpoints(run.checkpoints)[-1]
    assert steps_there(recipe) == [early]


def test_rows_come_with_a_later_checkpoint_of_another_machine(recipe: Recipe) -> None:
    """The disk's own end where it was left; kept, they would go over the bucket's."""
    run, _, late = begun(recipe)
    wanted = run.metrics.read_bytes()
    shutil.rmtree(run.checkpoint(late))
    kept = [line for line in wanted.splitlines(keepends=True) if json.loads(line)["step"] < 4]
    run.metrics.write_bytes(b"".join(kept))
    assert run.metrics.read_bytes() != wanted
    assert RemoteRun(str(recipe.train.checkpoint_url), run).newest() == run.checkpoint(late)
    assert run.metrics.read_bytes() == wanted


def damage(recipe: Recipe, checkpoint: Path) -> None:
    """One bit, which no size tells of."""
    path = f"checkpoints/{checkpoint.name}/ema.safetensors"
    (content := bytearray(keys(recipe)[path]))[-3] ^= 1
    put(recipe, path, bytes(content))


def test_damaged_ones_are_passed_over_and_unreadable_ones_end_the_start(
    recipe: Recipe, failing: Failing, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, early, late = begun(recipe)
    said = list[str]()
    remote = RemoteRun(str(recipe.train.checkpoint_url), run)
    damage(recipe, run.checkpoint(late))
    shutil.rmtree(run.checkpoints)
    run.create()
    assert remote.newest(said.append) == run.checkpoint(early)
    assert [f"{run.checkpoint(late).name} is damaged" in text for text in said] == [True]
    assert f"checkpoints/{run.checkpoint(late).name}/{DAMAGED}" in keys(recipe)
    assert steps_there(recipe) == [early]
    shutil.rmtree(run.checkpoint(early))
    put(recipe, f"checkpoints/{run.checkpoint(early).name}/model.safetensors", None)
    for _ in range(2):  # set aside, they are not forgotten
        assert_refused(lambda: remote.newest(said.append), InputError, r"intact \(2 damaged\)")
    assert not any(run.checkpoints.iterdir())
    monkeypatch.setattr("flowray.data.remote.TRIES", 2)
    failing.every = 1
    assert_refused(remote.newest, InputError, r"cannot be reached or read, 2 times")


def test_shares_of_several_ranks_come_back(recipe: Recipe) -> None:
    run = run_of(recipe)
    run.create()
    weights = torch.arange(12.0).reshape(6, 2)
    save_shares(run.checkpoints, 4, [{"model": {"w": weights[:4]}}, {"model": {"w": weights[4:]}}])
    RemoteRun.of(recipe, run).send(run.checkpoint(4))
    shutil.rmtree(run.path)
    run.create()
    fetched = RemoteRun.of(recipe, run).newest()
    assert fetched == run.checkpoint(4)
    assert torch.equal(load_tensors(fetched, "model")["w"], weights)


def test_a_damaged_disk_takes_the_one_in_the_bucket(recipe: Recipe, whole: RunDirectory) -> None:
    run, _, _ = begun(recipe)
    for checkpoint in list_checkpoints(run.checkpoints):
        (checkpoint / "model.safetensors").write_bytes(b"")
    assert_same(go(recipe), whole, 12)


def test_training_goes_on_while_the_bucket_fails(recipe: Recipe, failing: Failing) -> None:
    """Its server answers again after step 8; the start has no checkpoint to ask for."""
    run = go(recipe, **{"train.steps": 2})
    failing.every, seen = 1, list[int]()

    def heal(row: dict[str, Any]) -> None:
        seen.append(row["step"])
        if row["step"] == 8:
            assert steps_there(recipe) == [2]
            failing.every = 0

    train(recipe, run, CPU, heal)
    assert seen[-1] == 12
    assert steps_there(recipe)[-1] == 12


def test_a_bucket_that_never_answers_halts_the_run_after_its_patience(
    recipe: Recipe, failing: Failing, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("flowray.data.remote.TRIES", 2)
    run = go(recipe, **{"train.steps": 2})
    failing.every = 1
    patience = {"train.checkpoint_patience_s": 0.5, "train.steps": 10**6}
    assert_refused(lambda: go(recipe, **patience), Halted, r"checkpoint_patience_s=0.5 s")
    assert list_checkpoints(run.checkpoints)[-1].name > "step_000002"
    failing.every = 0
    assert steps_there(recipe) == [2]


LOOP = """
import sys
from pathlib import Path
from flowray.config.load import load_recipe
from flowray.store.run import RunDirectory
from flowray.train.group import Group
from flowray.train.loop import train
import torch
recipe = load_recipe(sys.argv[1]).recipe
run = RunDirectory(Path(recipe.storage_path) / recipe.name)
train(recipe, run, Group(0, 1, torch.device("cpu")), lambda row: None)
"""


def test_a_kill_before_the_state_is_sent_leaves_the_checkpoint_before(
    recipe: Recipe, whole: RunDirectory, failing: Failing, tmp_path: Path
) -> None:
    """The first PUT of a later checkpoint's state.json gets no answer until the sender is dead."""
    held = set[str]()

    def holds(method: str, path: str) -> bool:
        name = path.partition("?")[0]
        if method == "PUT" and name.endswith(f"/{STATE}") and "step_000002" not in name:
            held.add(name.split("/")[-2])
            return True
        return False

    (tmp_path / "recipe.yaml").write_text(dump_recipe(recipe))
    words = [sys.executable, "-c", LOOP, str(tmp_path / "recipe.yaml")]
    failing.holds = holds
    with subprocess.Popen(words) as process:
        assert waited(lambda: bool(held) or process.poll() is not None)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    failing.holds = None
    (cut_off,) = held
    assert f"checkpoints/{cut_off}/model.safetensors" in keys(recipe)
    assert steps_there(recipe) == [2]
    run = run_of(recipe)
    shutil.rmtree(run.path)
    assert_same(go(recipe), whole, 12)
    assert len(steps_there(recipe)) == 2
    assert steps_there(recipe)[-1] == 12


def waited(done: Callable[[], bool], s: float = 200.0) -> bool:
    deadline = time.monotonic() + s
    while not done() and time.monotonic() < deadline:
        time.sleep(0.02)
    return done()


def test_what_a_kill_left_unsent_is_sent_by_the_resume(recipe: Recipe) -> None:
    run = go(recipe)
    for path in keys(recipe):
        put(recipe, path, None)
    go(recipe)
    assert steps_there(recipe) == [12]
    assert read_rows(run.probes)[-1]["step"] == 12


def test_a_run_is_finished_once_the_bucket_has_its_end(recipe: Recipe) -> None:
    run = go(recipe)
    assert is_finished(recipe, run)
    put(recipe, f"checkpoints/step_000012/{STATE}", None)
    assert not is_finished(recipe, run)
    assert is_finished(override_recipe(recipe, {"train.checkpoint_url": None}), run)
    go(recipe)
    assert is_finished(recipe, run)
    put(recipe, "probes.jsonl", b"")
    assert not is_finished(recipe, run)


def test_times_of_starts_on_two_machines_are_all_kept(recipe: Recipe) -> None:
    run, early, late = begun(recipe)
    here = read_rows(run.times)
    add_row(run.times, {"step": early, "start": 1, "at": here[0]["at"] + 1e-6, "what": "here"})
    kept = read_rows(run.times)[:-2] + read_rows(run.times)[-1:]  # the bucket has the one between
    run.times.write_text("".join(json.dumps(row) + "\n" for row in kept))
    shutil.rmtree(run.checkpoint(late))
    assert RemoteRun(str(recipe.train.checkpoint_url), run).newest() == run.checkpoint(late)
    assert read_rows(run.times) == [here[0], kept[-1], *here[1:]]


def test_a_machine_that_goes_leaves_a_run_to_go_on_though_the_bucket_fails(
    recipe: Recipe, failing: Failing, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("flowray.data.remote.TRIES", 2)
    run = go(recipe, **{"train.steps": 2})

    def told() -> bool:
        failing.every = 1
        return True

    patience = override_recipe(recipe, {"train.checkpoint_patience_s": 0.5})
    outcome = train(patience, run, CPU, lambda row: None, told=told)
    failing.every = 0
    assert outcome == "preempted"
    assert step_of(list_checkpoints(run.checkpoints)[-1]) == 3
    assert steps_there(recipe) == [2]
    go(recipe, **{"train.steps": 4})
    assert steps_there(recipe)[-1] == 4


def copied(recipe: Recipe, whole: RunDirectory) -> RunDirectory:
    shutil.copytree(whole.path, run_of(recipe).path)
    return run_of(recipe)


def test_a_console_that_is_gone_does_not_keep_checkpoints_from_the_bucket(
    recipe: Recipe, whole: RunDirectory, failing: Failing, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("flowray.data.remote.TRIES", 2)
    run, said = copied(recipe, whole), list[str]()

    def say(text: str) -> None:
        said.append(text)
        failing.every = 0
        raise OSError(5, "the console is gone")

    failing.every = 1
    with Uploader(RemoteRun(str(recipe.train.checkpoint_url), run), 2, 60.0, say) as uploader:
        uploader.take(run.checkpoint(12))
    assert len(said) == 1
    assert steps_there(recipe) == [12]


class Rotating(RemoteRun):
    """The disk loses step 4, which is not the best one any more, as it is sent."""

    def send(self, checkpoint: Path) -> None:
        if step_of(checkpoint) == 4:
            shutil.rmtree(checkpoint)
        super().send(checkpoint)


def test_a_best_one_that_is_replaced_while_it_is_sent_is_no_failure(
    recipe: Recipe, whole: RunDirectory
) -> None:
    run, said = copied(recipe, whole), list[str]()
    remote = Rotating(str(recipe.train.checkpoint_url), run)
    with Uploader(remote, 2, 60.0, said.append) as uploader:
        uploader.spare({4})
        uploader.take(run.checkpoint(12))
    assert said == []
    assert steps_there(recipe) == [12]


def test_a_new_run_does_not_begin_over_one_in_the_bucket(recipe: Recipe, tmp_path: Path) -> None:
    run, _, _ = begun(recipe)
    shutil.rmtree(run.path)
    (file := tmp_path / "recipe.yaml").write_text(dump_recipe(recipe))
    assert_refused(lambda: main([str(file)]), InputError, f"^s3.*{recipe.name} holds a run already")
    elsewhere = "train.checkpoint_url=s3://not-there/runs"
    for words in ([elsewhere], [elsewhere, "--resume"]):
        assert_refused(lambda w=words: main([str(file), *w]), InputError, "there is no such bucket")
    assert not run.path.exists()


def test_the_best_one_stays_on_both_sides(recipe: Recipe) -> None:
    kept = {"train.keep_checkpoints": 1, "train.keep_best": "ema/shoot/nmse"}
    run = go(recipe, **kept)
    values = {row["step"]: row["ema/shoot/nmse"] for row in read_rows(run.probes)}
    best = min(values, key=lambda step: (values[step], step))
    wanted = sorted({best, 12})
    assert list(map(step_of, list_checkpoints(run.checkpoints))) == wanted
    assert steps_there(recipe) == wanted
    told = json.loads((run.checkpoints / "best.json").read_text())
    assert told == {"step": best, "metric": "ema/shoot/nmse", "value": values[best]}
    shutil.rmtree(run.path)
    assert RemoteRun(str(recipe.train.checkpoint_url), created(run)).newest() == run.checkpoint(12)
    assert list(map(step_of, list_checkpoints(run.checkpoints))) == wanted


def created(run: RunDirectory) -> RunDirectory:
    run.create()
    return run
