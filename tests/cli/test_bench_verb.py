"""`flowray bench`: the benchmarks of a checkout, and one line where there is none."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from flowray.cli import bench
from flowray.config.errors import InputError

ROOT = Path(bench.__file__).parents[2]


def command(*argv, cwd, **env):
    return subprocess.run(
        [sys.executable, *argv], capture_output=True, text=True, timeout=120, cwd=cwd, env=env
    )


def test_a_checkout_runs_its_benchmarks_from_anywhere(tmp_path):
    """Not a folder `benchmarks` of somebody else's."""
    (tmp_path / "benchmarks").mkdir()
    (tmp_path / "benchmarks" / "__main__.py").write_text("raise SystemExit('not this one')")
    done = command("-m", "flowray", "bench", "dta", cwd=tmp_path, PYTHONPATH=str(ROOT))
    assert (done.returncode, done.stdout) == (2, "")
    assert "choose from 'sweep', " in done.stderr
    assert "'data'" in done.stderr


def test_a_folder_that_is_no_checkout_is_one_line(tmp_path):
    (tmp_path / "benchmarks").mkdir()
    (tmp_path / "benchmarks" / "__main__.py").write_text("raise SystemExit('not this one')")
    with pytest.raises(InputError, match="not part of an installed flowray"):
        bench.main(["data"], tmp_path)


def test_an_installed_package_says_so(tmp_path):
    """The package alone, as a wheel lays it down."""
    ignored = shutil.ignore_patterns("__pycache__", "assets")
    shutil.copytree(ROOT / "flowray", tmp_path / "flowray", ignore=ignored)
    done = command("-m", "flowray.bench", "--help", cwd=tmp_path, PYTHONPATH=str(tmp_path))
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: flowray.bench: ")
    assert done.stderr.count("\n") == 1
