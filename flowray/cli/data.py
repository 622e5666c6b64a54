"""`flowray.data`: make, pack and check webdataset shards."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table

from flowray.cli import ready
from flowray.cli.common import FINDINGS, GOOD
from flowray.cli.make import add_make
from flowray.cli.parser import JSON, Parser, add_recipe, whole_number
from flowray.cli.progress import IMPORTING, ConsoleProgress
from flowray.config.cache import cache_dir
from flowray.config.load import load_recipe
from flowray.config.paths import argument, expand
from flowray.config.progress import Progress
from flowray.data.captions import LISTS
from flowray.data.check import ShardCheck, check_shards
from flowray.data.emoji import made_emoji
from flowray.data.make import ensure_embedded
from flowray.data.pack import LARGEST, pack_folder
from flowray.data.shards import EMBEDDED, FETCHED, NAMED, splits, tars

SHOWN = 20  # problems in the table; --json has them all


def main(argv: list[str]) -> int:
    """Run one subcommand; 0 good, 1 problems found, InputError for bad input."""
    parser = Parser(
        prog="flowray.data",
        description="Make, pack and check webdataset shards (KEY.png, KEY.txt, KEY.json).",
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND", dest="command")
    for add in (add_make, _add_pack, _add_check, _add_encode):
        add(commands)
    args = parser.parse_args(argv)
    return int(args.run(args))


def _add_pack(commands: argparse._SubParsersAction[Parser]) -> None:
    parser = commands.add_parser("pack", help="pack a folder of pictures with captions into shards")
    parser.add_argument(
        "images",
        type=argument,
        help=f"folder of pictures, each with a .txt of the same name, or one of {', '.join(LISTS)}",
    )
    parser.add_argument(
        "out", type=argument, help="folder for the shards; must not exist or be empty"
    )
    parser.add_argument(
        "--val",
        type=float,
        default=0.0,
        metavar="X",
        help="hold out the share X, such as 0.05: OUT/train and OUT/val",
    )
    parser.add_argument(
        "--skip-bad",
        action="store_true",
        help="name what has no caption or does not decode, leave it out",
    )
    parser.add_argument(
        "--size",
        type=int,
        metavar="PX",
        help=f"centre-crop and resize to PX x PX, at most {LARGEST}; else kept as they are",
    )
    parser.add_argument(
        "--per-shard", type=int, default=1000, metavar="N", help="samples in a shard, %(default)s"
    )
    parser.set_defaults(run=_pack)


def _pack(args: argparse.Namespace) -> int:
    packed = pack_folder(
        args.images,
        args.out,
        args.size,
        val=args.val,
        skip_bad=args.skip_bad,
        per_shard=args.per_shard,
        progress=ConsoleProgress(),
    )
    for fault in packed.left_out:
        print(f"left out: {fault}", file=sys.stderr)
    for split, count in packed.samples.items():
        print(f"{count} samples  {args.out / split if args.val else args.out}")
    if packed.left_out:
        print(
            f"{len(packed.left_out)} fault(s), named above: such files are left out",
            file=sys.stderr,
        )
    return GOOD


def _add_check(commands: argparse._SubParsersAction[Parser]) -> None:
    parser = commands.add_parser(
        "check", help="read every sample of a shard set and say what is wrong with it"
    )
    parser.add_argument(
        "specs",
        type=expand,
        nargs="+",
        metavar="SHARDS",
        help=f"folders of .tar files, globs or .tar files; or {', '.join(NAMED)}",
    )
    parser.add_argument("--json", action="store_true", help=JSON)
    parser.set_defaults(run=_check)


def _check(args: argparse.Namespace) -> int:
    progress = ConsoleProgress()
    specs = [each for spec in args.specs for each in _every_split(spec, progress)]
    result = check_shards(*specs, progress=progress)
    if args.json:
        print(json.dumps(result.as_json()))
    else:
        _show(result)
    return GOOD if result.good else FINDINGS


def _every_split(spec: str, progress: Progress) -> list[str]:
    """The folders of an embedded set, or of a folder that holds train/, val/, ...; any other
    spec as it is.
    """
    if spec in EMBEDDED:
        made = ensure_embedded(spec, cache_dir(None), progress)  # type: ignore[arg-type]
        folders = list(made.values())
    elif spec in FETCHED:
        folders = list(made_emoji(spec, cache_dir(None)).values())
    else:
        folders = [] if tars(Path(spec)) else splits(Path(spec))
    return [str(folder) for folder in folders] or [spec]


def _show(result: ShardCheck) -> None:
    console = Console(markup=False, emoji=False, highlight=False)
    sizes = ", ".join(f"{size} ({count})" for size, count in list(result.sizes.items())[:3])
    held = (
        f"{result.samples} samples in {result.shards} shard(s), {result.bytes / 1e6:.1f} MB,"
        f" {result.captions} captions"
    )
    console.print(f"{held}; sizes: {sizes or 'none'}", soft_wrap=True)
    if result.problems:
        table = Table("", "shard", "sample", "what", box=None)
        for problem in result.problems[:SHOWN]:
            table.add_row(problem.severity, problem.shard, problem.sample, problem.what)
        console.print(table)
    if len(result.problems) > SHOWN:
        console.print(f"... and {len(result.problems) - SHOWN} more; --json lists them all")
    console.print("shards are good" if result.good else "shards have problems")


def _add_encode(commands: argparse._SubParsersAction[Parser]) -> None:
    parser = commands.add_parser(
        "encode",
        help="cache the latents that a recipe trains on; training does it by itself on first use",
    )
    add_recipe(parser, "data.max_bad=0.01")
    parser.add_argument(
        "--workers",
        type=whole_number(1),
        default=1,
        metavar="N",
        help="processes that encode at once, each its share of the shards (default %(default)s)",
    )
    parser.set_defaults(run=_encode)


def _encode(args: argparse.Namespace) -> int:
    recipe, progress = load_recipe(args.recipe, args.overrides).recipe, ConsoleProgress()
    with progress.task(IMPORTING):
        from flowray.store.latents import channel_metrics, ensure_latents, load_latents

    ready.check_shards(recipe)
    made_of = recipe.data, recipe.model.autoencoder, recipe.model.latent
    folders = ensure_latents(*made_of, progress, processes=args.workers)
    for split, folder in folders.items():
        mean, least, most = channel_metrics(load_latents(folder)).values()
        print(
            f"{split:<8}{folder}  channels: mean within {mean:.2f} of 0, std {least:.2f} to"
            f" {most:.2f}"
        )
    return GOOD
