"""The text side: a frozen language model that turns captions into tokens for the head.

A causal model sees the prompt and, after it, learnable meta queries (OpenUni, arXiv 2505.23661); its last hidden states at the
queries are the tokens. The prompt cannot see the queries, so it runs without gradient into a key-value cache and only the
queries carry one; `forward_plain` is the single pass it must equal.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import MODEL_FOR_TEXT_ENCODING_MAPPING, AutoConfig, AutoModel, AutoTokenizer, DynamicCache

from flowray.config.errors import InputError
from flowray.config.model import CausalText, EncoderText, TextConfig
from flowray.model.assets import asset_path


class Prompts(NamedTuple):
    """Right-padded token ids (B, L) int64 and their mask (B, L) bool."""

    ids: Tensor
    mask: Tensor


class TextTokens(NamedTuple):
    """What a head reads: values (B, N, width) fp32 and mask (B, N) bool, True where there is a token."""

    values: Tensor
    mask: Tensor


class TextModel(nn.Module):
    """Shared by both kinds: tokenizer, frozen backbone, `width` of the tokens."""

    def __init__(self, backbone: Any, tokenizer: Any, config: TextConfig):
        super().__init__()
        self.backbone: Any = backbone.eval().requires_grad_(False)
        self.tokenizer = tokenizer
        self.max_tokens = config.max_tokens
        self.width: int = getattr(backbone.config, "hidden_size", None) or backbone.config.d_model
        tokenizer.padding_side = "right"
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token

    def train(self, mode: bool = True) -> TextModel:
        """The backbone stays in eval mode: it is frozen."""
        super().train(mode)
        self.backbone.eval()
        return self

    def reset(self) -> None:
        """Draw the trainable parameters anew from the global RNG; a plain encoder has none."""

    def tokenize(self, prompts: Sequence[str]) -> Prompts:
        """Token ids on this module's device; prompts longer than max_tokens are cut."""
        device = next(self.backbone.parameters()).device
        out = self.tokenizer(list(prompts), padding=True, truncation=True, max_length=self.max_tokens, return_tensors="pt")
        return Prompts(out["input_ids"].to(device), out["attention_mask"].bool().to(device))


class CausalQueries(TextModel):
    """A frozen causal LM with learnable meta queries after the prompt."""

    def __init__(self, backbone: Any, tokenizer: Any, config: CausalText):
        super().__init__(backbone, tokenizer, config)
        self.template = config.template
        self.queries = nn.Parameter(torch.empty(config.queries, self.width))
        self.reset()

    def reset(self) -> None:
        nn.init.normal_(self.queries, std=self.width**-0.5)

    def tokenize(self, prompts: Sequence[str]) -> Prompts:
        return super().tokenize([self.template.replace("{prompt}", prompt) for prompt in prompts])

    def _positions(self, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Mask over prompt + queries, and position ids that skip the padding."""
        whole = torch.cat([mask, mask.new_ones(len(mask), len(self.queries))], dim=1)
        return whole, (whole.long().cumsum(1) - 1).clamp_min(0)

    def forward(self, prompts: Prompts) -> TextTokens:
        """Tokens (B, queries, width): the prompt without gradient into a cache, then the queries with gradient."""
        whole, positions = self._positions(prompts.mask)
        length = prompts.ids.shape[1]
        with torch.no_grad():
            cache = self.backbone(
                input_ids=prompts.ids,
                attention_mask=prompts.mask.long(),
                position_ids=positions[:, :length],
                past_key_values=DynamicCache(config=self.backbone.config),
                use_cache=True,
            ).past_key_values
        out = self.backbone(
            inputs_embeds=self.queries.expand(len(whole), -1, -1),
            attention_mask=whole.long(),
            position_ids=positions[:, length:],
            past_key_values=cache,
            use_cache=True,
        )
        return TextTokens(out.last_hidden_state.float(), whole[:, length:])

    def forward_plain(self, prompts: Prompts) -> TextTokens:
        """The same tokens in one pass over prompt and queries; the reference of `forward`."""
        whole, positions = self._positions(prompts.mask)
        embedded = self.backbone.get_input_embeddings()(prompts.ids)
        inputs = torch.cat([embedded, self.queries.expand(len(whole), -1, -1).to(embedded.dtype)], dim=1)
        out = self.backbone(inputs_embeds=inputs, attention_mask=whole.long(), position_ids=positions, use_cache=False)
        count = len(self.queries)
        return TextTokens(out.last_hidden_state[:, -count:].float(), whole[:, -count:])


class EncoderTokens(TextModel):
    """A frozen bidirectional encoder (CLIP, T5, BERT): its last hidden states."""

    def __init__(self, backbone: Any, tokenizer: Any, config: EncoderText):
        super().__init__(backbone, tokenizer, config)
        self.scale = config.scale

    @torch.no_grad()
    def forward(self, prompts: Prompts) -> TextTokens:
        """Tokens (B, L, width), padding masked."""
        out = self.backbone(input_ids=prompts.ids, attention_mask=prompts.mask.long())
        return TextTokens(out.last_hidden_state.float() * self.scale, prompts.mask)


def _load_lm(path: str | Path) -> Any:
    return AutoModel.from_pretrained(path, dtype=torch.float32)


def _load_encoder(path: str | Path) -> Any:
    """The text encoder of a checkpoint: T5's encoder without its decoder, CLIP's text model, or the model itself."""
    encoders: Any = MODEL_FOR_TEXT_ENCODING_MAPPING
    config = AutoConfig.from_pretrained(path)
    backbone = encoders[type(config)].from_pretrained(path, dtype=torch.float32) if type(config) in encoders else _load_lm(path)
    return getattr(backbone, "text_model", backbone)


_TEXT_MODELS: dict[type, tuple[Callable[[str | Path], Any], Callable[[Any, Any, Any], TextModel]]] = {
    CausalText: (_load_lm, CausalQueries),
    EncoderText: (_load_encoder, EncoderTokens),
}


def load_text(config: TextConfig) -> TextModel:
    """Load tokenizer and weights from a folder, a hub name, or the shipped model."""
    path: str | Path = asset_path("text") if config.path == "embedded" else config.path
    load, wrap = _TEXT_MODELS[type(config)]
    try:
        tokenizer, backbone = AutoTokenizer.from_pretrained(path), load(path)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:  # RuntimeError: weights of other shapes
        raise InputError(f"model.text.path: cannot load {str(path)!r}: {str(error).partition(chr(10))[0]}") from error
    return wrap(backbone, tokenizer, config)
