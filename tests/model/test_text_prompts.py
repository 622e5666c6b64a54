"""How prompts are worded and cut: templates, the tokenizer's own chat template, frames that stay
whole; dead queries are none.
"""

from __future__ import annotations

import copy
import threading
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from support import tiny_text
from text_support import chat_tokenizer, qwen2, save

from flowray.config.errors import InputError
from flowray.config.model import CausalText
from flowray.model.text import CausalQueries, load_text

LONG = (
    "a large blue square on the left and a small red circle on the right on a pink background " * 8
)


def model(folder: Path, **options: Any) -> CausalQueries:
    text = load_text(CausalText(path=str(folder), queries=4, **options))
    assert isinstance(text, CausalQueries)
    return text


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("chat")
    save(qwen2, path)
    return path


def text_of(text: CausalQueries, prompt: str) -> str:
    prompts = text.tokenize([prompt])
    return text.prompts.inner.decode(prompts.ids[0][prompts.mask[0]])


def test_chat_template_around_the_prompt(folder: Path) -> None:
    """OpenUni's wording, letter by letter, its `<img>` a single token."""
    text = model(
        folder, chat=True, template="Generate an image: {prompt}", suffix="<img>", max_tokens=128
    )
    wanted = (
        "<|im_start|>user\nGenerate an image: a red circle<|im_end|>\n<|im_start|>assistant\n<img>"
    )
    assert text_of(text, "a red circle") == wanted
    assert int(
        text.tokenize(["a red circle"]).ids[0, -1]
    ) == text.prompts.inner.convert_tokens_to_ids("<img>")
    system = model(folder, chat=True, system="You draw.", max_tokens=128)
    assert (
        text_of(system, "a cross")
        == "<|im_start|>system\nYou draw.<|im_end|>\n"
        + wanted.split("Generate")[0]
        + "a cross<|im_end|>\n<|im_start|>assistant\n"
    )
    assert text_of(model(folder, max_tokens=128), "a cross") == "a cross"


def test_chat_template_reaches_the_tokens(folder: Path) -> None:
    plain, chat = model(folder, max_tokens=64), model(folder, max_tokens=64, chat=True)
    chat.load_state_dict({"queries": plain.queries.detach()}, strict=False)
    tokens = [text(text.tokenize(["a red circle"])).values for text in (plain, chat)]
    assert float((tokens[0] - tokens[1]).detach().abs().mean()) > 1e-2


def test_chat_template_that_wants_a_list(folder: Path, tmp_path: Path) -> None:
    """As vision-language models' templates do: a content is a list of parts."""
    save(qwen2, tmp_path)
    template = (
        "{% for m in messages %}[{{ m['role'] }}]{% for part in m['content'] %}{{ part['text'] }}{%"
        " endfor %}{% endfor %}>"
    )
    chat_tokenizer(template).save_pretrained(tmp_path)
    assert text_of(model(tmp_path, chat=True), "a cross") == "[user]a cross>"


def test_chat_adds_no_special_tokens_of_its_own(tmp_path: Path) -> None:
    """The template has them all: a tokenizer that ends every text with <eos> (id 1) does not put
    one behind the reply's opening.
    """
    text = model(tiny_text(tmp_path))
    assert text.tokenize(["circle"]).ids[0].tolist().count(1) == 1
    text.prompts.inner.chat_template = "{% for m in messages %}a {{ m['content'] }} on{% endfor %}"
    text.prompts.inner.save_pretrained(tmp_path)
    chat = model(tmp_path, chat=True)
    assert text_of(chat, "circle") == "a circle on"


@pytest.mark.parametrize(
    ("template", "said"),
    [
        (None, "has no chat template; type model.text.chat=false"),
        ("{{ raise_exception('no system role here') }}", "no system role here"),
        ("always the same", "does not repeat"),
    ],
)
def test_chat_templates_that_do_not_serve(template: str | None, said: str, tmp_path: Path) -> None:
    save(qwen2, tmp_path)
    (tmp_path / "chat_template.jinja").unlink()
    chat_tokenizer(template).save_pretrained(tmp_path)
    with pytest.raises(InputError, match=rf"model\.text\.chat.*{said}") as caught:
        model(tmp_path, chat=True)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "options", [{"system": "You draw."}, {"suffix": "<img>"}, {"template": "a picture"}]
)
def test_wording_that_would_be_lost_is_refused(options: dict[str, str]) -> None:
    with pytest.raises(ValueError, match=r"chat: true|\{prompt\}"):
        CausalText(**options)  # type: ignore[arg-type]


@pytest.mark.parametrize("limit", [36, 40, 41, 42])
def test_a_long_prompt_is_cut_and_its_frame_is_not(folder: Path, limit: int) -> None:
    text = model(
        folder, chat=True, template="Generate an image: {prompt}", suffix="<img>", max_tokens=limit
    )
    with pytest.warns(
        UserWarning, match=rf"model\.text\.max_tokens: a prompt of \d+ tokens was cut to {limit}"
    ):
        prompts = text.tokenize([LONG, "a"])
    assert limit - 2 <= int(prompts.mask[0].sum()) <= limit
    left = text_of(text, LONG)
    start, end = left.split("Generate an image: ")[1].split("<|im_end|>")
    assert LONG.startswith(start)
    assert end == "\n<|im_start|>assistant\n<img>"
    assert text_of(text, "a").endswith(
        "Generate an image: a<|im_end|>\n<|im_start|>assistant\n<img>"
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        text.tokenize([LONG])  # said once


def test_a_plain_prompt_is_cut_as_the_tokenizer_cuts(tmp_path: Path) -> None:
    text = model(tiny_text(tmp_path), max_tokens=6)
    wanted = text.prompts.inner(
        [LONG, "circle"], truncation=True, max_length=6, padding=True, return_tensors="pt"
    )
    with pytest.warns(UserWarning, match="was cut to 6"):
        prompts = text.tokenize([LONG, "circle"])
    assert torch.equal(prompts.ids, wanted["input_ids"])
    assert torch.equal(prompts.mask, wanted["attention_mask"].bool())
    assert int(prompts.ids[0, -1]) == 1  # <eos> stays


def test_a_template_that_leaves_no_room(folder: Path) -> None:
    with pytest.raises(
        InputError,
        match=r"model\.text\.max_tokens: got 10, but the template alone takes \d+ tokens",
    ):
        model(folder, chat=True, template="Generate an image: {prompt}", max_tokens=10)


def test_positions_skip_the_padding(folder: Path) -> None:
    """Queries stand right after their own prompt, whatever the longest prompt of the batch is."""
    text = model(folder)
    mask = torch.tensor([[True, True, True], [True, False, False]])
    whole, positions = text._positions(mask)
    assert whole[:, 3:].all()
    assert positions[0].tolist() == [0, 1, 2, 3, 4, 5, 6]
    assert positions[1, 3:].tolist() == [1, 2, 3, 4]


SOME = [LONG, "circle", "", "a small red circle", LONG[:200], "circle", "x" * 3000]


def as_one_by_one(text: CausalQueries) -> list[list[int]]:
    """What the tokenizer itself says of SOME, each alone."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return [text.prompts._rows([prompt])[0] for prompt in SOME]


@pytest.mark.filterwarnings("ignore:model.text.max_tokens")
def test_kept_ids_are_those_of_the_tokenizer(folder: Path) -> None:
    options = {"template": "Generate an image: {prompt}", "max_tokens": 30}
    for given in ({}, options, {**options, "chat": True, "max_tokens": 40}):
        text = model(folder, **given)
        wanted = as_one_by_one(text)
        first, again = text.tokenize(SOME), text.tokenize(SOME[::-1])
        assert text.prompts.rows(SOME) == wanted
        assert torch.equal(first.ids, again.ids.flip(0))
        assert torch.equal(first.mask, again.mask.flip(0))
        text.prompts.inner = None  # they are not made anew
        assert text.prompts.rows([*SOME[:3], SOME[3]]) == wanted[:4]


@pytest.mark.filterwarnings("ignore:model.text.max_tokens")
def test_only_so_many_are_kept(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flowray.model.prompts.KEPT", 8)
    text = model(folder, max_tokens=30)
    wanted = as_one_by_one(text)
    for start in range(40):
        others = [f"number {i}" for i in range(3 * start, 3 * start + 3)]
        rows = text.prompts.rows([*others, SOME[start % 7]])
        assert rows == [*text.prompts._rows(others), wanted[start % 7]]
        assert len(text.prompts._kept) <= 8
        assert SOME[-1] not in text.prompts._kept  # as long ones are not


class OneAtATime:
    """A tokenizer that notices a second thread in it: how it cuts is a state of its own."""

    def __init__(self, inner: Any):
        self.inner, self.asked = inner, threading.Lock()

    def __call__(self, *given: Any, **options: Any) -> Any:
        assert self.asked.acquire(blocking=False)
        time.sleep(0.02)
        try:
            return self.inner(*given, **options)
        finally:
            self.asked.release()


def test_threads_may_ask_at_once(folder: Path) -> None:
    text = model(folder, max_tokens=30)
    prompts = [[f"circle {i}", "square", f"cross {i}"] for i in range(4)]
    wanted = [text.prompts._rows(some) for some in prompts]
    text.prompts.inner = OneAtATime(text.prompts.inner)
    with ThreadPoolExecutor(4) as threads:
        assert list(threads.map(text.prompts.rows, prompts)) == wanted
    assert copy.deepcopy(text.prompts).rows(prompts[0]) == wanted[0]
