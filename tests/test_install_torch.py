"""Which build of torch `make setup` installs: by what the machine has, or by what was asked for."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parent.parent
SCRIPT = ROOT / "tools" / "install_torch.py"
# nobody listens: as on a machine that reaches no index of the CPU builds
NOWHERE = "http://127.0.0.1:9"


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    spec = importlib.util.spec_from_file_location("install_torch", SCRIPT)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def stand_in(folder: Path, script: str) -> str:
    """A PATH with an nvidia-smi that does what the script says."""
    folder.mkdir()
    program = folder / "nvidia-smi"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    return str(folder)


@pytest.mark.parametrize(
    ("script", "gpu"),
    [
        ('echo "GPU 0: NVIDIA H100 (UUID: GPU-1)"', True),
        ('echo "No devices were found"; exit 6', False),
        ("echo no driver >&2; exit 9", False),
    ],
)
def test_a_gpu_is_what_nvidia_smi_lists(
    tool: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str, gpu: bool
) -> None:
    monkeypatch.setenv("PATH", stand_in(tmp_path / "bin", script))
    assert tool.has_gpu(tmp_path / "none") is gpu


def test_a_gpu_without_nvidia_smi_is_seen_at_its_driver(
    tool: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert not tool.has_gpu(tmp_path / "gpus")
    (tmp_path / "gpus" / "0000:01:00.0").mkdir(parents=True)
    assert tool.has_gpu(tmp_path / "gpus")


@pytest.mark.parametrize(
    ("build", "there", "facts", "wanted"),
    [
        ("cuda", "", {"linux": True, "cpu_index": False}, [["torch==9.1"]]),
        (
            "cuda",
            "9.1+cpu",
            {"linux": True, "cpu_index": False},
            [["--force-reinstall", "torch==9.1"]],
        ),
        ("cuda", "9.1", {"linux": True, "cpu_index": False}, []),
        (
            "cpu",
            "9.0",
            {"linux": True, "cpu_index": True},
            [["--extra-index-url", "INDEX", "torch==9.1+cpu"]],
        ),
        ("cpu", "9.1+cpu", {"linux": True, "cpu_index": True}, []),
        ("cpu", "", {"linux": True, "cpu_index": False}, [["torch==9.1+cpu"], ["torch==9.1"]]),
        ("cpu", "", {"linux": False, "cpu_index": False}, [["torch==9.1"]]),  # macOS has one build
        ("cpu", "9.1", {"linux": False, "cpu_index": False}, []),
    ],
)
def test_what_pip_is_asked_for(
    tool: ModuleType, build: str, there: str, facts: dict[str, bool], wanted: list[list[str]]
) -> None:
    found = tool.tries(build, "9.1", there, **facts)
    assert [
        ["INDEX" if part == tool.CPU_INDEX else part for part in one] for one in found
    ] == wanted


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere there is one build")
def test_the_command_says_which_build_and_how_to_get_the_other(tmp_path: Path) -> None:
    env = {
        **os.environ,
        "https_proxy": NOWHERE,
        "PATH": stand_in(tmp_path / "bin", 'echo "GPU 0: NVIDIA H100"'),
    }
    for asked, build, other in (
        ("auto", "CUDA", "cpu"),
        ("cuda", "CUDA", "cpu"),
        ("cpu", "CPU", "cuda"),
    ):
        # -S: no torch is installed yet
        command = [sys.executable, "-S", str(SCRIPT), asked, "--plan"]
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
        first, *_, last = done.stdout.splitlines()
        assert f"the {build} build" in first
        assert f"make setup TORCH={other}" in first
        assert last.partition(" -m pip install ")[2].split()[-1].startswith("torch==")


def test_make_setup_installs_the_dashboard_too_and_passes_the_choice_on() -> None:
    def recipe(*argv: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["make", "-n", "-B", *argv], cwd=ROOT, capture_output=True, text=True, timeout=60
        )

    assert "'.[dev,dashboard]'" in recipe("setup").stdout
    assert "tools/install_torch.py auto" in recipe("setup").stdout
    assert "tools/install_torch.py cpu" in recipe("setup", "TORCH=cpu").stdout
    assert recipe("setup", "TORCH=rocm").returncode == 2


VENV_PYTHON = """#!/bin/sh
echo "$@" >> log
case "$*" in "-m pip --version") test -f .venv/whole ;; esac
"""
SYSTEM_PYTHON = """#!/bin/sh
case "$1 $2" in
  "-m venv") echo made >> log; touch .venv/whole ;;
  -c*) exit {too_old} ;;
esac
"""


def set_up(folder: Path, *, too_old: bool) -> tuple[int, list[str]]:
    """`make setup` in a folder whose .venv was left half made; its exit code, and what was run
    in turn.
    """
    for name in ("Makefile", "pyproject.toml", "constraints.txt", "tools/install_torch.py"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes((ROOT / name).read_bytes())
    for path, text in (
        (".venv/bin/python", VENV_PYTHON),
        ("python", SYSTEM_PYTHON.format(too_old=int(too_old))),
    ):
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(text)
        (folder / path).chmod(0o755)
    command = ["make", "setup", "PYTHON=./python"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=60)
    return done.returncode, (folder / "log").read_text().splitlines()


def test_a_half_made_venv_is_made_whole_and_torch_comes_first(tmp_path: Path) -> None:
    code, log = set_up(tmp_path, too_old=False)
    assert code == 0
    after = log[log.index("made") + 1 :]
    assert [line.split()[0] for line in after] == ["tools/install_torch.py", "-m"]
    assert after[1].endswith(".[dev,dashboard]")
    assert (tmp_path / ".venv" / ".ready").is_file()


def test_an_old_python_installs_nothing(tmp_path: Path) -> None:
    code, log = set_up(tmp_path, too_old=True)
    assert code == 2
    assert set(log) == {"-m pip --version"}
