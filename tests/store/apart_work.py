"""Work for another process, in a module that it imports in no time."""

from __future__ import annotations

import os
from pathlib import Path

from flowray.config.errors import InputError
from flowray.config.progress import Progress


def count(place: Path, progress: Progress) -> None:
    with progress.task("outer", 2) as outer, progress.task("inner", 3) as inner:
        inner(3)
        outer(2, "note")
    progress.say("a remark")
    print("not on stdout")
    place.write_text(str(os.getpid()))


def refuse(progress: Progress) -> None:
    with progress.task("looking"):
        raise InputError("data.shards: bad")


def die(progress: Progress) -> None:
    os._exit(9)
