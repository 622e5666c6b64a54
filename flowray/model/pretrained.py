"""Loading a checkpoint with transformers: no network, no code of the checkpoint's, no weight at random, one line where it cannot be."""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import CONFIG_MAPPING, AutoConfig
from transformers.utils import logging

from flowray.config.errors import InputError
from flowray.model.files import ModelFiles, Part, beside

# trust_remote_code False, and not its default: that one asks on the terminal whether to run what the checkpoint brings.
OFFLINE = {"local_files_only": True, "trust_remote_code": False}

# What the libraries raise over a checkpoint. RuntimeError: weights of other shapes; TypeError, LookupError, AttributeError: a
# config that lacks or misspells something.
_REFUSALS = (
    *(AttributeError, ImportError, LookupError, OSError, RuntimeError, TypeError, ValueError),
    *(SafetensorError, StrictDataclassError, pickle.UnpicklingError),
)


def planning() -> bool:
    """Whether modules are being made on the meta device, to be counted and not computed with."""
    return torch.get_default_device().type == "meta"


@contextmanager
def loading(where: str, place: object) -> Iterator[None]:
    """What a library says about a checkpoint that it cannot load, as an InputError of one line."""
    try:
        yield
    except _REFUSALS as error:
        if any(isinstance(cause, pickle.UnpicklingError) for cause in _causes(error)):
            raise InputError(
                f"{where}: {str(place)!r} has weights in a pickle that is cut off or holds more than tensors, which is never run; "
                "give them as safetensors"
            ) from error
        raise InputError(f"{where}: cannot load {str(place)!r}: {first_line(error)}") from error


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
    """Without transformers' table of the weights it leaves out: a text encoder taken from a larger checkpoint leaves out many."""
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)


def transformers_config(files: ModelFiles, where: str, part: Part) -> Any:
    """transformers' config of a checkpoint. InputError where it is none, or only code of the checkpoint's own would read it.

    part: the one that is wanted of a pipeline, which the message names where another one was given.
    """
    kind = files.config.get("model_type")
    if kind not in CONFIG_MAPPING and "auto_map" in files.config:
        raise needs_code(files, where)
    if kind is None:
        name = files.config.get("_class_name", "no model_type")
        hint = beside(files.folder, part, where)
        raise InputError(f"{where}: {str(files.folder)!r} holds {name}, not a model of transformers{hint}")
    with loading(where, files.folder):
        return AutoConfig.from_pretrained(files.folder, **OFFLINE)


def needs_code(files: ModelFiles, where: str) -> InputError:
    """The error for a checkpoint that brings its own code."""
    return InputError(
        f"{where}: {str(files.folder)!r} needs code of its own (auto_map), which is never run; give a checkpoint that "
        "transformers reads by itself, often the one of the same name with -hf at its end"
    )


def load_weights(model_class: Any, files: ModelFiles, where: str, dtype: torch.dtype, *, unread: str = "", **options: Any) -> Any:
    """The checkpoint's weights in `model_class`; InputError where it lacks some, which transformers would draw at random.

    unread: weights with this in their names may be absent. On the meta device, where a plan is made, its shapes alone.
    """
    if planning():
        return model_class(options.get("config") or AutoConfig.from_pretrained(files.folder, **OFFLINE))
    with quiet(), loading(where, files.folder):
        model, report = model_class.from_pretrained(
            files.folder, dtype=dtype, variant=files.variant, output_loading_info=True, **OFFLINE, **options
        )
    lacking = sorted(key for key in report["missing_keys"] if not unread or unread not in key)
    if lacking:
        raise InputError(f"{where}: {str(files.folder)!r} lacks {len(lacking)} weights of {model_class.__name__}, such as {lacking[0]}")
    return model
