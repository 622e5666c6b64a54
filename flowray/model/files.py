"""The files of a model: the part of a folder that is meant, whole weights, of a kind that is read.

Quick to import: nothing here loads a model.
"""

from __future__ import annotations

import hashlib
import json
import re
import shlex
from pathlib import Path
from typing import Any, Literal, NamedTuple

from safetensors import SafetensorError, safe_open

from flowray.config.errors import InputError
from flowray.config.paths import is_hub_name, no_such
from flowray.model.local import Kind, find_place

Part = Literal["text_encoder", "vae", "image_encoder"]  # as pipelines on the hub name their folders
_KINDS: dict[Part, Kind] = {
    "text_encoder": "text",
    "vae": "autoencoder",
    "image_encoder": "pictures",
}
CONFIG = "config.json"
TEXT, AUTOENCODER = "model.text.path", "model.autoencoder.path"  # the recipe keys that errors name
WHOLE, BLOCKS, BLOCK = 2**26, 64, 2**16  # of a large file, 64 blocks of 64 KiB are 4 MiB
_PIPELINE = "model_index.json"
_LFS = b"version https://git-lfs"
_FLOATS = {"F64", "F32", "F16", "BF16"}
# (begin, ending) of the names of weights that the libraries read, the preferred first.
_TRANSFORMERS = (("model", "safetensors"), ("pytorch_model", "bin"))
_DIFFUSERS = (("diffusion_pytorch_model", "safetensors"), ("diffusion_pytorch_model", "bin"))


class ModelFiles(NamedTuple):
    """A model's folder, config.json, weights, and the `variant` (fp16) a loader finds them by."""

    folder: Path
    config: dict[str, Any]
    weights: tuple[Path, ...]
    variant: str | None


def find_model(path: str, where: str, part: Part, *, weights: bool = True) -> Path:
    """The folder with the config.json of `path`, or the file it names; of a pipeline its `part`.

    where: the recipe key, which begins the message. weights: as for `find_place`. InputError, one
    line: nothing there, or not clear which part is meant.
    """
    place = find_place(path, where, _KINDS[part], weights=weights)
    if place.is_file() or ((place / CONFIG).is_file() and not (place / _PIPELINE).is_file()):
        return place
    if not place.is_dir():
        raise refused(where, place, f"is no model: {no_such(place)}")
    parts = _parts(place)
    meant = [each for each in parts if each.name == part or each.name.startswith(f"{part}_")]
    if len(meant) == 1:
        return meant[0]
    if choices := meant or parts:
        others = "".join(f" or {folder.name}" for folder in choices[1:])
        typed = f"type {where}={choices[0]}{others}"
        raise refused(where, place, f"holds several models or another one; {typed}")
    held = f"it holds {_listing(place)}"
    raise refused(where, place, f"has no {CONFIG}; {held}; give the folder of a model")


def refused(where: str, place: Path, why: str) -> InputError:
    """The error for a model that cannot be used: recipe key, file or folder, what is wrong."""
    return InputError(f"{where}: {str(place)!r} {why}")


def _parts(place: Path) -> list[Path]:
    return sorted(folder for folder in place.iterdir() if (folder / CONFIG).is_file())


def beside(folder: Path, part: Part, where: str) -> str:
    """'; type WHERE=PATH' where the wanted part of a pipeline lies beside `folder`, else ''."""
    found = [other for other in _parts(folder.parent) if other.name == part and other != folder]
    return f"; type {where}={found[0]}" if found else ""


def open_model(path: str, where: str, part: Part, *, weights: bool = True) -> ModelFiles:
    """What a loader needs to know of `path`; weights False: for a plan, config.json is enough.

    InputError, one line with what to type: see `find_model`, or weights that are missing, cut off,
    quantised, git-lfs pointers, or of several variants.
    """
    place = find_model(path, where, part, weights=weights)
    again = f"type `hf download {path}`" if is_hub_name(path) else "download it again"
    folder = place.parent if place.is_file() else place
    if not (folder / CONFIG).is_file():
        raise refused(where, place, f"is one file; give a folder with {CONFIG} and the weights")
    config = read_json(folder / CONFIG, where)
    if not weights:
        return ModelFiles(folder, config, (), None)
    _refuse_quantised(config, folder, where)
    sets = _weight_sets(folder, _DIFFUSERS if part == "vae" else _TRANSFORMERS, where)
    if place.is_file():
        sets = {variant: files for variant, files in sets.items() if place in files}
    if not sets:
        held = f"it holds {_listing(folder)}"
        raise refused(where, folder, f"has no weights of a known name; {held}; {again}")
    variants = [variant for variant in sets if variant]
    if None not in sets and len(variants) > 1:
        named = " or ".join(sets[variant][0].name for variant in sorted(variants))
        raise refused(where, folder, f"holds several variants; type {where}={folder}/{named}")
    variant = None if None in sets else variants[0]
    files = sets[variant]
    if lacking := [file.name for file in files if not file.is_file()]:
        count = f"{len(lacking)} of {len(files)} files of weights"
        raise refused(where, folder, f"lacks {count}, such as {lacking[0]}; {again}")
    for file in files:
        check_file(file, where)
    return ModelFiles(folder, config, files, variant)


def _refuse_quantised(config: dict[str, Any], folder: Path, where: str) -> None:
    """InputError where a config.json says that the weights are quantised."""
    for each in (config, *(value for value in config.values() if isinstance(value, dict))):
        if isinstance(quantised := each.get("quantization_config"), dict):
            method = quantised.get("quant_method", "of an unknown kind")
            instead = "give the fp32, fp16 or bf16 checkpoint that it was made from"
            raise refused(where, folder, f"is quantised ({method}); {instead}")


def open_autoencoder(path: str, *, weights: bool = True) -> ModelFiles | Path:
    """The same for an autoencoder; the path alone of a file of weights without a config.json."""
    place = find_model(path, AUTOENCODER, "vae", weights=weights)
    if place.is_file() and not place.name.startswith(_DIFFUSERS[0][0]):
        return place
    return open_model(path, AUTOENCODER, "vae", weights=weights)


def check_file(file: Path, where: str) -> None:
    """InputError: a file of weights that is a git-lfs pointer, cut off, or quantised."""
    refuse_pointer(file, where)
    if file.suffix != ".safetensors":
        return
    try:
        with safe_open(file, "numpy") as stored:
            names = [key for key in stored.keys() if key.endswith("weight")]  # noqa: SIM118
            kinds = {stored.get_slice(key).get_dtype() for key in names}
    except (SafetensorError, OSError) as error:
        size = file.stat().st_size
        why = f"is cut off at {size} bytes, or no safetensors file; download it again"
        raise refused(where, file, why) from error
    if odd := sorted(kinds - _FLOATS):
        why = f"is quantised (stored as {odd[0]}); give the checkpoint in fp32, fp16 or bf16"
        raise refused(where, file, why)


def refuse_pointer(file: Path, where: str) -> None:
    """InputError where git has left a pointer in the file's place."""
    with file.open("rb") as stream:
        if stream.read(len(_LFS)) == _LFS:
            pull = f"git -C {shlex.quote(str(file.parent))} lfs pull"
            raise refused(where, file, f"is a git-lfs pointer and not the file; type `{pull}`")


def read_json(file: Path, where: str) -> dict[str, Any]:
    """The object in a JSON file. InputError, one line: it holds none."""
    refuse_pointer(file, where)
    try:
        read = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise refused(where, file, f"is no JSON: {error}; download it again") from error
    if not isinstance(read, dict):
        raise refused(where, file, "holds no JSON object; download it again")
    return read


def content_of(*weights: Path) -> str:
    """16 hex digits that stand for the content of files of weights, wherever they lie.

    Of one above WHOLE bytes its size and BLOCKS blocks spread evenly over it, its first and last
    bytes among them: reading gigabytes at every start takes minutes.
    """
    digest = hashlib.sha256()
    for file in weights:
        size = file.stat().st_size
        digest.update(f"{size} ".encode())
        with file.open("rb") as stream:
            if size <= WHOLE:
                digest.update(stream.read())
                continue
            for i in range(BLOCKS):
                stream.seek((size - BLOCK) * i // (BLOCKS - 1))
                digest.update(stream.read(BLOCK))
    return digest.hexdigest()[:16]


def _weight_sets(
    folder: Path, forms: tuple[tuple[str, str], ...], where: str
) -> dict[str | None, tuple[Path, ...]]:
    """variant -> its files, which an index may name in vain; None: the plain ones."""
    found: dict[str | None, tuple[Path, ...]] = {}
    # sorted: a single file comes before the index of the same name
    names = sorted(file.name for file in folder.iterdir())
    for begin, ending in forms:
        for name in names:
            if single := re.fullmatch(rf"{begin}(?:\.([^.]+))?\.{ending}", name):
                found.setdefault(single[1], (folder / name,))
            elif index := re.fullmatch(rf"{begin}\.{ending}\.index(?:\.([^.]+))?\.json", name):
                shards = read_json(folder / name, where).get("weight_map", {})
                shards = sorted(set(shards.values()))
                found.setdefault(index[1], tuple(folder / shard for shard in shards))
    return found


def _listing(folder: Path) -> str:
    """The names in a folder, at most six."""
    names = sorted(path.name for path in folder.iterdir())
    return ", ".join([*names[:6], *(["..."] if names[6:] else [])]) or "nothing"
