"""The run directory: its files, its lock."""

from __future__ import annotations

import json
import os
import socket
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from flowray.config.errors import InputError

STALE_S = 120.0  # a lock of another host not renewed for this long has a dead owner


@dataclass(frozen=True)
class RunDirectory:
    """Paths of one run, `<storage_path>/<name>`."""

    path: Path

    @property
    def config(self) -> Path:
        return self.path / "config.yaml"

    @property
    def card(self) -> Path:
        return self.path / "card.md"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def probes(self) -> Path:
        return self.path / "probes.jsonl"

    @property
    def samples(self) -> Path:
        return self.path / "samples"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def stop_request(self) -> Path:
        """A file whose presence asks the loop to write a checkpoint and stop."""
        return self.path / ".stop"

    def create(self) -> None:
        """Make the folders; InputError where that cannot be."""
        try:
            for folder in (self.path, self.samples, self.checkpoints):
                folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self.path):
                pass
        except OSError as error:
            raise InputError(f"storage_path: {self.path} cannot be written: {error.strerror}; set storage_path=FOLDER") from error


class RunLock:
    """Keeps two processes from writing one run. A dead owner's lock (same host: no such process; elsewhere: stale) is taken over."""

    def __init__(self, run: RunDirectory):
        self._file = run.path / ".lock"
        self._me = {"host": socket.gethostname(), "pid": os.getpid(), "started": _process_start(os.getpid())}

    def __enter__(self) -> RunLock:
        for _ in range(2):
            try:
                with self._file.open("x") as file:
                    json.dump(self._me, file)
                return self
            except FileExistsError:
                if self._alive():
                    raise InputError(f"{self._file.parent}: in use by {self._owner()}; wait for it or choose another name") from None
                self._file.unlink(missing_ok=True)
        raise InputError(f"{self._file.parent}: another process took this run at the same moment")

    def __exit__(self, *_: object) -> None:
        self._file.unlink(missing_ok=True)

    def renew(self) -> None:
        """Tell other hosts that the owner lives."""
        os.utime(self._file)

    def _owner(self) -> str:
        owner = json.loads(self._file.read_text())
        return f"process {owner['pid']} on {owner['host']}"

    def _alive(self) -> bool:
        try:
            owner = json.loads(self._file.read_text())
            age = time.time() - self._file.stat().st_mtime
        except (OSError, ValueError):
            return False
        if owner["host"] != self._me["host"]:
            return age < STALE_S
        return owner["pid"] != self._me["pid"] and _process_start(owner["pid"]) == owner["started"]


def _process_start(pid: int) -> str:
    """Start time of a live process, so that a reused pid is not taken for the owner; '' where there is none."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return "" if fields[0] == "Z" else fields[19]
    except OSError:
        return ""
