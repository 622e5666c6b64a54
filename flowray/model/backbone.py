"""Frozen text models from checkpoints in transformers' own formats: a causal LM, the one inside a VLM, or a text encoder."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    MODEL_FOR_MASKED_LM_MAPPING,
    MODEL_FOR_TEXT_ENCODING_MAPPING,
    MODEL_MAPPING,
    AutoConfig,
    AutoTokenizer,
)
from transformers.utils import logging

from flowray.config.errors import InputError
from flowray.config.model import CausalText, EncoderText, TextConfig
from flowray.model.assets import asset_path
from flowray.model.images import planning

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
# A VLM's checkpoint names its language model `language_model.model.*`, `model.language_model.*` or, the older Qwen-VL, `model.*`.
_TO_LANGUAGE_MODEL = {r"^(model\.)?language_model\.(model\.)?": ""}


@contextmanager
def _quiet() -> Iterator[None]:
    """Without transformers' table of the weights it leaves out: a text encoder taken from a larger checkpoint leaves out many."""
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)


def _weights(model_class: Any, path: str | Path, dtype: torch.dtype, **options: Any) -> Any:
    """The checkpoint's weights in `model_class`; InputError where it lacks some, which transformers would draw at random.

    On the meta device, where a plan is made, its shapes alone.
    """
    if planning():
        return model_class(options.get("config") or AutoConfig.from_pretrained(path))
    with _quiet():
        model, report = model_class.from_pretrained(path, dtype=dtype, output_loading_info=True, **options)
    lacking = sorted(key for key in report["missing_keys"] if "pooler" not in key)  # the pooler's output is not read
    if lacking:
        raise InputError(f"model.text.path: {str(path)!r} lacks {len(lacking)} weights of {model_class.__name__}, such as {lacking[0]}")
    return model


def _causal(path: str | Path, config: Any, dtype: torch.dtype) -> Any:
    """A causal LM without its output layer; of a vision-language model only the language model is read."""
    known, language = type(config), config.get_text_config()
    causal = known in MODEL_FOR_CAUSAL_LM_MAPPING or known in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
    if not causal or known in MODEL_FOR_MASKED_LM_MAPPING:
        raise InputError(
            f"model.text.path: {str(path)!r} holds a {config.model_type}, not a causal language model; use model.text.kind=encoder for it"
        )
    if language is config:
        return _weights(MODEL_MAPPING[known], path, dtype)
    return _weights(MODEL_MAPPING[type(language)], path, dtype, config=language, key_mapping=_TO_LANGUAGE_MODEL)


def _encoder(path: str | Path, config: Any, dtype: torch.dtype) -> Any:
    """The text encoder of a checkpoint: T5's encoder without its decoder, CLIP's text model without its tower, or the model itself."""
    encoders, language = MODEL_FOR_TEXT_ENCODING_MAPPING, config.get_text_config()
    known = next((c for c in (config, language) if type(c) in encoders), None)
    if known is None:
        raise InputError(
            f"model.text.path: {str(path)!r} holds a {config.model_type}, not a text encoder (CLIP, T5, BERT, ...); "
            "a language model takes model.text.kind=causal_lm"
        )
    return _weights(encoders[type(known)], path, dtype, config=known)


_LOADERS: dict[type, Callable[[str | Path, Any, torch.dtype], Any]] = {CausalText: _causal, EncoderText: _encoder}


def load_backbone(config: TextConfig) -> tuple[Any, Any]:
    """(model, tokenizer) from a folder, a hub name, or the shipped model; InputError in one line where that cannot be."""
    path: str | Path = asset_path("text") if config.path == "embedded" else config.path
    try:
        tokenizer = AutoTokenizer.from_pretrained(path)
        backbone = _LOADERS[type(config)](path, AutoConfig.from_pretrained(path), _DTYPES[config.dtype])
    except (OSError, ValueError, RuntimeError, KeyError, SafetensorError) as error:  # RuntimeError: weights of other shapes
        raise InputError(f"model.text.path: cannot load {str(path)!r}: {str(error).partition(chr(10))[0]}") from error
    width = backbone_width(backbone)
    if config.width not in (None, width):
        raise InputError(f"model.text.width: the recipe says {config.width}, the weights in {str(path)!r} have {width}; correct it")
    return backbone, tokenizer


def backbone_width(backbone: Any) -> int:
    """Hidden size of a loaded model; T5's configs call it d_model."""
    return getattr(backbone.config, "hidden_size", None) or backbone.config.d_model
