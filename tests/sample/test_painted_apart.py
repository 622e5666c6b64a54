"""A set of pictures dealt out to several: the files of one process, whoever paints what."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from support import Heard, tiny_recipe

from flowray.config.errors import InputError
from flowray.config.progress import Progress
from flowray.sample.apart import Painting, save_each_apart, shares
from flowray.sample.pipeline import open_pipeline
from flowray.sample.pngs import key_of, save_each
from flowray.store.found import Found, find_checkpoint
from flowray.store.run import RunDirectory
from flowray.train.group import Group
from flowray.train.loop import train

TOLD = [
    {"prompt": prompt, "number": str(number), "key": key_of(prompt, number), "seed": "3"}
    for prompt in ("a red circle", "cross", "a blue square")
    for number in range(3)
]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Found:
    folder = tmp_path_factory.mktemp("apart")
    recipe = tiny_recipe(folder, **{"train.steps": 2, "sample.batch_size": 2})
    path = folder / "runs" / "tiny"
    train(recipe, RunDirectory(path), Group.current("cpu"), lambda row: None)
    return find_checkpoint(path)


class InTurn:
    """Painters that work one after the other; `lost` of them, the last ones, do nothing."""

    def __init__(self, count: int, lost: int = 0):
        self.count, self.cores, self.lost = count, 1, lost
        self.given: list[int] = []

    def __call__(self, works: Sequence[Painting], progress: Progress) -> list[int]:
        self.given = [len(work.told) for work in works]
        return [work(progress) for work in works[: len(works) - self.lost]]


def test_whole_batches_are_dealt_out_in_turn() -> None:
    assert [len(share) for share in shares(TOLD, 2, 2)] == [5, 4]
    assert shares(TOLD, 2, 2)[1] == (TOLD[2], TOLD[3], TOLD[6], TOLD[7])
    assert [len(share) for share in shares(TOLD, 50, 4)] == [4, 4, 1]
    assert shares([], 3, 2) == []
    for count in range(1, 12):
        dealt = [one for share in shares(TOLD, count, 2) for one in share]
        assert sorted(one["key"] for one in dealt) == sorted(one["key"] for one in TOLD)


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def test_the_files_are_those_of_one_process(found: Found, tmp_path: Path) -> None:
    """One task of progress for all; what is there is painted by nobody; what a lost one leaves out
    is named, and painted when the command is typed again.
    """
    one, several = tmp_path / "one", tmp_path / "several"
    alone = save_each(open_pipeline(found), TOLD, one, lambda count=1, note="": None, seed=3)
    with pytest.raises(InputError, match="4 of 9 pictures are not there"):
        save_each_apart(found, TOLD, several, InTurn(2, lost=1), _Quiet(), seed=3)
    assert len((several / "pictures.jsonl").read_text().splitlines()) == 5
    again, heard = InTurn(2), Heard()
    pictures = save_each_apart(found, TOLD, several, again, heard, seed=3)
    assert again.given == [2, 2]
    assert heard.tasks == {"sampling": 9}
    assert np.array_equal(pictures, alone)
    assert contents(several) == contents(one)
    idle = InTurn(2)
    save_each_apart(found, TOLD, several, idle, Heard(), seed=3)
    assert idle.given == []


class _Quiet(Heard):
    """Hears of a task that does not come to its end."""

    def task(self, what, total=None, done=0):  # type: ignore[no-untyped-def]
        return super().task(what, None, done)
