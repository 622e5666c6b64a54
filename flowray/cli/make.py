"""`flowray.data make`: write one of the sets that this program makes."""

from __future__ import annotations

import argparse
import json
from typing import Any

from flowray.cli.common import GOOD
from flowray.cli.parser import Parser
from flowray.cli.progress import ConsoleProgress
from flowray.config.cache import cache_dir
from flowray.config.errors import InputError
from flowray.config.paths import argument
from flowray.data.emoji import SIZES, EmojiSet
from flowray.data.emoji_catalogue import PERMISSIVE, STYLES
from flowray.data.make import DigitsSet, MadeSet, ShapesSet, ensure_set, make_set
from flowray.data.shards import EMBEDDED, MANIFEST

_OPTIONS = {  # by the set that takes them
    "shapes": ("samples", "two_share", "seed"),
    "digits": (),
    "emoji": ("size", "lang", "styles", "permissive", "skin_tones", "packages"),
}


def add_make(commands: argparse._SubParsersAction[Parser]) -> None:
    parser = commands.add_parser(
        "make",
        help="write a set: shapes (procedural scenes under captions that leave things open),"
        " shapes_closed (the same, all of each named), digits (real 8x8 scans) or emoji (in nine"
        " drawn styles, fetched with npm)",
    )
    sets = (*EMBEDDED, "emoji")
    parser.add_argument("set", choices=sets, metavar="SET", help=", ".join(sets))
    parser.add_argument(
        "--out", type=argument, help="folder that gets train/, val/, unseen/; else the cache"
    )
    parser.add_argument(
        "--samples",
        type=int,
        metavar="N",
        help="shapes: for training, 12000; val N/16, unseen N/32",
    )
    parser.add_argument(
        "--two-share",
        type=float,
        metavar="X",
        help="shapes: share of two-object scenes in 0..1, 0.2",
    )
    parser.add_argument("--seed", type=int, help="shapes: another seed draws other scenes, 0")
    _add_emoji(parser)
    parser.set_defaults(run=_make)


def _add_emoji(parser: Parser) -> None:
    parser.add_argument(
        "--size",
        type=int,
        choices=SIZES,
        metavar="PX",
        help=f"emoji: {', '.join(map(str, SIZES))} px a side, {SIZES[0]}",
    )
    parser.add_argument(
        "--lang",
        type=_names,
        metavar="L,...",
        help="emoji: languages of the captions, such as en,zh; en",
    )
    parser.add_argument(
        "--styles", type=_names, metavar="S,...", help=f"emoji: of {', '.join(STYLES)}; all"
    )
    parser.add_argument(
        "--permissive",
        action="store_true",
        default=None,
        help="emoji: without the styles under CC-BY-SA",
    )
    parser.add_argument(
        "--skin-tones",
        action="store_true",
        default=None,
        help="emoji: people in five skin tones as well",
    )
    parser.add_argument(
        "--packages", type=argument, metavar="DIR", help="emoji: a folder of what npm would fetch"
    )


def _names(text: str) -> tuple[str, ...]:
    return tuple(dict.fromkeys(filter(None, (name.strip() for name in text.split(",")))))


def _make(args: argparse.Namespace) -> int:
    what, progress = _set(args), ConsoleProgress()
    if args.out is None:
        folders = ensure_set(what, cache_dir(None), progress)
    else:
        folders = make_set(what, args.out, cache_dir(None), progress)
    for split, folder in folders.items():
        count = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["samples"]
        print(f"{split:7s} {count:6d} samples  {folder}")
    return GOOD


def _set(args: argparse.Namespace) -> MadeSet:
    kind = "shapes" if args.set.startswith("shapes") else args.set
    given = {
        name: value
        for names in _OPTIONS.values()
        for name in names
        if (value := getattr(args, name)) is not None
    }
    for name in given:
        if name not in _OPTIONS[kind]:
            owner = next(owner for owner, names in _OPTIONS.items() if name in names)
            raise InputError(
                f"--{name.replace('_', '-')} is for {owner}, {args.set} has no such choice"
            )
    if kind == "digits":
        return DigitsSet()
    if kind == "emoji":
        return _emoji(given)
    if (count := given.pop("samples", None)) is not None:
        if count < 1:
            raise InputError(f"--samples {count}: must be at least 1")
        given |= {"train": count, "val": max(1, count // 16), "unseen": max(1, count // 32)}
    what = ShapesSet(**given, closed=args.set == "shapes_closed")
    if not 0 <= what.two_share <= 1:
        raise InputError(f"--two-share {what.two_share}: must lie in 0..1")
    if what.seed < 0:
        raise InputError(f"--seed {what.seed}: must be 0 or more")
    return what


def _emoji(given: dict[str, Any]) -> EmojiSet:
    if given.pop("permissive", False):
        shared = [name for name in given.get("styles", ()) if name in STYLES.keys() - PERMISSIVE]
        if shared:
            raise InputError(
                f"--styles {shared[0]}: is under {STYLES[shared[0]].licence}, which --permissive"
                " leaves out; give one of the two"
            )
        given.setdefault("styles", PERMISSIVE)
    if (languages := given.pop("lang", None)) is not None:
        given["languages"] = languages
    return EmojiSet(**given)
