"""What every command shares: exit codes and the one line for bad input."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import NoReturn

from flowray.config.errors import InputError

GOOD, FINDINGS, BAD_INPUT, STOPPED = 0, 1, 2, 75  # 75: stopped by a signal with a checkpoint written (EX_TEMPFAIL)
INTERRUPTED = 130  # Ctrl-C before there was anything to keep

Main = Callable[[list[str]], int]


def entry(main: Main, argv: list[str] | None = None) -> NoReturn:
    """Run a command's `main(argv)` and exit; bad input becomes one line on stderr and exit code 2."""
    try:
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
