"""Work done in a process of its own, and its progress shown here: the GPU memory that it takes is
free again after it.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from multiprocessing.connection import Connection
from typing import Any, TypeVar

from flowray.config.progress import Advance, Progress

T = TypeVar("T")
Message = tuple[Any, ...]  # the name of a call of Progress and what it was given


def apart(work: Callable[[Progress], T], progress: Progress) -> T:
    """Do `work`, which can be pickled, in a fresh process and show its progress here.

    Returns what it returns and raises what it raises; RuntimeError where the process dies.
    """
    # a fork would share the parent's threads and CUDA
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    child = context.Process(target=_work_in_child, args=(work, theirs), daemon=True)
    child.start()
    theirs.close()
    try:
        with ShownProgress(progress) as shown:
            while True:
                try:
                    message = ours.recv()
                except EOFError:
                    child.join()
                    code = child.exitcode
                    raise RuntimeError(f"a process died, exit code {code}") from None
                if message[0] == "failed":
                    raise message[1]
                if message[0] == "done":
                    return message[1]
                shown(message)
    finally:
        child.terminate()
        child.join()


class ShownProgress:
    """Shows what a `SentProgress` sends. A context manager: its end closes what is open."""

    def __init__(self, progress: Progress):
        self._progress, self._open = progress, list[_OpenTask]()

    def __call__(self, message: Message) -> None:
        match message:
            case "say", text:
                self._progress.say(text)
            case "begin", what, total, done:
                self._open.append(_OpenTask(self._progress, what, total, done))
            case "advance", depth, count, note:
                self._open[depth].advance(count, note)
            case ("end",):
                self._open.pop().close()

    def begin_anew(self) -> None:
        """The work starts again: what it has counted so far is taken back."""
        while self._open:
            task = self._open.pop()
            task.advance(-task.counted, "")
            task.close()

    def __enter__(self) -> ShownProgress:
        return self

    def __exit__(self, *_: object) -> None:
        while self._open:
            self._open.pop().close()


class _OpenTask:
    def __init__(self, progress: Progress, what: str, total: int | None, done: int):
        self._closing, self.counted = ExitStack(), 0
        self._advance = self._closing.enter_context(progress.task(what, total, done))
        self.close = self._closing.close

    def advance(self, count: int, note: str) -> None:
        self.counted += count
        self._advance(count, note)


def _work_in_child(work: Callable[[Progress], object], send_to: Connection) -> None:
    # the end of `apart`: nothing half written stays
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with contextlib.redirect_stdout(sys.stderr), contextlib.suppress(KeyboardInterrupt):
        try:
            message = ("done", work(SentProgress(send_to.send)))
        except BrokenPipeError:
            return  # nobody waits for it any more
        except Exception as error:
            message = ("failed", error)
        send_to.send(message)


class SentProgress:
    """Progress whose calls are sent to the process that shows them."""

    def __init__(self, send: Callable[[Message], None]):
        self._send, self._depth = send, 0

    def say(self, text: str) -> None:
        self._send(("say", text))

    @contextmanager
    def task(self, what: str, total: int | None = None, done: int = 0) -> Iterator[Advance]:
        depth = self._depth
        self._send(("begin", what, total, done))
        self._depth += 1

        def advance(count: int = 1, note: str = "") -> None:
            self._send(("advance", depth, count, note))

        try:
            yield advance
        finally:
            self._depth -= 1
            self._send(("end",))
