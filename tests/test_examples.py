"""CONTRIBUTING.md: each example of how to add something still applies, passes what it says to type,
and touches the files it lists.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
EXAMPLES = sorted((ROOT / "docs" / "examples").glob("*.patch"))
SECTIONS = {
    patch: text
    for text in (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8").split("\n### ")[1:]
    for patch in re.findall(r"^    git apply (\S+)$", text, re.MULTILINE)
}


def touched(patch: Path) -> list[str]:
    return re.findall(r"^\+\+\+ b/(\S+)$", patch.read_text(encoding="utf-8"), re.MULTILINE)


def copy_of_the_project(folder: Path) -> Path:
    for name in ("flowray", "tests", "docs"):
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / name, folder / name, ignore=ignored)
    shutil.copy(ROOT / "pyproject.toml", folder)
    return folder


def run(folder: Path, *command: str) -> subprocess.CompletedProcess[str]:
    """In a copy, with its own package: neither this checkout's nor, where the copy lies in one,
    another repository's.
    """
    kept = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    inside = {"PYTHONPATH": str(folder), "GIT_CEILING_DIRECTORIES": str(folder.parent)}
    return subprocess.run(
        command, cwd=folder, env={**kept, **inside}, capture_output=True, text=True, timeout=240
    )


def test_every_example_is_shown_once() -> None:
    assert [str(patch.relative_to(ROOT)) for patch in EXAMPLES] == sorted(SECTIONS)
    assert len(EXAMPLES) == 4


@pytest.mark.parametrize("patch", EXAMPLES, ids=lambda patch: patch.stem)
def test_an_example_touches_the_files_it_lists(patch: Path) -> None:
    section = SECTIONS[str(patch.relative_to(ROOT))]
    assert sorted(re.findall(r"^- `(\S+)`: ", section, re.MULTILINE)) == sorted(touched(patch))


@pytest.mark.parametrize("patch", EXAMPLES, ids=lambda patch: patch.stem)
def test_an_example_applies_and_passes_its_tests(patch: Path, tmp_path: Path) -> None:
    folder = copy_of_the_project(tmp_path / "copy")
    applied = run(folder, "git", "apply", str(patch))
    assert applied.returncode == 0, applied.stderr
    section = SECTIONS[str(patch.relative_to(ROOT))]
    (typed,) = re.findall(r"^    python (-m pytest .+)$", section, re.MULTILINE)
    code = [name for name in touched(patch) if name.endswith(".py")]
    here = "tests/test_architecture.py::test_import_directions"
    for command in (
        ["-m", "ruff", "check", *code],
        ["-m", "ruff", "format", "--check", *code],
        [*shlex.split(typed), here, "-vv"],
    ):
        done = run(folder, sys.executable, *command)
        assert done.returncode == 0, done.stdout + done.stderr
    for name in re.findall(r"^\+class (Test\w+)", patch.read_text(), re.MULTILINE):
        assert f"::{name}::" in done.stdout


def test_an_example_that_no_longer_fits_is_refused(tmp_path: Path) -> None:
    folder = copy_of_the_project(tmp_path / "copy")
    changed = folder / touched(EXAMPLES[0])[0]
    changed.write_text("# written anew\n")
    assert run(folder, "git", "apply", str(EXAMPLES[0])).returncode != 0
