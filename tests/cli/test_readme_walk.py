"""The README from top to bottom, in an empty folder, as somebody types it who has just come.

Every command is taken from README.md and run as it stands, with what `SMALL` has for its verb
appended: overrides that make trainings short. Not run: `make test` and the set-up (their targets
must be there), and what needs a Ray cluster (tests/cluster/test_job_submit.py submits that line).
The quick walk asks for plans where the slow one trains.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import pytest
from support import own_pictures

from flowray.cli.common import Main
from flowray.config.load import recipe_names

ROOT = Path(__file__).parent.parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
SHORT = {
    "train.steps": 8,
    "train.log_every": 4,
    "train.probe_every": 8,
    "train.sample_every": 8,
    "train.checkpoint_every": 8,
}
SMALL = {
    "train": [f"{key}={value}" for key, value in SHORT.items()],
    "tune": [
        "run_cap=3",
        "early_terminate=null",
        *(f"set.{key}={value}" for key, value in SHORT.items()),
    ],
}
PATIENCE_S = 420  # for one command; the first one makes and encodes 12,000 pictures
SERVES = "dashboard"  # until Ctrl-C
# planned without its weights, which the plan lists as problems: exit code 1
LACKING = "crossflow_256"


def readme_commands() -> list[list[str]]:
    """The command lines of the README's blocks, and those in its sentences, in order, comments
    cut.
    """
    block = r"^ {4}((?:make|ray|python -m|\. ) ?\S.*)$"
    inline = r"`(python -m flowray\.[^`]+)`"
    found = (
        match[1] or match[2] for match in re.finditer(f"{block}|{inline}", README, re.MULTILINE)
    )
    return [shlex.split(line, comments=True) for line in found]


def dry_make(target: str) -> subprocess.CompletedProcess[str]:
    """What make would run for it, also where make runs these tests and hands its own flags on."""
    inherited = ("MAKEFLAGS", "MFLAGS", "MAKELEVEL", "MAKEOVERRIDES", "ARGS")
    env = {key: value for key, value in os.environ.items() if key not in inherited}
    return subprocess.run(
        ["make", "-n", target], cwd=ROOT, env=env, capture_output=True, text=True, check=True
    )


def typed() -> Iterator[list[str]]:
    """What a newcomer runs of it: [verb, argument, ...]; `make sweep` is what its target runs."""
    for words in readme_commands():
        if words == ["make", "sweep"]:
            said = dry_make("sweep")
            words = ["python", *shlex.split(said.stdout.splitlines()[-1])[1:]]
        if words[:2] == ["python", "-m"]:
            yield [words[2].removeprefix("flowray."), *words[3:]]


def test_the_walk_sees_every_command() -> None:
    firsts = {words[0] for words in readme_commands()}
    assert firsts == {"make", "python", ".", "ray"}
    verbs = [words[0] for words in typed()]
    assert verbs.count("train") >= 5
    assert {"tune", "sample", "eval", "doctor", "dashboard", "data", "init"} <= set(verbs)


@pytest.mark.parametrize(
    "target", sorted({words[1] for words in readme_commands() if words[0] == "make"} | {"setup"})
)
def test_the_make_targets_are_there(target: str) -> None:
    assert dry_make(target).stdout


FETCHES = ["make", "emoji"]  # needs a network, which no test has


def quick(verb: str, argv: list[str], place: Path) -> list[str]:
    """A command without its hours: the plan of a training, the help of what needs a finished
    one.
    """
    if argv[:2] == FETCHES:
        return ["make", "--help"]
    if verb in ("data", "init"):
        return argv
    source = argv[0] if argv else ""
    there = source in recipe_names() or (place / source).is_file() or verb == "tune"
    if verb in ("train", "tune") and there:
        return [*argv, *(["--plan"] if "--plan" not in argv else [])]
    return ["--help"]


def test_quick_walk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Data packed, checked and looked at; every plan; in a folder with a space and without a
    home.
    """
    place = tmp_path / "an empty folder"
    own_pictures(place / "PHOTOS", 100)
    monkeypatch.chdir(place)
    monkeypatch.setenv("HOME", "/dev/null")
    for verb, *argv in typed():
        main: Main = import_module(f"flowray.cli.{verb}").main
        try:
            code = main(quick(verb, argv, place))
        except SystemExit as stop:  # --help
            code = stop.code  # type: ignore[assignment]
        assert code == int(LACKING in argv), (verb, argv)
    assert (place / "mine.yaml").is_file()
    assert not (place / "runs").exists()


@pytest.fixture(scope="module")
def cache() -> Iterator[Path]:
    folder = Path(tempfile.mkdtemp(prefix="walk-"))
    yield folder
    shutil.rmtree(folder)


def run(words: list[str], place: Path, env: dict[str, str]) -> None:
    """One command to its end, or to its first line and Ctrl-C where it serves: no traceback, no
    endless wait.
    """
    verb, *argv = words
    if argv[:2] == FETCHES:
        argv = ["make", "--help"]
    command = [
        sys.executable,
        "-m",
        f"flowray.{verb}",
        *argv,
        *([] if "--plan" in argv else SMALL.get(verb, [])),
    ]
    process = subprocess.Popen(
        command, cwd=place, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    patience = threading.Timer(PATIENCE_S, process.kill)
    patience.start()
    assert process.stdout
    lines = []
    for line in process.stdout:
        lines.append(line)
        if verb == SERVES and "Ctrl-C" in line:
            process.send_signal(signal.SIGINT)
    process.wait()
    patience.cancel()
    said = "".join(lines)
    shown = f"{shlex.join(command)}\n{said}"
    assert "Traceback" not in said, shown
    # After 8 steps the doctor finds much, and a plan lists weights that are not here: exit code 1.
    assert process.returncode == int(verb == "doctor" or LACKING in argv), shown


@pytest.mark.slow
@pytest.mark.parametrize("where", ["empty", "a path with a space", "no home"])
def test_walk(where: str, cache: Path, tmp_path: Path) -> None:
    place = tmp_path / where
    own_pictures(place / "PHOTOS", 100)
    env = {**os.environ, "PYTHONPATH": str(ROOT), "FLOWRAY_CACHE": str(cache / "flowray")}
    if where == "no home":
        del env["FLOWRAY_CACHE"]
        env |= {"HOME": "/dev/null", "TMPDIR": str(cache)}
        for name in [name for name in env if name.startswith(("XDG_", "HF_", "MPL"))]:
            del env[name]
    for words in typed():
        run(words, place, env)
    assert list((place / "runs" / "quickstart" / "samples").glob("*red*circle*.png"))
    assert (place / "runs" / "head" / "best.yaml").is_file()
    assert (place / "runs" / "mine" / "report.html").is_file()
