"""The text side on real checkpoints: the cached pass equals the plain one, padding changes
nothing, nothing frozen learns.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from bench_text_cache import kept_for_backward
from support import tiny_text, word_tokenizer
from torch import nn

from flowray.config.errors import InputError
from flowray.config.losses import LossConfig
from flowray.config.model import CausalText, EncoderText, GridHead, ModelConfig
from flowray.model.assemble import build_model, part_sizes
from flowray.model.text import CausalQueries, Prompts, load_text

PROMPTS = [
    "a small red circle",
    "a large blue square on the left on a pink background",
    "circle",
    "unknownword , a cross",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_text(tmp_path_factory.mktemp("text") / "qwen")


@pytest.fixture
def text(folder: Path) -> CausalQueries:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = load_text(CausalText(path=str(folder), queries=5))
    assert isinstance(model, CausalQueries)
    return model


def llama(path: Path) -> Path:
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = word_tokenizer()
    torch.manual_seed(0)
    sizes = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    }
    LlamaForCausalLM(
        LlamaConfig(vocab_size=len(tokenizer), pad_token_id=0, eos_token_id=1, **sizes)
    ).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@pytest.mark.parametrize("family", ["qwen", "llama"])
def test_cached_pass_equals_the_plain_one(family: str, folder: Path, tmp_path: Path) -> None:
    model = load_text(
        CausalText(path=str(folder if family == "qwen" else llama(tmp_path / "llama")), queries=5)
    )
    assert isinstance(model, CausalQueries)
    prompts = model.tokenize(PROMPTS)
    assert len({int(n) for n in prompts.mask.sum(1)}) > 2  # ragged
    w = torch.randn(len(PROMPTS), 5, model.width, generator=torch.Generator().manual_seed(0))
    results = []
    for forward in (model.forward, model.forward_plain):
        out = forward(prompts)
        (grad,) = torch.autograd.grad((out.values * w).sum(), model.queries)
        results.append((out, grad))
    (cached, cached_grad), (plain, plain_grad) = results
    assert cached.values.shape == (len(PROMPTS), 5, 32)
    assert bool(cached.mask.all())
    assert torch.allclose(cached.values, plain.values, atol=1e-5)
    assert torch.allclose(cached_grad, plain_grad, atol=1e-5)
    assert float(cached_grad.abs().min()) > 0


def test_queries_read_the_prompt_and_each_other(text: CausalQueries) -> None:
    out = text(text.tokenize(PROMPTS)).values
    assert float((out[0] - out[1]).abs().mean()) > 1e-3
    before = out.clone()
    with torch.no_grad():
        text.queries[0] += 1
    after = text(text.tokenize(PROMPTS)).values
    # later queries see earlier ones
    assert float((after[:, 1:] - before[:, 1:]).abs().mean()) > 1e-3


def test_256_queries_by_default() -> None:
    """The shipped model, without a word about queries."""
    model = load_text(CausalText())
    with torch.no_grad():
        assert model(model.tokenize(PROMPTS[:1])).values.shape == (1, 256, model.width)


def test_padding_changes_nothing(text: CausalQueries) -> None:
    together = text(text.tokenize(PROMPTS)).values
    alone = torch.cat([text(text.tokenize([prompt])).values for prompt in PROMPTS])
    assert torch.allclose(together, alone, atol=1e-5)
    ids, mask = text.tokenize(PROMPTS)
    garbage = torch.where(mask, ids, 7)
    assert torch.allclose(
        text(type(text.tokenize(PROMPTS))(garbage, mask)).values, together, atol=1e-5
    )


def test_a_prompt_of_no_tokens_gives_finite_tokens(text: CausalQueries) -> None:
    prompts = text.tokenize(PROMPTS)
    prompts.mask[2] = False
    out = text(prompts).values
    assert bool(torch.isfinite(out).all())
    assert torch.allclose(out[0], text(text.tokenize(PROMPTS)).values[0], atol=1e-5)


def test_template_and_cut(folder: Path) -> None:
    plain = load_text(CausalText(path=str(folder), queries=2, max_tokens=4))
    assert plain.tokenize(PROMPTS).ids.shape == (len(PROMPTS), 4)
    framed = load_text(CausalText(path=str(folder), queries=2, template="a picture with {prompt}"))
    longer = load_text(CausalText(path=str(folder), queries=2))
    assert torch.equal(
        framed.tokenize(["circle"]).ids, longer.tokenize(["a picture with circle"]).ids
    )


def test_backbone_is_frozen_and_stays_in_eval_mode(text: CausalQueries) -> None:
    text.train()
    assert text.training
    assert not any(module.training for module in text.backbone.modules())
    text(text.tokenize(PROMPTS)).values.sum().backward()
    assert all(p.grad is None and not p.requires_grad for p in text.backbone.parameters())
    assert text.queries.grad is not None
    assert [name for name, p in text.named_parameters() if p.requires_grad] == ["queries"]


def clip() -> Any:
    from transformers import CLIPTextConfig, CLIPTextModel

    sizes = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    }
    return CLIPTextModel(CLIPTextConfig(vocab_size=64, eos_token_id=1, pad_token_id=0, **sizes))


def whole_clip() -> Any:
    from transformers import CLIPConfig, CLIPModel

    sizes = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    }
    vision = {**sizes, "image_size": 8, "patch_size": 4, "hidden_size": 16}
    return CLIPModel(
        CLIPConfig(
            text_config={**sizes, "vocab_size": 64, "eos_token_id": 1, "pad_token_id": 0},
            vision_config=vision,
        )
    )


def t5() -> Any:
    from transformers import T5Config, T5EncoderModel

    return T5EncoderModel(
        T5Config(vocab_size=64, d_model=32, d_kv=16, d_ff=64, num_layers=2, num_heads=2)
    )


def bert() -> Any:
    from transformers import BertConfig, BertModel

    return BertModel(
        BertConfig(
            vocab_size=64,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
        )
    )


@pytest.mark.parametrize("make", [clip, whole_clip, t5, bert])
def test_encoders_by_path(make: Any, tmp_path: Path) -> None:
    torch.manual_seed(0)
    original = make().eval()
    original.save_pretrained(tmp_path)
    word_tokenizer().save_pretrained(tmp_path)
    model = load_text(EncoderText(path=str(tmp_path), max_tokens=16, scale=2.0))
    assert model.width == 32
    prompts = model.tokenize(PROMPTS)
    out = model(prompts)
    assert out.values.shape == (*prompts.ids.shape, 32)
    assert torch.equal(out.mask, prompts.mask)
    assert not out.values.requires_grad
    reference = getattr(original, "text_model", original)(
        input_ids=prompts.ids, attention_mask=prompts.mask.long()
    ).last_hidden_state
    assert torch.allclose(out.values, 2 * reference, atol=1e-5)  # the saved weights, not fresh ones
    alone = model(model.tokenize(PROMPTS[2:3])).values
    assert torch.allclose(out.values[2, : alone.shape[1]], alone[0], atol=1e-4)
    assert not any(p.requires_grad for p in model.parameters())
    model.train()
    assert not any(module.training for module in model.backbone.modules())


def test_what_cannot_be_loaded_is_one_line(tmp_path: Path) -> None:
    for config in (CausalText(path=str(tmp_path / "nowhere")), EncoderText(path=str(tmp_path))):
        with pytest.raises(
            InputError, match=r"model\.text\.path: .*(no such folder|no config.json)"
        ) as caught:
            load_text(config)
        assert "\n" not in str(caught.value)


def test_corrupt_weights_are_one_line(tmp_path: Path) -> None:
    tiny_text(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"not weights")
    with pytest.raises(InputError, match=r"model\.text\.path"):
        load_text(CausalText(path=str(tmp_path)))


def config(folder: Path) -> ModelConfig:
    return ModelConfig(
        text=CausalText(path=str(folder), queries=3), head=GridHead(hidden=16, heads=2)
    )


def test_build_model_depends_on_the_seed_alone(folder: Path) -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first = build_model(config(folder), LossConfig(), 1)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(6)
    second, third = (
        build_model(config(folder), LossConfig(), 1),
        build_model(config(folder), LossConfig(), 2),
    )
    assert first.trainable().keys() == second.trainable().keys()
    assert all(
        torch.equal(a, b)
        for a, b in zip(first.state_dict().values(), second.state_dict().values(), strict=True)
    )
    assert not torch.equal(first.text.queries, third.text.queries)
    assert not torch.equal(first.velocity.patch_in.weight, third.velocity.patch_in.weight)


def test_parts_are_disjoint_and_complete(folder: Path) -> None:
    model: nn.Module = build_model(config(folder), LossConfig(), 0)
    sizes = part_sizes(model)
    assert sum(sizes.values()) == sum(p.numel() for p in model.parameters())
    assert sizes["text.queries"] == 3 * 32
    assert {"text.backbone", "head", "velocity.blocks"} <= sizes.keys()
    assert not any(
        name.startswith(("text.backbone", "velocity.backbone")) for name in model.trainable()
    )


def test_the_prompt_keeps_nothing_for_the_backward(tmp_path: Path) -> None:
    """With a prompt nine times as long as the queries the cached pass keeps well under half of
    what the plain one does.
    """
    text = load_text(CausalText(path=str(tiny_text(tmp_path)), queries=5, max_tokens=50))
    assert isinstance(text, CausalQueries)
    prompts = Prompts(torch.randint(2, 20, (4, 45)), torch.ones(4, 45, dtype=torch.bool))
    cached, plain = (
        kept_for_backward(text, forward, prompts)[0]
        for forward in (text.forward, text.forward_plain)
    )
    assert 0 < cached < 0.4 * plain


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("autocast", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("cache", [False, True])
def test_the_frozen_model_runs_in_its_own_dtype_whatever_trains(
    folder: Path, dtype: str, autocast: torch.dtype, cache: bool
) -> None:
    """Training runs under autocast, sampling and probes without; they see the same tokens."""
    given = {"path": str(folder), "queries": 5, "dtype": dtype, "cache": cache}
    config = CausalText.model_validate(given)
    model = load_text(config)
    assert isinstance(model, CausalQueries)
    prompts, seen = model.tokenize(PROMPTS), set()
    for layer in model.backbone.modules():
        if isinstance(layer, nn.Linear):
            layer.register_forward_hook(lambda _layer, _inputs, out: seen.add(out.dtype))
    sampled, trained = [], []
    for made, half in ((sampled, False), (trained, True)):
        with torch.autocast("cpu", autocast, enabled=half):
            if model.kept is not None:
                model.kept.clear()
            made += [model(prompts).values, model.forward_plain(prompts).values]
        made[0].square().sum().backward()
        made.append(model.queries.grad)
        model.queries.grad = None
    assert seen == {{"fp32": torch.float32, "bf16": torch.bfloat16}[dtype]}
    assert all(torch.equal(a, b) for a, b in zip(sampled, trained, strict=True))
