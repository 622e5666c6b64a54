"""A set of pictures by Ray tasks: to the last bit those of one process, killed tasks included."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import killed_once
import pytest
import ray
from killed_once import KilledOnce
from support import tiny_recipe

from flowray.cli.sample import main
from flowray.config.progress import Progress
from flowray.rayrun import encoder
from flowray.rayrun.encoder import RayTasks
from flowray.store.run import RunDirectory
from flowray.train.group import Group
from flowray.train.loop import train

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]
ray.cloudpickle.register_pickle_by_value(killed_once)  # tasks cannot import it
PROMPTS = ["a red circle", "cross", "a blue square", "a green ring", "a red circle"]
WORDS = ["--count", "2", "--set", "sample.batch_size=2"]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("painting")
    path: Path = folder / "runs" / "tiny"
    recipe = tiny_recipe(folder, **{"train.steps": 4})
    train(recipe, RunDirectory(path), Group.current("cpu"), lambda row: None)
    return path


def files(run: Path, folder: Path, *words: str) -> dict[str, bytes]:
    out = ["--out", str(folder / "s.png"), "--each", str(folder / "each")]
    assert main([str(run), *PROMPTS, *WORDS, *words, *out]) == 0
    made = {file.name: file.read_bytes() for file in (folder / "each").iterdir()}
    return made | {"sheet": (folder / "s.png").read_bytes()}


def test_two_tasks_paint_what_one_process_does(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whole, and with the third picture of a task its last one: its pictures stay, a new process
    paints the rest.
    """
    alone = files(run, tmp_path / "alone")
    assert len(alone) == 10 + 2
    assert files(run, tmp_path / "two", "--workers", "2") == alone
    works_of, mark = RayTasks.__call__, tmp_path / "killed"

    def killed(self: RayTasks, works: Sequence[Any], progress: Progress) -> list[Any]:
        return works_of(self, [KilledOnce(work, mark, "sampling", 3) for work in works], progress)

    monkeypatch.setattr(encoder.RayTasks, "__call__", killed)
    assert files(run, tmp_path / "killed_once", "--workers", "2") == alone
    assert mark.exists()
    rows = (tmp_path / "killed_once" / "each" / "pictures.jsonl").read_text(encoding="utf-8")
    assert len({json.loads(row)["key"] for row in rows.splitlines()}) == 10
