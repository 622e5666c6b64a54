"""The text side: a frozen language model that turns captions into tokens for the head.

A causal model sees the prompt and, after it, learnable meta queries (OpenUni, arXiv 2505.23661);
its last hidden states at the queries are the tokens. The prompt cannot see the queries, so it runs
without gradient into a key-value cache and only the queries carry one; `forward_plain` is the
single pass it must equal. With `cache` the prompt's keys and values are kept from step to step.
docs/benchmarks/text-cache.md has what both save.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from flowray.config.errors import InputError
from flowray.config.model import CausalText, EncoderText, TextConfig
from flowray.config.paths import is_hub_name
from flowray.model.backbone import backbone_width, load_backbone, planned_backbone
from flowray.model.connector import Connector
from flowray.model.files import TEXT, open_model
from flowray.model.layers import to_device
from flowray.model.local import find_place
from flowray.model.prompts import PromptTokenizer, load_tokenizer
from flowray.model.states import TokenStates


class Prompts(NamedTuple):
    """Right-padded token ids (B, L) int64 and their mask (B, L) bool."""

    ids: Tensor
    mask: Tensor


class TextTokens(NamedTuple):
    """What a head reads: values (B, N, width) fp32 and mask (B, N) bool, True where there is a
    token.
    """

    values: Tensor
    mask: Tensor

    def rows(self, indices: Tensor | slice) -> TextTokens:
        """The tokens of the captions at `indices`."""
        return TextTokens(self.values[indices], self.mask[indices])

    def repeated(self, again: int) -> TextTokens:
        """The tokens, `again` times over."""
        return TextTokens(self.values.repeat(again, 1, 1), self.mask.repeat(again, 1))


def _forget(model: TextModel, _: object) -> None:
    """Weights were loaded: what is kept was of others."""
    if model.kept is not None:
        model.kept.clear()


class TextModel(nn.Module):
    """Shared by both kinds: tokenizer, frozen backbone, connector if there is one, `width` of the
    tokens a head reads.

    prompts: None in a plan.
    """

    def __init__(self, backbone: Any, prompts: PromptTokenizer | None, config: TextConfig):
        super().__init__()
        self.backbone: Any = backbone.eval().requires_grad_(False)
        self._prompts, self.pad_to_max = prompts, False
        self.lm_width = backbone_width(backbone)
        self.connector = Connector(config.connector, self.lm_width) if config.connector else None
        self.width: int = config.connector.out if config.connector else self.lm_width
        self.kept = TokenStates(config.cache_gib) if config.cache else None
        self.register_load_state_dict_post_hook(_forget)

    @property
    def prompts(self) -> PromptTokenizer:
        """Captions to token ids."""
        if self._prompts is None:
            raise RuntimeError("a text model that is only planned has no tokenizer")
        return self._prompts

    def train(self, mode: bool = True) -> TextModel:
        """The backbone stays in eval mode: it is frozen."""
        super().train(mode)
        self.backbone.eval()
        return self

    @contextmanager
    def lent(self, backbone: Any, prompts: PromptTokenizer) -> Iterator[None]:
        """A block in which it reads with a frozen model and a tokenizer that someone else keeps."""
        mine = self.backbone, self._prompts
        self.backbone, self._prompts = backbone.eval().requires_grad_(False), prompts
        _forget(self, None)
        try:
            yield
        finally:
            self.backbone, self._prompts = mine

    def reset(self) -> None:
        """Draw the trainable parameters anew from the global RNG; a plain encoder has none."""
        if self.connector is not None:
            self.connector.reset()

    def own_dtype(self) -> AbstractContextManager[object]:
        """A block without autocast, for the backbone: training would otherwise see other tokens
        than sampling.
        """
        return torch.autocast(self.backbone.device.type, enabled=False)

    @contextmanager
    def whole_length(self) -> Iterator[None]:
        """A block in which a caption's tokens do not hang on the captions beside it, to the last
        bit: all have max_tokens positions, and none is taken from what was kept of another batch.
        """
        before = self.pad_to_max, self.kept
        self.pad_to_max, self.kept = True, None
        try:
            yield
        finally:
            self.pad_to_max, self.kept = before

    def states(self, prompts: Prompts, compute: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        """States (B, L, size) that the frozen backbone makes of tokens, by `compute` from ids and
        mask, or as they were kept.

        InputError where they are kept of a backbone that trains.
        """
        with torch.no_grad():
            if self.kept is None:
                return compute(*prompts)
            if any(p.requires_grad for p in self.backbone.parameters()):
                why = "the text model trains, so what it makes of a caption changes"
                raise InputError(f"model.text.cache: {why}; type model.text.cache=false")
            return self.kept(*prompts, compute)

    def connect(self, tokens: TextTokens) -> TextTokens:
        """Tokens as the head reads them: through the connector, if there is one."""
        return (
            tokens
            if self.connector is None
            else TextTokens(self.connector(*tokens).float(), tokens.mask)
        )

    def tokenize(self, prompts: Sequence[str]) -> Prompts:
        """Token ids on this module's device, cut to max_tokens as `PromptTokenizer.rows` does.

        InputError where the tokenizer gives an id without an embedding: it is another model's.
        """
        embeddings: Tensor = self.backbone.get_input_embeddings().weight
        rows, count, inner = self.prompts.rows(prompts), len(embeddings), self.prompts.inner
        for row, prompt in zip(rows, prompts, strict=True):
            if row and max(row) >= count:
                why = f"the id {max(row)}, but the model has {count} embeddings"
                instead = "give weights and tokenizer of one model"
                raise InputError(f"{TEXT}: its tokenizer gives {prompt[:60]!r} {why}; {instead}")
        # Padding is masked, so that any id will do: some tokenizers have none, or one too large.
        known = (i for i in (inner.pad_token_id, inner.eos_token_id) if i in range(count))
        padding = next(known, 0)
        length = self.prompts.max_tokens if self.pad_to_max else max([1, *map(len, rows)])
        device = embeddings.device
        ids = torch.tensor([row + [padding] * (length - len(row)) for row in rows])
        counts = torch.tensor([len(row) for row in rows])
        mask = torch.arange(length) < counts[:, None]
        return Prompts(to_device(ids, device), to_device(mask, device))


class CausalQueries(TextModel):
    """A frozen causal LM with learnable meta queries after the prompt."""

    def __init__(self, backbone: Any, prompts: PromptTokenizer | None, config: CausalText):
        super().__init__(backbone, prompts, config)
        self.queries = nn.Parameter(torch.empty(config.queries, self.lm_width))
        self._heads: list[tuple[int, int]] = []  # of each layer's keys and values
        self.reset()

    def reset(self) -> None:
        nn.init.normal_(self.queries, std=self.lm_width**-0.5)
        super().reset()

    def _positions(self, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Mask over prompt + queries, and position ids that skip the padding."""
        whole = torch.cat([mask, mask.new_ones(len(mask), len(self.queries))], dim=1)
        return whole, (whole.long().cumsum(1) - 1).clamp_min(0)

    def forward(self, prompts: Prompts) -> TextTokens:
        """Tokens (B, queries, width): the prompt without gradient into a cache, then the queries
        with gradient.
        """
        whole, positions = self._positions(prompts.mask)
        with self.own_dtype():
            if self.kept is None:
                cache = self._prefix(*prompts)
            else:
                cache = self._unpacked(self.states(prompts, self._packed))
            out = self.backbone(
                inputs_embeds=self.queries.expand(len(whole), -1, -1).to(self.backbone.dtype),
                attention_mask=whole.long(),
                position_ids=positions[:, prompts.ids.shape[1] :],
                past_key_values=cache,
                use_cache=True,
            )
        mask = whole[:, prompts.ids.shape[1] :]
        return self.connect(TextTokens(out.last_hidden_state.float(), mask))

    @torch.no_grad()
    def _prefix(self, ids: Tensor, mask: Tensor) -> Any:
        """The key-value cache of prompts (B, L)."""
        return self.backbone(
            input_ids=ids,
            attention_mask=mask.long(),
            position_ids=(mask.long().cumsum(1) - 1).clamp_min(0),
            past_key_values=DynamicCache(config=self.backbone.config),
            use_cache=True,
        ).past_key_values

    def _packed(self, ids: Tensor, mask: Tensor) -> Tensor:
        """All layers' keys and values of a token beside each other, (B, L, size)."""
        layers = self._prefix(ids, mask).layers
        parts = [part for layer in layers for part in (layer.keys, layer.values)]
        # a layer's keys may have other heads than its values, or than other layers'
        self._heads = [(part.shape[1], part.shape[3]) for part in parts]
        return torch.cat([part.transpose(1, 2).flatten(2) for part in parts], dim=-1)

    def _unpacked(self, states: Tensor) -> Any:
        """The key-value cache again, of (B, L, size)."""
        cache = DynamicCache(config=self.backbone.config)
        split = states.split([heads * dim for heads, dim in self._heads], dim=-1)
        parts = [
            part.unflatten(-1, heads).transpose(1, 2)
            for part, heads in zip(split, self._heads, strict=True)
        ]
        for layer, (key, value) in enumerate(zip(parts[::2], parts[1::2], strict=True)):
            cache.update(key, value, layer)
        return cache

    def forward_plain(self, prompts: Prompts) -> TextTokens:
        """The same tokens in one pass over prompt and queries; the reference of `forward`."""
        whole, positions = self._positions(prompts.mask)
        with self.own_dtype():
            embedded = self.backbone.get_input_embeddings()(prompts.ids)
            inputs = torch.cat(
                [embedded, self.queries.expand(len(whole), -1, -1).to(embedded.dtype)], dim=1
            )
            out = self.backbone(
                inputs_embeds=inputs,
                attention_mask=whole.long(),
                position_ids=positions,
                use_cache=False,
            )
        count = len(self.queries)
        return self.connect(
            TextTokens(out.last_hidden_state[:, -count:].float(), whole[:, -count:])
        )


class EncoderTokens(TextModel):
    """A frozen text encoder (CLIP, T5, BERT): its last hidden states."""

    def __init__(self, backbone: Any, prompts: PromptTokenizer | None, config: EncoderText):
        super().__init__(backbone, prompts, config)
        self.scale, self.pad_to_max = config.scale, bool(config.pad_to_max)
        self.sees_padding = config.pad_to_max == "seen"

    def forward(self, prompts: Prompts) -> TextTokens:
        """Tokens (B, L, width); the mask says which are padding."""
        seen = prompts
        if self.sees_padding:  # kept states have it then, too
            seen = Prompts(prompts.ids, torch.ones_like(prompts.mask))
        with self.own_dtype():
            hidden = self.states(seen, self._hidden)
        return self.connect(TextTokens(hidden.float() * self.scale, prompts.mask))

    def _hidden(self, ids: Tensor, mask: Tensor) -> Tensor:
        return self.backbone(input_ids=ids, attention_mask=mask.long()).last_hidden_state


_TEXT_MODELS: dict[type, Callable[[Any, PromptTokenizer | None, Any], TextModel]] = {
    CausalText: CausalQueries,
    EncoderText: EncoderTokens,
}


def load_text(config: TextConfig) -> TextModel:
    """Load tokenizer and weights from a folder, a hub name on this machine, or the shipped model.

    InputError says in one line what does not fit and what to type.
    """
    find_place(config.path, TEXT)  # a hub name's weights, before its tokenizer is missed
    prompts = load_tokenizer(config)
    model = _TEXT_MODELS[type(config)](load_backbone(config), prompts, config)
    _check_room(model, config)
    return model


def _check_room(model: TextModel, config: TextConfig) -> None:
    """InputError where the model has too few positions or too short a window for all tokens."""
    most, queries = config.max_tokens, config.queries if isinstance(config, CausalText) else 0
    limit = getattr(model.backbone.config, "max_position_embeddings", None)
    modules = model.backbone.named_modules()
    table = next((module for name, module in modules if name.endswith("position_embeddings")), None)
    if limit is not None and (padding := getattr(table, "padding_idx", None)) is not None:
        limit -= padding + 1  # RoBERTa counts positions from there
    if limit is not None and most + queries > limit:
        have = f"{config.path!r} has {limit} positions"
        raise InputError(f"model.text.max_tokens: {most} + {queries} queries, but {have}")
    window = getattr(model.backbone.config, "sliding_window", None)
    # a prompt's padding would take places in it: tokens would depend on the batch
    if window is not None and most + queries > window:
        have = f"{config.path!r} sees a window of {window} tokens"
        raise InputError(f"model.text.max_tokens: {most} + {queries} queries, but {have}")


def check_text(config: TextConfig) -> None:
    """InputError where `load_text` would refuse; no weights are read."""
    load_tokenizer(config)
    open_model(config.path, TEXT, "text_encoder")
    with torch.device("meta"):
        _check_room(planned_text(config), config)


def planned_text(config: TextConfig) -> TextModel:
    """The text model of a plan, without weights: its shapes from config.json, or the trainable
    parts alone from `width`.

    InputError where neither is known.
    """
    backbone: Any = planned_backbone(config)
    if backbone is None and config.width is None:
        if not is_hub_name(config.path):
            find_place(config.path, TEXT)  # says what is wrong with the path
        page = f"https://huggingface.co/{config.path}/blob/main/config.json"
        typed = f"type `hf download {config.path} config.json`, or model.text.width=N"
        where = f"N is hidden_size (T5: d_model) in {page}"
        here = f"{config.path!r} is not on this machine"
        raise InputError(f"model.text.width: {here}; {typed}: {where}")
    if backbone is None:
        assert config.width is not None
        return bare_text(config, config.width)
    return _TEXT_MODELS[type(config)](backbone, None, config)


def bare_text(config: TextConfig, width: int) -> TextModel:
    """The trainable parts alone, beside a frozen model of hidden size `width` that is not there."""
    backbone: Any = nn.Module()
    backbone.config = SimpleNamespace(hidden_size=width)
    return _TEXT_MODELS[type(config)](backbone, None, config)
