"""Ctrl-C and other signals: one line and exit code 130, or 75 with a checkpoint; nothing is left half written."""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from support import own_pictures, tiny_recipe

from flowray.config.load import dump_recipe
from flowray.store.checkpoint import newest_checkpoint


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with tiny.yaml, a recipe that would train for minutes."""
    folder = tmp_path_factory.mktemp("cc")
    recipe = tiny_recipe(folder, **{"train.steps": 20_000, "train.log_every": 1})
    (folder / "tiny.yaml").write_text(dump_recipe(recipe))
    return folder


def interrupt(place: Path, said: str, *argv: str, times: int = 1, number: int = signal.SIGINT) -> tuple[int, list[str]]:
    """(exit code, remarks) of a command that gets a signal where a line has `said`."""
    environment = {**os.environ, "FLOWRAY_CACHE": str(place / "cache")}
    command = [sys.executable, "-m", "flowray", *argv]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, cwd=place, env=environment, **pipes) as process:
        try:
            wanted = (said, *["stopping"] * (times - 1))
            for words in wanted:
                while words not in (line := process.stderr.readline()):
                    assert line, f"ended before it said {words}"
                process.send_signal(number)
            out, err = process.communicate(timeout=120)
        finally:
            process.kill()
    assert (out == "") == (process.returncode == 128 + number)
    lines = err.splitlines()
    return process.returncode, [line for line in lines if not re.match(r"\[ *\d+ s\] ", line)]


def test_while_importing(place: Path) -> None:
    argv = ("sample", "runs/tiny", "a red circle")
    assert interrupt(place, "importing", *argv) == (130, ["interrupted"])


def test_while_a_health_check_trains(place: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    argv = ("doctor", "overfit", "tiny.yaml", "--steps", "20000")
    assert interrupt(place, "training ", *argv) == (130, ["interrupted"])
    assert list(tmp_path.glob("flowray-health-*")) == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (("make", "shapes", "--samples", "100000", "--out", "out"), "making train"),
        (("pack", "own", "out/shards", "--size", "4096"), "packing all"),
    ],
)
def test_while_data_are_written(tmp_path: Path, argv: tuple[str, ...], said: str, number: int) -> None:
    own_pictures(tmp_path / "own")
    assert interrupt(tmp_path, said, "data", *argv, number=number) == (128 + number, ["interrupted"])
    assert list((tmp_path / "out").iterdir()) == []


def test_nohup_holds(tmp_path: Path) -> None:
    """A hang-up that was ignored before the command began stays ignored."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        argv = ("data", "make", "shapes", "--samples", "200", "--out", "out")
        code, _ = interrupt(tmp_path, "making train", *argv, number=signal.SIGHUP)
    finally:
        signal.signal(signal.SIGHUP, before)
    assert code == 0


@pytest.mark.slow
@pytest.mark.parametrize("said", ["starting Ray", "training 0"])
def test_a_run_leaves_a_checkpoint(place: Path, said: str) -> None:
    name = said.replace(" ", "-")
    code, remarks = interrupt(place, said, "train", "tiny.yaml", f"name={name}", "--json")
    assert (code, remarks) == (75, [])
    assert newest_checkpoint(place / "runs" / name / "checkpoints") is not None


@pytest.mark.slow
def test_twice_ends_without_waiting(place: Path) -> None:
    argv = ("train", "tiny.yaml", "name=twice", "train.log_every=10000", "train.grad_every=0")
    assert interrupt(place, "training 0", *argv, times=2) == (130, ["interrupted"])
