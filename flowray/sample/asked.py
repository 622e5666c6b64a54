"""What an evaluation on any set of pictures asks for: held-out captions, what their pictures show
by the samples' JSON, and all real pictures to compare with.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from sys import intern
from typing import Any

import numpy as np

from flowray.config.errors import InputError
from flowray.config.progress import SILENT, Progress
from flowray.config.recipe import Recipe
from flowray.config.train import DataConfig
from flowray.data.pictures import filtered, one_size, pictures_also_in
from flowray.data.prepare import AS_THEY_ARE, Preparation
from flowray.data.reader import ShardReader
from flowray.data.remote import RemoteCache
from flowray.data.shards import find_shards
from flowray.model.autoencoder import planned_picture_size
from flowray.sample.judges import LATENTS
from flowray.sample.neighbours import CAPTIONS, PICTURES, Choices, Values
from flowray.store.latents import ensure_latents, skipped_places, split_shards

LABEL, ATTRIBUTES, GROUP = "label", ("style",), "group"  # fields that are looked for by themselves
# a word of ASCII, or one letter of any other script: some write words without spaces between
WORDS = re.compile(r"[a-z0-9]+|[^\W_a-z0-9]")


@dataclass(frozen=True)
class Fields:
    """The fields of the samples' JSON that are judged; label None: the first caption is it."""

    label: str | None
    attributes: tuple[str, ...]
    group: str | None

    @property
    def caption(self) -> str:
        """What the label is called among the judged fields."""
        return self.label or "caption"


@dataclass(frozen=True)
class Asked:
    """A held-out caption and the picture that lent it, by its place in the held-out shards.

    wanted: field -> what a picture of it shows; None where the caption does not say.
    """

    text: str
    index: int
    wanted: dict[str, str | None]


class Samples:
    """The pictures of shards, with what some fields of their JSON say."""

    def __init__(self, reader: ShardReader, names: Collection[str]):
        self.reader = reader
        self.said = {name: np.full(len(reader), None, dtype=object) for name in names}
        for i in range(len(reader)):
            row = self._row(i)
            for name in self.said:
                if row.get(name) is not None:  # null says nothing
                    self.said[name][i] = intern(str(row[name]))

    def _row(self, i: int) -> dict[str, Any]:
        if "json" not in self.reader.extensions(i):
            return {}
        read = json.loads(self.reader.read(i, "json"))
        return read if isinstance(read, dict) else {}

    def __len__(self) -> int:
        return len(self.reader)

    @cached_property
    def captions(self) -> np.ndarray:
        """The first caption of every sample, (N,)."""
        first = (intern(self.reader.captions(i)[0]) for i in range(len(self)))
        return np.array(list(first), dtype=object)

    def have(self, name: str) -> bool:
        """Whether every sample has the field."""
        return all(value is not None for value in self.said[name])

    def values(self, name: str | None) -> np.ndarray:
        """What the field of every sample says, (N,); None: its first caption. InputError where one
        has none.
        """
        if name is None:
            return self.captions
        lacking = [i for i, value in enumerate(self.said[name]) if value is None]
        for i in lacking[:1]:
            said = [name for name, value in self._row(i).items() if value is not None]
            has = ", ".join(said) or "none"
            raise InputError(f"{self.reader.label(i)}: no field {name!r} in its JSON; it has {has}")
        return self.said[name]


def names_of(choices: Choices) -> set[str]:
    """The fields that may be judged."""
    chosen = (choices.label, choices.group, *choices.attributes)
    return {LABEL, *ATTRIBUTES, GROUP, *filter(None, chosen)}


def fields_of(samples: Sequence[Samples], choices: Choices) -> Fields:
    """The chosen fields, else those of the usual names that every sample has.

    InputError where the label is chosen as an attribute too.
    """

    def usual(name: str) -> str | None:
        return name if all(each.have(name) for each in samples) else None

    label = choices.label or usual(LABEL)
    found = tuple(name for name in map(usual, ATTRIBUTES) if name and name != label)
    fields = Fields(label, choices.attributes or found, choices.group or usual(GROUP))
    if fields.caption in fields.attributes:
        raise InputError(
            f"--attribute {fields.caption}: says already which pictures are of one caption; want"
            " another"
        )
    return fields


def says(text: str, value: str) -> bool:
    """Whether the words of a value stand in a text, in its order; False where it has none."""
    return bool(_words(value).strip()) and _words(value) in _words(text)


def _words(text: str) -> str:
    return f" {' '.join(WORDS.findall(text.lower()))} "


def ask(held_out: Samples, fields: Fields, count: int | None, seed: int) -> list[Asked]:
    """A caption of a random picture of each of `count` labels; None: CAPTIONS, or all there are.

    InputError where there are not that many labels, or but one.
    """
    labels = held_out.values(fields.label)
    every = np.random.default_rng(seed).permutation(np.unique(labels.astype(str)))
    if len(every) < 2:
        one = repr(str(every[0]))
        raise InputError(f"all held-out pictures are of one caption, {one}; want two or more")
    if count is not None and count > len(every):
        raise InputError(f"--captions: want at most {len(every)}, got {count}")
    asked = []
    for i, label in enumerate(every[: count or CAPTIONS]):
        rng = np.random.default_rng([seed, i])
        index = int(rng.choice(np.flatnonzero(labels == label)))
        text = str(rng.choice(held_out.reader.captions(index)))
        wanted: dict[str, str | None] = {fields.caption: str(label)}
        # a label may have the word of a style: "flat shoe"
        rest = _words(text).replace(_words(str(label)), " ", 1) if fields.label else text
        for name in fields.attributes:
            value = held_out.values(name)[index]
            wanted[name] = value if says(rest, value) else None
        asked.append(Asked(text, index, wanted))
    return asked


@dataclass(frozen=True)
class Prepared:
    """What an evaluation needs of the data: split -> its samples, which of them is held out.

    left_out: held-out samples dropped because their picture is a training one's, or another
    held-out set's. prepare: what is done to the pictures before they are looked at. clip: as for
    Choices.
    """

    samples: dict[str, Samples]
    held_out: str
    fields: Fields
    asked: list[Asked]
    draws: int
    features: str
    why: str
    left_out: int
    prepare: Preparation = AS_THEY_ARE
    clip: str | None = None

    @property
    def lent(self) -> Samples:
        """The held-out samples."""
        return self.samples[self.held_out]

    def offset(self) -> int:
        """Where the held-out ones begin among all real pictures."""
        before = list(self.samples).index(self.held_out)
        return sum(len(each) for each in list(self.samples.values())[:before])

    def values(self) -> Values:
        """What all real pictures show in the judged fields."""
        return {
            name: np.concatenate(
                [
                    each.values(self.fields.label if name == self.fields.caption else name)
                    for each in self.samples.values()
                ]
            )
            for name in self.asked[0].wanted
        }

    def wanted(self, order: np.ndarray) -> Values:
        """What draws of the asked captions should show, in this order of captions."""
        return {
            name: np.repeat(
                np.array([self.asked[i].wanted[name] for i in order], dtype=object), self.draws
            )
            for name in self.asked[0].wanted
        }


def prepare(recipe: Recipe, choices: Choices, seed: int, progress: Progress = SILENT) -> Prepared:
    """Read what the samples say and choose the captions; InputError where the choices do not fit
    them.
    """
    shards = split_shards(recipe.data, progress)
    held_out = "val"
    if choices.held_out:
        given = find_shards(choices.held_out, RemoteCache.of(recipe.data))
        held_out = _split_of(given, shards)
        shards = shards | {held_out: shards.get(held_out, given)}
    made_of = recipe.data, recipe.model.autoencoder, recipe.model.latent
    features = choices.features or LATENTS
    if features == LATENTS:  # first, as encoding finds the samples that are bad
        ensure_latents(*made_of, progress)
    with progress.task("reading what the samples say"):
        size = planned_picture_size(recipe.model.autoencoder, recipe.model.latent)
        prepare = Preparation(recipe.data.prepare, size)
        every = _readers(shards, recipe.data, skipped_places(*made_of), prepare)
        readers, left_out = _apart(every, held_out)
        one_size(readers.values(), choices.held_out or recipe.data.shards, prepare)
        samples = {split: Samples(reader, names_of(choices)) for split, reader in readers.items()}
        fields = fields_of(list(samples.values()), choices)
        _check(samples, held_out, fields)
        asked = ask(samples[held_out], fields, choices.captions, seed)
    if left_out:
        progress.say(f"held-out pictures left out, as in training or held out twice: {left_out}")
    draws = choices.draws or max(2, round(PICTURES / len(asked)))
    asked = _named(asked[: choices.limit], fields, choices)
    why = "chosen by --features"
    if choices.features is None:
        why = "no --features: the latents that the run was trained on, which need no other network"
    return Prepared(
        samples, held_out, fields, asked, draws, features, why, left_out, prepare, choices.clip
    )


def _readers(
    shards: Mapping[str, Sequence[Path]],
    data: DataConfig,
    skipped: Mapping[str, frozenset[int]],
    prepare: Preparation,
) -> dict[str, ShardReader]:
    """The splits, without the samples at the places `skipped`, and those that `prepare` leaves
    out: shards that are evaluated alone have never been encoded.
    """
    readers = {}
    for split, paths in shards.items():
        limit = data.limit if split == "train" else None
        every = ShardReader(paths, limit, caption_key=data.caption_key)
        without = skipped.get(split, frozenset()) | filtered(every, prepare)
        readers[split] = ShardReader(paths, limit, without, data.caption_key)
    return readers


def _apart(readers: Mapping[str, ShardReader], held_out: str) -> tuple[dict[str, ShardReader], int]:
    """The splits, in their order, without the pictures that training has too, or the held-out split
    before another one; how many these are. Such a picture would be its own nearest neighbour.

    InputError where the held-out split or all but training has no other ones.
    """
    kept, left_out = {"train": readers["train"]}, 0
    rest = [split for split in readers if split not in kept]
    for split in sorted(rest, key=lambda split: split != held_out):
        here = readers[split]
        twice = {i for each in kept.values() for i in pictures_also_in(here, each)}
        left_out += len(twice)
        if len(twice) < len(here):
            without = here.without | set(here.places(twice))
            kept[split] = ShardReader(here.paths, None, without, here.caption_key)
    if held_out not in kept or len(kept) == 1:
        raise InputError(
            f"{readers[held_out].paths[0].parent}: every held-out picture is in data.shards too, so"
            " that none is held out; give others as data.val_shards or --held-out"
        )
    return {split: kept[split] for split in readers if split in kept}, left_out


def _split_of(given: Sequence[Path], shards: Mapping[str, Sequence[Path]]) -> str:
    """The split that these shards are, by whatever path; InputError where they are but a part of
    one: their pictures would be among the real ones twice.
    """
    files = {path.resolve() for path in given}
    known = {split: {path.resolve() for path in paths} for split, paths in shards.items()}
    for split, those in known.items():
        if files == those:
            return split
    for split, those in known.items():
        if both := files & those:
            raise InputError(
                f"--held-out: {min(both)} is one of the {len(those)} {split} shards; want all of"
                " these alone, or none"
            )
    return "held_out"


def _check(samples: Mapping[str, Samples], held_out: str, fields: Fields) -> None:
    """InputError where a sample lacks what is judged: found out before anything is painted."""
    for name in (fields.label, *fields.attributes):
        for each in samples.values():
            each.values(name)
    if fields.group:
        samples[held_out].values(fields.group)


def _named(asked: list[Asked], fields: Fields, choices: Choices) -> list[Asked]:
    """The same without attributes that no caption names; InputError where one was chosen."""
    silent = {name for name in fields.attributes if all(one.wanted[name] is None for one in asked)}
    if chosen := sorted(silent & set(choices.attributes)):
        raise InputError(f"--attribute {chosen[0]}: no caption that is asked for names its value")
    return [
        replace(one, wanted={name: x for name, x in one.wanted.items() if name not in silent})
        for one in asked
    ]
