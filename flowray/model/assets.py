"""Where the models shipped with flowray lie."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path


def asset_path(name: str) -> Path:
    """Folder of a shipped model: `autoencoder`, `autoencoder_emoji` or `text`."""
    return Path(str(files("flowray") / "assets" / name))
