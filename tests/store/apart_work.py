"""Work for another process, in a module that it imports in no time."""

from __future__ import annotations

import os
import time
from pathlib import Path

from flowray.config.errors import InputError
from flowray.config.progress import Progress
from flowray.data.shards import whole_folder


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


def wait(folder: Path, progress: Progress) -> None:
    """Half write a folder, say so, and go on for ever."""
    with whole_folder(folder) as partial:
        (partial / "half").write_text("")
        progress.say("half")
        time.sleep(600)
