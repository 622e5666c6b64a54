"""The files of a model: the part of a folder that is meant, and whether its weights are whole and of a kind that is read.

Quick to import: nothing here loads a model.
"""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any, Literal, NamedTuple

from safetensors import SafetensorError, safe_open

from flowray.config.errors import InputError
from flowray.model.local import find_place

Part = Literal["text_encoder", "vae", "image_encoder"]  # as pipelines on the hub name their folders
CONFIG = "config.json"
TEXT, AUTOENCODER = "model.text.path", "model.autoencoder.path"  # the recipe keys that errors name
_PIPELINE = "model_index.json"
_LFS = b"version https://git-lfs"
_FLOATS = {"F64", "F32", "F16", "BF16"}
# (begin, ending) of the names of weights that transformers and diffusers read, the preferred first.
_TRANSFORMERS = (("model", "safetensors"), ("pytorch_model", "bin"))
_DIFFUSERS = (("diffusion_pytorch_model", "safetensors"), ("diffusion_pytorch_model", "bin"))


class ModelFiles(NamedTuple):
    """A model's folder, its config.json, its weights, and the `variant` (such as fp16) by which a loader finds them."""

    folder: Path
    config: dict[str, Any]
    weights: tuple[Path, ...]
    variant: str | None


def find_model(path: str, where: str, part: Part, embedded: str = "text") -> Path:
    """The folder with the config.json of `path`, or the file that `path` names; of a pipeline's folder its `part`.

    where: the recipe key, which begins the message. InputError, one line: nothing there, or not clear which part is meant.
    """
    place = find_place(path, where, embedded)
    if place.is_file() or ((place / CONFIG).is_file() and not (place / _PIPELINE).is_file()):
        return place
    parts = _parts(place)
    meant = [folder for folder in parts if folder.name == part or folder.name.startswith(f"{part}_")]
    if len(meant) == 1:
        return meant[0]
    if choices := meant or parts:
        others = "".join(f" or {folder.name}" for folder in choices[1:])
        raise InputError(f"{where}: {str(place)!r} holds several models or another one; type {where}={choices[0]}{others}")
    raise InputError(f"{where}: {str(place)!r} has no {CONFIG}; it holds {_listing(place)}; give the folder of a model")


def _parts(place: Path) -> list[Path]:
    return sorted(folder for folder in place.iterdir() if (folder / CONFIG).is_file())


def beside(folder: Path, part: Part, where: str) -> str:
    """'; type WHERE=PATH' where the wanted part of a pipeline lies beside `folder`, else ''."""
    found = [other for other in _parts(folder.parent) if other.name == part and other != folder]
    return f"; type {where}={found[0]}" if found else ""


def open_model(path: str, where: str, part: Part, embedded: str = "text", *, weights: bool = True) -> ModelFiles:
    """What a loader needs to know of `path`; weights False: a plan, for which config.json is enough.

    InputError, one line with what to type: see `find_model`, or weights that are missing, cut off, quantised, git-lfs pointers,
    or of several variants.
    """
    place = find_model(path, where, part, embedded)
    folder = place.parent if place.is_file() else place
    if not (folder / CONFIG).is_file():
        raise InputError(f"{where}: {str(place)!r} is one file; give a folder with {CONFIG} and the weights")
    config = _read_config(folder, where)
    if not weights:
        return ModelFiles(folder, config, (), None)
    sets = _weight_sets(folder, _DIFFUSERS if part == "vae" else _TRANSFORMERS, where)
    if place.is_file():
        sets = {variant: files for variant, files in sets.items() if place in files}
    if not sets:
        raise InputError(f"{where}: no weights of a known name in {str(folder)!r}, which holds {_listing(folder)}; download it again")
    variants = [variant for variant in sets if variant]
    if None not in sets and len(variants) > 1:
        named = " or ".join(sets[variant][0].name for variant in sorted(variants))
        raise InputError(f"{where}: {str(folder)!r} holds several variants; type {where}={folder}/{named}")
    variant = None if None in sets else variants[0]
    files = sets[variant]
    if lacking := [file.name for file in files if not file.is_file()]:
        raise InputError(
            f"{where}: {str(folder)!r} lacks {len(lacking)} of {len(files)} files of weights, such as {lacking[0]}; download it again"
        )
    for file in files:
        check_file(file, where)
    return ModelFiles(folder, config, files, variant)


def _read_config(folder: Path, where: str) -> dict[str, Any]:
    """A folder's config.json. InputError, one line: it is no JSON, or says that the weights are quantised."""
    config = read_json(folder / CONFIG, where)
    for each in (config, *(value for value in config.values() if isinstance(value, dict))):
        if isinstance(quantised := each.get("quantization_config"), dict):
            method = quantised.get("quant_method", "of an unknown kind")
            raise InputError(
                f"{where}: {str(folder)!r} is quantised ({method}); weights in fp32, fp16 or bf16 are read: "
                f"give the checkpoint that it was made from (its README names it)"
            )
    return config


def open_autoencoder(path: str, *, weights: bool = True) -> ModelFiles | Path:
    """The same for an autoencoder; the path alone of a file of weights that has no config.json of its own."""
    place = find_model(path, AUTOENCODER, "vae", "autoencoder")
    if place.is_file() and not place.name.startswith(_DIFFUSERS[0][0]):
        return place
    return open_model(path, AUTOENCODER, "vae", "autoencoder", weights=weights)


def check_file(file: Path, where: str) -> None:
    """InputError, one line: a file of weights that is a git-lfs pointer, cut off, or stored in fewer bits than are read."""
    refuse_pointer(file, where)
    if file.suffix != ".safetensors":
        return
    try:
        with safe_open(file, "numpy") as stored:
            kinds = {stored.get_slice(key).get_dtype() for key in stored.keys() if key.endswith("weight")}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        size = file.stat().st_size
        raise InputError(f"{where}: {file} ({size} bytes) is cut off or no safetensors file; download it again") from error
    if odd := sorted(kinds - _FLOATS):
        raise InputError(f"{where}: {file} is quantised (stored as {odd[0]}); give the checkpoint in fp32, fp16 or bf16")


def refuse_pointer(file: Path, where: str) -> None:
    """InputError where git has left a pointer in the file's place."""
    with file.open("rb") as stream:
        if stream.read(len(_LFS)) == _LFS:
            raise InputError(
                f"{where}: {file} is a git-lfs pointer and not the file; type `git -C {shlex.quote(str(file.parent))} lfs pull`"
            )


def read_json(file: Path, where: str) -> dict[str, Any]:
    """The object in a JSON file. InputError, one line: it holds none."""
    refuse_pointer(file, where)
    try:
        read = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{where}: {file} is no JSON: {error}; download it again") from error
    if not isinstance(read, dict):
        raise InputError(f"{where}: {file} holds no JSON object; download it again")
    return read


def _weight_sets(folder: Path, forms: tuple[tuple[str, str], ...], where: str) -> dict[str | None, tuple[Path, ...]]:
    """variant -> its files, which need not be there where an index names them; None is the plain one."""
    found: dict[str | None, tuple[Path, ...]] = {}
    names = sorted(file.name for file in folder.iterdir())  # a single file comes before the index of the same name
    for begin, ending in forms:
        for name in names:
            if single := re.fullmatch(rf"{begin}(?:\.([^.]+))?\.{ending}", name):
                found.setdefault(single[1], (folder / name,))
            elif index := re.fullmatch(rf"{begin}\.{ending}\.index(?:\.([^.]+))?\.json", name):
                shards = read_json(folder / name, where).get("weight_map", {})
                found.setdefault(index[1], tuple(folder / shard for shard in sorted(set(shards.values()))))
    return found


def _listing(folder: Path) -> str:
    """The names in a folder, at most six."""
    names = sorted(path.name for path in folder.iterdir())
    return ", ".join([*names[:6], *(["..."] if names[6:] else [])]) or "nothing"
