"""What the frozen text model made of a caption is kept: the same tokens, gradients and training,
and nothing computed twice.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support import tiny_text, word_tokenizer
from test_text import PROMPTS, bert, clip, t5
from text_support import chat_tokenizer, llama, qwen3

from flowray.config.errors import InputError, Notice
from flowray.config.model import CausalText, EncoderText, TextConfig
from flowray.model.states import TokenStates
from flowray.model.text import Prompts, TextModel, load_text


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_text(tmp_path_factory.mktemp("text") / "qwen")


def both(config: TextConfig) -> tuple[TextModel, TextModel]:
    """The text model without a cache and with one, of the same weights."""
    plain = load_text(config)
    kept = load_text(config.model_copy(update={"cache": True}))
    kept.load_state_dict(plain.state_dict())
    return plain, kept


def heard(model: TextModel) -> list[int]:
    """How many prompts each pass of the backbone over token ids has, from now on."""
    passes: list[int] = []

    def hear(module: Any, args: Any, options: dict[str, Any]) -> None:
        if (ids := options.get("input_ids")) is not None:
            passes.append(len(ids))

    model.backbone.register_forward_pre_hook(hear, with_kwargs=True)
    return passes


def gradient(model: Any, prompts: Prompts) -> tuple[torch.Tensor, torch.Tensor]:
    out = model(prompts).values
    w = torch.randn(out.shape, generator=torch.Generator().manual_seed(0))
    return out.detach(), torch.autograd.grad((out * w).sum(), model.queries)[0]


@pytest.mark.parametrize("make", [qwen3, llama])
def test_tokens_and_gradients_are_those_without(make: Callable[[], Any], tmp_path: Path) -> None:
    torch.manual_seed(0)
    make()[0].save_pretrained(tmp_path)
    chat_tokenizer().save_pretrained(tmp_path)
    plain, kept = both(CausalText(path=str(tmp_path), queries=5, max_tokens=80))
    passes = heard(kept)
    prompts = plain.tokenize(PROMPTS)
    wanted = gradient(plain, prompts)
    for _ in range(2):  # bit for bit: the same batch was computed at once
        for got, want in zip(gradient(kept, prompts), wanted, strict=True):
            assert torch.equal(got, want)
    assert passes == [len(PROMPTS)]
    # in other batches, with other padding, to rounding
    for some in (PROMPTS[2:3], PROMPTS[1:3], [PROMPTS[3], "a new one", PROMPTS[0]]):
        got, want = (gradient(model, plain.tokenize(some)) for model in (kept, plain))
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)
    assert passes == [len(PROMPTS), 1]  # "a new one" alone


@pytest.mark.parametrize("make", [clip, t5, bert])
@pytest.mark.parametrize("whole", [True, False])
def test_encoders(make: Callable[[], Any], whole: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    make().save_pretrained(tmp_path)
    word_tokenizer().save_pretrained(tmp_path)
    plain, kept = both(EncoderText(path=str(tmp_path), max_tokens=16, scale=2.0, pad_to_max=whole))
    passes = heard(kept)
    prompts = plain.tokenize(PROMPTS)
    for some in (prompts, prompts, plain.tokenize(PROMPTS[2:]), plain.tokenize(PROMPTS[:1])):
        got, want = kept(some), plain(some)
        assert got.values.shape == want.values.shape
        assert torch.equal(got.mask, want.mask)
        torch.testing.assert_close(got.values[got.mask], want.values[want.mask], atol=1e-5, rtol=0)
    assert passes == [len(PROMPTS)]


def test_a_caption_twice_in_a_batch_is_computed_once(folder: Path) -> None:
    _, kept = both(CausalText(path=str(folder), queries=5, cache=True))
    passes = heard(kept)
    out = kept(kept.tokenize(["circle", "a small red circle", "circle"])).values
    assert passes == [2]
    assert torch.equal(out[0], out[2])
    assert not torch.equal(out[0], out[1])


def test_a_prompt_of_no_tokens(folder: Path) -> None:
    plain, kept = both(CausalText(path=str(folder), queries=5))
    prompts = plain.tokenize(PROMPTS)
    prompts.mask[2] = False
    torch.testing.assert_close(kept(prompts).values, plain(prompts).values, atol=1e-5, rtol=0)
    alone = Prompts(prompts.ids[2:3], prompts.mask[2:3])
    assert bool(torch.isfinite(kept(alone).values).all())


def test_cache_gib_bounds_it_and_says_so(folder: Path) -> None:
    plain = load_text(CausalText(path=str(folder), queries=5))
    size = plain._packed(*plain.tokenize(PROMPTS[:1])).nbytes  # of a prompt of four words
    room = 1.5 * size / 2**30
    kept = load_text(CausalText(path=str(folder), queries=5, cache=True, cache_gib=room))
    kept.load_state_dict(plain.state_dict())
    passes = heard(kept)
    prompts = plain.tokenize(PROMPTS)
    with pytest.warns(Notice, match=r"model\.text\.cache_gib: \d captions fill"):
        kept(prompts)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # once is enough
        for _ in range(2):
            out = kept(prompts).values
    assert kept.kept is not None
    left = len(PROMPTS) - len(kept.kept)
    assert 0 < left < len(PROMPTS)
    assert passes == [len(PROMPTS), left, left]
    torch.testing.assert_close(out, plain(prompts).values, atol=1e-5, rtol=0)


def test_a_backbone_that_trains_is_refused(folder: Path) -> None:
    _, kept = both(CausalText(path=str(folder), queries=5))
    prompts = kept.tokenize(PROMPTS)
    kept(prompts)
    next(iter(kept.backbone.parameters())).requires_grad_(True)
    with pytest.raises(InputError, match=r"model\.text\.cache: the text model trains") as caught:
        kept(prompts)
    assert "\n" not in str(caught.value)


def test_other_weights_make_other_states(folder: Path) -> None:
    plain, kept = both(CausalText(path=str(folder), queries=5))
    prompts = plain.tokenize(PROMPTS)
    kept(prompts)
    copied = copy.deepcopy(kept)
    assert copied.kept is not None
    assert len(copied.kept) == 0
    with torch.no_grad():
        plain.backbone.get_input_embeddings().weight.mul_(2)
    kept.load_state_dict(plain.state_dict())
    assert torch.equal(kept(prompts).values, plain(prompts).values)


def test_states_of_sampling_serve_training_under_autocast(folder: Path) -> None:
    """The frozen model runs in its own dtype in both, so what is kept of one is right for both."""
    plain, kept = both(CausalText(path=str(folder), queries=5))
    prompts = plain.tokenize(PROMPTS)
    passes = heard(kept)
    for half in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            assert torch.equal(kept(prompts).values, plain(prompts).values)
    assert passes == [len(PROMPTS)]


def test_what_inference_kept_serves_training(folder: Path) -> None:
    _, kept = both(CausalText(path=str(folder), queries=5))
    prompts = kept.tokenize(PROMPTS)
    with torch.inference_mode():
        kept(prompts)
    assert bool(gradient(kept, prompts)[1].any())


def test_states_must_be_of_single_tokens() -> None:
    states = TokenStates(1.0)
    ids, mask = torch.ones(2, 3, dtype=torch.int64), torch.ones(2, 3, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"a state of each token, \(1, 3\), got \(1, 2\)"):
        states(ids, mask, lambda ids, mask: torch.zeros(len(ids), 2, 4))
    assert len(states) == 0
