"""What every command shares: exit codes, the one line for bad input, and what signals and a full
disk come to.
"""

from __future__ import annotations

import os
import signal
import sys
import tempfile
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NoReturn, TextIO, cast

from flowray.config.errors import InputError, Notice
from flowray.config.paths import exists, is_folder, no_such

# 75: stopped by a signal with a checkpoint written (EX_TEMPFAIL)
GOOD, FINDINGS, BAD_INPUT, STOPPED = 0, 1, 2, 75
AGAIN = 0.05  # s after which a signal that was lost is sent again
BROKEN_PIPE = 141  # 128 + the signal, as of what had nothing to keep

Main = Callable[[list[str]], int]


class Ended(KeyboardInterrupt):
    """SIGTERM or SIGHUP: it ends a command as Ctrl-C does, with what is to be cleared up."""

    def __init__(self, number: int):
        super().__init__(number)
        self.number = number


def end(number: int, _: object = None) -> NoReturn:
    """The handler of SIGTERM and SIGHUP. `timeout` sends the signal twice, to the command and to
    its group: the second one cuts nothing off.
    """
    signal.signal(number, lambda *_: None)
    raise Ended(number)


def _send_lost_signals_again(dropped: sys.UnraisableHookArgs) -> None:
    """The hook of errors that Python can raise nowhere: what a signal raises in a destructor or a
    callback of C is dropped, and the command would go on as if nothing had been asked of it.
    """
    error = dropped.exc_value
    if not isinstance(error, KeyboardInterrupt):
        sys.__unraisablehook__(dropped)
        return
    number = error.number if isinstance(error, Ended) else signal.SIGINT
    if number != signal.SIGINT:
        signal.signal(number, end)
    # a moment later: here it would be dropped once more
    threading.Timer(AGAIN, os.kill, (os.getpid(), number)).start()


class _Stderr:
    """stderr of a command, whose work and exit code do not hang on it: what it cannot take any
    more, full or without a reader, is dropped.
    """

    def __init__(self, stream: TextIO):
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except BlockingIOError:  # full for now: a pipe that its reader will empty
            return len(text)
        except OSError:
            _drop(self._stream)
            return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except BlockingIOError:
            pass
        except OSError:
            _drop(self._stream)


def _drop(stream: TextIO) -> None:
    """Have nowhere to go what is written to a stream from now on, by Python's own end too."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, stream.fileno())
    os.close(nowhere)


def _hold_streams() -> None:
    """Have all three streams there, closed ones as /dev/null: a file that took the number of one
    would get what libraries print.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # it gets the lowest number that is free
    if not isinstance(sys.stderr, _Stderr):
        # it is None where it was closed, and print would then take stdout
        stream = sys.stderr or os.fdopen(os.open(os.devnull, os.O_WRONLY), "w")
        sys.stderr = cast(TextIO, _Stderr(stream))


def entry(main: Main, argv: list[str] | None = None) -> NoReturn:
    """Run a command's `main(argv)` and exit.

    Bad input becomes one line on stderr and exit code 2, a signal one line and its usual exit code,
    what cannot be printed one line and exit code 1; a reader who has gone, as `head` goes, gets no
    line. A stderr that takes nothing changes nothing.
    """
    _hold_streams()
    sys.unraisablehook = _send_lost_signals_again
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is signal.SIG_DFL:  # nohup has a hang-up ignored
            signal.signal(number, end)
    try:
        try:
            with _plain_notices():
                code = main(sys.argv[1:] if argv is None else argv)
        except InputError as error:
            print(f"error: {error}", file=sys.stderr)
            code = BAD_INPUT
        # of a parser that has printed its help; of rich, to whom nobody listens any more
        except SystemExit as ended:
            gone = isinstance(ended.__context__, BrokenPipeError)
            code = BROKEN_PIPE if gone else ended.code if isinstance(ended.code, int) else GOOD
        print(end="", flush=True)  # there may be no stdout
    except OSError as error:
        if not _is_unwritable():
            raise
        code = BROKEN_PIPE
        if not isinstance(error, BrokenPipeError):
            print(f"error: the output cannot be written: {error.strerror}", file=sys.stderr)
            code = FINDINGS
    except KeyboardInterrupt as error:
        sent = error.number if isinstance(error, Ended) else signal.SIGINT
        with suppress(OSError):  # the terminal may have hung up
            print("terminated" if sent == signal.SIGTERM else "interrupted", file=sys.stderr)
            print(end="", flush=True)
        os._exit(128 + sent)  # torch's threads, cut off, abort the interpreter's own end
    sys.exit(code)


def _is_unwritable() -> bool:
    """Whether stdout takes nothing more; what is still to be printed, also by the interpreter's
    end, is dropped then.
    """
    try:
        print(flush=True)
    except OSError:
        _drop(sys.stdout)
        return True
    return False


@contextmanager
def _plain_notices() -> Iterator[None]:
    """Within the block a Notice is a line on stderr, without the place in the code."""

    def show(message: Warning | str, category: type[Warning], *place: Any, **more: Any) -> None:
        if issubclass(category, Notice):
            print(f"warning: {message}", file=sys.stderr, flush=True)
        else:
            before(message, category, *place, **more)

    with warnings.catch_warnings():
        before, warnings.showwarning = warnings.showwarning, show
        yield


def refuse_unwritable(file: Path, option: str = "", *, makes_folders: bool = False) -> None:
    """InputError where a command could not write `file` at its end: asked before it begins.

    option: that names it on the command line.
    makes_folders: whether the command makes those that are missing.
    """
    name = f"{option} {file}".strip()
    if is_folder(file):
        raise InputError(f"{name}: is a folder, want a file")
    folder = file.absolute().parent
    while makes_folders and not exists(folder):
        folder = folder.parent
    if not exists(folder):
        raise InputError(f"{name}: {folder}: {no_such(folder)}; make it first")
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise InputError(f"{name}: cannot be written: {error.strerror}") from error
