"""Text models in the formats that transformers saves, loaded back by path: LMs, LMs inside
vision-language models, encoders.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support import tiny_text
from text_support import (
    CAUSAL,
    WINDOW,
    Maker,
    bert,
    clip,
    internvl,
    mistral_sliding,
    qwen2,
    save,
    t5,
)

from flowray.config.errors import InputError
from flowray.config.model import CausalText, ConnectorConfig, EncoderText
from flowray.model.backbone import load_backbone
from flowray.model.prompts import load_tokenizer
from flowray.model.text import CausalQueries, TextModel, load_text, planned_text

PROMPTS = ["a small red circle", "a large blue square on the left on a pink background", "circle"]


@pytest.mark.parametrize("make", CAUSAL)
def test_language_models_by_path(make: Maker, tmp_path: Path) -> None:
    net, language = save(make, tmp_path)
    text = load_text(CausalText(path=str(tmp_path), queries=5))
    assert isinstance(text, CausalQueries)
    saved, loaded = language.state_dict(), text.backbone.state_dict()
    # the language model alone: no tower, no projector, no output layer
    assert loaded.keys() == saved.keys()
    assert all(torch.equal(loaded[key], saved[key]) for key in saved)
    assert len(loaded) < len(net.state_dict())
    cached_equals_plain(text)


def test_a_sliding_window_that_cuts_the_prompt_off(tmp_path: Path) -> None:
    """The two passes agree even there; but padding takes places in the window, so such a length
    is refused.
    """
    save(mistral_sliding, tmp_path)
    config = CausalText(path=str(tmp_path), queries=5)
    cached_equals_plain(CausalQueries(load_backbone(config), load_tokenizer(config), config))
    assert f"40 + 5 queries, but {str(tmp_path)!r} sees a window of {WINDOW} tokens" in one_line(
        config
    )
    load_text(CausalText(path=str(tmp_path), queries=1, max_tokens=WINDOW - 1))


def cached_equals_plain(text: CausalQueries) -> None:
    prompts = text.tokenize(PROMPTS)
    assert len({int(n) for n in prompts.mask.sum(1)}) > 1  # ragged
    weight = torch.randn(len(PROMPTS), 5, 32, generator=torch.Generator().manual_seed(0))
    values, gradients = [], []
    for forward in (text.forward, text.forward_plain):
        out = forward(prompts).values
        values.append(out.detach())
        gradients += torch.autograd.grad((out * weight).sum(), text.queries)
    assert torch.allclose(*values, atol=1e-5)
    assert torch.allclose(*gradients, atol=1e-5)
    assert float(gradients[0].abs().min()) > 0
    assert float((values[0][0] - values[0][1]).abs().mean()) > 1e-3


@pytest.mark.parametrize("make", [qwen2, internvl])
def test_the_last_hidden_states_are_the_whole_models(make: Maker, tmp_path: Path) -> None:
    """What the saved model itself gives at the queries, run unpadded and without a cache."""
    net, language = save(make, tmp_path)
    text = load_text(CausalText(path=str(tmp_path), queries=3))
    assert isinstance(text, CausalQueries)
    tokens = text(text.tokenize(PROMPTS)).values
    for prompt, row in zip(PROMPTS, tokens, strict=True):
        ids = torch.tensor([text.prompts.inner(prompt)["input_ids"]])
        assert len(set(ids[0].tolist())) > 1
        inputs = torch.cat([net.get_input_embeddings()(ids), text.queries[None]], dim=1)
        assert torch.allclose(
            row, language(inputs_embeds=inputs).last_hidden_state[0, -3:], atol=1e-5
        )


def test_bf16_weights_give_fp32_tokens_and_gradients(tmp_path: Path) -> None:
    save(qwen2, tmp_path)
    exact, half = (
        load_text(CausalText(path=str(tmp_path), queries=5, dtype=dtype))
        for dtype in ("fp32", "bf16")
    )  # type: ignore[arg-type]
    half.load_state_dict({"queries": exact.queries.detach()}, strict=False)
    assert {p.dtype for p in half.backbone.parameters()} == {torch.bfloat16}
    assert half.queries.dtype == torch.float32
    out = half(half.tokenize(PROMPTS)).values
    assert out.dtype == torch.float32
    assert torch.allclose(out, exact(exact.tokenize(PROMPTS)).values, atol=0.1)
    out.sum().backward()
    assert bool(half.queries.grad.isfinite().all())


@pytest.mark.parametrize("make", [clip, t5, bert])
def test_encoders_inside_whole_checkpoints(make: Maker, tmp_path: Path) -> None:
    """CLIP beside its tower, T5 beside its decoder, BERT under its output layer: only the
    encoder is read, and exactly.
    """
    net, encoder = save(make, tmp_path)
    plain, scaled = (
        load_text(EncoderText(path=str(tmp_path), max_tokens=16, scale=scale))
        for scale in (1.0, 10.0)
    )
    assert sum(p.numel() for p in plain.parameters()) < sum(p.numel() for p in net.parameters())
    prompts = plain.tokenize(PROMPTS)
    reference = encoder(input_ids=prompts.ids, attention_mask=prompts.mask.long()).last_hidden_state
    out = plain(prompts)
    assert torch.allclose(out.values[prompts.mask], reference[prompts.mask], atol=1e-5)
    assert torch.allclose(scaled(prompts).values, 10 * out.values)  # CrossFlow's T5
    assert torch.equal(out.mask, prompts.mask)
    garbage = prompts._replace(ids=torch.where(prompts.mask, prompts.ids, 7))
    # padding is not read
    assert torch.allclose(plain(garbage).values[prompts.mask], out.values[prompts.mask], atol=1e-5)


def test_tokens_of_a_fixed_number(tmp_path: Path) -> None:
    save(t5, tmp_path)
    short, full = (
        load_text(EncoderText(path=str(tmp_path), max_tokens=14, pad_to_max=pad))
        for pad in (False, True)
    )
    for prompts in (PROMPTS[:1], PROMPTS):
        a, b = (text(text.tokenize(prompts)) for text in (short, full))
        assert b.values.shape == (len(prompts), 14, 32)
        assert torch.equal(a.mask.sum(1), b.mask.sum(1))
        assert torch.allclose(a.values[a.mask], b.values[b.mask], atol=1e-5)
    with pytest.warns(UserWarning, match="was cut to 4"):
        assert load_text(EncoderText(path=str(tmp_path), max_tokens=4, pad_to_max=True)).tokenize(
            PROMPTS
        ).ids.shape == (3, 4)


def one_line(config: CausalText | EncoderText) -> str:
    with pytest.raises(InputError) as caught:
        load_text(config)
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith("model.text.")
    return str(caught.value)


def test_the_wrong_kind_of_checkpoint(tmp_path: Path) -> None:
    for make in (bert, t5, clip, qwen2):
        save(make, tmp_path / make.__name__)
    for name in ("bert", "t5", "clip"):
        assert f"a {name}, not a causal language model; use model.text.kind=encoder" in one_line(
            CausalText(path=str(tmp_path / name))
        )
    assert "a qwen2, not a text encoder" in one_line(EncoderText(path=str(tmp_path / "qwen2")))
    assert "no such folder" in one_line(EncoderText(path=str(tmp_path / "nowhere")))


def test_missing_weights_are_not_drawn_at_random(tmp_path: Path) -> None:
    save(qwen2, tmp_path)
    file = tmp_path / "model.safetensors"
    weights = load_file(file)
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, file, metadata={"format": "pt"})
    assert "lacks 1 weights of Qwen2Model, such as layers.1.mlp.up_proj.weight" in one_line(
        CausalText(path=str(tmp_path))
    )


def test_more_tokens_than_the_model_has_positions(tmp_path: Path) -> None:
    save(clip, tmp_path)
    assert "has 20 positions" in one_line(EncoderText(path=str(tmp_path), max_tokens=21))
    load_text(EncoderText(path=str(tmp_path), max_tokens=20))
    tiny_text(tmp_path / "lm")
    assert "100 + 29 queries" in one_line(
        CausalText(path=str(tmp_path / "lm"), max_tokens=100, queries=29)
    )


def test_width_of_recipe_and_weights(tmp_path: Path) -> None:
    save(internvl, tmp_path)
    assert load_text(CausalText(path=str(tmp_path), width=32)).width == 32
    message = one_line(CausalText(path=str(tmp_path), width=896))
    assert "model.text.width: the recipe says 896" in message
    assert "have 32" in message


@pytest.mark.parametrize(
    "connector", [None, ConnectorConfig(layers=2, hidden=16, intermediate=24, heads=2, out=20)]
)
def test_a_plan_has_the_trainable_parts_without_the_weights(
    tmp_path: Path, connector: ConnectorConfig | None
) -> None:
    save(qwen2, tmp_path)
    config = CausalText(path=str(tmp_path), queries=6, connector=connector)
    real: TextModel = load_text(config)
    with torch.device("meta"):
        plan = planned_text(config.model_copy(update={"path": "not/here", "width": 32}))
    trainable = {name: p.shape for name, p in real.named_parameters() if p.requires_grad}
    assert {name: p.shape for name, p in plan.named_parameters()} == trainable
    assert all(p.is_meta for p in plan.parameters())
    assert plan.width == real.width == (20 if connector else 32)
    with pytest.raises(InputError, match=r"model\.text\.width=N"):
        planned_text(config.model_copy(update={"path": "nobody/nothing"}))


def test_the_shipped_model_loads(tmp_path: Path) -> None:
    backbone, tokenizer = load_backbone(CausalText()), load_tokenizer(CausalText()).inner
    assert backbone.config.hidden_size == 128
    assert tokenizer("a red circle")["input_ids"][-1] == tokenizer.eos_token_id
