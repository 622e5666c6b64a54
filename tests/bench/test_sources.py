"""Sources beside each other: two short trainings for real, their table and their picture."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

pytestmark = pytest.mark.slow
ARMS = ["text_adaln", "noise_adaln"]


def command(folder: Path) -> list[str]:
    typed = ["--minutes", "0.2", "--seeds", "0", "--arms", *ARMS]
    return [sys.executable, "-m", "benchmarks", "answers", str(folder), *typed]


def answers(folder: Path) -> str:
    """What the command prints."""
    done = subprocess.run(
        command(folder), capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_table_and_a_picture_of_trained_runs_and_nothing_twice(tmp_path: Path) -> None:
    table = answers(tmp_path)
    scores = sorted(tmp_path.glob("*/eval.json"))
    assert len(scores) == len(ARMS)
    pace = json.loads((tmp_path / "pace.json").read_text())
    assert list(pace) == ARMS
    assert all(seconds > 0 for seconds in pace.values())
    cells = {
        row[1].strip(): [cell.strip() for cell in row[2:-1]]
        for row in (line.split("|") for line in table.splitlines() if line.startswith("|"))
    }
    for path in scores:
        told = json.loads(path.read_text())
        arm, steps, _ = path.parent.name.split("-")
        assert cells[arm][:2] == [steps, f"{told['open']['named']:.2f}"]
        assert cells[arm][-1] == f"{told['shapes']['two_objects']['binding']:.2f}"
        assert told["step"] == int(steps)
    assert [name for name in cells if name in ARMS] == ARMS
    assert "its decode(mu)" in cells  # of the text source; noise is no caption's own
    with Image.open(tmp_path / "answers.png") as picture:
        assert len(picture.convert("RGB").getcolors(1 << 20)) > 100
    before = [path.stat().st_mtime_ns for path in scores]
    assert answers(tmp_path) == table
    assert [path.stat().st_mtime_ns for path in scores] == before


def test_a_signal_ends_the_command_and_its_trainings_at_once(tmp_path: Path) -> None:
    with subprocess.Popen(command(tmp_path), start_new_session=True) as running:
        wait_for(lambda: list(tmp_path.glob("*/*/metrics.jsonl")), 120)  # one of them trains
        running.send_signal(signal.SIGTERM)
        assert running.wait(20) == 143
    wait_for(lambda: not group_lives(running.pid), 10)


def group_lives(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


def wait_for(holds: Callable[[], object], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.1)
