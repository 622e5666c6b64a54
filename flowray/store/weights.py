"""Trained weights to start from: of a run, a checkpoint, an exported pipeline or a single file."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from flowray.config.errors import InputError
from flowray.config.paths import is_file
from flowray.store.checkpoint import group_files
from flowray.store.found import find_checkpoint
from flowray.store.tensorfile import Shape, Stored, opened

if TYPE_CHECKING:  # looking at shapes takes none of the seconds that torch takes to import
    from torch import Tensor

KEY = "train.init_from"
_PIPELINE, _SINGLE, _SEMANTIC = "flow.", "transformer.", "semantic."
_SHOWN = 3


@dataclass(frozen=True)
class Weights:
    """Safetensors files with a model's weights, as `opened` joins them. prefix: of their names
    there, and not of the model's; tensors without it are of other parts.
    """

    where: str
    files: tuple[Path, ...]
    prefix: str = ""

    def shapes(self) -> dict[str, Shape]:
        """Name -> shape, from the files' heads alone; InputError where one cannot be read."""
        with self._opened("np") as stored:
            return {name: each.shape for name, each in stored.items()}

    def tensors(self) -> dict[str, Tensor]:
        """Name -> tensor on the CPU; InputError where a file cannot be read."""
        with self._opened("pt") as stored:
            return {name: each.whole() for name, each in stored.items()}

    @contextmanager
    def _opened(self, library: str) -> Iterator[dict[str, Stored]]:
        try:
            with opened(self.files, library) as stored:
                yield {
                    key.removeprefix(self.prefix): each
                    for key, each in stored.items()
                    if key.startswith(self.prefix)
                }
        except (OSError, ValueError) as error:
            raise InputError(f"{KEY}: {self.where} cannot be read: {error}") from error


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
    return Weights(str(found.checkpoint), group_files(found.checkpoint, group))


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
