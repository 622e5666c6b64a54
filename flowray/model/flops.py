"""Floating point operations of a training step: those of its matrix products and convolutions, two
for a multiply-add, counted from the modules' shapes.

A layer takes 2 x weights x rows, attention 4 x queries x keys x width; elementwise work is not
counted. A backward pass takes twice the forward one, through frozen weights once. The networks
of the semantic losses are left out, and so is what an optimiser does.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from torch import nn

from flowray.model.assemble import FlowModel
from flowray.model.condition import CaptionAttention
from flowray.model.connector import Connector
from flowray.model.dimr import ConvNeXtBlock, DiMR, Stage
from flowray.model.dit import DiT
from flowray.model.heads import Conv, Grid, Mapped, Pooled
from flowray.model.layers import ConvAdaptor
from flowray.model.levels import VelocityNet
from flowray.model.text import CausalQueries, TextModel
from flowray.model.transencoder import TransEncoder

_NO_PRODUCTS = (nn.Embedding, nn.LayerNorm, nn.RMSNorm, nn.GroupNorm)


@dataclass(frozen=True)
class StepFlops:
    """Of one image in a training step. model: forward and backward, as MFU has it (PaLM, arXiv
    2204.02311); again: what gradient checkpointing computes a second time.
    """

    model: float
    again: float


def step_flops(model: FlowModel, prompt: float) -> StepFlops | None:
    """Of captions of so many tokens and latents of the model's own size; None where a part of the
    model is not known here.
    """
    head = model.head
    tokens = _queries(model.text) or prompt
    passed = velocity_flops(model.velocity, model.config.latent.shape[1:], tokens)
    made = 0.0 if head is None else head_flops(head, tokens)
    if passed is None or made is None:
        return None
    forward, blocks = passed
    trained = forward + made
    if model.text.connector is not None:
        trained += _connector(model.text.connector, tokens)
    again = blocks if model.config.velocity.gradient_checkpointing else 0.0
    return StepFlops(3 * trained + text_flops(model.text, prompt), again)


def products(module: nn.Module, rows: float) -> float:
    """Of all linear layers and convolutions in a module, each on so many rows or cells."""
    weights = (
        part.weight
        for name, part in module.named_modules()
        if not isinstance(part, _NO_PRODUCTS)
        and "pooler" not in name
        and isinstance(getattr(part, "weight", None), nn.Parameter)
    )
    return sum(2.0 * weight.numel() * rows for weight in weights if weight.ndim > 1)


def _attended(queries: float, keys: float, width: int) -> float:
    return 4.0 * queries * keys * width


def text_flops(text: TextModel, prompt: float) -> float:
    """Of the frozen backbone: a prompt's forward pass, none where it is kept, and the queries'
    pass with the gradient of their inputs.
    """
    if not hasattr(text.backbone, "get_input_embeddings"):
        return 0.0  # of a plan without its config.json
    config = text.backbone.config.get_text_config()
    layers = getattr(config, "num_hidden_layers", None) or config.num_layers
    heads = getattr(config, "num_attention_heads", None) or config.num_heads
    size = (
        getattr(config, "head_dim", None) or getattr(config, "d_kv", None) or text.lm_width // heads
    )

    def passed(new: float, read: float) -> tuple[float, float]:
        return products(text.backbone, new), layers * _attended(new, read, heads * size)

    made = 0.0 if text.kept is not None else sum(passed(prompt, prompt))
    if not (queries := _queries(text)):
        return made
    linear, attended = passed(queries, prompt + queries)
    return made + 2 * linear + 3 * attended


def _queries(text: TextModel) -> int:
    return len(text.queries) if isinstance(text, CausalQueries) else 0


def _each(modules: nn.ModuleList) -> list[Any]:
    """torch's list does not say of what it is."""
    return list(modules)


def _connector(connector: Connector, tokens: float) -> float:
    attended = sum(
        _attended(tokens, tokens, layer.out.in_features) for layer in _each(connector.layers)
    )
    return products(connector, tokens) + attended


def _read(caption: CaptionAttention, rows: float, tokens: float) -> float:
    """Of a block's rows that read a caption's tokens."""
    own = products(caption.query, rows) + products(caption.out, rows)
    return (
        own + products(caption.key_value, tokens) + _attended(rows, tokens, caption.out.in_features)
    )


def _dit(net: DiT, size: tuple[int, int], tokens: float) -> tuple[float, float]:
    """Forward, and of that the blocks."""
    config = net.config
    cells = (size[0] // config.patch) * (size[1] // config.patch)
    extra = int(config.indicator == "token")
    part = config.route.kept(cells) if config.route else cells
    blocks = 0.0
    for number, block in enumerate(_each(net.blocks)):
        rows = (part if number in config.routed else cells) + extra
        blocks += products(block.modulation, 1) + _attended(rows, rows, config.width)
        blocks += sum(products(layer, rows) for layer in (block.qkv, block.out, block.mlp))
        if block.caption is not None:
            blocks += _read(block.caption, rows, tokens)
    once = [part for part in (net.time, net.pooled, net.modulation) if part is not None]
    rest = products(net.patch_in, cells) + products(net.patch_out, cells)
    rest += sum(products(part, 1) for part in once)
    if net.caption is not None:
        rest += products(net.caption, tokens)
    return blocks + rest, blocks


def _dimr(net: DiMR, size: tuple[int, int], tokens: float) -> tuple[float, float]:
    """Forward, and of that the blocks."""
    forward, all_blocks = 0.0, 0.0
    for stage in (each for each in net.children() if isinstance(each, Stage)):
        cells = (size[0] // stage.patch) * (size[1] // stage.patch)
        rows = cells + int(stage.null is not None)
        blocks = 0.0
        for block in _each(stage.blocks):
            if isinstance(block, ConvNeXtBlock):
                blocks += products(block, rows)
                continue
            blocks += sum(products(layer, rows) for layer in (block.qkv, block.out, block.mlp))
            blocks += _attended(rows, rows, block.out.in_features)
            if block.caption is not None:
                blocks += _read(block.caption, rows, tokens)
        forward += blocks + products(stage.patch_in, cells) + products(stage.out, cells)
        forward += products(stage.skips, rows)
        if stage.upsample is not None:
            forward += products(stage.upsample, cells / 4)
        if stage.caption is not None:
            forward += products(stage.caption, tokens)
        all_blocks += blocks
    return forward, all_blocks


_VELOCITIES: dict[type, Callable[[Any, tuple[int, int], float], tuple[float, float]]] = {
    DiT: _dit,
    DiMR: _dimr,
}


def velocity_flops(
    net: VelocityNet, size: tuple[int, int], tokens: float
) -> tuple[float, float] | None:
    """Of a forward pass as in training, of a latent's size and a caption's tokens: of all, and of
    the blocks alone; None of a network that is not known here.
    """
    counted = _of(_VELOCITIES, net)
    return None if counted is None else counted(net, size, tokens)


Counted = TypeVar("Counted")


def _of(table: dict[type, Counted], module: nn.Module) -> Counted | None:
    """By the module's class, or what it is derived from: sharding derives."""
    return next((counted for kind, counted in table.items() if isinstance(module, kind)), None)


def _pooled(head: Pooled, tokens: float) -> float:
    return products(head, 1)


def _grid(head: Grid, tokens: float) -> float:
    cells = len(head.cells)
    made = products(head.embed, tokens) + products(head.convs, cells) + products(head.out, cells)
    for layer in _each(head.layers):
        made += sum(products(part, cells) for part in (layer.query, layer.out, layer.mlp))
        made += products(layer.key_value, tokens) + _attended(cells, tokens, layer.out.in_features)
    return made


def _conv(head: Conv, tokens: float) -> float:
    cells = head.latent.height * head.latent.width
    return products(head.mlp, 1) + products(head.convs, cells) + products(head.out, cells)


def _transencoder(head: TransEncoder, tokens: float) -> float:
    rows, cells = head.tokens, head.latent.height * head.latent.width
    made = products(head.compress, rows) + products(head.layers, rows)
    made += sum(_attended(rows, rows, layer.out.in_features) for layer in _each(head.layers))
    if isinstance(head.out, ConvAdaptor):
        convs = products(head.out.convs, cells) + products(head.out.last, cells)
        return made + products(head.out.linear, 1) + convs
    return made + products(head.out, 1)


_HEADS: dict[type, Callable[[Any, float], float]] = {
    Pooled: _pooled,
    Grid: _grid,
    Conv: _conv,
    TransEncoder: _transencoder,
}


def head_flops(head: nn.Module, tokens: float) -> float | None:
    """Forward, on so many tokens; None of a head that is not known here."""
    if isinstance(head, Mapped):
        inner = head_flops(head.head, tokens)
        return None if inner is None else inner + products(head.map, 1)
    counted = _of(_HEADS, head)
    return None if counted is None else counted(head, tokens)
