"""Ctrl-C: one line and exit code 130, or 75 with a checkpoint; nothing is left half written."""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from support import tiny_recipe

from flowray.config.load import dump_recipe
from flowray.store.checkpoint import newest_checkpoint


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with tiny.yaml, a recipe that would train for minutes."""
    folder = tmp_path_factory.mktemp("cc")
    recipe = tiny_recipe(folder, **{"train.steps": 20_000, "train.log_every": 1})
    (folder / "tiny.yaml").write_text(dump_recipe(recipe))
    return folder


def interrupt(place: Path, said: str, *argv: str, times: int = 1) -> tuple[int, list[str]]:
    """(exit code, remarks) of a command that gets Ctrl-C where a line has `said`."""
    environment = {**os.environ, "FLOWRAY_CACHE": str(place / "cache")}
    command = [sys.executable, "-m", "flowray", *argv]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, cwd=place, env=environment, **pipes) as process:
        try:
            wanted = (said, *["stopping"] * (times - 1))
            for words in wanted:
                while words not in (line := process.stderr.readline()):
                    assert line, f"ended before it said {words}"
                process.send_signal(signal.SIGINT)
            out, err = process.communicate(timeout=120)
        finally:
            process.kill()
    assert (out == "") == (process.returncode == 130)
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


def test_while_data_are_made(place: Path) -> None:
    argv = ("data", "make", "shapes", "--samples", "100000", "--out", "made")
    assert interrupt(place, "making train", *argv) == (130, ["interrupted"])
    assert list((place / "made").iterdir()) == []


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
