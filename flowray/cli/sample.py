"""`flowray.sample RUN "prompt" ...`: pictures as PNG."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from flowray.cli.common import GOOD, refuse_unwritable
from flowray.cli.parser import Parser, add_run, whole_number
from flowray.cli.progress import IMPORTING, LOOKING, ConsoleProgress, quiet_libraries
from flowray.config.buckets import size_for
from flowray.config.errors import InputError
from flowray.config.paths import argument, exists
from flowray.store.found import find_checkpoint

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
        "--prompts", dest="file", type=argument, help="a UTF-8 text file, one caption a line"
    )
    parser.add_argument(
        "--out",
        type=argument,
        help="PNG to write; default <run>/samples/<first words>.png, numbered where it is taken",
    )
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
        "--aspect",
        type=float,
        metavar="RATIO",
        help="width / height of the pictures, one of the run's data.aspect_ratios",
    )
    parser.add_argument(
        "--scale",
        type=whole_number(1, MAX_SCALE),
        default=1,
        help="enlarge the pictures this many times, without smoothing",
    )
    return parser


def read_prompts(path: Path) -> list[str]:
    """The captions of a prompt file, one a line; InputError names file and line."""
    try:
        lines = path.read_bytes().decode("utf-8-sig").splitlines()
    except OSError as error:
        raise InputError(
            f"{path}: cannot be read: {error.strerror}; want a text file with one caption a line"
        ) from error
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise InputError(f"{path}:{line}: not UTF-8 text; want one caption a line") from error
    prompts = [line.strip() for line in lines if line.strip()]
    if any("\0" in prompt for prompt in prompts):
        raise InputError(f"{path}: a binary file; want a text file with one caption a line")
    if not prompts:
        raise InputError(f"{path}: no captions in it; want one caption a line")
    return prompts


def _new_file(folder: Path, prompt: str) -> Path:
    """A file named after the prompt, numbered where one of that name is there already."""
    words = "".join(c if c.isalnum() else " " for c in prompt).split()[:10]
    name = "_".join(words)[:60] or "prompt"
    file, number = folder / f"{name}.png", 1
    while exists(file):
        number += 1
        file = folder / f"{name}_{number}.png"
    return file


def _shape(captions: int, count: int, between: int | None) -> tuple[int, int]:
    """Rows and columns of the sheet; InputError where it would have too many pictures."""
    rows, columns = (count, _columns(captions, between)) if between else (captions, count)
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


def main(argv: list[str]) -> int:
    """Run the command; returns its exit code."""
    args = _parser().parse_intermixed_args(argv)
    prompts = args.prompts + (read_prompts(args.file) if args.file else [])
    if not prompts:
        raise InputError(
            'no prompt; type one in quotes, e.g. "a large red circle on a white background", or'
            " --prompts FILE"
        )
    if empty := [place for place, prompt in enumerate(prompts, 1) if not prompt.strip()]:
        which = f"prompt {empty[0]} of {len(prompts)}"
        raise InputError(f"{which}: is empty; type a caption in quotes, or leave it out")
    shape = _shape(len(prompts), args.count, args.between)
    quiet_libraries()
    progress = ConsoleProgress()
    with progress.task(LOOKING):
        found = find_checkpoint(args.run, args.set)
    aspect, recipe = args.aspect, found.recipe
    size = None if aspect is None else size_for(recipe.data, recipe.model.latent, aspect)
    out = args.out or _new_file(found.run.samples, prompts[0])
    refuse_unwritable(out, "--out", makes_folders=True)
    with progress.task(IMPORTING):
        import torch

        from flowray.model.autoencoder import load_autoencoder
        from flowray.sample.between import between
        from flowray.sample.generate import generate, save_strip
        from flowray.sample.restore import open_run

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with progress.task("loading the models"):
        opened = open_run(found, device)
        config = opened.recipe.model
        autoencoder = load_autoencoder(config.autoencoder, config.latent).to(device)
    sample = opened.recipe.sample
    with progress.task("sampling", shape[0] * shape[1]) as advance:
        if args.between:
            pictures = between(
                opened.model,
                autoencoder,
                prompts,
                pictures=args.between,
                rows=args.count,
                config=sample,
                seed=args.seed,
                advance=advance,
                size=size,
            )
        else:
            repeated = [prompt for prompt in prompts for _ in range(args.count)]
            made_by = opened.model, autoencoder, repeated, sample, args.seed, advance, size
            pictures = generate(*made_by)
    rows = pictures.reshape(*shape, *pictures.shape[1:])
    sheet = np.concatenate(list(rows), axis=1).repeat(args.scale, axis=1).repeat(args.scale, axis=2)
    out = args.out or _new_file(opened.path / "samples", prompts[0])
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        save_strip(sheet, out)
    except OSError as error:
        raise InputError(f"--out {out}: cannot be written: {error.strerror}") from error
    print(
        json.dumps({"picture": str(out), "prompts": prompts, "step": opened.step})
        if args.json
        else out
    )
    return GOOD
