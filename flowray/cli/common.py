"""What every command shares: exit codes and the one line for bad input."""

from __future__ import annotations

import os
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

from flowray.config.errors import InputError, Notice
from flowray.config.paths import exists, is_folder, no_such

# 75: stopped by a signal with a checkpoint written (EX_TEMPFAIL)
GOOD, FINDINGS, BAD_INPUT, STOPPED = 0, 1, 2, 75
INTERRUPTED = 130  # Ctrl-C before there was anything to keep

Main = Callable[[list[str]], int]


def entry(main: Main, argv: list[str] | None = None) -> NoReturn:
    """Run a command's `main(argv)` and exit; bad input becomes one line on stderr and exit code
    2.
    """
    try:
        with _plain_notices():
            code = main(sys.argv[1:] if argv is None else argv)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        code = BAD_INPUT
    except BrokenPipeError:
        code = GOOD
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(INTERRUPTED)  # torch's threads, cut off, abort the interpreter's own end
    sys.exit(code)


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
