"""The connector against transformers' own layers, its mask and width, and that it trains and is
kept.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support import tiny_recipe, tiny_text
from text_support import save, t5
from torch import Tensor

from flowray.config.model import CausalText, ConnectorConfig, EncoderText
from flowray.model.connector import Connector, ConnectorLayer
from flowray.model.text import CausalQueries, load_text
from flowray.store.run import RunDirectory
from flowray.train.state import fresh_state, restore_state, save_state

SMALL = ConnectorConfig(layers=2, hidden=16, intermediate=24, heads=2, out=20)
PARTS = ("weight", "bias")
X = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(0))
MASK = torch.tensor([[True] * 5, [True] * 3 + [False] * 2])


def spread(layer: torch.nn.Module) -> None:
    """Weights, norms and biases away from their start, so that each one counts."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in layer.parameters():
            p.add_(0.3 * torch.randn(p.shape, generator=generator))


def halves(qkv: torch.nn.Linear) -> dict[str, tuple[Tensor, Tensor]]:
    return dict(
        zip(
            ("q_proj", "k_proj", "v_proj"),
            zip(qkv.weight.chunk(3), qkv.bias.chunk(3), strict=True),
            strict=True,
        )
    )


@torch.no_grad()
def test_siglip_layer_is_siglips() -> None:
    from transformers import SiglipVisionConfig
    from transformers.models.siglip.modeling_siglip import SiglipEncoderLayer

    layer = ConnectorLayer(SMALL)
    spread(layer)
    reference = SiglipEncoderLayer(
        SiglipVisionConfig(
            hidden_size=16, intermediate_size=24, num_attention_heads=2, attn_implementation="sdpa"
        )
    )
    state = {
        f"self_attn.{name}.{part}": t
        for name, pair in halves(layer.qkv).items()
        for part, t in zip(PARTS, pair, strict=True)
    }
    for ours, theirs in [
        ("out", "self_attn.out_proj"),
        ("norm_attention", "layer_norm1"),
        ("norm_mlp", "layer_norm2"),
        ("up", "mlp.fc1"),
        ("down", "mlp.fc2"),
    ]:
        state |= {f"{theirs}.{part}": getattr(getattr(layer, ours), part) for part in PARTS}
    reference.load_state_dict(state)
    wanted = reference(X, attention_mask=MASK[:, None, None, :].expand(2, 1, 5, 5))
    assert torch.allclose(layer(X, MASK), wanted, atol=1e-5)


@torch.no_grad()
def test_qwen2_layer_is_qwen2s_without_its_causal_mask() -> None:
    from transformers import Qwen2Config
    from transformers.models.qwen2.modeling_qwen2 import Qwen2DecoderLayer

    layer = ConnectorLayer(SMALL.model_copy(update={"style": "qwen2"}))
    spread(layer)
    sizes = {
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
    }
    reference = Qwen2DecoderLayer(Qwen2Config(**sizes, attn_implementation="sdpa"), 0)
    state = {
        f"self_attn.{name}.{part}": t
        for name, pair in halves(layer.qkv).items()
        for part, t in zip(PARTS, pair, strict=True)
    }
    gate, up = layer.up.weight.chunk(2)
    state |= {
        "self_attn.o_proj.weight": layer.out.weight,
        "mlp.gate_proj.weight": gate,
        "mlp.up_proj.weight": up,
    }
    state |= {
        "mlp.down_proj.weight": layer.down.weight,
        "input_layernorm.weight": layer.norm_attention.weight,
    }
    reference.load_state_dict(state | {"post_attention_layernorm.weight": layer.norm_mlp.weight})
    still = (torch.ones(2, 5, 8), torch.zeros(2, 5, 8))  # no rotation
    wanted = reference(
        X, attention_mask=MASK[:, None, None, :].expand(2, 1, 5, 5), position_embeddings=still
    )
    assert torch.allclose(
        layer(X, MASK), wanted[0] if isinstance(wanted, tuple) else wanted, atol=1e-5
    )


@torch.no_grad()
@pytest.mark.parametrize("style", ["siglip", "qwen2"])
def test_qk_norm_bounds_the_attention_logits(style: str) -> None:
    """With normalised queries and keys their size does not matter, without it does."""
    change = []
    for qk_norm in (True, False):
        layer = ConnectorLayer(
            ConnectorConfig(**(SMALL.model_dump() | {"style": style, "qk_norm": qk_norm}))
        )
        torch.nn.init.normal_(layer.qkv.weight)
        before = layer(X, MASK)
        layer.qkv.weight[:32] *= 100
        layer.qkv.bias[:32] *= 100
        change.append(float((layer(X, MASK) - before).abs().max()))
    assert change[0] < 1e-3
    assert change[1] > 1e-2


@torch.no_grad()
def test_every_token_reads_every_other_that_is_there() -> None:
    connector = Connector(SMALL, 16)
    before = connector(X, MASK)
    assert before.shape == (2, 5, 20)
    last = X.clone()
    last[:, -1] = X[:, 0]
    moved = (connector(last, MASK) - before).abs().amax(-1)
    assert bool((moved[0] > 1e-4).all())  # the first token reads the last: bidirectional
    assert bool((moved[1, :3] == 0).all())  # masked: not read


def test_parameters_of_openuni() -> None:
    """OpenUni-B: 6 SigLIP layers 896/3072, 14 heads, then 896 -> 2304; no entry where the widths
    agree.
    """
    with torch.device("meta"):
        count = sum(p.numel() for p in Connector(ConnectorConfig(), 896).parameters())
        wider = sum(p.numel() for p in Connector(ConnectorConfig(), 1536).parameters())
    layer = 4 * (896 * 896 + 896) + 2 * 896 * 3072 + 3072 + 896 + 4 * 896
    assert count == 6 * layer + 896 * 2304 + 2304
    assert wider == count + 1536 * 896 + 896


@pytest.mark.parametrize("kind", ["causal_lm", "encoder"])
def test_a_head_reads_what_the_connector_gives(kind: str, tmp_path: Path) -> None:
    if kind == "encoder":
        save(t5, tmp_path)
    else:
        tiny_text(tmp_path)
    path = str(tmp_path)
    plain, joined = (
        load_text(
            EncoderText(path=path, connector=c)
            if kind == "encoder"
            else CausalText(path=path, queries=16, connector=c)
        )
        for c in (None, SMALL)
    )
    if isinstance(plain, CausalQueries):
        joined.load_state_dict({"queries": plain.queries.detach()}, strict=False)
    prompts = plain.tokenize(["a small red circle", "a large blue square on the left"])
    tokens, mask = plain(prompts)
    assert joined.connector is not None
    assert torch.allclose(joined(prompts).values, joined.connector(tokens, mask), atol=1e-5)
    assert (plain.width, joined.width, joined(prompts).values.shape[-1]) == (32, 20, 20)
    if isinstance(joined, CausalQueries):
        assert torch.allclose(
            joined(prompts).values, joined.forward_plain(prompts).values, atol=1e-5
        )
    joined(prompts).values.square().sum().backward()
    trained = {
        name for name, p in joined.named_parameters() if p.grad is not None and bool(p.grad.any())
    }
    assert trained == {
        name for name, p in joined.named_parameters() if not name.startswith("backbone.")
    }


def test_the_connector_starts_from_the_seed_trains_and_is_kept(tmp_path: Path) -> None:
    keys = {f"model.text.connector.{key}": value for key, value in SMALL.model_dump().items()}
    recipe = tiny_recipe(tmp_path, **keys)
    states = []
    for other in (1, 2):
        torch.manual_seed(other)
        states.append(fresh_state(recipe, torch.device("cpu")))
    state, again = states
    names = {name for name in state.parameters if name.startswith("text.connector.")}
    assert len(names) == len(list(Connector(SMALL, 32).parameters()))
    assert all(torch.equal(state.parameters[name], again.parameters[name]) for name in names)
    prompts = state.model.text.tokenize(["a small red circle", "a blue square"])
    posterior = state.model.posterior(state.model.text(prompts))
    posterior.mu.square().sum().backward()
    before = {name: state.parameters[name].detach().clone() for name in names}
    state.optimizer.step()
    assert all(not torch.equal(state.parameters[name], before[name]) for name in names)
    assert all(state.optimizer.state[state.parameters[name]] for name in names)
    state.ema.update(0)
    for p in state.parameters.values():  # a checkpoint holds every parameter's slots
        p.grad = torch.zeros_like(p)
    state.optimizer.step()
    state.step = 1
    run = RunDirectory(tmp_path / "run")
    run.create()
    save_state(state, recipe, run)
    restore_state(again, recipe, run)
    assert all(torch.equal(state.parameters[name], again.parameters[name]) for name in names)
    assert all(torch.equal(state.ema.average[name], again.ema.average[name]) for name in names)
