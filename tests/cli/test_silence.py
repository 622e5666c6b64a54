"""No command is silent for long: the real ones, from an empty cache, with the times at which their lines come.

docs of the figures: `python tests/silence.py -m flowray.train quickstart` prints them for any command.
"""

import json
import os
import sys
from pathlib import Path

import pytest
from silence import Talk, listen
from support import tiny_recipe

from flowray.config.load import dump_recipe

SILENCE_S = 10.0  # alone on two cores no gap is over 4 s; tests share theirs


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("silence")
    recipe = tiny_recipe(folder, **{"train.steps": 8, "train.log_every": 1})
    (folder / "tiny.yaml").write_text(dump_recipe(recipe))
    return folder


def heard(place: Path, *argv: str) -> Talk:
    environment = {**os.environ, "FLOWRAY_CACHE": str(place / "cache")}
    talk = listen([sys.executable, "-m", "flowray", *argv], cwd=place, env=environment)
    assert talk.code in (0, 1), talk.lines
    assert talk.longest[0] < SILENCE_S, talk.lines
    assert talk.first < SILENCE_S
    return talk


@pytest.fixture(scope="module")
def trained(place: Path) -> Path:
    """The run of a real `flowray train`, which was heard."""
    planned = heard(place, "train", "tiny.yaml", "--plan", "--json")
    talk = heard(place, "train", "tiny.yaml", "--json")
    (line,) = talk.of("stdout")
    guess = json.loads(planned.of("stdout")[0])["wall_time"]["seconds"]
    assert talk.seconds / 3 < guess < talk.seconds * 3
    said = " ".join(talk.of("stderr"))
    assert all(what in said for what in ("importing", "starting Ray", "training"))
    return Path(json.loads(line)["run"])


def test_sample(place: Path, trained: Path) -> None:
    talk = heard(place, "sample", str(trained), "a red circle", "--json")
    (line,) = talk.of("stdout")
    assert Path(json.loads(line)["picture"]).is_file()


def test_report(place: Path, trained: Path) -> None:
    assert heard(place, "report", str(trained)).of("stdout") == [str(trained / "report.html")]
