"""`python -m flowray.train tiny.yaml` as users type it, in a folder of a test's own that has the
file; gone with all that it started after the test.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from kills import marked

TIMEOUT_S = 150.0
MARK = "FLOWRAY_E2E"


class Commands:
    """Starts the command with the arguments it is called with; further variables of its
    environment by name.
    """

    def __init__(self, folder: Path):
        self.folder, self.processes = folder, list[subprocess.Popen]()

    def __call__(self, *arguments: str, **environment: str) -> subprocess.Popen:
        given = {**os.environ, MARK: str(self.folder), "PYTHONFAULTHANDLER": "1"}
        given.pop("RAY_ADDRESS", None)
        command = [sys.executable, "-m", "flowray.train", "tiny.yaml", *arguments]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        self.processes.append(
            subprocess.Popen(command, cwd=self.folder, env=given | environment, **pipes)
        )
        return self.processes[-1]

    def left(self) -> list[int]:
        """Live processes of the commands, of Ray and of its workers."""
        return marked(f"{MARK}={self.folder}")


@contextmanager
def commands(folder: Path) -> Iterator[Commands]:
    """What starts commands in the folder, for the block."""
    made = Commands(folder)
    try:
        yield made
    finally:
        for process in made.processes:
            process.kill()
            process.wait()
        for pid in made.left():
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def until(
    condition: Callable[[], object],
    what: str,
    process: subprocess.Popen | None = None,
    timeout_s: float = TIMEOUT_S,
) -> None:
    """Wait for the condition; the test fails where the command ends before it."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        if process is not None and process.poll() is not None:
            pytest.fail(f"the command ended before {what}: {process.communicate()}")
        assert time.monotonic() < deadline, f"waited in vain for {what}"
        time.sleep(0.05)


def finish(process: subprocess.Popen, timeout_s: float = TIMEOUT_S) -> str:
    """What the command prints, once it has ended well."""
    stdout, stderr = process.communicate(timeout=timeout_s)
    assert process.returncode == 0, stderr
    return stdout
