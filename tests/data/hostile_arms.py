"""Reads sets that are hostile or odd by flowray, or by stock webdataset, each in a process of its
own with bounded memory and time, and says what became of them, what ran and what was touched.

`python hostile_arms.py flowray|pack|stock CASES.json`: a list of [folder, data.shards] in, a list
of what was found out, on stdout. The first one has to be good: it has everything imported.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

MEMORY = 1536 << 20  # bytes that a set may take beyond what is imported
SECONDS = {"flowray": 60, "pack": 60, "stock": 60}  # that it may take
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
_RUNS = ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "pickle.find_class")
_TOUCHES = ("os.symlink", "os.link", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.chmod")
_LIBRARIES = [os.path.realpath(place) for place in (sys.prefix, sys.base_prefix, "/proc", "/usr")]
Found = dict[str, Any]
Arm = Callable[[str], Found]


class Watch:
    """What a process does beside computing, by Python's audit events."""

    def __init__(self, folder: str) -> None:
        self.folder, self.ran, self.escaped = os.path.realpath(folder), list[str](), list[str]()
        self.code = [os.path.realpath(place) for place in sys.path if place] + _LIBRARIES

    def __call__(self, event: str, args: tuple[Any, ...]) -> None:
        if event in _RUNS:
            self.ran.append(f"{event} {args[:2]}")
        elif event.startswith("socket.") and event in ("socket.connect", "socket.getaddrinfo"):
            self.escaped.append(f"{event} {args[1:]}")
        elif event == "open" and isinstance(args[0], str | bytes):
            name, flags = os.fsdecode(args[0]), int(args[2] or 0)
            self._opened(name, args[1], flags, followed=not flags & os.O_NOFOLLOW)
        elif event in _TOUCHES:
            for name in args[: 2 if event in ("os.rename", "os.link") else 1]:
                self._opened(os.fsdecode(name), "w", 0, followed=False)

    def _opened(self, name: str, mode: str | None, flags: int, followed: bool) -> None:
        where, last = os.path.split(name)
        path = os.path.realpath(name if followed else where)
        path = path if followed else os.path.join(path, last)
        inside = path == self.folder or path.startswith(self.folder + "/")
        written = bool(flags & _WRITES) or any(letter in (mode or "") for letter in "wax+")
        library = not written and any(path.startswith(place) for place in self.code)
        if not inside and not library and path != "/dev/null":
            self.escaped.append(f"{'wrote' if written else 'read'} {path}")


def by_flowray(spec: str) -> Found:
    """Found and read as training does: captions and picture of every sample, every array, and
    `check`.
    """
    import numpy as np

    from flowray.config.errors import InputError
    from flowray.data.check import check_shards
    from flowray.data.decode import picture_of
    from flowray.data.pictures import decode_image
    from flowray.data.reader import ShardReader
    from flowray.data.shards import find_shards

    found: Found = {"samples": [], "refused": "", "checked": []}
    try:
        reader = ShardReader(find_shards(spec))
        for i in range(len(reader)):
            one: Found = {"key": reader.key(i), "label": reader.label(i)}
            has = reader.extensions(i)
            try:
                if picture_of(has) is not None:  # else it is bad for that cause
                    one["captions"] = reader.captions(i)
                picture = decode_image(reader, i)
                one["size"] = picture.shape[:2]
                if picture.size < 1 << 16:
                    one["pixels"] = picture.tolist()
                del picture
            except InputError as error:
                one["bad"] = str(error)
            if fault := reader.fault(i):
                one["cause"] = fault.cause
            for extension in has:
                if extension.endswith("npy"):
                    try:
                        reader.gather(np.array([i]), extension)
                    except InputError as error:
                        one["npy"] = str(error)
            found["samples"].append(one)
        reader.fingerprint()
    except InputError as error:
        found["refused"] = str(error)
    try:
        problems = check_shards(spec).problems
        found["checked"] = [f"{p.severity} {p.sample!r}: {p.what}" for p in problems]
    except InputError as error:
        found["checked"] = [f"refused: {error}"]
    return found


def by_stock(spec: str) -> Found:
    """`WebDataset(spec).decode("pilrgb")`, as its documentation has it."""
    import numpy as np
    import webdataset
    from PIL import Image

    found: Found = {"samples": [], "error": ""}
    path = Path(spec)
    urls = sorted(map(str, path.glob("*.tar"))) if path.is_dir() else spec
    try:
        for sample in webdataset.WebDataset(urls, shardshuffle=False).decode("pilrgb"):
            one: Found = {"key": sample["__key__"]}
            pictures = [v for v in sample.values() if isinstance(v, Image.Image)]
            if pictures:
                one["size"] = pictures[0].size[::-1]
                if pictures[0].width * pictures[0].height < 1 << 14:
                    one["pixels"] = np.asarray(pictures[0]).tolist()
            if isinstance(sample.get("txt"), str):
                one["text"] = sample["txt"][:200]
            found["samples"].append(one)
    except Exception as error:  # whatever it is, it ended the reading
        found["error"] = type(error).__name__
        found["memory"] = isinstance(error, MemoryError) or isinstance(error.__cause__, MemoryError)
    return found


def by_pack(place: str) -> Found:
    """`pack` of the folder `in`, to `out`."""
    from flowray.config.errors import InputError
    from flowray.data.pack import pack_folder

    try:
        packed = pack_folder(Path(place) / "in", Path(place) / "out", None)
        return {"packed": sum(packed.samples.values()), "refused": ""}
    except InputError as error:
        return {"packed": 0, "refused": str(error)}


def watched(arm: Arm, folder: str, spec: str, out: int) -> None:
    """The arm in this process, a child, which ends with it; what it found goes to `out`."""
    watch = Watch(folder)
    now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (now + MEMORY, now + MEMORY))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    sys.addaudithook(watch)
    try:
        found = arm(spec)
    except Exception as error:  # a traceback, which no input may cause
        found = {"raised": f"{type(error).__name__}: {str(error)[:200]}"}
    found |= {"ran": list(watch.ran), "escaped": list(watch.escaped)}
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    found["peak"] = peak << 10
    with open(out, "w", encoding="utf-8") as file:
        json.dump(found, file)
    os._exit(0)


def aside(arm: Arm, seconds: int, folder: str, spec: str) -> Found:
    """`watched` in a child of this process."""
    warnings.simplefilter("ignore")
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        os.close(reading)
        os.chdir(folder)
        signal.alarm(seconds)
        watched(arm, folder, spec, writing)
    os.close(writing)
    with open(reading, encoding="utf-8") as file:
        told = file.read()
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        hung = os.WTERMSIG(status) == signal.SIGALRM
        return {"raised": "hangs" if hung else f"signal {os.WTERMSIG(status)}"}
    return json.loads(told)


def main(arm_name: str, cases: str) -> None:
    arm = {"flowray": by_flowray, "stock": by_stock, "pack": by_pack}[arm_name]
    silent = os.open(os.devnull, os.O_WRONLY)
    told = os.dup(1)
    os.dup2(silent, 1)
    # everything is imported before anything is counted
    first, *rest = json.loads(Path(cases).read_text())
    arm(first[1])
    found = [aside(arm, SECONDS[arm_name], *case) for case in rest]
    with open(told, "w", encoding="utf-8") as file:
        json.dump(found, file)


if __name__ == "__main__":
    main(*sys.argv[1:])
