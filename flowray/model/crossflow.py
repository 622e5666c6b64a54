"""Checkpoints of CrossFlow (arXiv 2412.15213) as published, nnet.pth or nnet_ema.pth: each tensor
becomes one of a `FlowModel`'s, or is skipped by name.

Text encoder, DiMR and DiT are read. flowray/model/crossflow_config.py reads the sizes.
"""

from __future__ import annotations

import pickle
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from einops import rearrange
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from flowray.config.base import LatentSpec
from flowray.config.errors import InputError
from flowray.config.model import DiTVelocity
from flowray.model.assemble import FlowModel
from flowray.model.dit import DiT
from flowray.model.layers import positions_2d
from flowray.model.transencoder import TransEncoder

Tensors = dict[str, Tensor]
TOWER = "the contrastive loss's image tower, which pictures are made without"
SKIPPED: Mapping[str, str] = {
    r"open_clip(_output)?\..+": TOWER,
    r"pos_embed": "fixed sines, which a DiT here makes itself in another order of channels",
}
_TIMED = {"param0": "p0", "param1": "p1", "nodecay_weight": "w", "nodecay_bias": "b"}
_OF_NORM = {"weight": "scale", "bias": "shift", "scale": "scale"}
_OF_STD_NORM = {"g": "gain", "b": "bias"}

_GROUPS = {
    "(w|b)": "(weight|bias)",
    "(n)": r"(\d+)",
    "(s)": r"(\d+)",
    "(o)": "(weight|bias|scale)",
    "(t)": f"({'|'.join(_TIMED)})",
}
# name there -> name here, where {0} is what stands in the first group; after # which part of it
_NAMES: Mapping[str, str] = {
    "context_encoder.compressor.fc1.(w|b)": "head.compress.0.{0}",
    "context_encoder.compressor.ln_fc1.(w|b)": "head.compress.1.{0}",
    "context_encoder.compressor.fc2.(w|b)": "head.compress.3.{0}",
    "context_encoder.(layers|reduction_layers).(n).attn.W_([QKV]).(w|b)": (
        "head.layers.{1}.qkv.{3}#{2}"
    ),
    "context_encoder.(layers|reduction_layers).(n).attn.W_O.(w|b)": "head.layers.{1}.out.{2}",
    "context_encoder.(layers|reduction_layers).(n).feed_forward.ffn_1.(w|b)": (
        "head.layers.{1}.mlp.0.{2}"
    ),
    "context_encoder.(layers|reduction_layers).(n).feed_forward.ffn_2.(w|b)": (
        "head.layers.{1}.mlp.3.{2}"
    ),
    "context_encoder.(layers|reduction_layers).(n).norm1.(g|b)": (
        "head.layers.{1}.norm_attention.{2}"
    ),
    "context_encoder.(layers|reduction_layers).(n).norm2.(g|b)": ("head.layers.{1}.norm_mlp.{2}"),
    "context_encoder.(reduction_layers).(n).reduction.(w|b)": "head.layers.{1}.narrow.{2}",
    "context_encoder.linear.(w|b)": "head.out.0.{0}",
    "context_encoder.adaptor.fc1.(w|b)": "head.out.linear.0.{0}",
    "context_encoder.adaptor.ln_fc1.(w|b)": "head.out.linear.1.{0}",
    "context_encoder.adaptor.fc2.(w|b)": "head.out.linear.3.{0}",
    "context_encoder.adaptor.ln_fc2.(w|b)": "head.out.linear.4.{0}",
    "context_encoder.adaptor.conv1.(w|b)": "head.out.convs.1.{0}",
    "context_encoder.adaptor.ln_conv1.(w|b)": "head.out.convs.2.{0}",
    "context_encoder.adaptor.conv2.(w|b)": "head.out.convs.4.{0}",
    "context_encoder.adaptor.ln_conv2.(w|b)": "head.out.convs.5.{0}",
    "context_encoder.adaptor.conv3.(w|b)": "head.out.last.{0}",
    "stages.(s).input_layer.1.(w|b)": "velocity.{0}.patch_in.{1}",
    "stages.(s).input_layer.3.position_embeddings.weight": "velocity.{0}.positions",
    "stages.(s).upsample.0.(o).(t)": "velocity.{0}.upsample.norm_in.{1}.{2}",
    "stages.(s).upsample.1.kernel.(w|b)": "velocity.{0}.upsample.linear.{1}",
    "stages.(s).upsample.2.(o).(t)": "velocity.{0}.upsample.norm_out.{1}.{2}",
    "stages.(s).blocks.(n).block1.norm.(o).(t)": "velocity.{0}.blocks.{1}.norm.{2}.{3}",
    "stages.(s).blocks.(n).block1.query_key_value.weight": ("velocity.{0}.blocks.{1}.qkv.weight"),
    "stages.(s).blocks.(n).block1.dense.(w|b)": "velocity.{0}.blocks.{1}.out.{2}",
    "stages.(s).blocks.(n).block1.1.(w|b)": "velocity.{0}.blocks.{1}.depthwise.{2}",
    "stages.(s).blocks.(n).block2.norm.(o).(t)": "velocity.{0}.blocks.{1}.mlp.norm.{2}.{3}",
    "stages.(s).blocks.(n).block2.w([012]).(w|b)": "velocity.{0}.blocks.{1}.mlp.w{2}.{3}",
    "stages.(s).skip_denses.(n).(w|b)": "velocity.{0}.skips.{1}.{2}",
    "stages.(s).output_layer.0.(o).(t)": "velocity.{0}.norm_out.{1}.{2}",
    "stages.(s).output_layer.2.(w|b)": "velocity.{0}.out.{1}",
    "stages.(s).tensor_false": "velocity.{0}.null.value#0",
    "stages.(s).tensor_true": "velocity.{0}.null.value#1",
    "x_embedder.proj.(w|b)": "velocity.patch_in.{0}",
    "t_embedder.mlp.([02]).(w|b)": "velocity.time.mlp.{0}.{1}",
    "y_embedder.embedding_table.weight": "velocity.null.weight",
    "blocks.(n).attn.qkv.(w|b)": "velocity.blocks.{0}.qkv.{1}",
    "blocks.(n).attn.proj.(w|b)": "velocity.blocks.{0}.out.{1}",
    "blocks.(n).mlp.fc1.(w|b)": "velocity.blocks.{0}.mlp.0.{1}",
    "blocks.(n).mlp.fc2.(w|b)": "velocity.blocks.{0}.mlp.2.{1}",
    "blocks.(n).adaLN_modulation.1.(w|b)": "velocity.blocks.{0}.modulation.{1}",
    "final_layer.linear.(w|b)": "velocity.patch_out.{0}",
    "final_layer.adaLN_modulation.1.(w|b)": "velocity.modulation.{0}",
}


def _compiled(name: str) -> re.Pattern[str]:
    pattern = name.replace(".", r"\.")
    for short, whole in _GROUPS.items():
        pattern = pattern.replace(short, whole)
    return re.compile(pattern)


_PATTERNS = tuple((_compiled(there), here) for there, here in _NAMES.items())


class Mapped(NamedTuple):
    """state: head and velocity of a FlowModel, by its own names. skipped: name there -> why."""

    state: Tensors
    skipped: dict[str, str]


def read_tensors(path: Path) -> Tensors:
    """Of a .pth, of which nothing but tensors is unpickled, or a .safetensors. InputError: neither,
    or damaged.
    """
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        found = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, SafetensorError, pickle.UnpicklingError, EOFError) as error:
        why = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(f"{path}: cannot be read as weights: {why}") from error
    if not isinstance(found, dict) or not all(isinstance(x, Tensor) for x in found.values()):
        raise InputError(f"{path}: holds no plain state dict; want nnet.pth or nnet_ema.pth")
    return dict(found)


def load_crossflow(tensors: Mapping[str, Tensor], model: FlowModel) -> Mapped:
    """Copy a published state dict into head and velocity network of a model of the same sizes.

    InputError, and nothing copied: a name that is not of the published layout, a tensor of ours
    that none of theirs fills, or another shape.
    """
    mapped = map_crossflow(tensors, model)
    model.load_state_dict(mapped.state, strict=False)
    return mapped


def map_crossflow(tensors: Mapping[str, Tensor], model: FlowModel) -> Mapped:
    """`load_crossflow` without the copy."""
    ours = {
        name: x.shape
        for name, x in model.state_dict().items()
        if name.startswith(("head.", "velocity."))
    }
    parts: dict[str, dict[str, Tensor]] = {}
    skipped: dict[str, str] = {}
    for name, tensor in tensors.items():
        if (why := _skipped(name)) is not None:
            skipped[name] = why
            continue
        here, _, part = _name_here(name, model).partition("#")
        parts.setdefault(here, {})[part] = tensor
    if unknown := sorted(parts.keys() - ours.keys()):
        raise InputError(f"model: has no {unknown[0]}, which the checkpoint has: other sizes?")
    if lacking := sorted(ours.keys() - parts.keys()):
        raise InputError(f"the checkpoint lacks {len(lacking)} tensors, such as {lacking[0]}")
    state = {}
    for here, found in parts.items():
        joined = _joined(here, found)
        made = _as_here(here, joined, ours[here], model)
        if made.shape != ours[here]:
            got, want = tuple(joined.shape), tuple(ours[here])
            raise InputError(f"{here}: the checkpoint has {got}, this model {want}")
        state[here] = made.contiguous()
    if isinstance(model.velocity, DiT):
        _refuse_other_positions(tensors, model.velocity.config, model.config.latent)
        state = _in_our_channels(state, model.velocity)
    return Mapped(state, skipped)


def _skipped(name: str) -> str | None:
    return next((why for known, why in SKIPPED.items() if re.fullmatch(known, name)), None)


def _name_here(name: str, model: FlowModel) -> str:
    """Where a published tensor goes; `#` before its part of a tensor made of several. InputError
    for a name that is not of the layout.
    """
    for pattern, here in _PATTERNS:
        if (found := pattern.fullmatch(name)) is None:
            continue
        groups = _norm_words(list(found.groups()))
        if groups and groups[0] == "reduction_layers":
            groups[1] = str(int(groups[1]) + _plain_layers(model))
        elif name.startswith("stages."):
            groups[0] = "transformer" if groups[0] == "0" else f"convnext_{groups[0]}"
        return here.format(*groups)
    raise InputError(f"checkpoint: {name} is not of CrossFlow's published layout")


def _norm_words(groups: list[str]) -> list[str]:
    """Of a norm's tensor our words; any other's as they are."""
    if groups and groups[-1] in _TIMED:
        return [*groups[:-2], _OF_NORM[groups[-2]], _TIMED[groups[-1]]]
    if groups and groups[-1] in _OF_STD_NORM:
        return [*groups[:-1], _OF_STD_NORM[groups[-1]]]
    return groups


def _plain_layers(model: FlowModel) -> int:
    """How many layers of the text encoder do not halve the width."""
    layers = model.head.layers if isinstance(model.head, TransEncoder) else ()
    return sum(not isinstance(layer.narrow, nn.Linear) for layer in layers)


def _joined(here: str, parts: Mapping[str, Tensor]) -> Tensor:
    """Query, key and value one below the other; the two indicators beside each other."""
    order = "QKV" if here.endswith(("qkv.weight", "qkv.bias")) else "01"
    if "" in parts:
        return parts[""]
    if lacking := [part for part in order if part not in parts]:
        raise InputError(f"{here}: the checkpoint lacks its part {lacking[0]}")
    return torch.cat([parts[part] for part in order])


def _as_here(here: str, tensor: Tensor, shape: torch.Size, model: FlowModel) -> Tensor:
    """In our form: convolutions of whole patches as linear layers, positions as a picture's, and
    the time's weight, which is kept there less 1.
    """
    if here.endswith("patch_in.weight") and tensor.ndim == 4:
        return tensor.flatten(1)
    if here.endswith(".positions") and tensor.numel() == shape.numel():
        return tensor.reshape(shape)
    if re.search(r"\.(scale|shift)\.w$", here):
        return tensor + 1
    return tensor


def _in_our_channels(state: Tensors, velocity: DiT) -> Tensors:
    """A DiT's tensors with the channels of its tokens in our order: its positions there are sines
    of the column, then of the row, each sine before cosine, and ours the other way about. Nothing
    else in the network knows the order.
    """
    width, p = velocity.config.width, velocity.config.patch
    quarter = torch.arange(width).view(4, width // 4)
    order = quarter[[3, 2, 1, 0]].flatten()  # ours: row cos, row sin, column cos, column sin

    def rows(x: Tensor) -> Tensor:
        return x[order]

    def columns(x: Tensor) -> Tensor:
        return x[:, order] if x.ndim == 2 else x

    def chunks(x: Tensor) -> Tensor:
        return torch.cat([chunk[order] for chunk in x.split(width)])

    def patches(x: Tensor) -> Tensor:
        return rearrange(columns(x), "(p q c) ... -> (c p q) ...", p=p, q=p)

    moves: dict[str, Callable[[Tensor], Tensor]] = {
        r"velocity\.patch_in\.\w+": rows,
        r"velocity\.blocks\.\d+\.(out|mlp\.2)\.\w+": rows,
        r"velocity\.blocks\.\d+\.(qkv|mlp\.0)\.\w+": columns,
        r"velocity\.(blocks\.\d+\.)?modulation\.\w+": chunks,
        r"velocity\.patch_out\.\w+": patches,
    }
    for name, tensor in state.items():
        for pattern, move in moves.items():
            if re.fullmatch(pattern, name):
                state[name] = move(tensor)
    return state


def _refuse_other_positions(
    tensors: Mapping[str, Tensor], config: DiTVelocity, latent: LatentSpec
) -> None:
    size = latent.height // config.patch, latent.width // config.patch
    table = tensors.get("pos_embed")
    wanted = their_positions(*size, config.width)
    if table is not None and (
        table.shape != wanted.shape or not torch.allclose(table.float(), wanted, atol=1e-4)
    ):
        raise InputError(f"pos_embed: not the published sines of {size[0]} x {size[1]} patches")


def their_positions(rows: int, columns: int, width: int) -> Tensor:
    """A published DiT's `pos_embed`, (1, rows * columns, width)."""
    quarters = positions_2d(rows, columns, width).unflatten(1, (4, width // 4))
    return quarters[None, :, [3, 2, 1, 0]].flatten(2)
