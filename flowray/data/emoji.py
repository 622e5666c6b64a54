"""Emoji in nine drawn styles with captions: a set in which a caption has several right pictures.

Two kinds of (emoji, style) pairs never reach the training split:

- *held-out pictures*: a twentieth of all pairs whose emoji is in training in three other styles
(the `val` split);
- *unseen pairs*: in each style a twenty-fifth of the subgroups, such as fruit, are left out whole;
the style is known from other subgroups, the subgroup from other styles (the `unseen` split).

Both are decided by hashes of names, so that neither order nor another choice of languages or size
moves a picture. Skin tones of one emoji go together.
"""

from __future__ import annotations

import hashlib
import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from flowray.config.cache import cache_dir
from flowray.config.errors import InputError, did_you_mean
from flowray.config.progress import Progress
from flowray.data import emoji_catalogue, emoji_render
from flowray.data.emoji_catalogue import CAPTIONS, STYLES, Drawing, read_drawings
from flowray.data.emoji_render import refuse_without_resvg, render_pngs
from flowray.data.make import is_made, sample, set_folders
from flowray.data.packages import fetch_all, require

SIZES = (64, 128, 256)  # px a side
VAL, UNSEEN = 0.05, 0.04  # shares of all pairs, and of each style's subgroups
KNOWN_IN = 3  # other styles in which training shows the emoji of a `val` picture
TAGS = 3  # in the caption made of them

_IN_STYLE = {"en": "{label} in {style} style", "zh": "{label}，{style}风格"}
_ELSEWHERE = "{label}, {style}"  # in the other languages


@dataclass(frozen=True)
class EmojiSet:
    """Which emoji, how large and in which styles and languages; styles in any order.

    packages: a folder that has the packages; None: they are fetched into the cache.
    InputError where a size or a style is not known.
    """

    size: int = 64
    languages: tuple[str, ...] = ("en",)
    styles: tuple[str, ...] = tuple(STYLES)
    skin_tones: bool = False
    packages: Path | None = field(default=None, compare=False)
    drawings: dict[str, list[Drawing]] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    splits = ("train", "val", "unseen")
    drawn_by = (emoji_catalogue, emoji_render, sys.modules[__name__])

    def __post_init__(self) -> None:
        if self.size not in SIZES:
            raise InputError(f"--size {self.size}: give {', '.join(map(str, SIZES))}")
        for style in self.styles:
            if style not in STYLES:
                near = did_you_mean(style, STYLES)
                raise InputError(f"--styles {style}: no such style{near}; give {', '.join(STYLES)}")
        if not self.styles or not self.languages:
            raise InputError("--styles and --lang: give at least one each")

    @property
    def name(self) -> str:
        return f"emoji_{self.size}"

    def arguments(self) -> dict[str, Any]:
        return {
            "size": self.size,
            "languages": self.languages,
            "styles": [style for style in STYLES if style in self.styles],
            "skin_tones": self.skin_tones,
        }

    def prepare(self, cache: Path, progress: Progress) -> None:
        """Fetch or find the packages, and read which drawings they have."""
        refuse_without_resvg()
        chosen = self.arguments()["styles"]
        wanted = [CAPTIONS, *(STYLES[style] for style in chosen)]
        if self.packages is None:
            folder = cache / "packages"
            captions, *archives = fetch_all(wanted, folder, progress)
        else:
            captions, *archives = require(wanted, self.packages)
        with progress.task("reading the drawings"):
            drawings = read_drawings(
                captions,
                dict(zip(chosen, archives, strict=True)),
                self.languages,
                skin_tones=self.skin_tones,
            )
        self.drawings.update(split_drawings(drawings))

    def count(self, split: str) -> int:
        return len(self.drawings[split])

    def samples(self, split: str) -> Iterator[dict[str, Any]]:
        drawings = self.drawings[split]
        pictures = render_pngs([(_key(drawing), drawing.art) for drawing in drawings], self.size)
        for drawing, picture in zip(drawings, pictures, strict=True):
            yield _sample(drawing, picture)


def _sample(drawing: Drawing, picture: bytes) -> dict[str, Any]:
    emoji, package = drawing.emoji, STYLES[drawing.style]
    facts = {
        "hexcode": emoji.hexcode,
        "label": emoji.label,
        "group": emoji.group,
        "subgroup": emoji.subgroup,
        "style": drawing.style,
        "skin_tones": emoji.tones,
        "licence": package.licence,
        "attribution": package.attribution,
    }
    return sample(_key(drawing), picture, captions(drawing), facts)


def _key(drawing: Drawing) -> str:
    return f"{drawing.emoji.hexcode.lower()}-{drawing.style}"


def captions(drawing: Drawing) -> list[str]:
    """In each language the label alone, the label with the style, and a few tags, which differ
    from style to style.
    """
    emoji, style = drawing.emoji, drawing.style
    found: list[str] = []
    for language, (label, tags) in emoji.words.items():
        found += [label, _IN_STYLE.get(language, _ELSEWHERE).format(label=label, style=style)]
        few = sorted(tags, key=lambda tag: _place("tag", emoji.hexcode, style, tag))[:TAGS]
        found += [("、" if language == "zh" else ", ").join(few)] if few else []
    return list(dict.fromkeys(found))


def _place(*names: str) -> float:
    """Evenly spread in [0, 1), a function of the names alone."""
    return int.from_bytes(hashlib.sha256("/".join(names).encode()).digest()[:6]) / 2**48


def split_drawings(drawings: Iterable[Drawing]) -> dict[str, list[Drawing]]:
    """split -> its drawings, in an order in which the first few are of all styles and groups.

    Where fewer styles than KNOWN_IN + 1 are there at all, all other styles do for `val`.
    """
    drawings = list(drawings)
    known_in = min(KNOWN_IN, len({drawing.style for drawing in drawings}) - 1)
    unseen = unseen_pairs(drawings)
    trained: dict[str, set[str]] = {drawing.emoji.hexcode: set() for drawing in drawings}
    forms: dict[str, set[str]] = defaultdict(set)
    for drawing in drawings:
        emoji = drawing.emoji
        forms[emoji.base].add(emoji.hexcode)
        if not (_pair(drawing) in unseen or _chosen(drawing)):
            trained[emoji.hexcode].add(drawing.style)
    found: dict[str, list[Drawing]] = {split: [] for split in EmojiSet.splits}
    for drawing in sorted(
        drawings, key=lambda drawing: _place("order", drawing.emoji.hexcode, drawing.style)
    ):
        known = all(len(trained[form]) >= known_in for form in forms[drawing.emoji.base])
        if _pair(drawing) in unseen:
            found["unseen"].append(drawing)
        else:
            found["val" if _chosen(drawing) and known else "train"].append(drawing)
    return found


def unseen_pairs(drawings: Iterable[Drawing]) -> set[tuple[str, str]]:
    """The (style, subgroup) pairs of `unseen`: of each style the UNSEEN share of its subgroups
    that comes first by hash, one at least.
    """
    subgroups: dict[str, set[str]] = defaultdict(set)
    for drawing in drawings:
        subgroups[drawing.style].add(drawing.emoji.subgroup)
    return {
        (style, subgroup)
        for style, drawn in subgroups.items()
        for subgroup in sorted(drawn, key=lambda each: _place("unseen", each, style))[
            : max(1, round(UNSEEN * len(drawn)))
        ]
    }


def _pair(drawing: Drawing) -> tuple[str, str]:
    return drawing.style, drawing.emoji.subgroup


def _chosen(drawing: Drawing) -> bool:
    """Whether it goes to `val` if training knows its emoji well enough."""
    return _place("val", drawing.emoji.base, drawing.style) < VAL


def made_emoji(name: str, cache: Path) -> dict[str, Path]:
    """split -> shard folder of one of FETCHED, as `make emoji` makes it by default.

    InputError with the command that makes it where it is not there: training fetches nothing.
    """
    size = int(name.rpartition("_")[2])
    folders = set_folders(EmojiSet(size=size), cache)
    if not is_made(folders.values()):
        where = "" if cache == cache_dir(None) else f"FLOWRAY_CACHE={cache} "
        raise InputError(
            f"data.shards {name}: not made yet; type {where}python -m flowray.data make emoji"
            f" --size {size}, which fetches 37 MB once"
        )
    return folders
