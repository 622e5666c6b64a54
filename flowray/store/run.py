"""The run directory: its files, its lock."""

from __future__ import annotations

import errno
import json
import os
import re
import socket
import threading
import time
import uuid
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flowray.config.errors import InputError

_STRIP = re.compile(r"step_(\d+)\.png")
RENEW_S = 10.0  # how often an owner renews its lock
STALE_S = 40.0  # a lock of another host not renewed for this long has a dead owner
EMPTY_S = 5.0  # a lock that stays empty for this long was cut off by a full disk or a kill


@dataclass(frozen=True)
class RunDirectory:
    """Paths of one run, `<storage_path>/<name>`."""

    path: Path

    @property
    def config(self) -> Path:
        return self.path / "config.yaml"

    @property
    def next_config(self) -> Path:
        """The recipe of a start that has yet to take over the run's state; it then becomes
        `config`.
        """
        return self.path / ".config.next"

    @property
    def taken_over(self) -> bool:
        """Whether a worker of the newest start has restored the state: its steps may be lost,
        and no start's before.
        """
        return not self.next_config.exists()

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
    def times(self) -> Path:
        """What the wall time of all its starts went into, see `flowray.train.times`, and rows
        {step, lost, why, at} of the ranks that were lost.
        """
        return self.path / "times.jsonl"

    def rank_log(self, rank: int) -> Path:
        """What a rank has said, over all starts."""
        return self.path / "logs" / f"rank_{rank}.log"

    @property
    def findings(self) -> Path:
        """What the doctor found while the run trained: rows {step, findings}."""
        return self.path / "findings.jsonl"

    @property
    def bad_samples(self) -> Path:
        """The samples that it does without: rows {split, shard, key, cause, message}; no file where
        there are none.
        """
        return self.path / "bad_samples.jsonl"

    @property
    def skipped(self) -> Path:
        """The steps that did not reach the weights, as a loss or the gradient was not finite; no
        file where there are none.
        """
        return self.path / "skipped_steps.jsonl"

    @property
    def gaps(self) -> Path:
        """Probes and pictures that failed: rows {step, what, why}; no file where none did."""
        return self.path / "gaps.jsonl"

    @property
    def samples(self) -> Path:
        return self.path / "samples"

    def strip(self, step: int) -> Path:
        """The sample strip of a step."""
        return self.samples / f"step_{step:06d}.png"

    def strips(self) -> list[Path]:
        """All sample strips, in the order of their steps, which names of seven digits lose."""
        found = {
            int(named[1]): path
            for path in self.samples.glob("step_*.png")
            if (named := _STRIP.fullmatch(path.name))
        }
        return [found[step] for step in sorted(found)]

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    def checkpoint(self, step: int) -> Path:
        """The checkpoint of a step."""
        return self.checkpoints / f"step_{step:06d}"

    @property
    def lock(self) -> Path:
        """Of the process that writes the run, see RunLock."""
        return self.path / ".lock"

    @property
    def start_lock(self) -> Path:
        """Of the process that starts the run's workers and waits for them: two would share its
        hidden files, the next config among them.
        """
        return self.path / ".lock.start"

    @property
    def stop_request(self) -> Path:
        """A file whose presence asks the loop to write a checkpoint and stop."""
        return self.path / ".stop"

    @property
    def preempted(self) -> Path:
        """A file of a start that ended with a checkpoint as a machine was taken away; the run is to
        be started again elsewhere.
        """
        return self.path / ".preempted"

    @property
    def stuck(self) -> Path:
        """A file of ranks that have ended as the run came no further: {ranks, why}."""
        return self.path / ".stuck"

    @property
    def doing(self) -> Path:
        """What its worker is doing before the first step."""
        return self.path / ".doing"

    def create(self) -> None:
        """Make the folders; InputError where that cannot be."""
        try:
            for folder in (self.path, self.samples, self.checkpoints):
                folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(
                f"storage_path: {self.path} cannot be written: {error.strerror}; set"
                " storage_path=FOLDER"
            ) from error
        require_writable(self.path)


def require_writable(folder: Path) -> None:
    """InputError, naming what is missing, where a run cannot be kept in `folder`.

    Asked by doing it: a mounted bucket, a USB stick or a drive in the cloud has no hard links, no
    symbolic links, no sockets, which a run needs none of; it does need the four below.
    """
    mine = folder / f".try-{uuid.uuid4().hex}"
    other = mine.with_suffix(".new")
    doing = "cannot be written"
    try:
        with mine.open("x") as file:
            file.write("old\n")
        doing = "makes a file that is there already: two processes would write one run"
        with suppress(FileExistsError), mine.open("x"):
            raise OSError(errno.ENOTSUP, os.strerror(errno.ENOTSUP))
        doing = "does not rename a file over another one"
        other.write_text("new\n")
        os.replace(other, mine)
        doing = "does not append to a file"
        with mine.open("a") as file:
            file.write("more\n")
        if mine.read_text() != "new\nmore\n":
            raise OSError(errno.EIO, "it reads back differently")
    except OSError as error:
        raise InputError(
            f"storage_path: {folder} {doing}: {error.strerror or error}; set storage_path=FOLDER"
        ) from error
    finally:
        for left in (mine, other):
            with suppress(OSError):
                left.unlink(missing_ok=True)


class RunLock:
    """Keeps two processes from writing one run. A dead owner's lock (same host: no such process;
    elsewhere: stale) is taken over.

    Whether the owner on another host lives takes up to RENEW_S to see, that it is dead up to
    STALE_S: a run that moves to another host after a crash waits that long and goes on. patience_s:
    how long to wait for a live owner to let go. file: the lock, `run.lock` unless given.
    """

    def __init__(self, run: RunDirectory, patience_s: float = 0.0, file: Path | None = None):
        self._file, self._patience_s = file or run.lock, patience_s
        self._me = {
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "started": process_start(os.getpid()),
        }
        self._left = threading.Event()

    def __enter__(self) -> RunLock:
        for _ in range(2):
            try:
                self._take()
            except FileExistsError:
                self.refuse_if_held()
                self._file.unlink(missing_ok=True)
            else:
                threading.Thread(target=self._keep, name="lock", daemon=True).start()
                return self
        raise InputError(f"{self._file.parent}: another process took this run at the same moment")

    def _take(self) -> None:
        """Make the file, which storage without hard links can do too, and then write into it."""
        file = self._file.open("x")
        try:
            with file:
                file.write(json.dumps(self._me))
        except OSError:  # a full disk
            self._file.unlink(missing_ok=True)
            raise

    def __exit__(self, *_: object) -> None:
        self._left.set()
        self._file.unlink(missing_ok=True)

    def renew(self) -> None:
        """Tell other hosts that the owner lives; done every RENEW_S while the lock is held."""
        os.utime(self._file)

    def refuse_if_held(self) -> None:
        """InputError where another live process holds the run."""
        deadline = time.monotonic() + self._patience_s
        while (owner := self._owner()) is not None and self._alive(owner):
            if time.monotonic() >= deadline:
                where = f"process {owner['pid']} on {owner['host']}"
                raise InputError(
                    f"{self._file.parent}: in use by {where}; wait for it or choose another name"
                )
            time.sleep(0.2)

    def _keep(self) -> None:
        while not self._left.wait(RENEW_S):
            with suppress(OSError):
                self.renew()

    def _owner(self) -> dict[str, Any] | None:
        """Who holds it, None where nobody does.

        A lock that its taker still writes is waited for.
        """
        deadline = time.monotonic() + EMPTY_S
        while not (text := self._text()):
            if text is None or time.monotonic() > deadline:
                return None
            time.sleep(0.05)
        try:
            owner = json.loads(text)
        except ValueError:
            return None
        return owner if isinstance(owner, dict) and owner.keys() >= self._me.keys() else None

    def _text(self) -> str | None:
        try:
            return self._file.read_text()
        except OSError:
            return None

    def _alive(self, owner: dict[str, Any]) -> bool:
        if owner["host"] == self._me["host"]:
            return (
                owner["pid"] != self._me["pid"] and process_start(owner["pid"]) == owner["started"]
            )
        try:
            seen = self._file.stat().st_mtime
            while time.time() - seen < STALE_S:
                time.sleep(0.5)
                if self._file.stat().st_mtime != seen:
                    return True
        except FileNotFoundError:  # it has let go
            pass
        return False


def process_start(pid: int) -> str:
    """Start time of a live process, so that a reused pid is not taken for the owner; '' where
    there is none.
    """
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return "" if fields[0] == "Z" else fields[19]
    except OSError:
        return ""
