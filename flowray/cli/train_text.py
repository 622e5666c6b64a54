"""Pre-train the small causal LM that flowray ships, on the embedded captions, with its own tokenizer (`flowray assets text`)."""

from __future__ import annotations

import math
import time
from collections import Counter
from itertools import islice
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM, Qwen3Model

from flowray.data import digits, shapes

BATCH = 64
VOCABULARY = 512


def captions(split: shapes.Split, count: int, seed: int) -> list[list[str]]:
    """Of each of `count` scenes the plain caption and three others, and the captions of one digit to every eight scenes."""
    texts = [[shapes.caption(scene), *options] for _, options, scene in shapes.samples(count, split, seed)]
    return texts + [digits.captions(i % 10) for i in range(count // 8)]


def paraphrases(texts: list[list[str]], tokenizer: PreTrainedTokenizerFast) -> Tensor:
    """Token ids (N, L) of `a caption <eos> another caption of the same picture <eos>`, every other time the plain one.

    To foretell the second caption the model must have read the first one whole, colours, sizes and places at their objects: this
    is what meta queries after the caption will ask of it. On single captions alone it forgets what it need not say again; the
    plain caption, always in the same order, is what teaches it sizes, the others, which may begin with it, the background.
    """
    rows = [f"{text}{tokenizer.eos_token} {plain}" for plain, *others in texts for text in others]
    for _, *others in texts:
        rows += [f"{text}{tokenizer.eos_token} {others[(i + 1) % len(others)]}" for i, text in enumerate(others)]
    return tokenizer(rows, padding=True, return_tensors="pt")["input_ids"]


def train_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """Byte-level BPE, so that any prompt can be tokenised; ends every text with <eos>."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<pad>", "<eos>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=VOCABULARY, special_tokens=special, initial_alphabet=alphabet))
    tokenizer.post_processor = processors.TemplateProcessing(single="$A <eos>", special_tokens=[("<eos>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", padding_side="right")


def _nll(net: Qwen3ForCausalLM, ids: Tensor) -> Tensor:
    """Mean next-token loss in nats, padding (id 0) left out; the first token counts, predicted from <eos>."""
    start = torch.full_like(ids[:, :1], 1)
    mask = (ids != 0).long()
    logits = net(input_ids=torch.cat([start, ids[:, :-1]], 1), attention_mask=torch.cat([torch.ones_like(start), mask[:, :-1]], 1)).logits
    return F.cross_entropy(logits.flatten(0, 1), ids.flatten(), ignore_index=0)


def _unigram_perplexity(train: Tensor, held_out: Tensor) -> float:
    """Perplexity of held-out tokens under training frequencies, add-one smoothed."""
    counts = Counter(train[train != 0].tolist())
    total = sum(counts.values()) + VOCABULARY
    tokens = held_out[held_out != 0].tolist()
    return math.exp(-sum(math.log((counts[t] + 1) / total) for t in tokens) / len(tokens))


def train(out: Path, steps: int, seed: int = 0, start: Path | None = None) -> dict[str, float]:
    """Train tokenizer and model, save both to `out`; returns perplexities on held-out captions.

    start: a folder to continue from, with a schedule of its own; the tokenizer depends on the seed and is trained anew.
    """
    torch.manual_seed(seed)
    texts = captions("train", 20_000, seed)
    tokenizer = train_tokenizer([text for options in texts for text in options])
    encoded, held_out = paraphrases(texts, tokenizer), paraphrases(captions("val", 500, seed + 1), tokenizer)
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
    net = Qwen3ForCausalLM(config)
    if start is not None:
        net.model = Qwen3Model.from_pretrained(start)
        net.tie_weights()
    optimizer = torch.optim.AdamW(net.parameters(), lr=3e-3, betas=(0.9, 0.95), weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=3e-3, total_steps=steps, pct_start=0.1)
    began = time.monotonic()
    batches = (encoded[torch.randint(len(encoded), (BATCH,))] for _ in iter(int, 1))
    for step, ids in enumerate(islice(batches, steps)):
        loss = _nll(net, ids[:, : int((ids != 0).sum(1).max())])
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 50 == 0:
            print(f"step {step}/{steps}  perplexity {loss.detach().exp():.3f}  {time.monotonic() - began:.0f} s", flush=True)
    net.eval()
    with torch.no_grad():
        perplexity = math.exp(float(_nll(net, held_out)))
    net.model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    return {"perplexity": perplexity, "perplexity_unigram": _unigram_perplexity(encoded, held_out)}
