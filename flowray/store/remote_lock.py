"""The lock of a run's place in a bucket, which machines without a common disk send to."""

from __future__ import annotations

import json
import os
import socket
import threading
import time
import uuid
from contextlib import suppress
from pathlib import Path
from typing import Any

from flowray.config.errors import InputError
from flowray.data.remote_place import RemotePlace
from flowray.store.run import process_start

RENEW_S = 15.0  # how often an owner renews its lock
STALE_S = 60.0  # a lock not renewed for this long has a dead owner
LOOK_S = 2.0  # between two looks at another's lock
ENDING_S = 10.0  # for a renewal under way
SETTLE_S = 3.0  # after it is seen who came last, where two may have created it


class InUse(InputError):
    """Another live process has the lock."""


class RemoteLock:
    """A small file `name` of the place that says who writes beside it, and is renewed while they
    do. A dead owner's (same machine: no such process; elsewhere: not renewed for STALE_S) is taken
    over.

    Of two that take it at once S3 and Google's storage let one create it; elsewhere each looks
    again after SETTLE_S who came last. An owner that was cut off for so long that another one took
    over finds out at its next renewal: `lost` says so then. Where the storage does not answer the
    lock is taken by the first `require` after it does. patience_s: how long to wait for a live
    owner to let go. run: whose lock it is; what this process has left of one of the same run is
    taken over.
    """

    def __init__(self, place: RemotePlace, name: str, patience_s: float = 0.0, run: str = ""):
        self._place, self._name, self._patience_s = place, name, patience_s
        pid = os.getpid()
        self._me = {
            "host": socket.gethostname(),
            "pid": pid,
            "started": process_start(pid),
            "machine": _machine(),
            "run": run,
            "id": uuid.uuid4().hex,
        }
        self._renewed = 0
        self._left = threading.Event()
        self._keeper = threading.Thread(target=self._keep, name="lock", daemon=True)
        self._lacking = ""  # why it could not be taken yet
        self.lost = ""

    def refuse_if_held(self) -> None:
        """InUse, one line, where another live process holds it."""
        deadline = time.monotonic() + self._patience_s
        while (text := self._place.read(self._name)) is not None and self._alive(text):
            if time.monotonic() >= deadline:
                raise InUse(f"{self._where}: in use by {_who(text)}; {_OTHERWISE}")
            time.sleep(LOOK_S)

    def require(self) -> None:
        """InputError where another process has taken it over, or it cannot be taken yet."""
        if self._lacking and not self.lost:
            self._try()
        if self.lost or self._lacking:
            raise InputError(self.lost or self._lacking)

    def __enter__(self) -> RemoteLock:
        self.lost = ""
        self._try()
        if self.lost:
            raise InUse(self.lost)
        self._keeper.start()
        return self

    def _try(self) -> None:
        """Take it, or say why not."""
        try:
            for _ in range(2):
                self.refuse_if_held()
                if self._take():
                    self._lacking = ""
                    return
            self.lost = f"{self._where}: another process took it at the same moment"
        except InUse as error:
            self.lost = str(error)
        except FileNotFoundError:
            self._lacking = f"{self._where}: there is no such bucket"
        except InputError as error:
            self._lacking = str(error)

    def __exit__(self, *_: object) -> None:
        self._left.set()
        self._keeper.join(ENDING_S)  # else it may write once more
        if self._lacking:
            return
        with suppress(InputError, OSError):
            if self._is_mine(self._place.read(self._name)):
                self._place.remove([self._name])

    def _take(self) -> bool:
        """Whether it is this process's now."""
        before, mine = self._place.read(self._name), self._content()
        if before is not None:
            self._place.remove([self._name])
        if not self._place.create(self._name, mine):
            return self._is_mine(self._place.read(self._name))  # the answer to a try was lost
        if before is None and not self._place.create(self._name, mine):
            return True  # nor could anybody else
        time.sleep(SETTLE_S)
        return self._is_mine(self._place.read(self._name))

    def _keep(self) -> None:
        while not self._left.wait(RENEW_S) and not self.lost:
            with suppress(InputError, OSError):  # the next time
                if not self._lacking:
                    self._renew()

    def _renew(self) -> None:
        """Tell others that the owner lives, or find out that another one took over."""
        text = self._place.read(self._name)
        if text is None:
            self._place.create(self._name, self._content())
        elif self._is_mine(text):
            self._renewed += 1
            self._place.write(self._name, self._content())
        else:
            self.lost = f"{self._where}: {_who(text)} has taken it over; {_OTHERWISE}"

    def _content(self) -> bytes:
        return json.dumps(self._me | {"renewed": self._renewed}).encode()

    def _is_mine(self, text: bytes | None) -> bool:
        return text is not None and _owner(text).get("id") == self._me["id"]

    def _is_ours(self, owner: dict[str, Any]) -> bool:
        """Whether this process left it behind, as the storage did not answer at the end: of a run's
        starts in one process its own lock on disk is the judge.
        """
        return bool(self._me["run"]) and all(
            owner.get(key) == self._me[key] for key in ("pid", "started", "run")
        )

    def _alive(self, text: bytes) -> bool:
        owner = _owner(text)
        if owner.get("machine") == self._me["machine"] and "pid" in owner:
            if owner["id"] == self._me["id"] or self._is_ours(owner):
                return False
            return process_start(owner["pid"]) == owner["started"]
        seen = time.monotonic()
        while time.monotonic() - seen < STALE_S:
            time.sleep(LOOK_S)
            if (now := self._place.read(self._name)) != text:
                return now is not None
        return False

    @property
    def _where(self) -> str:
        return f"train.checkpoint_url: {self._place.url(self._name).rpartition('/')[0]}"


_OTHERWISE = "wait for it, or type name=OTHER or another train.checkpoint_url"


def _owner(text: bytes) -> dict[str, Any]:
    """Who holds it; {} for what nobody has written so."""
    try:
        owner = json.loads(text)
    except ValueError:
        return {}
    return owner if isinstance(owner, dict) else {}


def _who(text: bytes) -> str:
    owner = _owner(text)
    return f"process {owner.get('pid', '?')} on {owner.get('host', '?')}"


def _machine() -> str:
    """What processes share whose numbers mean the same: hosts and containers may share names."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.stat('/proc/self/ns/pid').st_ino}"
    except OSError:
        return socket.gethostname()
