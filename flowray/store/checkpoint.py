"""Checkpoints: safetensors and JSON, no pickle, whole or absent.

`checkpoints/step_000500/` holds `model.safetensors` (trainable weights; frozen ones are named by
the recipe), `ema.safetensors`, `optim.safetensors`, `moving.safetensors` where a loss keeps a
running state, and `state.json` (step, seed and batch sizes, which are all of the data cursor and
the RNG, since every draw is a function of them; what the frozen models' weights were, see
frozen.py; and each file's size and CRC-32).

Several ranks write `model-00001-of-00004.safetensors` and so on, one file of each group a rank: of
a tensor that is in one of the files, all of it; of one that is in several, rows, which follow each
other in the order of the files. So what is read is the same however many wrote it.

The folder is renamed into place when complete. Damaged (another content) and unreadable (the
storage does not answer) are different things: the first is passed over aloud, the second ends a
start.
"""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import sys
import time
import uuid
import zlib
from collections.abc import Callable, Collection
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar, cast

from flowray.config.errors import InputError
from flowray.data.folders import put_in_place, sync
from flowray.store.tensorfile import Take, read_tensors, whole, write_tensors

if TYPE_CHECKING:  # looking for a checkpoint takes none of the seconds that torch takes to import
    from torch import Tensor

    Tensors = dict[str, Tensor]

T = TypeVar("T")

_NAME = re.compile(r"step_(\d+)")
STATE = "state.json"  # without it a folder is no checkpoint
DAMAGED = "damaged.json"  # what STATE is called of one that was found damaged
PAUSES_S = (0.5, 1.0, 2.0, 4.0)  # between tries to read


class Writers(Protocol):
    """Those who write a checkpoint together, each a share of it, and who meet for that. The first
    one, of rank 0, puts it in place.
    """

    @property
    def rank(self) -> int: ...

    @property
    def world(self) -> int: ...

    def gathered(self, value: T) -> list[T]:
        """Every rank's value, in the order of ranks; all have to call it."""


def save_checkpoint(
    folder: Path,
    step: int,
    groups: dict[str, Tensors],
    state: dict[str, Any],
    keep: int,
    spare: Collection[int] = (),
    writers: Writers | None = None,
) -> Path:
    """Write `folder/step_XXXXXX` atomically, then drop all but the newest `keep` of those up to it
    and those of the steps `spare`.

    writers: each calls it, `groups` being its share; None: alone. OSError, on all of them, leaves
    older checkpoints untouched.
    """
    final, first = folder / f"step_{step:06d}", writers is None or writers.rank == 0
    named = _together(writers, lambda: _begun(folder, step) if first else folder)
    partial = folder / named[0].name
    try:
        shares = _together(writers, lambda: _written(partial, groups, writers))
        files = {name: told for share in shares for name, told in share.items()}
        kept = {**state, "step": step, "files": files}
        _together(writers, lambda: _sealed(partial, final, kept) if first else final)
    except OSError:
        if first:
            shutil.rmtree(partial, ignore_errors=True)
        raise
    if first:
        with suppress(OSError):  # the next one rotates again
            rotate(folder, step, keep, spare)
    return final


def _together(writers: Writers | None, work: Callable[[], T]) -> list[T]:
    """What the work of each makes; OSError on all of them where that of one fails."""
    if writers is None or writers.world == 1:
        return [work()]
    done: T | None = None
    failed: OSError | None = None
    try:
        done = work()
    except OSError as error:
        failed = error
    made = []
    for rank, (theirs, wrong) in enumerate(writers.gathered((done, failed))):
        if wrong is not None:
            raise OSError(wrong.errno, f"{wrong.strerror or wrong} (rank {rank})")
        made.append(cast(T, theirs))
    return made


def _begun(folder: Path, step: int) -> Path:
    """A new folder to write a checkpoint into. Its name is not used again: a rank that was cut off
    from the others may still write into the one before.
    """
    for left in folder.glob(".partial_*"):  # what killed writers left; a run has one lead
        shutil.rmtree(left, ignore_errors=True)
    partial = folder / f".partial_{step:06d}_{uuid.uuid4().hex[:8]}"
    partial.mkdir(parents=True)
    return partial


def _written(
    partial: Path, groups: dict[str, Tensors], writers: Writers | None
) -> dict[str, dict[str, int]]:
    """Write a share; what `write_tensors` tells of its files, by their names."""
    of = ""
    if writers and writers.world > 1:
        of = f"-{writers.rank + 1:05d}-of-{writers.world:05d}"
    return {
        (file := f"{name}{of}.safetensors"): write_tensors(partial / file, tensors)
        for name, tensors in groups.items()
    }


def _sealed(partial: Path, final: Path, state: dict[str, Any]) -> Path:
    """Have a checkpoint of which all tensors are on disk in its place."""
    (partial / STATE).write_text(json.dumps(state))
    if not is_valid(partial):  # a mount that keeps lists of files for a while
        raise OSError(errno.ESTALE, "what other ranks wrote is not seen here")
    return put_whole(partial, final)


def put_whole(partial: Path, final: Path) -> Path:
    """Have a checkpoint whose tensors are on disk in its place, `final`, on disk too."""
    for place in (partial / STATE, partial):
        sync(place)
    _remove(final)
    put_in_place(partial, final, last=STATE)
    sync(final.parent)
    return final


def rotate(folder: Path, step: int, keep: int, spare: Collection[int]) -> None:
    """Of the checkpoints up to `step`, which is good, keep the newest `keep` and those of the steps
    `spare`, and of the damaged ones those that are not older than the newest.
    """
    good = [each for each in list_checkpoints(folder) if step_of(each) <= step]
    if len(good) <= keep:  # or the storage does not answer
        return
    for old in good[:-keep]:
        if step_of(old) not in spare:
            _remove(old)
    for old in _all(folder):
        if step_of(old) < step_of(good[-keep]) and (old / DAMAGED).exists():
            _remove(old)


def _remove(checkpoint: Path) -> None:
    """What is left of it by a kill on the way is no checkpoint, and not a damaged one."""
    for name in (STATE, DAMAGED):
        with suppress(OSError):
            (checkpoint / name).unlink(missing_ok=True)
    shutil.rmtree(checkpoint, ignore_errors=True)


def _crc32(path: Path) -> int:
    crc = 0
    with path.open("rb") as file:
        while block := file.read(2**22):
            crc = zlib.crc32(block, crc)
    return crc


def is_valid(checkpoint: Path) -> bool:
    """Whether every file is there at the size it was written with."""
    try:
        files = json.loads((checkpoint / STATE).read_text())["files"]
        return all(
            (checkpoint / name).stat().st_size == kept["size"] for name, kept in files.items()
        )
    except (OSError, ValueError, KeyError, TypeError):
        return False


def step_of(checkpoint: Path) -> int:
    """The step that its name says."""
    return int(checkpoint.name.removeprefix("step_"))


def list_checkpoints(folder: Path) -> list[Path]:
    """Valid checkpoints, oldest first."""
    return list(filter(is_valid, _all(folder)))


def _all(folder: Path) -> list[Path]:
    """Whatever has a checkpoint's name, whole or not, oldest first."""
    return sorted((p for p in folder.glob("step_*") if _NAME.fullmatch(p.name)), key=step_of)


def warn(text: str) -> None:
    """To stderr, for who is not told otherwise."""
    print(text, file=sys.stderr)


def newest_checkpoint(
    folder: Path, say: Callable[[str], None] = warn, *, set_aside: bool = False
) -> Path | None:
    """The newest intact checkpoint of a `checkpoints/` folder; reads every byte of it. None where
    there is none at all.

    say: hears of each damaged one that is passed over. set_aside: these are not counted any more,
    for whoever holds the run. InputError, one line: all that there are are damaged, and to begin
    anew is the user's to say; or one could not be read, which says nothing of what it holds.
    """
    found, damaged = search(folder, say, set_aside=set_aside)
    if found is None and damaged:
        newest, wrong = next(iter(damaged.items()))
        raise InputError(
            f"{folder}: no checkpoint in it is intact ({len(damaged)} damaged); of the newest,"
            f" {newest.name}, {wrong}; put a copy back, or remove {folder} to begin at step 0"
        )
    return found


def search(
    folder: Path, say: Callable[[str], None] = warn, *, set_aside: bool = False
) -> tuple[Path | None, dict[Path, str]]:
    """The newest intact checkpoint, and what is damaged of each newer one; as `newest_checkpoint`,
    but for those of which all are damaged, which are set aside by no one.
    """
    damaged: dict[Path, str] = {}
    for checkpoint in reversed(_all(folder)):
        wrong = _patiently(checkpoint, damage_of)
        if wrong is None:
            for each in damaged if set_aside else ():
                with suppress(OSError):  # it was before, or is met again at the next start
                    os.replace(each / STATE, each / DAMAGED)
            return checkpoint, damaged
        # one that was cut off while it was put in place or removed is none
        if (checkpoint / STATE).exists():
            say(f"warning: {checkpoint} is damaged and passed over: {wrong}")
            damaged[checkpoint] = wrong
        elif (checkpoint / DAMAGED).exists():
            damaged[checkpoint] = "it was set aside as damaged before"
    return None, damaged


def damage_of(checkpoint: Path) -> str | None:
    """What of it is not as it was written, None of an intact one. OSError says nothing of that."""
    try:
        files = json.loads((checkpoint / STATE).read_text())["files"]
        for name, kept in files.items():
            file = checkpoint / name
            if (size := file.stat().st_size) != kept["size"]:
                return f"{name} has {size} of {kept['size']} bytes"
            if _crc32(file) != kept["crc32"]:
                return f"{name} is not what was written (CRC-32)"
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except (ValueError, KeyError, TypeError, AttributeError):
        return f"{STATE} is not what was written"
    return None


def _patiently(checkpoint: Path, read: Callable[[Path], T]) -> T:
    """`read(checkpoint)`, tried again after each of PAUSES_S where the storage does not answer;
    InputError, one line, where it never does.
    """
    for pause in PAUSES_S:
        try:
            return read(checkpoint)
        except FileNotFoundError:
            raise
        except OSError:
            time.sleep(pause)
    try:
        return read(checkpoint)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise InputError(
            f"{checkpoint}: cannot be read: {error.strerror or error} ({len(PAUSES_S) + 1} tries in"
            f" {sum(PAUSES_S):g} s); it may be whole, so no older one is taken: start again once"
            " the storage answers, or remove it"
        ) from error


def load_state(checkpoint: Path) -> dict[str, Any]:
    """Its `state.json`: step, seed."""
    return json.loads(_patiently(checkpoint, lambda place: (place / STATE).read_text()))


def group_files(checkpoint: Path, group: str) -> tuple[Path, ...]:
    """The files of a group of tensors, in the order of the ranks that wrote them."""
    files = load_state(checkpoint)["files"]
    names = sorted(name for name in files if re.split(r"[-.]", name, maxsplit=1)[0] == group)
    return tuple(checkpoint / name for name in names)


def load_tensors(checkpoint: Path, group: str, take: Take = whole) -> Tensors:
    """One group of tensors: `model`, `ema`, `optim` or `moving`. take: what is wanted of each."""
    files = group_files(checkpoint, group)
    if not files:
        raise InputError(f"{checkpoint}: has no {group}")
    try:
        return _patiently(checkpoint, lambda _: read_tensors(files, take))
    except InputError:
        raise
    except Exception as error:  # safetensors raises its own Rust errors
        raise InputError(f"{checkpoint}: {group} cannot be read: {error}") from error


def copy_into(parameters: dict[str, Any], tensors: Tensors, where: Path) -> None:
    """Copy loaded tensors into parameters of the same names and shapes; InputError says what
    differs.
    """
    missing, surplus = (
        sorted(parameters.keys() - tensors.keys()),
        sorted(tensors.keys() - parameters.keys()),
    )
    if missing or surplus:
        raise InputError(
            f"{where}: does not fit the recipe's model: lacks {missing[:3]}, has besides"
            f" {surplus[:3]}"
        )
    for name, parameter in parameters.items():
        if parameter.shape != tensors[name].shape:
            raise InputError(
                f"{where}: {name} is {tuple(tensors[name].shape)}, the recipe's model has"
                f" {tuple(parameter.shape)}"
            )
        parameter.data.copy_(tensors[name])
