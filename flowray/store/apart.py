"""Work done in a process of its own, which leaves nothing behind in this one: no memory of a
GPU.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from multiprocessing.connection import Connection

from flowray.config.progress import Advance, Progress


def apart(work: Callable[[Progress], object], progress: Progress) -> None:
    """Do `work`, which can be pickled, in a fresh process; what it tells its progress shows here.

    Raises what it raises; RuntimeError where the process dies.
    """
    # a fork would share the parent's threads and CUDA
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    child = context.Process(target=_do, args=(work, theirs), daemon=True)
    child.start()
    theirs.close()
    try:
        failure = _replay(ours, progress)
    except EOFError:
        child.join()
        raise RuntimeError(f"a process died, exit code {child.exitcode}") from None
    finally:
        child.terminate()
        child.join()
    if failure is not None:
        raise failure


def _replay(told: Connection, progress: Progress) -> Exception | None:
    """Show what the other process tells until it is done; what it raised. EOFError: it has died."""
    tasks: list[tuple[ExitStack, Advance]] = []
    with ExitStack() as left_open:
        while True:
            match told.recv():
                case "say", text:
                    progress.say(text)
                case "begin", what, total, done:
                    closing = left_open.enter_context(ExitStack())
                    tasks.append((closing, closing.enter_context(progress.task(what, total, done))))
                case "advance", depth, count, note:
                    tasks[depth][1](count, note)
                case ("end",):
                    tasks.pop()[0].close()
                case "done", failure:
                    return failure


def _do(work: Callable[[Progress], object], tell: Connection) -> None:
    failure = None
    # the end of `apart`: nothing half written stays
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with contextlib.redirect_stdout(sys.stderr), contextlib.suppress(KeyboardInterrupt):
        try:
            work(_Told(tell))
        except Exception as error:
            failure = error
        tell.send(("done", failure))


class _Told:
    """Progress that is told to another process."""

    def __init__(self, tell: Connection):
        self._tell, self._depth = tell, 0

    def say(self, text: str) -> None:
        self._tell.send(("say", text))

    @contextmanager
    def task(self, what: str, total: int | None = None, done: int = 0) -> Iterator[Advance]:
        depth = self._depth
        self._tell.send(("begin", what, total, done))
        self._depth += 1

        def advance(count: int = 1, note: str = "") -> None:
            self._tell.send(("advance", depth, count, note))

        try:
            yield advance
        finally:
            self._depth -= 1
            self._tell.send(("end",))
