"""Pre-train the small causal LM that flowray ships, on the embedded captions, with its own
tokenizer (`tools.assets text`).
"""

from __future__ import annotations

import math
import time
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from flowray.data import digits, open_shapes, shapes

BATCH = 64
VOCABULARY = 768
QUERIES = 4
SCENES = 20_000


class Row(NamedTuple):
    """A caption and what it says, one word per fact."""

    caption: str
    facts: list[str]


class Encoded(NamedTuple):
    """Token ids of captions (N, L), padded with 0, and of their facts (N, F), padded with -1."""

    captions: Tensor
    facts: Tensor


def rows(split: shapes.Split, scenes: int, seed: int) -> list[Row]:
    """Captions of `scenes` scenes that name a part of them, and those of one digit to every eight
    scenes.
    """
    texts: list[Row] = []
    for index in range(scenes):
        rng = np.random.default_rng([seed, len(split), index])
        scene = shapes.draw_scene(rng, split, two_objects=index % 2 == 1)
        told = open_shapes.captions_of(scene, split, rng)
        texts += [Row(caption, open_shapes.facts(said)) for said, caption in told]
    return texts + [
        Row(caption, digits.facts(i % 10))
        for i in range(scenes // 8)
        for caption in digits.captions(i % 10)
    ]


def train_tokenizer(texts: list[Row]) -> PreTrainedTokenizerFast:
    """Byte-level BPE, so that any prompt can be tokenised; ends every text with <eos>. Facts
    become tokens of their own.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<pad>", "<eos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator((" ".join([row.caption, *row.facts]) for row in texts), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A <eos>", special_tokens=[("<eos>", 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", padding_side="right"
    )


def encode(texts: list[Row], tokenizer: PreTrainedTokenizerFast) -> Encoded:
    """Token ids. ValueError where a fact is not one token: the vocabulary is too small for them."""
    words = sorted({fact for row in texts for fact in row.facts})
    ids = dict(
        zip(
            words,
            tokenizer([f" {word}" for word in words], add_special_tokens=False)["input_ids"],
            strict=True,
        )
    )
    if split := [word for word, pieces in ids.items() if len(pieces) != 1]:
        raise ValueError(f"facts that are not one token: {', '.join(split)}")
    facts = torch.full((len(texts), max(len(row.facts) for row in texts)), -1)
    for i, row in enumerate(texts):
        facts[i, : len(row.facts)] = torch.tensor([ids[fact][0] for fact in row.facts])
    captions = tokenizer([row.caption for row in texts], padding=True, return_tensors="pt")[
        "input_ids"
    ]
    return Encoded(captions, facts)


def caption_loss(logits: Tensor, ids: Tensor) -> Tensor:
    """Mean next-token loss in nats of (B, L, V) logits over the caption's tokens after the
    first; padding (id 0) left out.
    """
    return F.cross_entropy(
        logits[:, : ids.shape[1] - 1].flatten(0, 1), ids[:, 1:].flatten(), ignore_index=0
    )


def query_loss(logits: Tensor, facts: Tensor) -> Tensor:
    """Mean cross-entropy of (B, Q, V) logits to the uniform distribution over each scene's facts
    (B, F).
    """
    known = facts >= 0
    nats = -logits.log_softmax(-1).gather(
        2, facts.clamp_min(0)[:, None].expand(-1, logits.shape[1], -1)
    )
    return ((nats * known[:, None]).sum(2) / known.sum(1)[:, None]).mean()


def run(net: Qwen3ForCausalLM, ids: Tensor, queries: Tensor) -> Tensor:
    """Logits (B, L + Q, V) over right-padded captions (B, L) and the query vectors (B, Q, width)
    after them.
    """
    mask = torch.cat([ids != 0, ids.new_ones(queries.shape[:2], dtype=torch.bool)], dim=1)
    embedded = torch.cat([net.get_input_embeddings()(ids), queries], dim=1)
    positions = (mask.long().cumsum(1) - 1).clamp_min(0)
    logits: Tensor = net(
        inputs_embeds=embedded, attention_mask=mask.long(), position_ids=positions
    ).logits
    return logits


def _unigram_perplexity(train: Tensor, held_out: Tensor) -> float:
    """Perplexity of held-out tokens after the first under training frequencies, add-one
    smoothed.
    """
    train, held_out = train[:, 1:], held_out[:, 1:]
    counts = Counter(train[train != 0].tolist())
    total = sum(counts.values()) + VOCABULARY
    tokens = held_out[held_out != 0].tolist()
    return math.exp(-sum(math.log((counts[t] + 1) / total) for t in tokens) / len(tokens))


def _fresh() -> Qwen3ForCausalLM:
    config = Qwen3Config(
        vocab_size=VOCABULARY,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=32,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=1,
    )
    return Qwen3ForCausalLM(config)


def train(out: Path, steps: int, seed: int = 0) -> dict[str, float]:
    """Train tokenizer and model, save both to `out`; returns perplexities on held-out captions.

    Beside the next token the model learns what meta queries will ask of it: at random vectors after
    the caption it names what that says, each with the same probability, so that a hidden
    state there holds all of them at once. A model of captions alone forgets what it need not say
    again, and the velocity network then waits long for the background or the sizes.
    """
    torch.manual_seed(seed)
    texts = rows("train", SCENES, seed)
    tokenizer = train_tokenizer(texts)
    data, held_out = encode(texts, tokenizer), encode(rows("val", 500, seed + 1), tokenizer)
    net = _fresh()
    width = net.config.hidden_size
    optimizer = torch.optim.AdamW(net.parameters(), lr=3e-3, betas=(0.9, 0.95), weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=3e-3, total_steps=steps, pct_start=0.1
    )
    began = time.monotonic()
    for step in range(steps):
        chosen = torch.randint(len(data.captions), (BATCH,))
        ids, facts = data.captions[chosen], data.facts[chosen]
        ids = ids[:, : int((ids != 0).sum(1).max())]
        # Meta queries start at width^-0.5 and move: any scale about it must do.
        queries = (
            torch.randn(BATCH, QUERIES, width)
            * width**-0.5
            * torch.exp(torch.empty(BATCH, QUERIES, 1).uniform_(-1, 2))
        )
        logits = run(net, ids, queries)
        language, question = caption_loss(logits, ids), query_loss(logits[:, ids.shape[1] :], facts)
        optimizer.zero_grad(set_to_none=True)
        (language + question).backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 50 == 0:
            told = f"perplexity {language.detach().exp():.3f}  facts {question.detach():.3f} nats"
            print(f"step {step}/{steps}  {told}  {time.monotonic() - began:.0f} s", flush=True)
    net.eval()
    with torch.no_grad():
        logits = run(
            net, held_out.captions, torch.randn(len(held_out.captions), 1, width) * width**-0.5
        )
    net.model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    known = (held_out.facts >= 0).sum(1)
    return {
        "perplexity": math.exp(float(caption_loss(logits, held_out.captions))),
        "perplexity_unigram": _unigram_perplexity(data.captions, held_out.captions),
        "facts_nats": float(query_loss(logits[:, -1:], held_out.facts)),
        "facts_nats_least": float(known.float().log().mean()),
    }
