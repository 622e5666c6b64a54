"""Work done in processes of its own: the GPU memory that it takes is free again after it."""

from __future__ import annotations

import contextlib
import multiprocessing
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from multiprocessing.connection import Connection, wait
from typing import Any, TypeVar

from flowray.config.progress import Advance, Progress

T = TypeVar("T")


def apart(work: Callable[[Progress], T], progress: Progress) -> T:
    """Do `work`, which can be pickled, in a fresh process and show its progress here.

    Returns what it returns and raises what it raises; RuntimeError where the process dies.
    """
    return together([work], progress)[0]


def together(works: Sequence[Callable[[Progress], T]], progress: Progress) -> list[T]:
    """`apart` for several at once, a process each. Where one fails, the others are ended."""
    # a fork would share the parent's threads and CUDA
    context = multiprocessing.get_context("spawn")
    children, found = list[Any](), dict[int, T]()
    shown = dict[Connection, _Shown]()
    with ExitStack() as closing:
        for work in works:
            ours, theirs = context.Pipe(duplex=False)
            child = context.Process(target=_work_in_child, args=(work, theirs), daemon=True)
            child.start()
            closing.callback(child.join)
            closing.callback(child.terminate)
            theirs.close()
            shown[ours] = _Shown(closing.enter_context(ExitStack()), progress)
            children.append(child)
        numbers = {connection: number for number, connection in enumerate(shown)}
        while len(found) < len(works):
            for ready in wait(list(numbers)):
                assert isinstance(ready, Connection)
                number = numbers[ready]
                try:
                    message = ready.recv()
                except EOFError:
                    children[number].join()
                    code = children[number].exitcode
                    raise RuntimeError(f"a process died, exit code {code}") from None
                if message[0] == "failed":
                    raise message[1]
                if message[0] == "done":
                    found[number] = message[1]
                    del numbers[ready]
                else:
                    shown[ready].show(message)
    return [found[number] for number in range(len(works))]


class _Shown:
    """The progress of another process."""

    def __init__(self, left_open: ExitStack, progress: Progress):
        self._left_open, self._progress = left_open, progress
        self._tasks: list[tuple[ExitStack, Advance]] = []

    def show(self, message: tuple[Any, ...]) -> None:
        match message:
            case "say", text:
                self._progress.say(text)
            case "begin", what, total, done:
                closing = self._left_open.enter_context(ExitStack())
                advance = closing.enter_context(self._progress.task(what, total, done))
                self._tasks.append((closing, advance))
            case "advance", depth, count, note:
                self._tasks[depth][1](count, note)
            case ("end",):
                self._tasks.pop()[0].close()


def _work_in_child(work: Callable[[Progress], object], send_to: Connection) -> None:
    # the end of `apart`: nothing half written stays
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with contextlib.redirect_stdout(sys.stderr), contextlib.suppress(KeyboardInterrupt):
        try:
            message = ("done", work(_SentProgress(send_to)))
        except BrokenPipeError:
            return  # nobody waits for it any more
        except Exception as error:
            message = ("failed", error)
        send_to.send(message)


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
