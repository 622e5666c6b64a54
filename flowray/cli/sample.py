"""`flowray.sample RUN "prompt" ...`: pictures as PNG."""

from __future__ import annotations

import json
from collections.abc import Sequence
from hashlib import sha256
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from flowray.cli.common import GOOD, refuse_unwritable
from flowray.cli.parser import Parser, add_run, whole_number
from flowray.cli.progress import IMPORTING, LOOKING, ConsoleProgress, quiet_libraries
from flowray.config.buckets import size_for
from flowray.config.errors import InputError
from flowray.config.paths import argument, exists
from flowray.sample.prompts import check_prompts, read_prompts, words_of
from flowray.store.checkpoint import STATE
from flowray.store.found import Found, find_checkpoint

if TYPE_CHECKING:
    from flowray.sample.pipeline import Pipeline

MAX_COUNT = 1024  # pictures of a prompt or row
MAX_SHEET = 16 * MAX_COUNT  # of all rows, in memory at once: 200 MB of 64 px pictures
MAX_SCALE = 64  # of 64 px pictures, sheets of 4,096 px each


def _parser() -> Parser:
    parser = Parser(
        prog="flowray.sample",
        description=(
            "Draw pictures from a run, the way its training defined the path. Each prompt gives one"
            " row of `count` pictures; with --between all prompts together `count` rows."
        ),
        epilog=(
            'Example: python -m flowray.sample runs/quickstart "a small red circle in the center on'
            ' a black background" --count 4'
        ),
    )
    add_run(parser)
    parser.add_argument("prompts", nargs="*", metavar="prompt", help="captions; or --prompts FILE")
    parser.add_argument(
        "--prompts",
        dest="file",
        type=argument,
        help="a UTF-8 text file, one caption a line; - for stdin",
    )
    parser.add_argument(
        "--out",
        type=argument,
        help="PNG to write; default <run>/samples/<first words>.png, numbered where it is taken",
    )
    parser.add_argument(
        "--each",
        type=argument,
        metavar="DIR",
        help="a PNG a picture and pictures.jsonl; default <out>_each. Those there already are kept",
    )
    parser.add_argument("--negative", metavar="TEXT", help="a caption to be guided away from")
    parser.add_argument(
        "--count",
        type=whole_number(1, MAX_COUNT),
        default=1,
        help="pictures a prompt, each from its own noise; with --between rows",
    )
    parser.add_argument(
        "--between",
        type=whole_number(2, MAX_COUNT),
        metavar="N",
        help="go from each prompt to the next in N pictures, both counted, a row by one noise",
    )
    parser.add_argument(
        "--strip",
        type=whole_number(2, MAX_COUNT),
        metavar="N",
        help="the way of each picture from the source, a row of N pictures",
    )
    parser.add_argument(
        "--aspect",
        type=float,
        metavar="RATIO",
        help="width / height of the pictures, one of the run's data.aspect_ratios",
    )
    parser.add_argument(
        "--compile",
        action="store_true",
        help="the network through torch.compile: slow at the first batch, faster then",
    )
    parser.add_argument(
        "--scale",
        type=whole_number(1, MAX_SCALE),
        default=1,
        help="enlarge the pictures this many times, without smoothing",
    )
    return parser


def _new_file(folder: Path, prompt: str) -> Path:
    """A file named after the prompt, numbered where one of that name is there already."""
    name = words_of(prompt)
    file, number = folder / f"{name}.png", 1
    while exists(file):
        number += 1
        file = folder / f"{name}_{number}.png"
    return file


def _shape(
    captions: int, count: int, between: int | None, strip: int | None = None
) -> tuple[int, int]:
    """Rows and columns of the sheet; InputError where it would have too many pictures."""
    rows, columns = (captions * count, strip) if strip else (captions, count)
    if between:
        rows, columns = count, _columns(captions, between)
    if rows * columns > MAX_SHEET:
        sheet = f"{rows:,} rows of {columns:,} make a sheet of {rows * columns:,} pictures"
        raise InputError(f"--count {count}: {sheet}, want at most {MAX_SHEET:,}")
    return rows, columns


def _columns(captions: int, pictures: int) -> int:
    """Pictures of a row through the captions, each caption drawn once; InputError for too few of
    them and for too long a row.
    """
    if captions < 2:
        raise InputError(f"--between {pictures}: got 1 caption, want two or more to go between")
    if (columns := (captions - 1) * (pictures - 1) + 1) > MAX_COUNT:
        row = f"{captions} captions make a row of {columns:,} pictures"
        raise InputError(f"--between {pictures}: {row}, want at most {MAX_COUNT:,}")
    return columns


def _prompts(typed: Sequence[str], file: Path | None) -> list[str]:
    """The captions that were typed and those of the file; InputError for none and bad ones."""
    prompts = [*typed, *(read_prompts(file) if file else [])]
    if not prompts:
        raise InputError(
            'no prompt; type one in quotes, e.g. "a large red circle on a white background", or'
            " --prompts FILE"
        )
    check_prompts(prompts)
    return prompts


def _version() -> str:
    try:
        return metadata.version("flowray")
    except metadata.PackageNotFoundError:
        return "not installed"


def _numbered(prompts: Sequence[str], count: int) -> list[tuple[str, int]]:
    """`count` pictures of every prompt, each with its number; a prompt that is given again goes on
    with numbers that no count reaches.
    """
    from flowray.sample.generate import numbers_of

    return [
        (prompt, again * MAX_COUNT + number)
        for prompt, again in zip(prompts, numbers_of(prompts), strict=True)
        for number in range(count)
    ]


def _asked(
    pipe: Pipeline, found: Found, prompts: Sequence[str], count: int, seed: int, how: dict[str, Any]
) -> list[dict[str, str]]:
    """What the PNG of each picture will say of itself, `count` for every prompt."""
    from flowray.sample.pngs import key_of

    drawn = pipe.settings(how).model_dump(mode="json", exclude={"prompts"}) | how
    same = {
        "seed": str(seed),
        "step": str(pipe.step),
        "run": pipe.path_of_run.name,
        # of the weights, by the sums in state.json: another run may have the same name
        "checkpoint": sha256((found.checkpoint / STATE).read_bytes()).hexdigest()[:12],
        "set": json.dumps({key: new for key, (_, new) in found.typed.items()}, default=str),
        "sample": json.dumps(drawn, ensure_ascii=False),
        "flowray": _version(),
    }
    return [
        {"prompt": prompt, "number": str(number), "key": key_of(prompt, number), **same}
        for prompt, number in _numbered(prompts, count)
    ]


def _rows_between(pipe: Pipeline, prompts: Sequence[str], args: Any, advance: Any) -> np.ndarray:
    from flowray.sample.between import between

    recipe = pipe.recipe
    return between(
        pipe.model,
        pipe.autoencoder,
        prompts,
        pictures=args.between,
        rows=args.count,
        config=recipe.sample,
        seed=args.seed,
        advance=advance,
        size=args.aspect and size_for(recipe.data, recipe.model.latent, args.aspect),
    )


def _write(path: Path, sheet: np.ndarray) -> None:
    from flowray.sample.generate import save_strip

    path.parent.mkdir(parents=True, exist_ok=True)
    save_strip(sheet, path)


def main(argv: list[str]) -> int:
    """Run the command; returns its exit code."""
    args = _parser().parse_intermixed_args(argv)
    prompts = _prompts(args.prompts, args.file)
    how = {"negative": args.negative, "aspect": args.aspect}
    how |= {"compile": True} if args.compile else {}  # else pictures of before would differ in it
    if args.between and (args.each or args.strip or args.compile or args.negative is not None):
        raise InputError("--between: goes with none of --compile, --each, --negative and --strip")
    if args.strip and args.each:
        raise InputError("--strip: does not go with --each")
    shape = _shape(len(prompts), args.count, args.between, args.strip)
    quiet_libraries()
    progress = ConsoleProgress()
    with progress.task(LOOKING):
        found = find_checkpoint(args.run, args.set)
    if args.aspect is not None:
        size_for(found.recipe.data, found.recipe.model.latent, args.aspect)
    out = args.out or _new_file(found.run.samples, prompts[0])
    each = args.each or out.with_name(f"{out.stem}_each")
    refuse_unwritable(out, "--out", makes_folders=True)
    refuse_unwritable(each / "x", "--each", makes_folders=True)
    with progress.task(IMPORTING):
        from flowray.sample.pipeline import open_pipeline
        from flowray.sample.pngs import save_each

    with progress.task("loading the models"):
        pipe = open_pipeline(found)
    try:
        with progress.task("sampling", shape[0] * shape[1]) as advance:
            if args.between:
                pictures = _rows_between(pipe, prompts, args, advance)
            elif args.strip:
                named, numbers = zip(*_numbered(prompts, args.count), strict=True)
                how |= {"seed": args.seed, "numbers": numbers}
                pictures = pipe.strip(named, args.strip, **how)
            else:
                told = _asked(pipe, found, prompts, args.count, args.seed, how)
                pictures = save_each(pipe, told, each, advance, seed=args.seed, **how)
        rows = pictures.reshape(*shape, *pictures.shape[-3:])
        sheet = np.concatenate(list(rows), axis=1).repeat(args.scale, axis=1)
        # asked anew: another command may have taken the name
        out = args.out or _new_file(found.run.samples, prompts[0])
        _write(out, sheet.repeat(args.scale, axis=2))
    except OSError as error:
        where = error.filename or out
        raise InputError(f"{where}: cannot be written: {error.strerror}") from error
    written = {"picture": str(out)}
    if not (args.between or args.strip):
        written["each"] = str(each)
    print(json.dumps(written | {"prompts": prompts, "step": pipe.step}) if args.json else out)
    return GOOD
