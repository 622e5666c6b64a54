"""Trained weights to start from: of a run, a checkpoint, an exported pipeline or a single file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors import SafetensorError, safe_open

from flowray.config.errors import InputError
from flowray.config.paths import is_file
from flowray.store.found import find_checkpoint

if TYPE_CHECKING:  # looking at shapes takes none of the seconds that torch takes to import
    from torch import Tensor

KEY = "train.init_from"
Shape = tuple[int, ...]
_PIPELINE, _SINGLE, _SEMANTIC = "flow.", "transformer.", "semantic."
_SHOWN = 3


@dataclass(frozen=True)
class Weights:
    """Safetensors files with a model's weights. prefix: of their names there, and not of the
    model's; tensors without it are of other parts.
    """

    where: str
    files: tuple[Path, ...]
    prefix: str = ""

    def shapes(self) -> dict[str, Shape]:
        """Name -> shape, from the files' heads alone; InputError where one cannot be read."""
        found: dict[str, Shape] = {}
        for file in self.files:
            try:
                with safe_open(file, "np") as opened:
                    for key in opened.keys():  # noqa: SIM118  # it is no mapping
                        if key.startswith(self.prefix):
                            name = key.removeprefix(self.prefix)
                            found[name] = tuple(opened.get_slice(key).get_shape())
            except (OSError, SafetensorError) as error:
                raise InputError(f"{KEY}: {file} cannot be read: {error}") from error
        return found

    def tensors(self) -> dict[str, Tensor]:
        """Name -> tensor on the CPU; InputError where a file cannot be read."""
        from safetensors.torch import load_file

        found: dict[str, Tensor] = {}
        for file in self.files:
            try:
                loaded = load_file(file)
            except (OSError, SafetensorError) as error:
                raise InputError(f"{KEY}: {file} cannot be read: {error}") from error
            found |= {
                key.removeprefix(self.prefix): tensor
                for key, tensor in loaded.items()
                if key.startswith(self.prefix)
            }
        return found


def find_weights(place: str) -> Weights:
    """The weights at a place. Of a run or a checkpoint those that its recipe samples with, the
    moving average unless it says `sample.weights: raw`. InputError: there are none.
    """
    path = Path(place)
    if is_file(path):
        whole = Weights(place, (path,))
        ours = any(name.startswith(_SINGLE) for name in whole.shapes())
        return Weights(place, (path,), _SINGLE) if ours else whole
    if is_file(path / "model_index.json"):
        files = tuple(sorted((path / "transformer").glob("*.safetensors")))
        if not files:
            raise InputError(f"{KEY}: {place}: no safetensors in transformer/, want an export")
        return Weights(place, files, _PIPELINE)
    try:
        found = find_checkpoint(path)
    except InputError as error:
        raise InputError(f"{KEY}: {error}") from error
    group = "ema" if found.recipe.sample.weights == "ema" else "model"
    return Weights(str(found.checkpoint), (found.checkpoint / f"{group}.safetensors",))


def lacking(where: str, have: Mapping[str, Shape], want: Mapping[str, Shape]) -> list[str]:
    """Of wanted weights, name -> shape, those that only a loss reads and the source lacks.

    InputError, one line with the first few, where others are missing, too many or of another shape.
    """
    anew = [name for name in want if name not in have and name.startswith(_SEMANTIC)]
    other = [
        f"{name} {have[name]} for {shape}"
        for name, shape in want.items()
        if name in have and have[name] != shape
    ]
    missing = [name for name in want if name not in have and name not in anew]
    surplus = [name for name in have if name not in want and not name.startswith(_SEMANTIC)]
    faults = {"is of another shape": other, "is missing": missing, "is too much": surplus}
    if told := [_first(what, names) for what, names in faults.items() if names]:
        raise InputError(f"{KEY}: {where} does not fit the recipe's model: {'; '.join(told)}")
    return anew


def _first(what: str, names: list[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return f"{what}: {', '.join(names[:_SHOWN])}{more}"
