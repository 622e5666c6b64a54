"""The formula of a step's operations against what torch counts in one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support import tiny_recipe, tiny_text, word_tokenizer
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from flowray.config.load import override_recipe
from flowray.config.model import CausalText, DiTVelocity, EncoderText
from flowray.config.recipe import Recipe
from flowray.losses.total import Batch
from flowray.model.flops import step_flops, text_flops
from flowray.model.text import load_text
from flowray.train.state import fresh_state

WIDE = {
    "model.latent.height": 16,
    "model.latent.width": 16,
    "model.velocity.width": 64,
    "model.velocity.depth": 4,
    "model.velocity.patch": 2,
    "model.head.hidden": 64,
}
ROUTE = {"before": 1, "after": 1, "keep": 0.25}
DIMR = {"kind": "dimr", "widths": [64, 32], "depths": [3, 3]}
CONNECTOR = {"layers": 2, "hidden": 48, "intermediate": 96, "heads": 4, "out": 40}
NOISE = {"model.source.kind": "noise", "loss.kl.weight": 0.0}


def recipe_of(tmp_path: Path, changes: dict[str, Any]) -> Recipe:
    """A change that is another kind drops the keys of the kind before."""
    kinds = tuple(f"{key}." for key, value in changes.items() if isinstance(value, dict))
    kept = {key: value for key, value in WIDE.items() if not key.startswith(kinds or ("-",))}
    return override_recipe(tiny_recipe(tmp_path, **kept), changes)


def counted(recipe: Recipe, images: int = 2) -> tuple[float, float]:
    """(torch's count of a step's forward and backward pass, the formula's) of one image."""
    state = fresh_state(recipe, torch.device("cpu"))
    model, shape, velocity = state.model, recipe.model.latent.shape, recipe.model.velocity
    generator = torch.Generator().manual_seed(0)
    z1, noise = (torch.randn(images, *shape, generator=generator) for _ in range(2))
    captions = ["a red circle above a small blue square"] * images
    kept = None
    if isinstance(velocity, DiTVelocity) and velocity.route:
        cells = shape[1] * shape[2] // velocity.patch**2
        kept = torch.arange(velocity.route.kept(cells)).expand(images, -1)
    t, null = torch.full((images,), 0.5), torch.zeros(images, dtype=torch.bool)
    batch = Batch(captions, z1, z1, noise, t, null, kept)
    over = [0.0]  # torch counts the gradient of a grouped convolution's weights as a dense one's

    def grouped(layer: nn.Conv2d, given: object, made: Tensor) -> None:
        over[0] += 2.0 * layer.weight.numel() * (layer.groups - 1) * made[0, 0].numel()

    for layer in model.modules():
        if isinstance(layer, nn.Conv2d):
            layer.register_forward_hook(grouped)
    model.text(model.text.tokenize(captions))  # where captions are kept, they are from here on
    over[0] = 0.0
    # a CPU's fused attention is not counted
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        losses, _ = state.objective(batch)
        torch.stack(list(losses.values())).sum().backward()
    (row,) = {tuple(row) for row in model.text.prompts.rows(captions)}
    formula = step_flops(model, len(row))
    assert formula is not None
    return counter.get_total_flops() / images - over[0], formula.model + formula.again


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"model.velocity.route": ROUTE},
        {"model.velocity.gradient_checkpointing": True},
        {"model.velocity.condition": {"kind": "cross_attention"}},
        {"model.velocity.condition": {"kind": "adaln"}, "model.velocity.indicator": "token"},
        {"model.velocity": DIMR},
        {"model.head": {"kind": "pooled", "hidden": 64}},
        {"model.head": {"kind": "conv", "hidden": 32}},
        {"model.head": {"kind": "transencoder"}},
        {**NOISE, "model.velocity.condition": {"kind": "cross_attention"}},
        {"model.text.connector": CONNECTOR},
        {"model.text.cache": True},
    ],
    ids=str,
)
def test_the_formula_counts_what_torch_counts(tmp_path: Path, changes: dict[str, Any]) -> None:
    found, formula = counted(recipe_of(tmp_path, changes))
    assert formula == pytest.approx(found, rel=0.02)


def encoder(kind: str) -> nn.Module:
    from transformers import BertConfig, BertModel, T5Config, T5EncoderModel

    if kind == "t5":
        sizes = {"d_model": 32, "d_kv": 16, "d_ff": 64, "num_layers": 2, "num_heads": 2}
        return T5EncoderModel(T5Config(vocab_size=64, **sizes))
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    return BertModel(BertConfig(vocab_size=64, num_attention_heads=2, **sizes))


@pytest.mark.parametrize("kind", ["t5", "bert", "queries"])
def test_the_frozen_text_model_counts_alone(tmp_path: Path, kind: str) -> None:
    if kind == "queries":
        text = load_text(CausalText(path=str(tiny_text(tmp_path)), queries=4))
    else:
        encoder(kind).save_pretrained(tmp_path)
        word_tokenizer().save_pretrained(tmp_path)
        text = load_text(EncoderText(path=str(tmp_path), max_tokens=16))
    prompts = text.tokenize(["a red circle above a small blue square"])
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        values = text(prompts).values
        if values.requires_grad:
            values.sum().backward()
    found = counter.get_total_flops()
    assert text_flops(text, prompts.ids.shape[1]) == pytest.approx(found, rel=0.02)


def test_a_part_that_is_not_known_has_no_formula(tmp_path: Path) -> None:
    model = fresh_state(tiny_recipe(tmp_path), torch.device("cpu")).model
    assert step_flops(model, 8) is not None
    model.head = nn.Identity()
    assert step_flops(model, 8) is None
