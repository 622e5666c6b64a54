"""Why a run ended without finishing: carried as fields from the process that knows to the one that
tells.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from ray.exceptions import OutOfMemoryError

from flowray.cluster.ray_private import carried
from flowray.cluster.storage import StorageNotShared
from flowray.config.errors import InputError
from flowray.config.writing import NO_ROOM, write_whole
from flowray.store.run import RunDirectory

_LOW = "node running low on memory"  # Ray's words where it ends an actor
_INPUT = (StorageNotShared, InputError)  # the narrower one first


class RunFailed(RuntimeError):
    """A run ended without finishing; the message is one line.

    errno: of the system's error that was behind it, None where none was.
    """

    def __init__(self, message: str, errno: int | None = None):
        super().__init__(message)
        self.errno = errno


class OutOfMemory(RunFailed):
    """A worker needs more memory than there is, and would again."""


def out_of_memory(error: BaseException) -> OutOfMemory | None:
    """What a worker's error says, on one line, where it is of a GPU's memory or one of those that
    Ray ends on a node whose memory runs low; else None.
    """
    said = str(error)
    if isinstance(error, torch.OutOfMemoryError):
        return OutOfMemory(f"out of GPU memory: {'. '.join(said.split('. ')[1:3]) or said}")
    if isinstance(error, OutOfMemoryError) or _LOW in said:
        return OutOfMemory("a worker was ended as its node ran low on memory")
    return None


def errno_of(error: BaseException | None) -> int | None:
    """The number of the system's error that this one is or came from, through what Ray wraps it
    in.
    """
    while error is not None:
        if isinstance(number := getattr(error, "errno", None), int):
            return number
        context = None if error.__suppress_context__ else error.__context__
        error = carried(error) or error.__cause__ or context
    return None


def no_room(error: BaseException) -> OSError | None:
    """The full disk (or spent quota) that an error came from; None where it came from none."""
    number = errno_of(error)
    return OSError(number, str(error)) if number in NO_ROOM else None


def failure_file(run: RunDirectory) -> Path:
    return run.path / ".failure"


_KINDS = (*_INPUT, OutOfMemory)


def write_failure(run: RunDirectory, error: Exception) -> None:
    """Leave it for the process that drives the run. Where that cannot be written Ray carries it:
    raises bad input as it is, else RunFailed.
    """
    kind = next((kind.__name__ for kind in _KINDS if isinstance(error, kind)), "")
    fields = {"kind": kind, "message": str(error), "errno": errno_of(error)}
    try:
        write_whole(failure_file(run), json.dumps(fields), shared=True)  # every rank may
    except OSError:
        if kind:
            raise error from None
        raise RunFailed(str(error), errno_of(error)) from None


def raise_failure(run: RunDirectory) -> None:
    """Raise what a worker of the run has left, if one has."""
    file = failure_file(run)
    if not file.exists():
        return
    fields = json.loads(file.read_text(encoding="utf-8"))
    file.unlink()
    for kind in _INPUT:
        if fields["kind"] == kind.__name__:
            raise kind(fields["message"])
    failed = OutOfMemory if fields["kind"] == OutOfMemory.__name__ else RunFailed
    raise failed(f"{run.path}: {fields['message']}", fields["errno"])
