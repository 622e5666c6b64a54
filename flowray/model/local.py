"""Which weights are on this machine: nothing here asks the network."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

from flowray.model.assets import asset_path

_WEIGHTS = ("*.safetensors", "*.bin", "*.pth")


def local_weights(path: str, embedded: str = "text") -> Path | None:
    """The file or folder of a path, a hub name already downloaded, or the shipped model `embedded`; None where no weights lie there."""
    place = asset_path(embedded) if path == "embedded" else Path(path).expanduser()
    if not place.exists():
        try:
            place = Path(snapshot_download(path, local_files_only=True))
        except (LocalEntryNotFoundError, HFValidationError):
            return None
    return place if place.is_file() or any(True for pattern in _WEIGHTS for _ in place.rglob(pattern)) else None
