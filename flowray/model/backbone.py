"""Frozen text models from checkpoints in transformers' own formats: a causal LM, the one inside
a VLM, or a text encoder.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    MODEL_FOR_MASKED_LM_MAPPING,
    MODEL_FOR_TEXT_ENCODING_MAPPING,
    MODEL_MAPPING,
)

from flowray.config.errors import InputError
from flowray.config.model import CausalText, EncoderText, TextConfig
from flowray.model.files import TEXT, ModelFiles, open_model
from flowray.model.local import local_place
from flowray.model.pretrained import load_weights, transformers_config

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
# A VLM's checkpoint names its language model `language_model.model.*`, `model.language_model.*`
# or, the older Qwen-VL, `model.*`.
_TO_LANGUAGE_MODEL = {r"^(model\.)?language_model\.(model\.)?": ""}
# What a pass over padded prompts, and one over queries with the prompts' keys and values, hands
# over.
_CACHED_PASS = {"input_ids", "inputs_embeds", "attention_mask", "position_ids", "past_key_values"}


def _causal(files: ModelFiles, config: Any, dtype: torch.dtype) -> Any:
    """A causal LM without its output layer; of a vision-language model only the language model
    is read.
    """
    language = config.get_text_config()
    if not _is_causal(config):
        hint = "give a causal language model"
        if _encoder_config(config):
            hint = "use model.text.kind=encoder for it"
        raise InputError(f"{_holds(files, config)}, not a causal language model; {hint}")
    model_class: Any = MODEL_MAPPING[type(language)]
    kinds = set(getattr(language, "layer_types", None) or ())
    recurrent = sorted(kind for kind in kinds if not kind.endswith("attention") or "linear" in kind)
    lacks = _CACHED_PASS - inspect.signature(model_class.forward).parameters.keys()
    if model_class._is_stateful or recurrent or lacks:
        why = "keeps a running state or takes no positions: its tokens would depend on the padding"
        instead = "give one with attention in every layer, such as Qwen3, Llama or Gemma"
        raise InputError(f"{_holds(files, config)}, which {why}; {instead}")
    if language is config:
        return load_weights(model_class, files, TEXT, dtype)
    return load_weights(
        model_class, files, TEXT, dtype, config=language, key_mapping=_TO_LANGUAGE_MODEL
    )


def _is_causal(config: Any) -> bool:
    """Whether transformers has a causal language model for the config, alone or beside a tower."""
    known = type(config)
    causal = known in MODEL_FOR_CAUSAL_LM_MAPPING or known in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
    return causal and known not in MODEL_FOR_MASKED_LM_MAPPING


def is_encoder(config: Any) -> bool:
    """Whether transformers' config is a text encoder's, which `model.text.kind` encoder reads."""
    return not _is_causal(config) and _encoder_config(config) is not None


def _encoder(files: ModelFiles, config: Any, dtype: torch.dtype) -> Any:
    """The text encoder of a checkpoint: T5's encoder without its decoder, CLIP's text model
    without its tower, or the model itself.
    """
    known = _encoder_config(config)
    if known is None:
        hint = "a language model takes model.text.kind=causal_lm"
        raise InputError(f"{_holds(files, config)}, not a text encoder (CLIP, T5, BERT); {hint}")
    # the pooler's output is not read
    return load_weights(
        MODEL_FOR_TEXT_ENCODING_MAPPING[type(known)],
        files,
        TEXT,
        dtype,
        unread="pooler",
        config=known,
    )


def _encoder_config(config: Any) -> Any | None:
    """The config, or the text part of it, that transformers has a text encoder for."""
    both = (config, config.get_text_config())
    return next((each for each in both if type(each) in MODEL_FOR_TEXT_ENCODING_MAPPING), None)


def _holds(files: ModelFiles, config: Any) -> str:
    return f"{TEXT}: {str(files.folder)!r} holds a {config.model_type}"


_LOADERS: dict[type, Callable[[ModelFiles, Any, torch.dtype], Any]] = {
    CausalText: _causal,
    EncoderText: _encoder,
}


def load_backbone(config: TextConfig) -> Any:
    """The frozen model of a folder, a hub name that is here, or the shipped one; else
    InputError.
    """
    return _backbone(config, open_model(config.path, TEXT, "text_encoder"))


def planned_backbone(config: TextConfig) -> Any | None:
    """Its shapes alone, on the meta device: config.json is enough. None where that is not here."""
    if local_place(config.path) is None:
        return None
    return _backbone(config, open_model(config.path, TEXT, "text_encoder", weights=False))


def _backbone(config: TextConfig, files: ModelFiles) -> Any:
    backbone = _LOADERS[type(config)](
        files, transformers_config(files, TEXT, "text_encoder"), _DTYPES[config.dtype]
    )
    width = backbone_width(backbone)
    if config.width not in (None, width):
        have = f"the weights in {str(files.folder)!r} have {width}"
        raise InputError(f"model.text.width: the recipe says {config.width}, {have}; correct it")
    return backbone


def backbone_width(backbone: Any) -> int:
    """Hidden size of a loaded model; T5's configs call it d_model."""
    return getattr(backbone.config, "hidden_size", None) or backbone.config.d_model
