"""`flowray.data`: make, pack, check, show and encode webdataset shards."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table

from flowray.cli import ready
from flowray.cli.common import FINDINGS, GOOD, refuse_unwritable
from flowray.cli.make import add_make
from flowray.cli.parser import JSON, Parser, add_recipe, number, whole_number
from flowray.cli.progress import IMPORTING, ConsoleProgress
from flowray.config.cache import cache_dir
from flowray.config.cluster import in_cluster
from flowray.config.errors import InputError
from flowray.config.load import load_recipe
from flowray.config.paths import argument, expand, is_address, place_argument
from flowray.config.prepare import WHITE, PrepareConfig
from flowray.config.progress import Progress
from flowray.config.writing import write_whole
from flowray.data.check import ShardCheck, check_shards
from flowray.data.emoji import made_emoji
from flowray.data.make import ensure_embedded, png
from flowray.data.pack import LARGEST, LEFT_OUT, Packed, pack_folder
from flowray.data.reader import ShardReader
from flowray.data.remote_sets import remote_splits
from flowray.data.shards import EMBEDDED, FETCHED, NAMED, find_shards, splits, tars
from flowray.data.survey import Survey, contact_sheet, show, survey

MOST_SHOWN = 1024  # pictures of a page, which holds them all
SHOWN = 20  # problems in the table; --json has them all


def main(argv: list[str]) -> int:
    """Run one subcommand; 0 good, 1 problems found, InputError for bad input."""
    parser = Parser(
        prog="flowray.data",
        description="Make, pack, check and show webdataset shards (KEY.png, KEY.txt, KEY.json).",
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND", dest="command")
    for add in (add_make, _add_pack, _add_check, _add_show, _add_encode):
        add(commands)
    args = parser.parse_args(argv)
    return int(args.run(args))


def _add_pack(commands: argparse._SubParsersAction[Parser]) -> None:
    parser = commands.add_parser("pack", help="pack pictures with captions into shards")
    parser.add_argument(
        "images",
        type=place_argument,
        help="folder of pictures with a .txt each or a list (docs/data.md), .parquet, HF dataset",
    )
    parser.add_argument(
        "out", type=place_argument, help="empty folder, s3:// or gs:// for the shards"
    )
    add = parser.add_argument
    add("--val", type=float, default=0.0, metavar="X", help="share for OUT/val, such as 0.05")
    add("--skip-bad", action="store_true", help="leave out what does not decode or has no caption")
    add("--caption", metavar="KEY", help="column of the captions, in a list or table")
    add("--size", type=int, metavar="PX", help=f"crop and resize to squares, at most {LARGEST}")
    add("--resize", choices=("lanczos", "area"), default="lanczos", help="how (%(default)s)")
    add(
        "--min-size",
        type=whole_number(1),
        metavar="PX",
        help="leave out what is smaller, by default than --size",
    )
    add(
        "--max-aspect",
        type=number(1),
        metavar="R",
        help="leave out where longer / shorter side > R",
    )
    add("--background", type=_colour, default=WHITE, metavar="R,G,B", help="behind what is clear")
    add("--workers", type=whole_number(1), metavar="N", help="threads, by default one a core")
    add("--per-shard", type=int, default=1000, metavar="N", help="samples, %(default)s")
    parser.set_defaults(run=_pack)


def _colour(text: str) -> tuple[int, int, int]:
    """An argument's type: three numbers of 255."""
    parts = [int(part) for part in text.split(",") if part.strip().isdecimal()]
    if len(parts) != 3 or text.count(",") != 2 or max(parts) > 255:
        raise argparse.ArgumentTypeError(f"{text!r}: want three numbers up to 255, as 255,255,255")
    return parts[0], parts[1], parts[2]


def _pack(args: argparse.Namespace) -> int:
    prepare = PrepareConfig(
        background=args.background,
        resize=args.resize,
        min_size=args.min_size,
        max_aspect=args.max_aspect,
    )
    if isinstance(args.images, str):
        raise InputError(
            f"{args.images}: pictures are packed from a folder; mount the bucket or copy it here"
        )
    packed = pack_folder(
        args.images,
        args.out,
        args.size,
        val=args.val,
        skip_bad=args.skip_bad,
        per_shard=args.per_shard,
        prepare=prepare,
        caption_key=args.caption,
        workers=args.workers,
        progress=ConsoleProgress(),
    )
    _say_left_out(packed, args.out)
    for split, count in packed.samples.items():
        print(f"{count} samples  {args.out}{'' if split == 'all' else f'/{split}'}")
    return GOOD


def _say_left_out(packed: Packed, out: Path | str) -> None:
    lines = [f"left out: {fault}" for fault in packed.left_out]
    if packed.unread:
        lines.append(f"passed over: {packed.unread}")
    if packed.left_out:
        lines.append(f"{len(packed.left_out)} fault(s), named above: such files are left out")
    if packed.filtered:
        lines.append(
            f"{packed.told()}, first {packed.filtered[0]}; {out}/{LEFT_OUT} names all of them"
        )
    for line in lines:
        print(line, file=sys.stderr)


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
    _add_caption(parser)
    parser.add_argument(
        "--recipe",
        metavar="RECIPE",
        help="as it would train on them: its data.caption_key, data.prepare and size of pictures",
    )
    parser.add_argument("--json", action="store_true", help=JSON)
    parser.set_defaults(run=_check)


def _add_caption(parser: Parser) -> None:
    parser.add_argument(
        "--caption", metavar="KEY", help="the key of the .json that has the captions"
    )


def _check(args: argparse.Namespace) -> int:
    progress = ConsoleProgress()
    caption, prepare = args.caption, None
    if args.recipe is not None:
        recipe = load_recipe(args.recipe).recipe
        caption = caption or recipe.data.caption_key
        with progress.task(IMPORTING):
            prepare = ready.preparation(recipe, buckets=True)
        if prepare.size is None:
            raise InputError(
                f"--recipe {args.recipe}: which size it takes says its autoencoder's config, which"
                f" is not here ({recipe.model.autoencoder.path})"
            )
    specs = [each for spec in args.specs for each in _every_split(spec, progress)]
    result = check_shards(*specs, progress=progress, caption_key=caption, prepare=prepare)
    if args.json:
        print(json.dumps(result.as_json()))
    else:
        _show(result)
    return GOOD if result.good else FINDINGS


def _every_split(spec: str, progress: Progress) -> list[str]:
    """The folders of an embedded set, or of a folder that holds train/, val/, ...; any other
    spec as it is.
    """
    if is_address(spec):
        return remote_splits(spec) or [spec]
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


def _add_show(commands: argparse._SubParsersAction[Parser]) -> None:
    parser = commands.add_parser(
        "show",
        help="write a page and a contact sheet of a shard set: pictures with captions, sizes,"
        " lengths, duplicates",
    )
    parser.add_argument(
        "spec",
        type=expand,
        metavar="SHARDS",
        help=f"a folder of .tar files, a glob or one .tar; or {', '.join(NAMED)}",
    )
    parser.add_argument(
        "--out",
        type=argument,
        default=Path("shards.html"),
        metavar="FILE",
        help="the page to write, %(default)s; the sheet goes beside it as .png",
    )
    parser.add_argument(
        "--count",
        type=whole_number(1, MOST_SHOWN),
        default=48,
        metavar="N",
        help="pictures shown, evenly spread over the set, %(default)s",
    )
    _add_caption(parser)
    parser.add_argument("--json", action="store_true", help=JSON)
    parser.set_defaults(run=_show_set)


def _show_set(args: argparse.Namespace) -> int:
    page, sheet, progress = args.out, args.out.with_suffix(".png"), ConsoleProgress()
    if page.suffix.lower() not in (".html", ".htm"):
        raise InputError(f"--out {page}: a page is an .html file")
    for file in (page, sheet):
        refuse_unwritable(file, "--out", makes_folders=True)
    with progress.task(IMPORTING):
        from flowray.report.data_page import Sample, write_data_page
        from flowray.report.page import data_uri
    with progress.task(f"reading {args.spec}"):
        folders = _every_split(args.spec, progress)
        tars_of = [path for each in folders for path in find_shards(each)]
        reader = ShardReader(tars_of, caption_key=args.caption)
    told = survey(reader, progress)
    with progress.task("drawing the page"):
        shown = show(reader, args.count)
        pictures = [
            None if each.picture is None else data_uri("image/png", png(each.picture))
            for each in shown
        ]
        samples = [
            Sample(each.key, each.captions, picture, each.why)
            for each, picture in zip(shown, pictures, strict=True)
        ]
        try:
            page.parent.mkdir(parents=True, exist_ok=True)
            write_whole(sheet, png(contact_sheet(shown)), shared=True)
        except OSError as error:
            raise InputError(f"--out {sheet}: cannot be written: {error.strerror}") from error
        try:
            write_data_page(page, args.spec, told.as_json(), samples)
        except InputError:
            sheet.unlink()  # one without the other, as where the disk is full
            raise
    if args.json:
        print(json.dumps({"page": str(page), "sheet": str(sheet), **told.as_json()}))
    else:
        _say(told)
        print(f"{page}  {sheet}")
    return GOOD


def _say(told: Survey) -> None:
    """The figures in a few lines."""
    has = ", ".join(f".{name} {count:,}" for name, count in told.extensions.items())
    print(f"{told.samples:,} samples in {told.shards} shard(s), {told.bytes / 1e6:.1f} MB; {has}")
    if told.looked_at < told.samples:
        print(f"what follows is of {told.looked_at:,} samples, evenly spread")
    sizes = [f"{size} px ({count:,})" for size, count in list(told.sizes.items())[:5]]
    more = len(told.sizes) - len(sizes)
    print(f"pictures: {', '.join(sizes) or 'none'}{f' and {more} other sizes' if more else ''}")
    if told.without_picture or told.broken:
        print(f"without a picture: {told.without_picture:,}; cannot be read: {told.broken:,}")
    line = f"captions: {told.captions:,}, {told.distinct_captions:,} different"
    if told.characters and told.words:
        lengths = f"{told.characters.least} to {told.characters.greatest}"
        middle = f"{told.characters.median:g} ({told.words.median:g} words)"
        line += f", {lengths} characters, median {middle}"
    print(f"{line}; samples without: {told.without_caption:,}")
    for text, count in list(told.shared.items())[:1]:
        print(f"most shared caption: {text[:80]!r}, {count:,} samples")
    same = f", such as {' = '.join(told.equal[0][:3])}" if told.equal else ""
    print(f"pictures equal to an earlier one: {told.duplicates:,}{same}")


def _add_encode(commands: argparse._SubParsersAction[Parser]) -> None:
    parser = commands.add_parser(
        "encode",
        help="cache the latents that a recipe trains on; training does it by itself on first use",
    )
    add_recipe(parser, "data.max_bad=0.01")
    parser.add_argument(
        "--workers",
        type=whole_number(1),
        metavar="N",
        help="Ray tasks that encode at once, each its share of the shards, with the recipe's"
        " resources.cpus_per_worker and gpus_per_worker (default: this process alone)",
    )
    parser.set_defaults(run=_encode)


def _encode(args: argparse.Namespace) -> int:
    recipe, progress = load_recipe(args.recipe, args.overrides).recipe, ConsoleProgress()
    with progress.task(IMPORTING):
        from flowray.store.latents import channel_metrics, ensure_latents, load_latents

    ready.check_shards(recipe)
    fleet = None
    if args.workers or in_cluster():  # a cluster's head may have no GPU
        with progress.task(IMPORTING):
            from flowray.rayrun.encoder import tasks_of

        fleet = tasks_of(recipe.resources, args.workers or recipe.resources.num_workers, progress)
    made_of = recipe.data, recipe.model.autoencoder, recipe.model.latent
    folders = ensure_latents(*made_of, progress, fleet=fleet)
    for split, folder in folders.items():
        latents = load_latents(folder)
        mean, least, most = channel_metrics(latents).values()
        rounding = (
            "" if latents.rounding is None else f"; rounded by {latents.rounding:.2%} at most"
        )
        print(
            f"{split:<8}{folder}  channels: mean within {mean:.2f} of 0, std {least:.2f} to"
            f" {most:.2f}{rounding}"
        )
    return GOOD
