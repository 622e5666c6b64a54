"""Captions to token ids, by the tokenizer that lies beside a text model's weights."""

from __future__ import annotations

import threading
import warnings
from array import array
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2 import TemplateError
from transformers import AutoTokenizer
from transformers.utils.import_utils import is_sentencepiece_available

from flowray.config.errors import InputError, Notice
from flowray.config.model import CausalText, TextConfig
from flowray.model.files import TEXT, ModelFiles, open_model, read_json, refuse_pointer, refused
from flowray.model.local import find_place, may_download
from flowray.model.pretrained import OFFLINE, loading, needs_code, quiet, transformers_config

PROMPT = "{prompt}"
# prompts of which a tokenizer keeps the ids, 215 bytes each where they have 16 words, and the most
# letters of one that is kept
KEPT, KEPT_LETTERS = 2**16, 1000
# Files of which a tokenizer has at least one.
_TOKENIZER_FILES = ("tokenizer*", "vocab*", "merges.txt", "*.model", "*.tiktoken", "tekken.json")


class PromptTokenizer:
    """Prompts to rows of at most `max_tokens` token ids, the recipe's template kept whole.

    inner: transformers' tokenizer. frame: the text around a prompt, with {prompt} in it.
    """

    def __init__(self, inner: Any, config: TextConfig):
        self.inner, self.max_tokens = inner, config.max_tokens
        self.frame, self._special = PROMPT, True  # special: whether special tokens are added
        if isinstance(config, CausalText):
            self.frame = chat_frame(inner, config) if config.chat else config.template
            self._special = not config.chat
        self._cut_before = False
        self._kept: dict[str, array[int]] = {}
        self._asking = threading.Lock()  # how a tokenizer cuts is a state of its own

    def __deepcopy__(self, _: object) -> PromptTokenizer:
        return self

    def rows(self, prompts: Sequence[str]) -> list[list[int]]:
        """Token ids of every prompt, one too long cut at its end, the frame kept; one warning.

        They are kept for the next time, as training shows a caption once an epoch. Threads may ask.
        """
        with self._asking:
            if len(self._kept) + len(prompts) > KEPT:
                self._kept.clear()
            new = [prompt for prompt in dict.fromkeys(prompts) if prompt not in self._kept]
            made = dict(zip(new, self._rows(new), strict=True)) if new else {}
            for prompt, row in made.items():
                if len(prompt) <= KEPT_LETTERS:
                    self._kept[prompt] = array("I", row)
            return [made[p] if p in made else self._kept[p].tolist() for p in prompts]

    def _rows(self, prompts: Sequence[str]) -> list[list[int]]:
        rows = self._tokens(prompts)
        for i, (row, prompt) in enumerate(zip(rows, prompts, strict=True)):
            if len(row) > self.max_tokens:
                self._warn(prompt, len(row))
                cut = self._cut(prompt)
                rows[i] = self._tokens([cut], truncation=True, max_length=self.max_tokens)[0]
        return rows

    def frame_tokens(self) -> int:
        """How many tokens the template takes."""
        return len(self._tokens([""])[0])

    def cut_share(self, prompts: Sequence[str]) -> float:
        """Share, 0 to 1, of prompts that `rows` cuts."""
        with self._asking:
            rows = self._tokens(prompts)
        return sum(len(row) > self.max_tokens for row in rows) / max(len(prompts), 1)

    def unknown(self, prompts: Sequence[str]) -> float:
        """Share, 0 to 1, of tokens for what the tokenizer does not know, the template left out."""
        with self._asking:
            rows = self.inner(list(prompts), add_special_tokens=False, verbose=False)["input_ids"]
        count = sum(map(len, rows))
        return sum(row.count(self.inner.unk_token_id) for row in rows) / count if count else 0.0

    def _tokens(self, prompts: Sequence[str], **options: Any) -> list[list[int]]:
        """Token ids of framed prompts."""
        texts = [self.frame.replace(PROMPT, prompt) for prompt in prompts]
        options |= {"add_special_tokens": self._special, "verbose": False}
        return self.inner(texts, **options)["input_ids"]

    def _cut(self, prompt: str) -> str:
        """A prompt without its end, so that it and the frame fit; without one the tokenizer
        cuts.
        """
        if self.frame == PROMPT or not self.inner.is_fast:
            return prompt
        tokens = self.inner(prompt, add_special_tokens=False, return_offsets_mapping=True)
        ends = [end for _, end in tokens["offset_mapping"]]
        # More than once, because what is left may fall into other tokens beside the frame.
        while ends and (excess := len(self._tokens([prompt])[0]) - self.max_tokens) > 0:
            ends = ends[:-excess]
            prompt = prompt[: ends[-1]] if ends else ""
        return prompt

    def _warn(self, prompt: str, length: int) -> None:
        if not self._cut_before:
            self._cut_before = True
            cut = f"a prompt of {length} tokens was cut to {self.max_tokens}, later ones silently"
            warnings.warn(f"model.text.max_tokens: {cut}: {prompt[:60]!r}", Notice, stacklevel=4)


def load_tokenizer(config: TextConfig) -> PromptTokenizer:
    """The tokenizer of a text model's path, with the recipe's template.

    InputError: no tokenizer there, one that cannot be read, or a template that leaves no room.
    """
    if may_download(config.path):
        find_place(config.path, TEXT)  # a part of a snapshot may lack the tokenizer
    files = open_model(config.path, TEXT, "text_encoder", weights=False)
    transformers_config(files, TEXT, "text_encoder")  # refuses what is no text model at all
    made = PromptTokenizer(_load(files), config)
    if (frame := made.frame_tokens()) >= config.max_tokens:
        taken = f"but the template alone takes {frame} tokens"
        raise InputError(f"model.text.max_tokens: got {config.max_tokens}, {taken}; raise it")
    return made


def check_captions(prompts: PromptTokenizer, captions: Sequence[str]) -> str | None:
    """InputError where different captions become the same tokens: all would mean one picture.

    captions: some of the data's, as they stand there. Returns a line of warning where a few of them
    do, or where the captions themselves are all the same, which is no fault of the model's.
    """
    plain = {" ".join(caption.casefold().split()): caption for caption in captions}
    different = list(plain.values())
    if len(different) < 2:
        if len(captions) < 2:
            return None
        same = f"the {len(captions)} captions looked at are all the same, {captions[0][:60]!r}"
        return f"warning: {same}: they tell no picture apart"
    if (share := prompts.unknown(different)) > 0.5:
        why = f"knows only {1 - share:.0%} of captions such as {different[0][:60]!r}"
        raise InputError(f"{TEXT}: its tokenizer {why}; give a text model of their language")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a caption that is cut
        rows = prompts.rows(different)
    first: dict[tuple[int, ...], str] = {}
    pairs = [
        (caption, first[tuple(row)])
        for caption, row in zip(different, rows, strict=True)
        if first.setdefault(tuple(row), caption) != caption
    ]
    if not pairs:
        return None
    a, b = (text[:60] for text in pairs[0])
    rows_of = "the same row" if len(first) == 1 else f"only {len(first)} rows"
    said = f"{len(different)} different captions become {rows_of} of tokens, as {a!r} and {b!r}"
    if max(map(len, rows)) >= prompts.max_tokens:
        said, where = f"{said}: they are cut; raise it", "model.text.max_tokens"
    else:
        said, where = f"{said}: its tokenizer drops what tells them apart; give another", TEXT
    if 2 * len(first) <= len(different):
        raise InputError(f"{where}: {said}")
    return f"warning: {where}: {said}"


def _load(files: ModelFiles) -> Any:
    folder = _tokenizer_folder(files.folder)
    for pattern in _TOKENIZER_FILES:
        for file in folder.glob(pattern):
            if file.is_file():
                refuse_pointer(file, TEXT)
    why = "has no vocabulary of a tokenizer (tokenizer.json, vocab.txt, ...)"
    then = "all captions would become the same tokens; download the model's folder whole"
    missing = refused(TEXT, files.folder, f"{why}: {then}")
    if not _has_tokenizer(folder):
        raise missing
    whole = (folder / "tokenizer.json").is_file()
    pieces = sorted(file.name for file in folder.glob("*.model"))
    if pieces and not whole and not is_sentencepiece_available():
        typed = "type `pip install sentencepiece protobuf`"
        raise refused(TEXT, folder, f"has {pieces[0]} and no tokenizer.json; {typed}")
    try:
        with quiet(), loading(TEXT, folder):
            tokenizer = AutoTokenizer.from_pretrained(folder, **OFFLINE)
    except InputError as error:
        brought = folder / "tokenizer_config.json"
        if brought.is_file() and "auto_map" in read_json(brought, TEXT):
            raise needs_code(files, TEXT) from error
        raise
    # Without its files transformers makes a tokenizer up that knows no word.
    names = tokenizer.vocab_files_names
    wanted = [names[key] for key in ("vocab_file", "merges_file") if key in names]
    if not whole and not all((folder / name).is_file() for name in wanted):
        raise missing
    return tokenizer


def _has_tokenizer(folder: Path) -> bool:
    return any(file.is_file() for pattern in _TOKENIZER_FILES for file in folder.glob(pattern))


def _tokenizer_folder(folder: Path) -> Path:
    """With the weights, in `tokenizer/` among them or, in pipelines, in `tokenizer/` beside."""
    beside = folder.with_name(folder.name.replace("text_encoder", "tokenizer"))
    places = (folder, folder / "tokenizer", beside)
    return next((place for place in places if _has_tokenizer(place)), folder)


def chat_frame(tokenizer: Any, config: CausalText) -> str:
    """The chat template around the recipe's template, {prompt} still in it; InputError where the
    tokenizer has none that takes it.
    """
    if not tokenizer.chat_template:
        lacks = f"the tokenizer of {config.path!r} has no chat template"
        raise InputError(f"model.text.chat: {lacks}; type model.text.chat=false")
    why: object = "it does not repeat what it is told"
    listed = [{"type": "text", "text": config.template}]  # as some vision-language models want it
    for words in (config.template, listed):
        system = [] if config.system is None else [{"role": "system", "content": config.system}]
        try:
            messages = [*system, {"role": "user", "content": words}]
            text = tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=True
            )
        except (TemplateError, TypeError) as error:
            why = error
            continue
        if PROMPT in text:
            return text + config.suffix
    template = f"the chat template of {config.path!r}"
    raise InputError(f"model.text.chat: {template} does not take system and user text: {why}")
