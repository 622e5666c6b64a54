"""What keeping the frozen model's states saves: `python tests/model/bench_text_states.py`, figures
in docs/benchmarks/text-cache.md.

Forward and backward of the text side alone, with and without `model.text.cache`, one after the
other in one process, captions seen before: the shipped model and random ones of SmolLM2-135M's
and MiniLM-L6's sizes (but for their vocabularies).
"""

from __future__ import annotations

import statistics
import time
from typing import Any

import torch

from flowray.config.model import CausalText, EncoderText
from flowray.model.backbone import load_backbone
from flowray.model.states import TokenStates
from flowray.model.text import CausalQueries, EncoderTokens, Prompts, TextModel

BATCH, TOKENS, ROUNDS = 16, 20, 5


def shipped() -> Any:
    return load_backbone(CausalText())


def smollm2() -> Any:
    from transformers import LlamaConfig, LlamaModel

    return LlamaModel(
        LlamaConfig(
            vocab_size=1000,
            hidden_size=576,
            intermediate_size=1536,
            num_hidden_layers=30,
            num_attention_heads=9,
            num_key_value_heads=3,
        )
    )


def minilm() -> Any:
    from transformers import BertConfig, BertModel

    return BertModel(
        BertConfig(
            vocab_size=1000,
            hidden_size=384,
            intermediate_size=1536,
            num_hidden_layers=6,
            num_attention_heads=12,
        ),
        add_pooling_layer=False,
    )


def seconds(model: TextModel, prompts: Prompts, kept: TokenStates | None) -> float:
    """CPU time of one forward, and where something trains backward, pass."""
    model.kept = kept
    began = time.process_time()
    values = model(prompts).values
    if values.requires_grad:
        values.square().mean().backward()
    return time.process_time() - began


def measure(name: str, model: TextModel, vocabulary: int) -> None:
    torch.manual_seed(0)
    ids = torch.randint(vocabulary, (BATCH, TOKENS))
    prompts = Prompts(ids, torch.ones(BATCH, TOKENS, dtype=torch.bool))
    kept = TokenStates(2.0)
    first = seconds(model, prompts, kept)
    size = kept.nbytes / BATCH / TOKENS
    times: dict[bool, list[float]] = {False: [], True: []}
    for _ in range(ROUNDS):
        for on in times:
            times[on].append(seconds(model, prompts, kept if on else None))
    without, with_it = (statistics.median(times[on]) for on in (False, True))
    saved = [1 - b / a for a, b in zip(times[False], times[True], strict=True)]
    print(
        f"{name}: without {without * 1000:.1f} ms ({min(times[False]) * 1000:.1f} to"
        f" {max(times[False]) * 1000:.1f}), with {with_it * 1000:.1f} ms"
        f" ({min(times[True]) * 1000:.1f} to {max(times[True]) * 1000:.1f}), saved"
        f" {statistics.median(saved):.0%} ({min(saved):.0%} to {max(saved):.0%}), first"
        f" {first * 1000:.1f} ms, {size / 1000:.2f} kB a token",
        flush=True,
    )


if __name__ == "__main__":
    torch.set_num_threads(1)
    for queries in (4, 64):
        for make in (shipped, smollm2):
            net = make()
            config = CausalText(queries=queries, max_tokens=TOKENS)
            model = CausalQueries(net, None, config)
            measure(f"{make.__name__}, {queries} queries", model, net.config.vocab_size)
    encoder = EncoderTokens(minilm(), None, EncoderText(path="none", max_tokens=TOKENS))
    measure("minilm, encoder", encoder, 1000)
