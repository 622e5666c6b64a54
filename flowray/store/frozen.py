"""The frozen models that a run's weights were trained against, known by their content: with other
ones the weights mean nothing, and no shape would say so.

Quick to import: nothing here loads a model.
"""

from __future__ import annotations

import re
from contextlib import suppress
from pathlib import Path
from typing import Any

from flowray.config.errors import InputError
from flowray.config.model import ModelConfig
from flowray.config.paths import SHIPPED
from flowray.model.files import AUTOENCODER, TEXT, content_of, open_autoencoder, open_model
from flowray.model.local import Kind, local_place, local_weights

WEIGHTS = "frozen"  # their key in a checkpoint's state


def frozen_weights(model: ModelConfig) -> dict[str, str]:
    """Recipe key -> `content_of` the weights it names, of those that are on this machine and
    whole.
    """
    found: dict[str, str] = {}
    for key, (path, kind) in _places(model).items():
        with suppress(InputError):  # whoever loads the model says what is wrong with it
            if local_weights(path, kind) is not None:
                files = (
                    open_model(path, TEXT, "text_encoder")
                    if key == TEXT
                    else open_autoencoder(path)
                )
                found[key] = content_of(*([files] if isinstance(files, Path) else files.weights))
    return found


def _places(model: ModelConfig) -> dict[str, tuple[str, Kind]]:
    return {TEXT: (model.text.path, "text"), AUTOENCODER: (model.autoencoder.path, "autoencoder")}


def refuse_other_weights(checkpoint: Path, kept: dict[str, Any], model: ModelConfig) -> None:
    """InputError, one line, where the model's frozen weights are not those that a checkpoint was
    trained with. kept: its state.

    One of before they were noted goes on with models of the user's own; the embedded ones were
    others then.
    """
    noted = kept.get(WEIGHTS)
    here = frozen_weights(model) if noted else {}
    for key, (path, kind) in _places(model).items():
        if noted is None:
            other = path == "embedded"
        else:
            other = key in noted and key in here and noted[key] != here[key]
        if not other:
            continue
        what, instead = str(local_place(path, kind)), "put those weights back to go on"
        if path in SHIPPED:
            what, written = path, _commit(checkpoint.parent.parent / "config.yaml")
            instead = f"install the flowray that wrote it{written} to go on"
        raise InputError(f"{key}: {what!r}: {checkpoint} was trained with other weights; {instead}")


def _commit(config: Path) -> str:
    """' (main / abc1234)', as the card on top of a run's config.yaml has it; else ''."""
    with suppress(OSError):
        if card := re.search(r"^# BRANCH/COMMIT *: *(\S.*)$", config.read_text("utf-8"), re.M):
            return f" ({card[1].strip()})"
    return ""
