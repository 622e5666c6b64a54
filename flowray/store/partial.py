"""Which shards of a training set are encoded already, and those that a recipe names of it."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

from flowray.config.errors import InputError
from flowray.config.partial import Part, parse_part
from flowray.config.progress import SILENT, Progress
from flowray.store.latent_shards import LatentShards, known_sources, sources
from flowray.store.sums import Sums


def encoded_part(
    shards: Sequence[Path], cache: LatentShards, sums: Sums, progress: Progress = SILENT
) -> Part:
    """The shards whose latents are in the cache now; InputError where there are none.

    Those are known by the sha256 that encoding remembers, so none is read; where none is remembered
    at all, of a set that was moved, they are read for it.
    """
    named = known_sources(shards, sums)
    if all(source.key is None for source in named):
        named = sources(shards, sums, progress)
    places = [place for place, source in enumerate(named) if cache.find(source)]
    if not places:
        raise InputError(
            f"data.partial: none of the {len(shards)} training shards is encoded so far;"
            " `python -m flowray.data encode RECIPE` encodes them"
        )
    return Part(tuple(places), len(shards), _check([shards[place] for place in places], sums))


def shards_of(text: str, shards: Sequence[Path], sums: Sums) -> tuple[Path, ...]:
    """The shards that `data.partial` names; InputError where they are not there, or have other
    content.
    """
    part = parse_part(text)
    other = "true takes those that are encoded now, for a new run"
    if part.places[-1] >= len(shards):
        raise InputError(
            f"data.partial: {text} names shard {part.places[-1]}, data.shards has {len(shards)};"
            f" {other}"
        )
    chosen = tuple(shards[place] for place in part.places)
    if (check := _check(chosen, sums)) != part.check:
        raise InputError(
            f"data.partial: the shards that {text} names have other content now, {check}; {other}"
        )
    return chosen


def _check(shards: Sequence[Path], sums: Sums) -> str:
    return hashlib.sha256(" ".join(sums.of(shards)).encode()).hexdigest()[:8]
