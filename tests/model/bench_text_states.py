"""What keeping the frozen model's states saves: `python tests/model/bench_text_states.py`, figures
in docs/benchmarks/text-cache.md. With recipe keys (`... model.text.path=FOLDER`) whole steps of
quickstart at batch 32 are timed instead.

Forward and backward of the text side alone, with and without `model.text.cache`, one after the
other in one process, captions seen before: the shipped model and random ones of SmolLM2-135M's
and MiniLM-L6's sizes (but for their vocabularies).
"""

from __future__ import annotations

import statistics
import sys
import time
from typing import Any

import torch

from flowray.config.model import CausalText, EncoderText
from flowray.model.backbone import load_backbone
from flowray.model.states import TokenStates
from flowray.model.text import CausalQueries, EncoderTokens, Prompts, TextModel

BATCH, TOKENS, ROUNDS = 16, 20, 5
Times = dict[bool, list[float]]  # with the cache or without


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
    first_and_size = f"first {first * 1000:.1f} ms, {size / 1000:.2f} kB a token"
    times: Times = {False: [], True: []}
    for _ in range(ROUNDS):
        for on in times:
            times[on].append(seconds(model, prompts, kept if on else None))
    print(f"{name}: {compared(times)}, {first_and_size}", flush=True)


def compared(times: Times) -> str:
    def said(on: bool) -> str:
        middle, *ends = statistics.median(times[on]), min(times[on]), max(times[on])
        return f"{middle * 1000:.1f} ms ({ends[0] * 1000:.1f} to {ends[1] * 1000:.1f})"

    saved = [1 - b / a for a, b in zip(times[False], times[True], strict=True)]
    middle, low, high = statistics.median(saved), min(saved), max(saved)
    return f"without {said(False)}, with {said(True)}, saved {middle:.0%} ({low:.0%} to {high:.0%})"


def steps(keys: list[str]) -> None:
    """CPU time of whole training steps on the same two batches, in turns."""
    from flowray.config.load import load_recipe, override_recipe
    from flowray.store.latents import ensure_latents, load_latents
    from flowray.train.group import Group
    from flowray.train.state import fresh_state
    from flowray.train.step import BatchMaker, train_step

    given = ["train.batch_size=32", "train.device=cpu", "resources.num_workers=1", *keys]
    recipe, group = load_recipe("quickstart", given).recipe, Group(0, 1, torch.device("cpu"))
    folders = ensure_latents(recipe.data, recipe.model.autoencoder, recipe.model.latent)
    batches = BatchMaker(recipe, load_latents(folders["train"]), group)
    states = {
        on: fresh_state(override_recipe(recipe, {"model.text.cache": on}), group.device)
        for on in (False, True)
    }
    times: Times = {False: [], True: []}
    losses: Times = {False: [], True: []}
    for i in range(ROUNDS + 3):
        for on, state in states.items():
            began = time.process_time()
            row = train_step(state, state.objective, batches(i % 2), recipe, group)
            times[on].append(time.process_time() - began)
            losses[on].append(float(row["loss/total"].detach()))
    seen = {on: each[2:] for on, each in times.items()}  # the captions are met before
    apart = max(abs(a - b) for a, b in zip(losses[False], losses[True], strict=True))
    print(f"a step: {compared(seen)}, losses apart by at most {apart:.1e}")


if __name__ == "__main__":
    torch.set_num_threads(1)
    if len(sys.argv) > 1:
        steps(sys.argv[1:])
        sys.exit()
    for queries in (4, 64):
        for make in (shipped, smollm2):
            net = make()
            config = CausalText(queries=queries, max_tokens=TOKENS)
            model = CausalQueries(net, None, config)
            measure(f"{make.__name__}, {queries} queries", model, net.config.vocab_size)
    encoder = EncoderTokens(minilm(), None, EncoderText(path="none", max_tokens=TOKENS))
    measure("minilm, encoder", encoder, 1000)
