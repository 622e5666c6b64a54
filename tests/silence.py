"""How long a command says nothing: its lines with the times at which they came.

By hand: `python tests/silence.py -m flowray.train quickstart train.steps=20` prints the lines, the
first and the longest gap.
"""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import IO


@dataclass(frozen=True)
class Talk:
    """What a command said: (seconds after its start, stream, line), how it ended and after how
    many seconds.
    """

    lines: list[tuple[float, str, str]]
    code: int
    seconds: float

    def of(self, stream: str) -> list[str]:
        """The lines of `stdout` or `stderr`."""
        return [line for _, name, line in self.lines if name == stream]

    @property
    def first(self) -> float:
        """Seconds to the first line on stderr."""
        return next((at for at, name, _ in self.lines if name == "stderr"), self.seconds)

    @property
    def longest(self) -> tuple[float, str]:
        """The longest silence in seconds, and the line before it ('' where that is the start)."""
        times = [0.0, *(at for at, _, _ in self.lines), self.seconds]
        words = ["", *(line for _, _, line in self.lines)]
        return max((b - a, said) for a, b, said in zip(times, times[1:], words, strict=False))


def listen(command: Sequence[str], *, timeout: float = 600, **popen: object) -> Talk:
    """Run a command to its end, both streams into pipes. popen: as subprocess.Popen takes it."""
    began, lines = time.monotonic(), []
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **popen
    )  # type: ignore[call-overload]

    def take(name: str, stream: IO[str]) -> None:
        for line in stream:
            lines.append((time.monotonic() - began, name, line.rstrip("\n")))

    readers = [
        threading.Thread(target=take, args=pair)
        for pair in (("stdout", process.stdout), ("stderr", process.stderr))
    ]
    for reader in readers:
        reader.start()
    try:
        code = process.wait(timeout)
    finally:
        process.kill()
    for reader in readers:
        reader.join()
    return Talk(lines, code, time.monotonic() - began)


if __name__ == "__main__":
    heard = listen([sys.executable, *sys.argv[1:]])
    for at, stream, line in heard.lines:
        print(f"{at:7.1f}  {stream}  {line}")
    print(
        f"exit {heard.code} after {heard.seconds:.1f} s; first line on stderr {heard.first:.1f} s",
        end="; ",
    )
    print("longest silence {:.1f} s after {!r}".format(*heard.longest))
