"""The text side: a frozen language model that turns captions into tokens for the head.

A causal model sees the prompt and, after it, learnable meta queries (OpenUni, arXiv 2505.23661); its last hidden states at the
queries are the tokens. The prompt cannot see the queries, so it runs without gradient into a key-value cache and only the
queries carry one; `forward_plain` is the single pass it must equal. docs/benchmarks/text-cache.md has what that saves.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from jinja2 import TemplateError
from torch import Tensor, nn
from transformers import DynamicCache

from flowray.config.errors import InputError
from flowray.config.model import CausalText, EncoderText, TextConfig
from flowray.model.backbone import backbone_width, load_backbone
from flowray.model.connector import Connector

PROMPT = "{prompt}"


class Prompts(NamedTuple):
    """Right-padded token ids (B, L) int64 and their mask (B, L) bool."""

    ids: Tensor
    mask: Tensor


class TextTokens(NamedTuple):
    """What a head reads: values (B, N, width) fp32 and mask (B, N) bool, True where there is a token."""

    values: Tensor
    mask: Tensor


class TextModel(nn.Module):
    """Shared by both kinds: tokenizer, frozen backbone, connector if there is one, `width` of the tokens a head reads.

    frame: the text around a prompt, with {prompt} in it. special: whether the tokenizer adds its own special tokens.
    """

    def __init__(self, backbone: Any, tokenizer: Any, config: TextConfig, frame: str = PROMPT, special: bool = True):
        super().__init__()
        self.backbone: Any = backbone.eval().requires_grad_(False)
        self.tokenizer, self.frame, self.special = tokenizer, frame, special
        self.max_tokens, self.pad_to_max = config.max_tokens, False
        self.lm_width = backbone_width(backbone)
        self.connector = Connector(config.connector, self.lm_width) if config.connector else None
        self.width: int = config.connector.out if config.connector else self.lm_width
        self._cut_before = False

    def train(self, mode: bool = True) -> TextModel:
        """The backbone stays in eval mode: it is frozen."""
        super().train(mode)
        self.backbone.eval()
        return self

    def reset(self) -> None:
        """Draw the trainable parameters anew from the global RNG; a plain encoder has none."""
        if self.connector is not None:
            self.connector.reset()

    def connect(self, tokens: TextTokens) -> TextTokens:
        """Tokens as the head reads them: through the connector, if there is one."""
        return tokens if self.connector is None else TextTokens(self.connector(*tokens).float(), tokens.mask)

    def _tokens(self, prompts: Sequence[str], **options: Any) -> list[list[int]]:
        """Token ids of framed prompts."""
        texts = [self.frame.replace(PROMPT, prompt) for prompt in prompts]
        return self.tokenizer(texts, add_special_tokens=self.special, verbose=False, **options)["input_ids"]

    def tokenize(self, prompts: Sequence[str]) -> Prompts:
        """Token ids on this module's device. A prompt too long for max_tokens is cut at its end, the frame kept whole; one warning."""
        device = next(self.backbone.parameters()).device
        rows = self._tokens(prompts)
        for i, (row, prompt) in enumerate(zip(rows, prompts, strict=True)):
            if len(row) > self.max_tokens:
                self._warn(prompt, len(row))
                rows[i] = self._tokens([self._cut(prompt)], truncation=True, max_length=self.max_tokens)[0]
        length = self.max_tokens if self.pad_to_max else max([1, *map(len, rows)])
        ids = torch.tensor([row + [self.tokenizer.pad_token_id] * (length - len(row)) for row in rows], device=device)
        counts = torch.tensor([len(row) for row in rows], device=device)
        return Prompts(ids, torch.arange(length, device=device) < counts[:, None])

    def _cut(self, prompt: str) -> str:
        """A prompt without its end, so that it and the frame fit; where there is no frame the tokenizer's own cut is enough."""
        if self.frame == PROMPT or not self.tokenizer.is_fast:
            return prompt
        ends = [end for _, end in self.tokenizer(prompt, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]]
        # More than once, because what is left may fall into other tokens beside the frame.
        while ends and (excess := len(self._tokens([prompt])[0]) - self.max_tokens) > 0:
            ends = ends[:-excess]
            prompt = prompt[: ends[-1]] if ends else ""
        return prompt

    def _warn(self, prompt: str, length: int) -> None:
        if not self._cut_before:
            self._cut_before = True
            cut = f"a prompt of {length} tokens was cut to {self.max_tokens}, later ones silently"
            warnings.warn(f"model.text.max_tokens: {cut}: {prompt[:60]!r}", stacklevel=3)


class CausalQueries(TextModel):
    """A frozen causal LM with learnable meta queries after the prompt."""

    def __init__(self, backbone: Any, tokenizer: Any, config: CausalText):
        frame = chat_frame(tokenizer, config) if config.chat and tokenizer is not None else config.template
        super().__init__(backbone, tokenizer, config, frame, special=not config.chat)
        self.queries = nn.Parameter(torch.empty(config.queries, self.lm_width))
        self.reset()

    def reset(self) -> None:
        nn.init.normal_(self.queries, std=self.lm_width**-0.5)
        super().reset()

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
            inputs_embeds=self.queries.expand(len(whole), -1, -1).to(self.backbone.dtype),
            attention_mask=whole.long(),
            position_ids=positions[:, length:],
            past_key_values=cache,
            use_cache=True,
        )
        return self.connect(TextTokens(out.last_hidden_state.float(), whole[:, length:]))

    def forward_plain(self, prompts: Prompts) -> TextTokens:
        """The same tokens in one pass over prompt and queries; the reference of `forward`."""
        whole, positions = self._positions(prompts.mask)
        embedded = self.backbone.get_input_embeddings()(prompts.ids)
        inputs = torch.cat([embedded, self.queries.expand(len(whole), -1, -1).to(embedded.dtype)], dim=1)
        out = self.backbone(inputs_embeds=inputs, attention_mask=whole.long(), position_ids=positions, use_cache=False)
        count = len(self.queries)
        return self.connect(TextTokens(out.last_hidden_state[:, -count:].float(), whole[:, -count:]))


class EncoderTokens(TextModel):
    """A frozen text encoder (CLIP, T5, BERT): its last hidden states."""

    def __init__(self, backbone: Any, tokenizer: Any, config: EncoderText):
        super().__init__(backbone, tokenizer, config)
        self.scale, self.pad_to_max = config.scale, config.pad_to_max

    def forward(self, prompts: Prompts) -> TextTokens:
        """Tokens (B, L, width), padding masked."""
        with torch.no_grad():
            out = self.backbone(input_ids=prompts.ids, attention_mask=prompts.mask.long())
        return self.connect(TextTokens(out.last_hidden_state.float() * self.scale, prompts.mask))


def chat_frame(tokenizer: Any, config: CausalText) -> str:
    """The chat template around the recipe's template, {prompt} still in it; InputError where the tokenizer has none that takes it."""
    if not tokenizer.chat_template:
        raise InputError(f"model.text.chat: the tokenizer of {config.path!r} has no chat template; type model.text.chat=false")
    why: object = "it does not repeat what it is told"
    for words in (config.template, [{"type": "text", "text": config.template}]):  # a vision-language model's may want a list
        system = [] if config.system is None else [{"role": "system", "content": config.system}]
        try:
            messages = [*system, {"role": "user", "content": words}]
            text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        except (TemplateError, TypeError) as error:
            why = error
            continue
        if PROMPT in text:
            return text + config.suffix
    raise InputError(f"model.text.chat: the chat template of {config.path!r} does not take system and user text: {why}")


_TEXT_MODELS: dict[type, Callable[[Any, Any, Any], TextModel]] = {CausalText: CausalQueries, EncoderText: EncoderTokens}


def load_text(config: TextConfig) -> TextModel:
    """Load tokenizer and weights from a folder, a hub name, or the shipped model; InputError says in one line what does not fit."""
    backbone, tokenizer = load_backbone(config)
    tokenizer.padding_side = "right"
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    model = _TEXT_MODELS[type(config)](backbone, tokenizer, config)
    _check_room(model, config)
    return model


def _check_room(model: TextModel, config: TextConfig) -> None:
    """InputError where the template fills max_tokens, or the model has too few positions or too short a window for all tokens."""
    frame, most = len(model._tokens([""])[0]), config.max_tokens
    if frame >= most:
        raise InputError(f"model.text.max_tokens: got {most}, but the template alone takes {frame} tokens; raise it")
    queries = config.queries if isinstance(config, CausalText) else 0
    limit = getattr(model.backbone.config, "max_position_embeddings", None)
    if limit is not None and most + queries > limit:
        raise InputError(f"model.text.max_tokens: {most} + {queries} queries, but {config.path!r} has {limit} positions")
    window = getattr(model.backbone.config, "sliding_window", None)
    if window is not None and most + queries > window:  # a prompt's padding would take places in it: tokens would depend on the batch
        raise InputError(f"model.text.max_tokens: {most} + {queries} queries, but {config.path!r} sees a window of {window} tokens")


def planned_text(config: TextConfig) -> TextModel:
    """The text model without its frozen weights: the trainable parts of a plan. InputError where the recipe does not give `width`."""
    if config.width is None:
        raise InputError(f"model.text.width: a plan without the weights of {config.path!r} needs it; type model.text.width=N")
    absent: Any = nn.Module()
    absent.config = SimpleNamespace(hidden_size=config.width)
    return _TEXT_MODELS[type(config)](absent, None, config)
