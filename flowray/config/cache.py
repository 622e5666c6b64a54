"""The folder of what is made or fetched once and kept: embedded sets, cached latents, packages and
the models in them.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from flowray.config.errors import InputError
from flowray.config.paths import argument

# a name that model.text.path knows -> the folder of `flowray.models fetch NAME` in the cache
FETCHED_MODELS = {"smollm2": "smollm2-0.1.2", "minilm": "minilm-0.1.2"}


def cache_dir(configured: str | None) -> Path:
    """The cache, created.

    `configured` (data.cache), else FLOWRAY_CACHE, else `flowray` in XDG_CACHE_HOME or ~/.cache;
    where there is no home that can be written, as in many containers, a folder of the user's own
    beside the temporary files. InputError where a folder that was asked for cannot be written and
    has nothing that could be read either; who has to write into one that has says so.
    """
    from_env = os.environ.get("FLOWRAY_CACHE")
    if configured or from_env:
        path = (Path(configured) if configured else argument(str(from_env))).absolute()
        if (reason := unwritable(path)) and not _holds_something(path):
            where = "data.cache" if configured else "FLOWRAY_CACHE"
            raise InputError(
                f"{where} {path}: cannot be written: {reason}; set data.cache or FLOWRAY_CACHE to a"
                " writable folder"
            )
        return path
    usual = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")) / "flowray"
    if usual.is_absolute() and not unwritable(usual):
        return usual
    spare = Path(tempfile.gettempdir()).absolute() / f"flowray-{os.getuid()}"
    reason = unwritable(spare, mode=0o700)
    if reason or spare.stat().st_uid != os.getuid():
        raise InputError(
            f"neither {usual} nor {spare} can be written; set data.cache or FLOWRAY_CACHE to a"
            " writable folder"
        )
    return spare


def _holds_something(folder: Path) -> bool:
    try:
        return any(folder.iterdir())
    except OSError:
        return False


def unwritable(folder: Path, mode: int = 0o777) -> str | None:
    """Why no file can be made in the folder, which is created; None where one can."""
    try:
        folder.mkdir(mode=mode, parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return None
    except OSError as error:
        return error.strerror or str(error)


def fetched_model(name: str) -> Path:
    """Where `flowray.models fetch` puts a model, there or not."""
    return cache_dir(None) / "models" / FETCHED_MODELS[name]
