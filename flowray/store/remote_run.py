"""A run's checkpoints in a bucket, for the day on which its disk is gone.

`CHECKPOINT_URL/NAME/` has the files of a run directory: `checkpoints/step_000500/` as on disk, its
`state.json` sent last, so that a checkpoint is whole there or absent, and beside it the rows and
the recipe as of the newest one.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Collection
from contextlib import suppress
from operator import itemgetter
from pathlib import Path

from flowray.config.errors import InputError
from flowray.config.recipe import Recipe
from flowray.config.rows import parse_rows
from flowray.config.writing import write_whole
from flowray.data.folders import sync
from flowray.data.remote_place import RemotePlace
from flowray.store.best import BEST, best_step
from flowray.store.checkpoint import DAMAGED, STATE, damage_of, put_whole, search, step_of, warn
from flowray.store.remote_lock import RemoteLock
from flowray.store.run import RunDirectory

_STEP = re.compile(r"step_(\d{6,18})")
_FILE = re.compile(r"[a-z]+(-\d+-of-\d+)?\.safetensors")


class RemoteRun:
    """`run`'s place below `url`. Every method asks again where the server fails; InputError, one
    line, where it never answers or forbids it.

    lock: of that place, held by whoever sends to it; patience_s: how long it waits for another's.
    """

    def __init__(self, url: str, run: RunDirectory, patience_s: float = 0.0):
        self._place, self._run = RemotePlace(url), run
        self._root = f"{self._place.name(url)}/{run.path.name}"
        self.url = self._place.url(self._root)
        self.lock = RemoteLock(
            self._place, f"{self._root}/.lock", patience_s, str(run.path.absolute())
        )

    @classmethod
    def of(cls, recipe: Recipe, run: RunDirectory, patience_s: float = 0.0) -> RemoteRun | None:
        """That of a recipe; None where it names no bucket."""
        url = recipe.train.checkpoint_url
        return None if url is None else cls(url, run, patience_s)

    def require_writable(self) -> None:
        """InputError where nothing can be written there."""
        name = f"{self._root}/.try"
        try:
            self._place.write(name, b"")
        except FileNotFoundError:
            raise InputError(f"train.checkpoint_url: {self.url}: there is no such bucket") from None
        self._place.remove([name])

    def steps(self) -> dict[int, bool]:
        """The steps that something is there of, in their order, and whether all of it is."""
        found = {}
        for row in self._place.ls(f"{self._root}/checkpoints"):
            if named := _STEP.fullmatch(row["name"].rstrip("/").rpartition("/")[2]):
                found[int(named[1])] = STATE in self._files(int(named[1]))
        return dict(sorted(found.items()))

    def send(self, checkpoint: Path) -> None:
        """Send a checkpoint of the run, and its rows before it counts; what is there already is not
        sent again. FileNotFoundError where the bucket, or the checkpoint, is gone.
        """
        self.lock.require()
        state, folder = (checkpoint / STATE).read_bytes(), self._folder(step_of(checkpoint))
        if (there := self._place.read(f"{folder}/{STATE}")) != state:
            # of another content: until all of that is there, it is none
            self._place.remove([f"{folder}/{STATE}"] if there is not None else [])
            for name in json.loads(state)["files"]:
                self._place.put(checkpoint / name, f"{folder}/{name}")
            self.send_rows()
            self._place.write(f"{folder}/{STATE}", state)
            self._place.remove([f"{folder}/{DAMAGED}"])

    def send_rows(self) -> None:
        """Send the small files beside the checkpoints as they are now."""
        self.lock.require()
        for file, name in self._beside().items():
            with suppress(FileNotFoundError):
                self._place.write(name, file.read_bytes())

    def has(self, step: int) -> bool:
        """Whether the run's checkpoint of a step is there, and the probe rows up to the last."""
        state = (self._run.checkpoint(step) / STATE).read_bytes()
        if self._place.read(f"{self._folder(step)}/{STATE}") != state:
            return False
        rows = self._run.probes
        return not rows.exists() or self._place.read(self._beside()[rows]) == rows.read_bytes()

    def rotate(self, step: int, keep: int, spare: Collection[int]) -> None:
        """Of the checkpoints up to `step` keep the newest `keep` and those of the steps `spare`;
        what is older than those goes, with what was damaged or cut off.
        """
        self.lock.require()
        there = self.steps()
        good = [each for each, whole in there.items() if whole and each <= step]
        if len(good) < keep:
            return
        for old in there:
            if old < good[-keep] and old not in spare:
                self._place.remove(
                    f"{self._folder(old)}/{name}"
                    for name in sorted(self._files(old), key=lambda name: name != STATE)
                )

    def newest(self, say: Callable[[str], None] = warn) -> Path | None:
        """`newest_checkpoint` of the run, for whoever holds it; one that is newer and intact in the
        bucket is fetched, with what else the run lacks. None where there is none on either side.

        InputError: all that there are are damaged; one in the bucket is newer and cannot be read;
        or the bucket does not answer and the run has none itself.
        """
        own, damaged = search(self._run.checkpoints, say, set_aside=True)
        wrong = [f"{path}: {what}" for path, what in damaged.items()]
        try:
            there = self.steps()
        except InputError as error:
            if own is None:
                raise
            say(f"warning: {error}; the run goes on from {own}")
            return own
        for step in sorted(there, reverse=True):
            if own is not None and step <= step_of(own):
                break
            if there[step]:
                self._complete(there, step, say)
                fetched = self._fetch(step, say)
                if isinstance(fetched, Path):
                    return fetched
                wrong.append(f"{self._place.url(self._folder(step))}: {fetched}")
            elif DAMAGED in self._files(step):
                wrong.append(f"{self._place.url(self._folder(step))}: was set aside as damaged")
        if own is None and wrong:
            raise InputError(
                f"{self._run.checkpoints} and {self.url}: no checkpoint is intact ({len(wrong)}"
                f" damaged), such as {wrong[0]}; put a copy back, or remove both to begin at step 0"
            )
        return own

    def _fetch(self, step: int, say: Callable[[str], None]) -> Path | str:
        """A checkpoint, put among those of the run; or what is damaged of it, said and set aside
        there. InputError where it cannot be read, or written here.
        """
        folder, partial = self._folder(step), self._run.checkpoints / f".partial_{step:06d}"
        try:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir()
            state = self._place.read(f"{folder}/{STATE}") or b""
            (partial / STATE).write_bytes(state)
            for name in _files_of(state):
                if self._place.get(f"{folder}/{name}", partial / name):
                    sync(partial / name)
            if (wrong := damage_of(partial)) is None:
                return put_whole(partial, self._run.checkpoint(step))
        except OSError as error:
            raise InputError(f"{partial}: cannot be written: {error.strerror or error}") from error
        finally:
            shutil.rmtree(partial, ignore_errors=True)
        say(f"warning: {self._place.url(folder)} is damaged and passed over: {wrong}")
        with suppress(InputError):  # it was before, or is met again at the next start
            self._place.write(f"{folder}/{DAMAGED}", state)
            self._place.remove([f"{folder}/{STATE}"])
        return wrong

    def _complete(self, there: dict[int, bool], step: int, say: Callable[[str], None]) -> None:
        """Fetch what belongs to the checkpoint of `step`, newer than the run's own: rows, recipe
        and the best one. Before that one: it would not be fetched again after a kill, and these
        would stay away.

        The rows there are of all steps up to it; the run's own lack those that it did elsewhere.
        """
        for file, name in self._beside().items():
            content = self._place.read(name)
            if content is not None and file == self._run.times:
                content = _merged(content, file)
            if content is not None:
                write_whole(file, content)
        best = best_step(self._run)
        if best is None or best == step or self._run.checkpoint(best).exists():
            return
        if there.get(best):
            self._fetch(best, say)

    def _beside(self) -> dict[Path, str]:
        run = self._run
        rows = (run.metrics, run.probes, run.skipped, run.findings, run.gaps, run.times)
        files = (run.config, *rows)
        beside = {file: f"{self._root}/{file.name}" for file in files}
        return beside | {run.checkpoints / BEST: f"{self._root}/checkpoints/{BEST}"}

    def _folder(self, step: int) -> str:
        return f"{self._root}/checkpoints/step_{step:06d}"

    def _files(self, step: int) -> list[str]:
        return [row["name"].rpartition("/")[2] for row in self._place.ls(self._folder(step))]


def _files_of(state: bytes) -> list[str]:
    """The names of a checkpoint's files, by its state; none of one that is damaged."""
    try:
        files = json.loads(state)["files"]
    except (ValueError, KeyError, TypeError):
        return []
    return [name for name in files if _FILE.fullmatch(name)]


def is_sent(recipe: Recipe, run: RunDirectory, step: int) -> bool:
    """Whether a bucket that the recipe names has the run's checkpoint of a step, and its probe
    rows. InputError where it does not answer.
    """
    remote = RemoteRun.of(recipe, run)
    return remote is None or remote.has(step)


def _merged(there: bytes, file: Path) -> bytes:
    """times.jsonl of the bucket and of the disk, in the order of their instants: of the starts that
    it tells of some ran here and some elsewhere, and none is dropped.
    """
    lines = [line for line in there.splitlines() if line]
    if file.exists():
        known = set(lines)
        lines += [line for line in file.read_bytes().splitlines() if line not in known]
    rows = [
        (float(row[0].get("at", 0.0)), line)
        for line in lines
        if (row := parse_rows(line.decode(errors="replace"))[0])  # a torn one is none
    ]
    return b"".join(line + b"\n" for _, line in sorted(rows, key=itemgetter(0)))
