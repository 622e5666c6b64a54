"""Published checkpoints of CrossFlow: random ones of the published names, small, read into our
modules, which then answer as a forward written here from the formulas.
"""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPTextConfig, CLIPTextModel

from flowray.config.base import LatentSpec
from flowray.config.errors import InputError
from flowray.config.load import load_recipe
from flowray.config.model import (
    DiMRVelocity,
    DiTVelocity,
    EncoderText,
    ModelConfig,
    TransEncoderHead,
)
from flowray.model.assemble import FlowModel
from flowray.model.crossflow import TOWER, load_crossflow, read_tensors, their_positions
from flowray.model.crossflow_config import recipe_keys, recipe_of
from flowray.model.heads import build_head
from flowray.model.text import EncoderTokens, Prompts, TextTokens
from flowray.model.velocity import build_velocity

TOKENS, WIDTH, FFN, LAYERS, REDUCTIONS, HEADS = 5, 16, 24, 2, 2, 2
CHANNELS, SIDE, DIM, STAGES, BLOCKS = 4, 8, (16, 8), 2, (5, 3)
TIMED = ("param0", "param1", "nodecay_weight", "nodecay_bias")
W = dict[str, Tensor]


class Parts(FlowModel):
    """Head and velocity network alone."""

    def __init__(self, config: ModelConfig):
        nn.Module.__init__(self)
        self.config = config
        width = 64 if config.head.compress else WIDTH  # type: ignore[union-attr]
        self.head = build_head(config.head, width, TOKENS, config.latent)
        self.velocity = build_velocity(config.velocity, config.latent, width)


def dimr_parts(side: int = SIDE, **head: Any) -> Parts:
    options = {"layers": LAYERS, "reductions": REDUCTIONS, "heads": HEADS, "ffn": FFN}
    return Parts(
        ModelConfig(
            latent=LatentSpec(channels=CHANNELS, height=side, width=side),
            head=TransEncoderHead(**options | {"read_padding": True} | head),
            velocity=DiMRVelocity(widths=DIM, depths=BLOCKS, heads=2, kernel=3),
        )
    ).eval()


def linear(w: W, name: str, into: int, out: int, bias: bool = True) -> None:
    w[f"{name}.weight"] = torch.randn(out, into) / into**0.5
    if bias:
        w[f"{name}.bias"] = 0.1 * torch.randn(out)


def timed(w: W, name: str, width: int) -> None:
    for part in TIMED:
        w[f"{name}.{part}"] = 0.5 * torch.randn(width) + (part in ("param0", "param1"))


def text_weights(w: W, start: int = WIDTH) -> int:
    """The text encoder's layers; returns the width of a token at their end."""
    width = start
    for i in range(LAYERS + REDUCTIONS):
        last = i >= LAYERS
        name = f"context_encoder.{f'reduction_layers.{i - LAYERS}' if last else f'layers.{i}'}"
        for part in "QKVO":
            linear(w, f"{name}.attn.W_{part}", width, width)
        linear(w, f"{name}.feed_forward.ffn_1", width, FFN)
        linear(w, f"{name}.feed_forward.ffn_2", FFN, width)
        for norm in ("norm1", "norm2"):
            w[f"{name}.{norm}.g"] = 1 + 0.1 * torch.randn(width)
            w[f"{name}.{norm}.b"] = 0.1 * torch.randn(width)
        if last:
            linear(w, f"{name}.reduction", width, width // 2)
            width //= 2
    return width


def tower_weights(w: W) -> None:
    w["open_clip.logit_scale"] = torch.tensor(2.66)
    linear(w, "open_clip.visual.trunk.blocks.0.attn.qkv", 8, 24)
    linear(w, "open_clip_output.fc1", 8, 8)


def stage_weights(w: W, stage: int, below: int) -> None:
    name, dim, patch = f"stages.{stage}", DIM[stage], 2 >> stage
    cells = (SIDE // patch) ** 2
    w[f"{name}.input_layer.1.weight"] = 0.3 * torch.randn(dim, CHANNELS, patch, patch)
    w[f"{name}.input_layer.1.bias"] = 0.1 * torch.randn(dim)
    w[f"{name}.input_layer.3.position_embeddings.weight"] = 0.1 * torch.randn(cells, dim)
    if below:
        for part in ("weight", "bias"):
            timed(w, f"{name}.upsample.0.{part}", below)
            timed(w, f"{name}.upsample.2.{part}", dim)
        linear(w, f"{name}.upsample.1.kernel", below, 4 * dim)
    for i in range(BLOCKS[stage]):
        block = f"{name}.blocks.{i}"
        if below:
            w[f"{block}.block1.1.weight"] = 0.3 * torch.randn(dim, 1, 3, 3)
            w[f"{block}.block1.1.bias"] = 0.1 * torch.randn(dim)
        else:
            timed(w, f"{block}.block1.norm.scale", dim)
            linear(w, f"{block}.block1.query_key_value", dim, 3 * dim, bias=False)
            linear(w, f"{block}.block1.dense", dim, dim)
        timed(w, f"{block}.block2.norm.scale", dim)
        linear(w, f"{block}.block2.w0", dim, 2 * dim)
        linear(w, f"{block}.block2.w1", dim, 2 * dim)
        linear(w, f"{block}.block2.w2", 2 * dim, dim)
    for i in range(BLOCKS[stage] // 2):
        linear(w, f"{name}.skip_denses.{i}", 2 * dim, dim)
    for part in ("weight", "bias"):
        timed(w, f"{name}.output_layer.0.{part}", dim)
    w[f"{name}.output_layer.2.weight"] = 0.3 * torch.randn(CHANNELS, dim, 3, 3)
    w[f"{name}.output_layer.2.bias"] = 0.1 * torch.randn(CHANNELS)
    if not below:
        w[f"{name}.tensor_true"], w[f"{name}.tensor_false"] = torch.tensor([-1.3]), torch.ones(1)


def published() -> W:
    torch.manual_seed(0)
    w: W = {}
    linear(w, "context_encoder.linear", TOKENS * text_weights(w), 2 * CHANNELS * SIDE**2)
    below = 0
    for stage in range(STAGES):
        stage_weights(w, stage, below)
        below = DIM[stage] * (BLOCKS[stage] + 1)
    tower_weights(w)
    return w


# the same from the formulas


def affine(w: W, name: str, x: Tensor) -> Tensor:
    return F.linear(x, w[f"{name}.weight"], w.get(f"{name}.bias"))


def split(x: Tensor, heads: int) -> Tensor:
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def attend(q: Tensor, k: Tensor, v: Tensor, heads: int, mask: Tensor | None = None) -> Tensor:
    q, k, v = (split(x, heads) for x in (q, k, v))
    scores = q @ k.mT / q.shape[-1] ** 0.5
    if mask is not None:
        scores = scores.masked_fill(~mask[:, None, None], -1e9)
    return (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)


def std_norm(w: W, name: str, x: Tensor) -> Tensor:
    off = x - x.mean(-1, keepdim=True)
    return w[f"{name}.g"] * off / (x.std(-1, keepdim=True) + 1e-5) + w[f"{name}.b"]


def text_layers(w: W, x: Tensor, mask: Tensor) -> Tensor:
    names = [f"layers.{i}" for i in range(LAYERS)]
    names += [f"reduction_layers.{i}" for i in range(REDUCTIONS)]
    for name in (f"context_encoder.{each}" for each in names):
        q, k, v = (affine(w, f"{name}.attn.W_{part}", x) for part in "QKV")
        x = std_norm(
            w, f"{name}.norm1", x + affine(w, f"{name}.attn.W_O", attend(q, k, v, HEADS, mask))
        )
        inside = affine(w, f"{name}.feed_forward.ffn_1", x).relu()
        x = std_norm(w, f"{name}.norm2", x + affine(w, f"{name}.feed_forward.ffn_2", inside))
        if "reduction" in name:
            x = affine(w, f"{name}.reduction", x)
    return x.flatten(1)


def vector(w: W, name: str, tau: Tensor) -> Tensor:
    p0, p1, weight, bias = (w[f"{name}.{part}"] for part in TIMED)
    return p1 + torch.sigmoid(tau[:, None] * (weight + 1) + bias) * (p0 - p1)


def rms(w: W, name: str, x: Tensor, tau: Tensor) -> Tensor:
    scale = vector(w, f"{name}.scale", tau).view(len(x), *[1] * (x.ndim - 2), -1)
    return scale * x / (x.square().mean(-1, keepdim=True).sqrt() + 1e-8)


def layer_norm(w: W, name: str, x: Tensor, tau: Tensor) -> Tensor:
    shape = (len(x), *[1] * (x.ndim - 2), -1)
    scale, shift = (vector(w, f"{name}.{part}", tau).view(shape) for part in ("weight", "bias"))
    return F.layer_norm(x, x.shape[-1:], eps=1e-5) * scale + shift


def conv(w: W, name: str, x: Tensor, **options: Any) -> Tensor:
    """Of pictures (B, H, W, C)."""
    made = F.conv2d(x.permute(0, 3, 1, 2), w[f"{name}.weight"], w[f"{name}.bias"], **options)
    return made.permute(0, 2, 3, 1)


def run_block(w: W, name: str, x: Tensor, tau: Tensor) -> Tensor:
    if f"{name}.block1.1.weight" in w:
        x = x + conv(w, f"{name}.block1.1", x, padding=1, groups=x.shape[-1])
    else:
        q, k, v = affine(
            w, f"{name}.block1.query_key_value", rms(w, f"{name}.block1.norm", x, tau)
        ).chunk(3, -1)
        x = x + affine(w, f"{name}.block1.dense", attend(q, k, v, 2))
    y = rms(w, f"{name}.block2.norm", x, tau)
    gated = F.gelu(affine(w, f"{name}.block2.w0", y)) * affine(w, f"{name}.block2.w1", y)
    return x + affine(w, f"{name}.block2.w2", gated)


def run_stage(
    w: W, stage: int, x: Tensor, tau: Tensor, null: Tensor, below: list[Tensor]
) -> tuple[Tensor, list[Tensor]]:
    name, patch = f"stages.{stage}", 2 >> stage
    h = conv(w, f"{name}.input_layer.1", x.permute(0, 2, 3, 1), stride=patch)
    batch, rows, columns, dim = h.shape
    table = w[f"{name}.input_layer.3.position_embeddings.weight"]
    h = h + table.view(rows, columns, dim)
    if below:
        up = layer_norm(w, f"{name}.upsample.0", torch.cat(below, -1), tau)
        up = affine(w, f"{name}.upsample.1.kernel", up)
        up = up.view(batch, rows // 2, columns // 2, 2, 2, dim).transpose(2, 3)
        h = h + layer_norm(w, f"{name}.upsample.2", up.reshape(batch, rows, columns, dim), tau)
    else:
        sign = torch.where(null, w[f"{name}.tensor_true"], w[f"{name}.tensor_false"])
        h = torch.cat([sign[:, None, None].expand(-1, 1, dim), h.flatten(1, 2)], dim=1)
    states, kept, half = [h], [], BLOCKS[stage] // 2
    for i in range(BLOCKS[stage]):
        if i > half:
            h = affine(w, f"{name}.skip_denses.{i - half - 1}", torch.cat([h, kept.pop()], -1))
        h = run_block(w, f"{name}.blocks.{i}", h, tau)
        states.append(h)
        if i < half:
            kept.append(h)
    if not below:
        states = [state[:, 1:].view(batch, rows, columns, dim) for state in states]
    out = layer_norm(w, f"{name}.output_layer.0", states[-1], tau)
    return conv(w, f"{name}.output_layer.2", out, padding=1).permute(0, 3, 1, 2), states


def test_every_tensor_is_mapped_or_named() -> None:
    w, model = published(), dimr_parts()
    mapped = load_crossflow(w, model)
    assert mapped.skipped == {name: TOWER for name in w if name.startswith("open_clip")}
    ours = {name for name, _ in model.named_parameters()}
    assert mapped.state.keys() == ours
    taken = sum(x.numel() for name, x in w.items() if name not in mapped.skipped)
    assert taken == sum(p.numel() for p in model.parameters())


@torch.no_grad()
def test_the_text_encoder_answers_as_the_published_one() -> None:
    w, model = published(), dimr_parts()
    load_crossflow(w, model)
    values = torch.randn(3, TOKENS, WIDTH)
    mask = torch.arange(TOKENS) < torch.tensor([[5], [3], [1]])
    assert model.head is not None
    mu, logvar = model.head(TextTokens(values, mask))
    wanted = affine(w, "context_encoder.linear", text_layers(w, values, mask)).chunk(2, -1)
    # what stands behind the mask is not the model's to read: the published one does not zero it
    whole = mask.all(1)
    torch.testing.assert_close(mu[whole].flatten(1), wanted[0][whole], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(logvar[whole].flatten(1), wanted[1][whole], rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_the_text_encoder_reads_padding_as_the_published_one() -> None:
    w, model = published(), dimr_parts()
    load_crossflow(w, model)
    values, mask = torch.randn(2, TOKENS, WIDTH), torch.arange(TOKENS) < torch.tensor([[3], [1]])
    assert model.head is not None
    mu, _ = model.head(TextTokens(values, mask))
    wanted, _ = affine(w, "context_encoder.linear", text_layers(w, values, mask)).chunk(2, -1)
    torch.testing.assert_close(mu.flatten(1), wanted, rtol=1e-4, atol=1e-5)
    plain = dimr_parts(read_padding=False)
    load_crossflow(w, plain)
    assert plain.head is not None
    assert not torch.allclose(plain.head(TextTokens(values, mask))[0], mu, atol=0.01)


@torch.no_grad()
@pytest.mark.parametrize("cache", [False, True])
def test_padding_is_seen_as_the_published_clip_sees_it(cache: bool) -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2}
    clip = CLIPTextModel(CLIPTextConfig(vocab_size=20, num_attention_heads=2, **sizes)).eval()
    ids = torch.tensor([[5, 6, 19, 19], [7, 8, 9, 19]])
    mask = torch.tensor([[True, True, True, False], [True, True, True, True]])
    options: dict[str, Any] = {"path": "clip", "max_tokens": 4, "cache": cache}
    config = EncoderText(**options, pad_to_max="seen")
    text = EncoderTokens(clip, None, config)
    for _ in range(2):  # the second time kept
        tokens = text(Prompts(ids, mask))
        torch.testing.assert_close(tokens.values, clip(input_ids=ids).last_hidden_state)
        assert torch.equal(tokens.mask, mask)
    masked = EncoderTokens(clip, None, EncoderText(**options, pad_to_max=True))(Prompts(ids, mask))
    assert not torch.allclose(masked.values[0, 3], tokens.values[0, 3], atol=1e-3)
    torch.testing.assert_close(masked.values[mask], tokens.values[mask])


@torch.no_grad()
def test_the_adaptor_of_512_px_and_the_compressor_of_t5() -> None:
    w, wide = {}, 64
    torch.manual_seed(0)
    last = text_weights(w)
    linear(w, "context_encoder.compressor.fc1", wide, WIDTH)
    linear(w, "context_encoder.compressor.fc2", WIDTH, WIDTH)
    linear(w, "context_encoder.adaptor.fc1", TOKENS * last, 12)
    linear(w, "context_encoder.adaptor.fc2", 12, SIDE**2)
    shapes = {"ln_fc1": (12,), "ln_fc2": (SIDE**2,)}
    shapes |= {"ln_conv1": (32, SIDE, SIDE), "ln_conv2": (64, SIDE, SIDE)}
    for name, shape in shapes.items():
        w[f"context_encoder.adaptor.{name}.weight"] = 1 + 0.1 * torch.randn(shape)
        w[f"context_encoder.adaptor.{name}.bias"] = 0.1 * torch.randn(shape)
    w["context_encoder.compressor.ln_fc1.weight"] = 1 + 0.1 * torch.randn(WIDTH)
    w["context_encoder.compressor.ln_fc1.bias"] = 0.1 * torch.randn(WIDTH)
    for i, (into, out) in enumerate(((1, 32), (32, 64), (64, 2 * CHANNELS)), 1):
        w[f"context_encoder.adaptor.conv{i}.weight"] = 0.1 * torch.randn(out, into, 3, 3)
        w[f"context_encoder.adaptor.conv{i}.bias"] = 0.1 * torch.randn(out)
    whole = published()
    w |= {name: x for name, x in whole.items() if not name.startswith("context_encoder.")}
    model = dimr_parts(compress=WIDTH, adaptor="conv", hidden=12)
    load_crossflow(w, model)

    def normed(name: str, x: Tensor) -> Tensor:
        gain, bias = w[f"{name}.weight"], w[f"{name}.bias"]
        return F.layer_norm(x, gain.shape, gain, bias).relu()

    def convolved(i: int, x: Tensor) -> Tensor:
        at = f"context_encoder.adaptor.conv{i}"
        return F.conv2d(x, w[f"{at}.weight"], w[f"{at}.bias"], padding=1)

    values, mask = torch.randn(2, TOKENS, wide), torch.ones(2, TOKENS, dtype=torch.bool)
    at = "context_encoder.compressor"
    x = affine(w, f"{at}.fc2", normed(f"{at}.ln_fc1", affine(w, f"{at}.fc1", values)))
    at, x = "context_encoder.adaptor", text_layers(w, x, mask)
    x = normed(f"{at}.ln_fc1", affine(w, f"{at}.fc1", x))
    x = normed(f"{at}.ln_fc2", affine(w, f"{at}.fc2", x)).view(2, 1, SIDE, SIDE)
    x = normed(f"{at}.ln_conv2", convolved(2, normed(f"{at}.ln_conv1", convolved(1, x))))
    assert model.head is not None
    made = torch.cat(model.head(TextTokens(values, mask)), dim=1)
    torch.testing.assert_close(made, convolved(3, x), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_the_velocity_answers_as_the_published_one_at_both_resolutions() -> None:
    w, model = published(), dimr_parts()
    load_crossflow(w, model)
    x, code = torch.randn(3, CHANNELS, SIDE, SIDE), torch.tensor([-3.0, 0.5, 3.9])
    null = torch.tensor([True, False, False])
    made = model.velocity.levels(x, code, null)
    wanted, states = [], []
    for stage in range(STAGES):
        out, states = run_stage(w, stage, x, code / 4, null, states)
        wanted.append(out)
    assert wanted[-1].std() > 0.1
    for ours, theirs in zip(made, wanted, strict=True):
        # rms norms have 1e-6 under the root here, 1e-8 beside it there
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)


DIT = {"width": 16, "depth": 2, "heads": 2, "patch": 2, "mlp_ratio": 4.0}


def dit_weights(side: int) -> W:
    torch.manual_seed(0)
    w: W = {}
    linear(w, "context_encoder.linear", TOKENS * text_weights(w), 2 * CHANNELS * side**2)
    w["x_embedder.proj.weight"] = 0.3 * torch.randn(16, CHANNELS, 2, 2)
    w["x_embedder.proj.bias"] = 0.1 * torch.randn(16)
    w["pos_embed"] = their_positions(side // 2, side // 2, 16)
    linear(w, "t_embedder.mlp.0", 256, 16)
    linear(w, "t_embedder.mlp.2", 16, 16)
    w["y_embedder.embedding_table.weight"] = torch.randn(2, 16)
    for i in range(2):
        linear(w, f"blocks.{i}.attn.qkv", 16, 48)
        linear(w, f"blocks.{i}.attn.proj", 16, 16)
        linear(w, f"blocks.{i}.mlp.fc1", 16, 64)
        linear(w, f"blocks.{i}.mlp.fc2", 64, 16)
        linear(w, f"blocks.{i}.adaLN_modulation.1", 16, 96)
    linear(w, "final_layer.linear", 16, 4 * CHANNELS)
    linear(w, "final_layer.adaLN_modulation.1", 16, 32)
    tower_weights(w)
    return w


def dit_forward(w: W, x: Tensor, t: Tensor, null: Tensor) -> Tensor:
    batch, side = len(x), x.shape[-1] // 2
    half = torch.exp(-torch.arange(128) / 128 * torch.log(torch.tensor(10_000.0)))
    angles = t[:, None] * half
    condition = torch.cat([angles.cos(), angles.sin()], -1)
    condition = affine(w, "t_embedder.mlp.2", F.silu(affine(w, "t_embedder.mlp.0", condition)))
    condition = F.silu(condition + w["y_embedder.embedding_table.weight"][null.long()])
    h = F.conv2d(x, w["x_embedder.proj.weight"], w["x_embedder.proj.bias"], stride=2)
    # sines of the column, then of the row, each sine before cosine
    places = torch.arange(side)[:, None] * 10_000 ** -(torch.arange(4) / 4)
    line = torch.cat([places.sin(), places.cos()], -1)
    table = torch.cat([line[None].expand(side, -1, -1), line[:, None].expand(-1, side, -1)], dim=-1)
    h = h.flatten(2).mT + table.flatten(0, 1)
    for name in ("blocks.0", "blocks.1"):
        parts = affine(w, f"{name}.adaLN_modulation.1", condition)[:, None].chunk(6, -1)
        y = F.layer_norm(h, (16,), eps=1e-6) * (1 + parts[1]) + parts[0]
        q, k, v = affine(w, f"{name}.attn.qkv", y).chunk(3, -1)
        h = h + parts[2] * affine(w, f"{name}.attn.proj", attend(q, k, v, 2))
        y = F.layer_norm(h, (16,), eps=1e-6) * (1 + parts[4]) + parts[3]
        y = F.gelu(affine(w, f"{name}.mlp.fc1", y), approximate="tanh")
        h = h + parts[5] * affine(w, f"{name}.mlp.fc2", y)
    shift, scale = affine(w, "final_layer.adaLN_modulation.1", condition)[:, None].chunk(2, -1)
    y = affine(w, "final_layer.linear", F.layer_norm(h, (16,), eps=1e-6) * (1 + scale) + shift)
    y = y.view(batch, side, side, 2, 2, CHANNELS).permute(0, 5, 1, 3, 2, 4)
    return y.reshape(x.shape)


def dit_parts() -> Parts:
    time = {"of": "t", "frequencies": 256, "bound": "small_init"}
    return Parts(
        dimr_parts().config.model_copy(
            update={"velocity": DiTVelocity.model_validate({**DIT, "time": time})}
        )
    ).eval()


@torch.no_grad()
def test_the_dit_answers_as_the_published_one() -> None:
    w, model = dit_weights(SIDE), dit_parts()
    mapped = load_crossflow(w, model)
    assert "pos_embed" in mapped.skipped
    x, t = torch.randn(2, CHANNELS, SIDE, SIDE), torch.tensor([0.2, 0.9])
    null = torch.tensor([True, False])
    wanted = dit_forward(w, x, t, null)
    torch.testing.assert_close(model.velocity(x, 4 - 8 * t, null), wanted, rtol=1e-3, atol=1e-3)
    with pytest.raises(InputError, match="pos_embed"):
        load_crossflow({**w, "pos_embed": w["pos_embed"].roll(1, 2)}, model)


def test_what_does_not_fit_is_refused_and_nothing_copied() -> None:
    w, model = published(), dimr_parts()
    before = {name: p.clone() for name, p in model.state_dict().items()}
    name = "stages.1.blocks.0.block2.w0.weight"
    wrong: dict[str, tuple[W, str]] = {
        "a name": ({**w, "stages.0.odd.weight": w[name]}, "stages.0.odd.weight is not of"),
        "one lacking": ({k: x for k, x in w.items() if k != name}, "lacks 1 tensors, such as"),
        "a part": (
            {k: x for k, x in w.items() if not k.endswith("layers.0.attn.W_K.bias")},
            "lacks its part K",
        ),
        "a shape": ({**w, name: w[name][:, 1:]}, r"has \(16, 7\), this model \(16, 8\)"),
        "a block more": ({**w, name.replace("blocks.0", "blocks.9"): w[name]}, "other sizes"),
    }
    for tensors, words in wrong.values():
        with pytest.raises(InputError, match=words):
            load_crossflow(tensors, model)
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())


class Unpickled:
    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (Path("made_by_unpickling"),))


def test_files_of_both_forms_and_none_that_runs_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    w = published()
    torch.save(w, "nnet_ema.pth")
    save_file(w, "nnet_ema.safetensors")
    for name in ("nnet_ema.pth", "nnet_ema.safetensors"):
        read = read_tensors(Path(name))
        assert read.keys() == w.keys()
        assert all(torch.equal(read[key], w[key]) for key in w)
    Path("evil.pth").write_bytes(pickle.dumps({"a": Unpickled()}, protocol=2))
    torch.save({"model": w}, "nested.pth")
    for name in ("evil.pth", "nested.pth", "none.pth"):
        with pytest.raises(InputError, match=name):
            read_tensors(Path(name))
    assert not Path("made_by_unpickling").exists()


def config_text(size: int, stages: int, llm: str, kind: str) -> str:
    """A config of the published form: a tree of `Args` and of `d` with keywords."""
    rows = [
        f"Args(block_type='{'ConvNeXtBlock' if i else 'TransformerBlock'}', dim={1024 >> i},"
        f" hidden_dim={2048 >> i}, num_blocks={33 if i else 65}, num_attention_heads=16,"
        f" kernel_size=7, max_height={16 << i}, max_width={16 << i}, image_input_ratio=1,"
        f" input_feature_ratio={2 ** (stages - 1 - i)}, final_kernel_size=3, dropout_prob=0)"
        for i in range(stages)
    ]
    null = 0.15 if size == 64 and kind == "dimr" else 0.1
    rate = 2e-5 if kind == "dit" else 1e-5
    weights = ", ".join(["1/4", "1/2", "1"] if stages == 3 else ["1/4", "1"])
    return f"""
model = Args(channels=4, clip_dim={4096 if llm == "t5" else 768}, num_clip_token=77,
    gradient_checking=True, cfg_indicator={null},
    textVAE=Args(num_blocks=11, hidden_dim=1024, num_attention_heads=8, dropout_prob=0.1),
    stage_configs=[{", ".join(rows)}])

def get_config():
    config = ml_collections.ConfigDict()
    config.z_shape = (4, {size}, {size})
    config.autoencoder = d(pretrained_path='a.pth', scale_factor=0.23010)
    config.optimizer = d(name='adamw', lr={rate}, betas=(0.9, 0.9))
    config.nnet = d(name='{kind}', model_args=model)
    config.loss_coeffs = [{weights}]
    config.sample = d(sample_steps=50, scale=7)
    return config
"""


@pytest.mark.parametrize(
    ("recipe", "given"),
    [
        ("crossflow_256", (32, 2, "clip", "dimr")),
        ("crossflow_512", (64, 3, "clip", "dimr")),
        ("crossflow_dit", (64, 3, "t5", "dit")),
    ],
)
def test_the_sizes_of_published_configs_are_those_of_our_recipes(
    recipe: str, given: tuple[Any, ...], tmp_path: Path
) -> None:
    path = tmp_path / "config.py"
    path.write_text(config_text(*given))
    made, ours = recipe_of(path), load_recipe(recipe).recipe
    assert made.model == ours.model
    assert made.flow == ours.flow
    assert made.loss == ours.loss
    assert made.sample == ours.sample
    assert made.optim == ours.optim


def test_a_config_is_not_run_and_another_network_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "config.py"
    path.write_text(config_text(32, 2, "clip", "dimr") + "\nopen('made', 'w')\n")
    assert recipe_keys(path)["model.velocity"]["depths"] == [65, 33]
    assert not Path("made").exists()
    for text in (
        config_text(32, 2, "clip", "uvit"),
        "x = 1\n",
        "def (",
        config_text(32, 2, "clip", "dimr").replace("_feature_ratio=2", "_feature_ratio=4"),
    ):
        path.write_text(text)
        with pytest.raises(InputError, match=r"config\.py"):
            recipe_keys(path)
