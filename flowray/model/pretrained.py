"""Loading a checkpoint with transformers: no network, no code of its own, no weight at random."""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import CONFIG_MAPPING, AutoConfig
from transformers.utils import logging

from flowray.config.errors import InputError
from flowray.model.files import ModelFiles, Part, beside, refused

# trust_remote_code False, and not its default: that asks on the terminal whether to run what comes.
OFFLINE = {"local_files_only": True, "trust_remote_code": False}

# What the libraries raise over a checkpoint. RuntimeError: weights of other shapes; TypeError,
# LookupError, AttributeError: a config that lacks or misspells something.
_REFUSALS = (
    *(AttributeError, ImportError, LookupError, OSError, RuntimeError, TypeError, ValueError),
    *(SafetensorError, StrictDataclassError, pickle.UnpicklingError),
)


def planning() -> bool:
    """Whether modules are being made on the meta device, to be counted and not computed with."""
    return torch.get_default_device().type == "meta"


@contextmanager
def loading(where: str, place: Path) -> Iterator[None]:
    """What a library says about a checkpoint that it cannot load, as an InputError of one line."""
    try:
        yield
    except _REFUSALS as error:
        if any(isinstance(cause, pickle.UnpicklingError) for cause in _causes(error)):
            why = "has a pickle that is cut off or holds more than tensors, which is never run"
            raise refused(where, place, f"{why}; give safetensors") from error
        raise refused(where, place, f"cannot be loaded: {first_line(error)}") from error


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """An error and those that it was raised in place of."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def first_line(error: Exception) -> str:
    """The first line of a message, or the error's class where it has none."""
    return str(error).strip().partition("\n")[0] or type(error).__name__


@contextmanager
def quiet() -> Iterator[None]:
    """Without transformers' table of the weights it leaves out: a text encoder taken from a larger
    checkpoint leaves out many.
    """
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)


def transformers_config(files: ModelFiles, where: str, part: Part) -> Any:
    """transformers' config of a checkpoint. InputError where it has none, or one for its own code.

    part: the one that is wanted of a pipeline; the message names it where another one was given.
    """
    kind = files.config.get("model_type")
    if kind not in CONFIG_MAPPING and "auto_map" in files.config:
        raise needs_code(files, where)
    if kind is None:
        name = files.config.get("_class_name", "no model_type")
        hint = beside(files.folder, part, where)
        raise refused(where, files.folder, f"holds {name}, not a model of transformers{hint}")
    with loading(where, files.folder):
        return AutoConfig.from_pretrained(files.folder, **OFFLINE)


def needs_code(files: ModelFiles, where: str) -> InputError:
    """The error for a checkpoint that brings its own code."""
    instead = "give one that transformers reads by itself, often the one with -hf at its name's end"
    return refused(where, files.folder, f"needs code of its own (auto_map), never run; {instead}")


def load_weights(
    model_class: Any,
    files: ModelFiles,
    where: str,
    dtype: torch.dtype,
    *,
    unread: str = "",
    **options: Any,
) -> Any:
    """The checkpoint's weights in `model_class`; InputError where it lacks some, which transformers
    would draw at random. On the meta device, where a plan is made, its shapes alone.

    unread: weights with this in their names may be absent.
    """
    if planning():
        config = options.get("config")
        return model_class(config or AutoConfig.from_pretrained(files.folder, **OFFLINE))
    with quiet(), loading(where, files.folder):
        model, report = model_class.from_pretrained(
            files.folder,
            dtype=dtype,
            variant=files.variant,
            output_loading_info=True,
            **OFFLINE,
            **options,
        )
    lacking = sorted(key for key in report["missing_keys"] if not unread or unread not in key)
    if lacking:
        what = f"{len(lacking)} weights of {model_class.__name__}, such as {lacking[0]}"
        raise refused(where, files.folder, f"lacks {what}")
    return model
