"""The commands of docs/evaluation.md, on a run and sets so small that they take seconds."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest
from support import saved_run, tiny_recipe

from flowray.cli.eval import main

PAGE = Path(__file__).parent.parent.parent / "docs" / "evaluation.md"
START = "python -m flowray.eval "


def test_every_command_does_what_it_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = saved_run(tiny_recipe(tmp_path)).path
    monkeypatch.chdir(tmp_path)
    (tmp_path / "evaluation_metadata.jsonl").write_text('{"tag": "x", "prompt": "a red circle"}\n')
    (tmp_path / "dpg_bench" / "prompts").mkdir(parents=True)
    (tmp_path / "dpg_bench" / "prompts" / "5.txt").write_text("a red circle, on white")
    coco = {"annotations": [{"image_id": 7, "id": 1, "caption": "a red circle"}]}
    (tmp_path / "captions_val2014.json").write_text(json.dumps(coco))
    lines = re.findall(rf"^    {START}(.*)$", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    commands = [shlex.split(line, comments=True) for line in lines]
    assert len(commands) == 7
    # it needs a model, and tests/sample/test_clipscore.py has one
    for command in [words for words in commands if "--clip" not in words]:
        assert command[0] == "runs/quickstart"
        small = [] if "--out" in command or "--limit" in command else ["--limit=4", "--draws=2"]
        assert main([str(run), *command[1:], *small]) == 0
    names = {"eval.json", "eval.html", "eval.png"}
    assert names <= {path.name for path in run.iterdir()}
    told = json.loads((run / "eval.json").read_text())
    assert (told["seed"], told["neighbours"]["features"]["of"]) == (1, "pixels")
    pictures = {
        str(path.relative_to(tmp_path / "pictures")) for path in tmp_path.glob("pictures/**/*.png")
    }
    assert {"geneval/00000/samples/00003.png", "geneval/00000/grid.png"} <= pictures
    assert {"dpg/5.png", "coco/000000000007.png"} <= pictures
