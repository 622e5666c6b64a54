"""Runs and sweeps of an older flowray, whose files have relative paths, and ones that were
moved.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

import flowray
from flowray.config.errors import InputError
from flowray.config.load import dump_recipe, load_recipe
from flowray.config.paths import exists, no_such
from flowray.sweepconfig.file import load_sweep

RECORDED = Path(__file__).parent.parent / "report" / "recorded" / "head"


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, where the recorded sweep is runs/head."""
    shutil.copytree(RECORDED, tmp_path / "home" / "runs" / "head")
    (tmp_path / "other").mkdir()
    monkeypatch.chdir(tmp_path / "home")
    monkeypatch.delenv("FLOWRAY_STORAGE", raising=False)
    return tmp_path / "home"


def place_of(source: Path | str, *typed: str, in_place: bool = True) -> Path:
    loader = (
        load_sweep
        if str(source).endswith("sweep.yaml")
        else lambda *a, **k: load_recipe(*a, **k).recipe
    )
    made = loader(str(source), typed, in_place=in_place)
    return Path(made.storage_path, made.name)


def test_an_older_folder_goes_on_where_it_is(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    head = home / "runs" / "head"
    for folder in (home, home.parent / "other"):
        monkeypatch.chdir(folder)
        assert place_of(head / "sweep.yaml") == head
        assert place_of(head / "27" / "config.yaml") == head / "27"
        assert place_of(head / "best.yaml") == folder / "runs" / "head-best"
        assert place_of(head / "27" / "config.yaml", in_place=False) == folder / "runs/head/27"
    monkeypatch.setenv("FLOWRAY_STORAGE", "/mnt/shared")
    assert place_of(head / "sweep.yaml") == head
    assert place_of(head / "best.yaml") == Path("/mnt/shared/runs/head-best")


def test_a_moved_or_copied_folder_goes_on_where_it_is_now(home: Path) -> None:
    for file, key in (("sweep.yaml", "name: head\n"), ("27/config.yaml", "name: '27'\n")):
        path = home / "runs" / "head" / file
        relative = path.read_text()
        assert key in relative
        path.write_text(relative.replace("storage_path: runs", f"storage_path: {home.parent}/gone"))
    moved = home.parent / "my $old runs" / "copy-2"
    moved.parent.mkdir()
    shutil.copytree(home / "runs" / "head", moved)
    assert place_of(moved / "sweep.yaml") == moved
    assert place_of(moved / "27" / "config.yaml") == moved / "27"
    assert place_of(moved / "27" / "config.yaml", "name=next") == moved / "next"
    assert place_of(moved / "sweep.yaml", "storage_path=out") == home / "out" / "copy-2"


def test_the_recipe_of_a_run_that_was_cut_off_is_none(tmp_path: Path) -> None:
    """Wherever the cut lies: defaults would stand in the place of what is gone."""
    config = tmp_path / "config.yaml"
    (tmp_path / "checkpoints").mkdir()
    recipe = load_recipe("quickstart", ["resources.cpus_per_worker=2"]).recipe
    text = "# a card\n" + dump_recipe(recipe)
    last = text.index("resources:")
    for cut in [*range(0, last, 211), *range(last, len(text) - 1, 7)]:
        config.write_text(text[:cut])
        with pytest.raises(InputError, match=r"cut off|not valid|is empty|want"):
            load_recipe(str(config))
    config.write_text(text)
    assert load_recipe(str(config)).recipe == recipe
    # as those of before, and those of a person who adds a line
    older = text.replace("# end of the recipe\n", "").replace(text.splitlines()[1] + "\n", "")
    for whole in (older, f"{text}# mine\n"):
        config.write_text(whole)
        assert load_recipe(str(config)).recipe == recipe


def test_another_way_to_a_folder_does_not_rename_it(home: Path) -> None:
    (home / "latest").symlink_to(home / "runs" / "head" / "27")
    assert place_of("latest/config.yaml") == home / "runs" / "head" / "27"


def test_a_config_written_by_hand_is_no_run(home: Path) -> None:
    (home / "mine").mkdir()
    (home / "mine" / "config.yaml").write_text("name: a\nstorage_path: runs\ndata: {shards: set}\n")
    (home / "set").mkdir()
    recipe = load_recipe("mine/config.yaml", in_place=True).recipe
    assert Path(recipe.storage_path, recipe.name) == home / "runs" / "a"
    assert recipe.data.shards == str(home / "mine" / "set")


def test_the_set_that_an_older_recipe_names_is_the_closed_one(home: Path) -> None:
    """Every recipe that was written whole, wherever it lies; not what a person writes today."""
    head = home / "runs" / "head"
    text = (head / "27" / "config.yaml").read_text()
    (home / "sent.yaml").write_text(text)
    (home / "mine.yaml").write_text("base: sent.yaml\n")
    for older in (head / "27/config.yaml", head / "best.yaml", "sent.yaml", "mine.yaml"):
        assert load_recipe(str(older)).recipe.data.shards == "shapes_closed"
    assert load_recipe("sent.yaml", ["data.shards=shapes"]).recipe.data.shards == "shapes"
    (home / "digits.yaml").write_text(text.replace("shards: shapes", "shards: digits"))
    assert load_recipe("digits.yaml").recipe.data.shards == "digits"
    (home / "hand.yaml").write_text("base: sent.yaml\ndata: {shards: shapes}\n")
    today = load_recipe("quickstart", ["data.shards=shapes"]).recipe
    (home / "today.yaml").write_text(dump_recipe(today))
    (home / "few.yaml").write_text("data: {shards: shapes}\nmodel: {head: {kind: pooled}}\n")
    for meant in ("hand.yaml", "today.yaml", "few.yaml"):
        assert load_recipe(meant).recipe.data.shards == "shapes"


def test_relative_inputs_of_an_older_run(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = home / "runs" / "head" / "27" / "config.yaml"
    text = config.read_text().replace("shards: shapes", "shards: 'sets/*.tar'")
    text = text.replace("path: embedded\n    max", "path: models/llm\n    max")
    config.write_text(text.replace("cache: null", "cache: cache"))
    (home / "sets").mkdir()
    (home / "sets" / "a.tar").touch()
    for folder in (home / "cache", home / "models" / "llm", config.parent / "cache"):
        folder.mkdir(parents=True)
    recipe = load_recipe(str(config)).recipe
    assert recipe.data.shards == str(home / "sets" / "*.tar")
    assert recipe.data.cache == str(config.parent / "cache")
    assert recipe.model.text.path == str(home / "models" / "llm")
    monkeypatch.chdir(home.parent / "other")
    recipe = load_recipe(str(config)).recipe
    assert recipe.data.shards == str(config.parent / "sets" / "*.tar")
    assert recipe.model.text.path == "models/llm"
    (home.parent / "other" / "models").mkdir()
    assert load_recipe(str(config)).recipe.model.text.path == "models/llm"


def test_a_name_too_long_for_a_file_is_one_line(home: Path) -> None:
    long = "x" * 300
    for load, source in ((load_recipe, long), (load_recipe, f"{long}.yaml"), (load_sweep, long)):
        with pytest.raises(InputError, match="too long"):
            load(source)
    with pytest.raises(InputError, match=r"command line: model.text.path: .*too long"):
        load_recipe("quickstart", [f"model.text.path={long}"])
    assert "too long" not in no_such(long)
    assert not exists(home / "nul\0l")


@pytest.mark.skipif(os.getuid() != 0, reason="only root may become another user")
def test_a_closed_folder_is_one_line() -> None:
    code = """
import os
import sys
os.chdir("/")
from flowray.config.errors import InputError
from flowray.config.load import load_recipe, recipe_names
from flowray.config.paths import no_such
from flowray.sweepconfig.file import load_sweep
from flowray.data.shards import find_shards
here = sys.argv[1]
recipe_names()  # imports, of files that may be closed next
os.setuid(65534)
for look in (load_recipe, load_sweep, find_shards):
    for path in (here + "/r.yaml", here):
        try:
            look(path)
        except InputError as error:
            assert here in str(error) and "\\n" not in str(error), error
            assert path == here or "Permission denied" in str(error), error
        else:
            raise AssertionError(look)
assert "closed" in no_such(here + "/r.yaml")
"""
    env = {**os.environ, "PYTHONPATH": str(Path(flowray.__file__).parent.parent)}
    with tempfile.TemporaryDirectory() as closed:  # tmp_path lies in a closed folder itself
        (Path(closed) / "r.yaml").write_text("seed: 3\n")
        command = [sys.executable, "-c", code, closed]
        done = subprocess.run(command, capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
