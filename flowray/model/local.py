"""Where on this machine a model path leads; the network is asked only with FLOWRAY_DOWNLOAD=1."""

from __future__ import annotations

import os
import re
from collections import Counter
from pathlib import Path
from typing import Literal

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

from flowray.config.cache import FETCHED_MODELS, fetched_model
from flowray.config.errors import InputError, did_you_mean
from flowray.config.paths import SHIPPED, exists, is_hub_name, no_such
from flowray.model.assets import asset_path

Kind = Literal["text", "autoencoder", "pictures"]  # pictures: a network that sees them
# (name, kind of model) -> folder in the package; none that sees pictures is shipped
_SHIPPED: dict[tuple[str, Kind], str] = {
    ("embedded", "text"): "text",
    ("embedded", "autoencoder"): "autoencoder",
    ("embedded_emoji", "autoencoder"): "autoencoder_emoji",
}
DOWNLOAD = "FLOWRAY_DOWNLOAD"  # 1: hub names that are not here may be downloaded
_WEIGHTS = ("*.safetensors", "*.bin", "*.pth")
_SHARD = re.compile(r"(.*)-\d+-of-(\d+)(\..*)")  # model-00001-of-00004.safetensors
# Of a hub's repository, what flowray reads: no ONNX, TensorFlow or GGUF copies, no pictures.
_READ = ["*.json", "*.jinja", "*.model", "*.safetensors", "*.tiktoken", "*.txt"]


def find_place(path: str, where: str, kind: Kind = "text", *, weights: bool = True) -> Path:
    """The file or folder that `path` means: a shipped model, a path, or a hub name that was
    downloaded before, with its weights.

    where: the recipe key, which begins the message. kind: of the model that is wanted,
    which tells the shipped ones apart. weights False: of a hub name, any of its files are enough.
    InputError with what to type: nothing is there, or a shipped model of another kind.
    """
    place = local_place(path, kind)
    named = is_hub_name(path)
    if place is not None and not (named and weights and not _has_weights(place)):
        return place
    if may_download(path):
        return _download(path, where)
    if path in SHIPPED:
        names = " or ".join(repr(name) for name, shipped in _SHIPPED if shipped == kind)
        take = names or "the path of a folder or a hub name: none of this kind is shipped"
        raise InputError(f"{where}: {path!r} is another kind of model; take {take}")
    if path in FETCHED_MODELS:
        fetching = f"python -m flowray.models fetch {path}"
        raise InputError(f"{where}: {path!r} is not on this machine; type `{fetching}`")
    if not is_hub_name(path):
        raise InputError(f"{where}: {path!r}: {no_such(path)}")
    folders = [folder.name for folder in Path.cwd().iterdir() if folder.is_dir()]
    near = "" if place else did_you_mean(path.partition("/")[0], folders)
    lacks = "lacks weights" if place else "is not"
    typed = f"type `hf download {path}`, the path of a folder, or {DOWNLOAD}=1 before the command"
    raise InputError(
        f"{where}: {path!r} {lacks} on this machine{near}; {typed}, which downloads it"
    )


def may_download(path: str) -> bool:
    """Whether `path` is a hub name and the user allows flowray to ask the hub for it."""
    return is_hub_name(path) and os.environ.get(DOWNLOAD) == "1"


def local_place(path: str, kind: Kind = "text") -> Path | None:
    """The same without an error: None where nothing is there. Of a hub name there may be a part of
    its files only, such as config.json.
    """
    if path in SHIPPED:
        folder = _SHIPPED.get((path, kind))
        return asset_path(folder) if folder else None
    if path in FETCHED_MODELS:
        place = fetched_model(path)
        return place if exists(place) else None
    if not is_hub_name(path):
        return _snapshot(Path(path)) if exists(Path(path)) else None
    try:
        return Path(snapshot_download(path, local_files_only=True))
    except (LocalEntryNotFoundError, HFValidationError):
        return None


def local_weights(path: str, kind: Kind = "text") -> Path | None:
    """`local_place`, but None where no weights lie there, or of all that do a shard is missing."""
    place = local_place(path, kind)
    if place is None or place.is_file():
        return place
    return place if _has_weights(place) else None


def _has_weights(place: Path) -> bool:
    """Whether a file of weights, or all shards of one, lie in a folder or in one below it."""
    shards: Counter[tuple[Path, str, str, int]] = Counter()
    for file in (file for pattern in _WEIGHTS for file in place.rglob(pattern) if file.is_file()):
        if not (shard := _SHARD.fullmatch(file.name)):
            return True
        shards[file.parent, shard[1], shard[3], int(shard[2])] += 1
    return any(count == total for (*_, total), count in shards.items())


def _snapshot(place: Path) -> Path:
    """Of a folder of the hub's cache (`models--ORG--NAME`) its main revision; others as they
    are.
    """
    main = place / "refs" / "main"
    return place / "snapshots" / main.read_text().strip() if main.is_file() else place


def _download(name: str, where: str) -> Path:
    try:
        place = Path(snapshot_download(name, allow_patterns=_READ))
        if not any(place.rglob("*.safetensors")):
            snapshot_download(name, allow_patterns=["*.bin"])
    except (HfHubHTTPError, OSError) as error:
        why = "the hub does not answer"
        if isinstance(error, HfHubHTTPError):  # its answer: no such name, or not for everyone
            why = "the hub does not give it; check the name, or type `hf auth login`"
        raise InputError(f"{where}: cannot download {name!r}: {why}") from error
    # Of a hub that does not answer the library returns what is here, which lacks the weights.
    if not _has_weights(place):
        why = "the hub does not answer, or has no weights of it in safetensors or .bin"
        raise InputError(f"{where}: cannot download {name!r}: {why}; type `hf download {name}`")
    return place
