"""Checkpoints: safetensors and JSON, no pickle, whole or absent.

`checkpoints/step_000500/` holds `model.safetensors` (trainable weights; frozen ones are named by
the recipe), `ema.safetensors`, `optim.safetensors`, `moving.safetensors` where a loss keeps a
running state, and `state.json` (step and seed, which are all of the data cursor and the RNG, since
every draw is a function of them; what the frozen models' weights were, see frozen.py; and each
file's size and CRC-32). The folder is renamed into place
when complete.
"""

from __future__ import annotations

import errno
import json
import re
import shutil
import zlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError

from flowray.config.errors import InputError
from flowray.data.folders import put_in_place, sync

if TYPE_CHECKING:  # looking for a checkpoint takes none of the seconds that torch takes to import
    from torch import Tensor

    Tensors = dict[str, Tensor]

_NAME = re.compile(r"step_(\d+)")
STATE = "state.json"  # without it a folder is no checkpoint


def save_checkpoint(
    folder: Path, step: int, groups: dict[str, Tensors], state: dict[str, Any], keep: int
) -> Path:
    """Write `folder/step_XXXXXX` atomically, then drop all but the newest `keep`.

    OSError leaves older checkpoints untouched.
    """
    from safetensors.torch import save_file

    final, partial = folder / f"step_{step:06d}", folder / f".partial_{step:06d}"
    for left in folder.glob(".partial_*"):  # what a killed writer left; a run has one writer
        shutil.rmtree(left, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        for name, tensors in groups.items():
            save_file(
                {key: t.detach().contiguous() for key, t in tensors.items()},
                partial / f"{name}.safetensors",
            )
        files = {
            file.name: {"size": file.stat().st_size, "crc32": _crc32(file)}
            for file in partial.iterdir()
        }
        (partial / STATE).write_text(json.dumps({**state, "step": step, "files": files}))
        for file in (*partial.iterdir(), partial):
            sync(file)
        shutil.rmtree(final, ignore_errors=True)
        put_in_place(partial, final, last=STATE)
        sync(folder)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        if isinstance(error, SafetensorError):  # which has the system's number in its text alone
            number = re.search(r"os error (\d+)", str(error))
            raise OSError(int(number[1]) if number else errno.EIO, str(error)) from error
        raise
    for old in list_checkpoints(folder)[:-keep]:
        shutil.rmtree(old, ignore_errors=True)
    return final


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


def is_intact(checkpoint: Path) -> bool:
    """Whether it is valid and every file's content is what was written; reads all of it."""
    if not is_valid(checkpoint):
        return False
    try:
        files = json.loads((checkpoint / STATE).read_text())["files"]
        return all(_crc32(checkpoint / name) == kept["crc32"] for name, kept in files.items())
    except OSError:
        return False


def list_checkpoints(folder: Path) -> list[Path]:
    """Valid checkpoints, oldest first."""
    found = [path for path in folder.glob("step_*") if _NAME.fullmatch(path.name)]
    return sorted((path for path in found if is_valid(path)), key=lambda path: int(path.name[5:]))


def newest_checkpoint(folder: Path) -> Path | None:
    """The newest intact checkpoint of a `checkpoints/` folder."""
    return next(filter(is_intact, reversed(list_checkpoints(folder))), None)


def load_state(checkpoint: Path) -> dict[str, Any]:
    """Its `state.json`: step, seed."""
    return json.loads((checkpoint / STATE).read_text())


def load_tensors(checkpoint: Path, group: str) -> Tensors:
    """One group of tensors: `model`, `ema`, `optim` or `moving`."""
    from safetensors.torch import load_file

    try:
        return load_file(checkpoint / f"{group}.safetensors")
    except Exception as error:  # safetensors raises its own Rust errors
        raise InputError(f"{checkpoint}: {group}.safetensors cannot be read: {error}") from error


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
