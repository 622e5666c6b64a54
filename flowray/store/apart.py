"""Work done in a process of its own: the GPU memory that it takes is free again after it."""

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
    """Do `work`, which can be pickled, in a fresh process and show its progress here.

    Raises what it raises; RuntimeError where the process dies.
    """
    # a fork would share the parent's threads and CUDA
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    child = context.Process(target=_work_in_child, args=(work, theirs), daemon=True)
    child.start()
    theirs.close()
    try:
        failure = _show_messages(ours, progress)
    except EOFError:
        child.join()
        raise RuntimeError(f"a process died, exit code {child.exitcode}") from None
    finally:
        child.terminate()
        child.join()
    if failure is not None:
        raise failure


def _show_messages(messages: Connection, progress: Progress) -> Exception | None:
    """Show the progress of the other process until it is done; returns what it raised. EOFError:
    it has died.
    """
    tasks: list[tuple[ExitStack, Advance]] = []
    with ExitStack() as left_open:
        while True:
            match messages.recv():
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


def _work_in_child(work: Callable[[Progress], object], send_to: Connection) -> None:
    failure = None
    # the end of `apart`: nothing half written stays
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with contextlib.redirect_stdout(sys.stderr), contextlib.suppress(KeyboardInterrupt):
        try:
            work(_SentProgress(send_to))
        except Exception as error:
            failure = error
        send_to.send(("done", failure))


class _SentProgress:
    """Progress whose calls are sent to the process that shows them."""

    def __init__(self, send_to: Connection):
        self._connection, self._depth = send_to, 0

    def say(self, text: str) -> None:
        self._connection.send(("say", text))

    @contextmanager
    def task(self, what: str, total: int | None = None, done: int = 0) -> Iterator[Advance]:
        depth = self._depth
        self._connection.send(("begin", what, total, done))
        self._depth += 1

        def advance(count: int = 1, note: str = "") -> None:
            self._connection.send(("advance", depth, count, note))

        try:
            yield advance
        finally:
            self._depth -= 1
            self._connection.send(("end",))
