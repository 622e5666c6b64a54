"""`flowray.sample RUN "prompt" ...`: pictures as PNG."""

from __future__ import annotations

import json
import math
import warnings
from argparse import Namespace
from collections.abc import Sequence
from hashlib import sha256
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from flowray.cli.common import GOOD, refuse_unwritable
from flowray.cli.parser import Parser, add_run, whole_number
from flowray.cli.progress import IMPORTING, LOOKING, ConsoleProgress, quiet_libraries
from flowray.cli.sample_kinds import MAX_COUNT, Kind, kind_of, numbered
from flowray.config.buckets import size_for
from flowray.config.errors import InputError, Notice
from flowray.config.paths import argument, exists
from flowray.config.recipe import Recipe
from flowray.sample.prompts import check_prompts, read_prompts, words_of
from flowray.store.checkpoint import STATE, load_state
from flowray.store.found import Found, find_checkpoint

MAX_SCALE = 64  # of 64 px pictures, sheets of 4,096 px each


def _parser() -> Parser:
    parser = Parser(
        prog="flowray.sample",
        usage="flowray.sample RUN PROMPT ... [options]",
        description="Draw pictures from a run as its training defined them, a row a prompt.",
        epilog='Example: python -m flowray.sample runs/quickstart "a small red circle" --count 4',
    )
    add_run(parser)
    add = parser.add_argument
    add("prompts", nargs="*", metavar="prompt", help="captions; or --prompts FILE")
    add(
        "--prompts", dest="file", type=argument, metavar="FILE", help="a caption a line; - is stdin"
    )
    add("--count", type=whole_number(1, MAX_COUNT), default=1, metavar="N", help=_COUNT)
    add("--negative", metavar="TEXT", help="a caption to be guided away from")
    add("--aspect", type=float, metavar="RATIO", help="width / height, of data.aspect_ratios")
    add("--scale", type=whole_number(1, MAX_SCALE), default=1, metavar="N", help="enlarge N times")
    add("--out", type=argument, metavar="PNG", help="default <run>/samples/<first words>.png")
    add("--each", type=argument, metavar="DIR", help=_EACH)
    add("--workers", type=whole_number(1), metavar="N", help=_WORKERS)
    add("--compile", action="store_true", help="torch.compile: a slow first batch, faster then")
    add = parser.add_argument_group("another picture of the prompts, one of").add_argument
    several = whole_number(2, MAX_COUNT)
    add("--between", type=several, metavar="N", help="from each to the next in N pictures")
    add("--strip", type=several, metavar="N", help="the way of each from the source in N pictures")
    add("--plus", action="append", default=[], metavar="TEXT", help=_PLUS)
    add(
        "--minus",
        action="append",
        default=[],
        metavar="TEXT",
        help='a + b - c is "a" --plus "b" --minus "c"',
    )
    add("--reverse", action="append", default=[], type=argument, metavar="PICTURE", help=_REVERSE)
    add = parser.add_argument_group("of --between and --strip").add_argument
    add("--mix", choices=("linear", "spherical"), metavar="HOW", help=_MIX)
    add("--animate", action="store_true", help="one after the other in time, an animated PNG")
    return parser


_COUNT = "pictures a prompt, each of its own noise"
_EACH = "a PNG a picture and pictures.jsonl, kept if there; default <out>_each"
_WORKERS = "draw by N Ray tasks of the recipe's resources"
_PLUS = "added to each prompt, and as many --minus taken away"
_REVERSE = "to the source by the flow of its caption, and back"
_MIX = "of sources: linear (one noise) or spherical (each its own)"


def _new_file(folder: Path, prompt: str) -> Path:
    """A file named after the prompt, numbered where one of that name is there already."""
    name = words_of(prompt)
    file, number = folder / f"{name}.png", 1
    while exists(file):
        number += 1
        file = folder / f"{name}_{number}.png"
    return file


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


def _asked(
    found: Found, prompts: Sequence[str], count: int, seed: int, how: dict[str, Any]
) -> list[dict[str, str]]:
    """What the PNG of each picture will say of itself, `count` for every prompt."""
    from flowray.sample.pngs import key_of

    drawn = found.recipe.sample.model_dump(mode="json", exclude={"prompts"}) | how
    same = {
        "seed": str(seed),
        "step": str(load_state(found.checkpoint)["step"]),
        "run": found.run.path.name,
        # of the weights, by the sums in state.json: another run may have the same name
        "checkpoint": sha256((found.checkpoint / STATE).read_bytes()).hexdigest()[:12],
        "set": json.dumps({key: new for key, (_, new) in found.typed.items()}, default=str),
        "sample": json.dumps(drawn, ensure_ascii=False),
        "flowray": _version(),
    }
    return [
        {"prompt": prompt, "number": str(number), "key": key_of(prompt, number), **same}
        for prompt, number in numbered(prompts, count)
    ]


def _plain(
    args: Namespace, found: Found, prompts: Sequence[str], each: Path, progress: ConsoleProgress
) -> np.ndarray:
    """Plain pictures (prompts, count, H, W, 3), each in a file too."""
    how = {"negative": args.negative, "aspect": args.aspect}
    how |= {"compile": True} if args.compile else {}  # else pictures of before would differ in it
    told = _asked(found, prompts, args.count, args.seed, how)
    how |= {"seed": args.seed}
    if args.workers:
        from flowray.rayrun.encoder import shared_by_all, tasks_of
        from flowray.sample.apart import save_each_apart

        tasks = tasks_of(found.recipe.resources, args.workers, progress)
        shared_by_all(each, found.checkpoint, progress)
        pictures = save_each_apart(found, told, each, tasks, progress, **how)
    else:
        from flowray.sample.pipeline import open_pipeline
        from flowray.sample.pngs import save_each

        with progress.task("loading the models"):
            pipe = open_pipeline(found)
        with progress.task("sampling", len(told)) as advance:
            pictures = save_each(pipe, told, each, advance, **how)
    rows = pictures.reshape(len(prompts), args.count, *pictures.shape[1:])
    _say_alike(found.recipe, prompts, rows)
    return rows


def _say_alike(recipe: Recipe, prompts: Sequence[str], rows: np.ndarray) -> None:
    """A notice where a caption has no variations: its pictures differ by the noise alone."""
    firsts = rows[:, :1].astype(int)
    apart = np.abs(rows - firsts).reshape(len(rows), -1).max(1)
    alike = [prompt for prompt, most in zip(prompts, apart, strict=True) if most <= 1]
    if rows.shape[1] > 1 and alike:
        text, posterior = recipe.model.source.kind == "text", recipe.model.posterior
        std = math.exp(posterior.logvar_max / 2) if text else 1.0
        why = f"they differ by the noise of the source alone, whose std is {std:.2g} at most"
        why += f" (model.posterior.logvar_max={posterior.logvar_max:g})" if text else ""
        warnings.warn(f"{alike[0]!r}: all its pictures are the same: {why}", Notice, stacklevel=2)


def _sheet(cells: np.ndarray, scale: int) -> np.ndarray:
    """Pictures (rows, columns, H, W, 3) as one (rows * H, columns * W, 3), enlarged."""
    rows, columns, height, width, _ = cells.shape
    sheet = cells.swapaxes(1, 2).reshape(rows * height, columns * width, 3)
    return sheet.repeat(scale, axis=0).repeat(scale, axis=1)


def _write(out: Path, cells: np.ndarray, args: Namespace, kind: Kind | None) -> None:
    """The sheet of pictures (rows, columns, H, W, 3), or its columns one after the other."""
    from flowray.sample.animation import save_animation
    from flowray.sample.generate import save_strip

    out.parent.mkdir(parents=True, exist_ok=True)
    if args.animate and kind:
        frames = [each.reshape(*kind.frame(), *each.shape[1:]) for each in cells.swapaxes(0, 1)]
        save_animation(out, [_sheet(frame, args.scale) for frame in frames])
    else:
        save_strip(_sheet(cells, args.scale)[None], out)


def _drawn(args: Namespace, found: Found, kind: Kind, progress: ConsoleProgress) -> np.ndarray:
    """Pictures (rows, columns, H, W, 3) of a kind."""
    from flowray.sample.pipeline import open_pipeline

    with progress.task("loading the models"):
        pipe = open_pipeline(found)
    with progress.task("sampling", kind.rows * kind.columns) as advance:
        return kind.draw(pipe, advance)


def main(argv: list[str]) -> int:
    """Run the command; returns its exit code."""
    args = _parser().parse_intermixed_args(argv)
    prompts = _prompts(args.prompts, args.file)
    for more in (args.plus, args.minus):
        check_prompts(more or prompts)
    kind = kind_of(args, prompts)
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
        import flowray.sample.pipeline  # noqa: F401

    try:
        if kind:
            cells = _drawn(args, found, kind, progress)
        else:
            cells = _plain(args, found, prompts, each.absolute(), progress)
        # asked anew: another command may have taken the name
        out = args.out or _new_file(found.run.samples, prompts[0])
        _write(out, cells, args, kind)
    except OSError as error:
        where = error.filename or out
        raise InputError(f"{where}: cannot be written: {error.strerror}") from error
    step = load_state(found.checkpoint)["step"]
    told = {"picture": str(out)} | (kind.told if kind else {"each": str(each)})
    lines = [str(out), *(kind.lines if kind else [])]
    print(json.dumps(told | {"prompts": prompts, "step": step}) if args.json else "\n".join(lines))
    return GOOD
