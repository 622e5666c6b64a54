"""Installs torch into the Python that runs this: the CUDA build where there is an NVIDIA GPU, else
the CPU build.

    python tools/install_torch.py [auto|cpu|cuda] [--plan]      --plan: print the pip commands, run
    none

On Linux the plain wheel of the package index is the CUDA build, gigabytes of which a machine
without a GPU uses nothing; the CPU build is in an index of its own. Where that one does not answer,
whatever pip finds by itself is taken.
"""

from __future__ import annotations

import argparse
import re
import shlex
import shutil
import subprocess
import sys
import urllib.request
from importlib import metadata
from pathlib import Path

CPU_INDEX = "https://download.pytorch.org/whl/cpu"
ANSWERS_S = 5.0
CONSTRAINTS = Path(__file__).parent.parent / "constraints.txt"


def has_gpu(driver: Path = Path("/proc/driver/nvidia/gpus")) -> bool:
    """Whether nvidia-smi lists a GPU, or its driver does."""
    program = shutil.which("nvidia-smi")
    if program:
        try:
            listed = subprocess.run([program, "-L"], capture_output=True, text=True, timeout=30)
        except (OSError, subprocess.TimeoutExpired):
            return True  # a driver that hangs is a driver
        if listed.returncode == 0 and listed.stdout.startswith("GPU "):
            return True
    return driver.is_dir() and any(driver.iterdir())


def answers(url: str) -> bool:
    """Whether an index serves torch, asked once and for a few seconds."""
    try:
        with urllib.request.urlopen(f"{url}/torch/", timeout=ANSWERS_S):
            return True
    except (OSError, ValueError):
        return False


def installed() -> str:
    """The version of torch that is there, '' for none."""
    try:
        return metadata.version("torch")
    except metadata.PackageNotFoundError:
        return ""


def tries(build: str, version: str, there: str, *, linux: bool, cpu_index: bool) -> list[list[str]]:
    """Arguments of `pip install`, to be tried in turn until one succeeds; none where the build
    is there already.
    """
    base, _, local = there.partition("+")
    right_build = not linux or (local == "cpu") == (build == "cpu")
    if base == version and right_build:
        return []
    again = ["--force-reinstall"] if base == version else []  # pip takes one build for the other
    plain = [*again, f"torch=={version}"]
    if build == "cuda" or not linux:
        return [plain]
    cpu = [*again, f"torch=={version}+cpu"]
    return [["--extra-index-url", CPU_INDEX, *cpu]] if cpu_index else [cpu, plain]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("build", nargs="?", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--plan", action="store_true")
    args = parser.parse_args()
    pinned = re.search(r"^torch==(\S+)$", CONSTRAINTS.read_text(encoding="utf-8"), re.MULTILINE)
    if pinned is None:
        raise SystemExit(f"error: {CONSTRAINTS} pins no torch==VERSION")
    version, linux, there, gpu = pinned[1], sys.platform == "linux", installed(), has_gpu()
    build = args.build if args.build != "auto" else "cuda" if gpu else "cpu"
    if args.build == "auto" and there.partition("+")[0] == version:
        return 0  # the build that somebody chose before stays
    other = "cpu" if build == "cuda" else "cuda"
    why = (
        "asked for"
        if args.build != "auto"
        else "an NVIDIA GPU is here"
        if gpu
        else "no NVIDIA GPU is here"
    )
    if linux:
        print(
            f"torch {version}: the {build.upper()} build ({why}); `make setup TORCH={other}` takes"
            " the other",
            flush=True,
        )
    if not tries(build, version, there, linux=linux, cpu_index=False):
        return 0
    cpu_index = linux and build == "cpu" and answers(CPU_INDEX)
    if linux and build == "cpu" and not cpu_index:
        print(f"{CPU_INDEX} does not answer: taking what pip finds by itself", flush=True)
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    commands = [
        [*pip, *arguments]
        for arguments in tries(build, version, there, linux=linux, cpu_index=cpu_index)
    ]
    if args.plan:
        print("\n".join(map(shlex.join, commands)))
        return 0
    for command in commands:
        done = subprocess.run(command, stderr=subprocess.PIPE, text=True)
        if done.returncode == 0:
            break
    else:
        print(done.stderr, end="", file=sys.stderr)
        return done.returncode
    if tries(build, version, installed(), linux=linux, cpu_index=cpu_index):
        print(f"torch {installed()} is what pip found, and no {build.upper()} build")
    return 0


if __name__ == "__main__":
    sys.exit(main())
