"""What each rank says is kept with its run, start by start."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from flowray.rayrun.ranklog import rank_log
from flowray.store.run import RunDirectory
from flowray.train.group import Group

RANK = Group(1, 2, torch.device("cpu"))


def test_starts_are_appended_and_the_console_still_hears(tmp_path: Path, capsys):
    run, before = RunDirectory(tmp_path), sys.stderr
    with rank_log(run, RANK):
        print("first", file=sys.stderr)
    with pytest.raises(ZeroDivisionError), rank_log(run, RANK):
        print(1 / 0)
    assert sys.stderr is before
    lines = run.rank_log(1).read_text().splitlines()
    assert [line[:3] == "---" for line in lines].count(True) == 4
    assert "rank 1 of 2" in lines[0]
    assert lines[1] == "first"
    assert lines[-2] == "ZeroDivisionError: division by zero"
    assert capsys.readouterr().err == "first\n"


def test_without_a_place_for_it_the_rank_goes_on(tmp_path: Path, capsys):
    (tmp_path / "logs").write_text("a file")
    with rank_log(RunDirectory(tmp_path), RANK):
        print("first", file=sys.stderr)
    assert capsys.readouterr().err == "first\n"
