"""`flowray.eval RUN`: which real pictures the drawn ones lie near to, beside a ceiling and a floor.
On shapes also how many attributes of held-out prompts come out right, and of captions that leave
things open whether what is left open varies.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.console import Console
from rich.table import Table

from flowray.cli.common import GOOD, refuse_unwritable
from flowray.cli.eval_neighbours import show_neighbours
from flowray.cli.eval_paint import OPTIONS, paint
from flowray.cli.parser import Parser, add_run, whole_number
from flowray.cli.progress import IMPORTING, LOOKING, ConsoleProgress, quiet_libraries
from flowray.config.errors import InputError
from flowray.config.paths import argument, expand
from flowray.config.progress import Progress
from flowray.config.recipe import Recipe
from flowray.config.train import CHECKED, LEFT_OPEN
from flowray.config.writing import write_whole
from flowray.data.open_shapes import TooMany
from flowray.sample.neighbours import CAPTIONS as OTHER_CAPTIONS
from flowray.sample.neighbours import PICTURES, Choices
from flowray.sample.open_scores import CAPTIONS, DRAWS
from flowray.store.checkpoint import load_state
from flowray.store.found import find_checkpoint

if TYPE_CHECKING:
    from flowray.model.autoencoder import Autoencoder
    from flowray.sample.evaluate_open import Asked
    from flowray.sample.restore import OpenedRun

NO_CHOICE = Choices()
WRITTEN = (".png", ".html")  # beside the scores


def _parser() -> Parser:
    parser = Parser(
        prog="flowray.eval",
        description=(
            "Score a run: drawn pictures against the real ones, and on shapes also by an exact"
            " checker. Writes JSON and a page beside it."
        ),
    )
    add_run(parser)
    parser.add_argument(
        "--out",
        type=argument,
        metavar="PATH",
        help="where the scores go, as JSON (default RUN/eval.json), or the pictures",
    )
    for option, what in (
        ("--captions", f"held-out captions (default {OTHER_CAPTIONS}; open ones {CAPTIONS})"),
        ("--draws", f"pictures of each (default {PICTURES} in all; open ones {DRAWS})"),
        ("--limit", "captions of each kind, at most: for a quick look"),
    ):
        least = 1 if option == "--limit" else 2  # a prompt of a set; scores want two captions
        parser.add_argument(option, type=whole_number(least), metavar="N", help=what)
    others = parser.add_argument_group("what drawn and real pictures are compared by")
    others.add_argument(
        "--features",
        type=argument,
        metavar="WHAT",
        help="pixels, latents (default), or the folder of a vision model",
    )
    others.add_argument(
        "--clip",
        type=argument,
        metavar="FOLDER",
        help="a CLIP model that scores pictures against captions",
    )
    for option, what in (
        ("--label", "of the samples' JSON: pictures of one caption share it"),
        ("--attribute", "judged where captions name it; again for more"),
        ("--group", "to break the scores down by"),
    ):
        many = "append" if option == "--attribute" else "store"
        others.add_argument(option, metavar="FIELD", action=many, help=what)
    others.add_argument(
        "--held-out",
        type=expand,
        metavar="SHARDS",
        help="pictures whose captions are drawn (data.val_shards)",
    )
    sets = parser.add_argument_group("paint for the scorers of others, into RUN/NAME or --out")
    one = sets.add_mutually_exclusive_group()
    for name, what in OPTIONS.items():
        one.add_argument(f"--{name}", type=argument, metavar="PATH", help=what)
    return parser


def evaluate(
    run: Path,
    overrides: list[str],
    seed: int,
    progress: Progress,
    out: Path | None = None,
    choices: Choices = NO_CHOICE,
) -> dict[str, Any]:
    """The evaluation of a run as a JSON-ready object; also in `out`, or `<run>/eval.json`, beside
    it a sheet of pictures (`eval.png`) and a page (`eval.html`).
    """
    with progress.task(LOOKING):
        found = find_checkpoint(run, overrides)
    out = out or found.run.path / "eval.json"
    if out.suffix.lower() in WRITTEN:
        raise InputError(f"--out {out}: is for the scores, as JSON; want another ending")
    refuse_unwritable(out, "--out")
    recipe = found.recipe
    with progress.task(IMPORTING):
        import torch

        from flowray.model.autoencoder import load_autoencoder
        from flowray.report.eval_page import write_eval_page
        from flowray.sample.asked import prepare
        from flowray.sample.evaluate_neighbours import score_neighbours
        from flowray.sample.restore import open_run
        from flowray.sample.sheet import save_sheet

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    asked = _open_captions(recipe, choices, seed)
    prepared = prepare(recipe, choices, seed, progress)
    with progress.task("loading the models"):
        autoencoder = load_autoencoder(recipe.model.autoencoder, recipe.model.latent).to(device)
        opened = open_run(found, device)
    # first, as its judges may be refused
    near, pictures = score_neighbours(prepared, opened, autoencoder, seed, progress)
    of_shapes = {}
    if recipe.data.shards in CHECKED:
        of_shapes = _of_shapes(opened, autoencoder, asked, choices, seed, progress)
    result = {
        "run": str(found.run.path),
        "step": load_state(found.checkpoint)["step"],
        "sample": recipe.sample.model_dump(exclude={"prompts"}),
        "seed": seed,
        **of_shapes,
        "neighbours": near,
    }
    write_whole(out, json.dumps(result, indent=1))
    # by name: of eval-0.5 and eval-0.7 the suffix is no ending
    sheet, page = (out.with_name(out.name.removesuffix(".json") + end) for end in WRITTEN)
    first = prepared.asked[: len(pictures)]
    captions = [one.text for one in first]
    labels = [one.wanted[prepared.fields.caption] for one in first]
    save_sheet(sheet, captions, labels, pictures)
    write_eval_page(page, json.loads(json.dumps(result)), sheet.read_bytes())
    return result


def _open_captions(recipe: Recipe, choices: Choices, seed: int) -> list[Asked]:
    """Held-out captions that leave things open; none of a run whose captions leave nothing."""
    from flowray.sample.evaluate_open import ask

    if recipe.data.shards != LEFT_OPEN:
        return []
    try:
        every = ask(choices.captions or CAPTIONS, seed)
    except TooMany as error:
        raise InputError(
            f"--captions: want at most {error.most}, got {choices.captions}"
        ) from error
    return every[: choices.limit]


def _of_shapes(
    opened: OpenedRun,
    autoencoder: Autoencoder,
    asked: list[Asked],
    choices: Choices,
    seed: int,
    progress: Progress,
) -> dict[str, Any]:
    """`shapes` and, of captions that leave things open, `open`."""
    from flowray.sample.evaluate import evaluate_shapes
    from flowray.sample.evaluate_open import closed_caption, score_open
    from flowray.sample.generate import generate

    def paint(prompts: Sequence[str]) -> np.ndarray:
        with progress.task("sampling", len(prompts)) as advance:
            sample = opened.recipe.sample
            return generate(opened.model, autoencoder, prompts, sample, seed, advance)

    scores: dict[str, Any] = {}
    said = {}
    if asked:
        said = {"say": closed_caption}
        draws = choices.draws or DRAWS
        scores["open"] = score_open(opened, autoencoder, asked, draws, seed, progress)
    scores["shapes"] = evaluate_shapes(
        paint, autoencoder, seed, progress, limit=choices.limit, **said
    )
    return scores


def main(argv: list[str]) -> int:
    """Run the command; returns its exit code."""
    args = _parser().parse_intermixed_args(argv)
    quiet_libraries()
    choices = Choices(
        captions=args.captions,
        draws=args.draws,
        limit=args.limit,
        features=str(args.features) if args.features else None,
        clip=str(args.clip) if args.clip else None,
        label=args.label,
        attributes=tuple(args.attribute or ()),
        group=args.group,
        held_out=args.held_out or None,
    )
    if chosen := next((name for name in OPTIONS if vars(args)[name]), None):
        return _paint(args, chosen, choices)
    if args.limit == 1:
        raise InputError("--limit 1: scores want 2 captions or more; 1 goes with a set of prompts")
    result = evaluate(args.run, args.set, args.seed, ConsoleProgress(), args.out, choices)
    if args.json:
        print(json.dumps(result))
        return GOOD
    console = Console(highlight=False)
    if "open" in result:
        show_open(console, args.run, result)
    if "shapes" in result:
        _show_shapes(console, args.run, result)
    show_neighbours(console, args.run, result)
    return GOOD


def _paint(args: Any, chosen: str, choices: Choices) -> int:
    if choices != Choices(limit=args.limit):
        raise InputError(f"--{chosen}: goes with --limit, --out, --seed, --set and --json alone")
    told = paint(
        args.run,
        args.set,
        chosen,
        vars(args)[chosen],
        seed=args.seed,
        limit=args.limit,
        out=args.out,
        progress=ConsoleProgress(),
    )
    print(json.dumps(told) if args.json else told["pictures"])
    return GOOD


def _table(title: str, columns: Sequence[str]) -> Table:
    table = Table(title=title)
    for name in ("", *columns):
        table.add_column(name, justify="right" if name else "left")
    return table


def _show_shapes(console: Console, run: Path, result: dict[str, Any]) -> None:
    shapes = result["shapes"]
    columns = {
        "run": shapes,
        "unseen pairs": shapes["unseen"],
        "ceiling": shapes["controls"]["ceiling"],
        "floor": shapes["controls"]["floor"],
    }
    table = _table(
        f"{run} at step {result['step']}: held-out prompts judged by template matching",
        list(columns),
    )
    for key in ("mean_attribute_accuracy", "all_correct"):
        table.add_row(key.replace("_", " "), *(f"{column[key]:.3f}" for column in columns.values()))
    for key in shapes["by_attribute"]:
        table.add_row(
            f"  {key}", *(f"{column['by_attribute'][key]:.3f}" for column in columns.values())
        )
    console.print(table)
    for name, of in {"run": shapes["two_objects"], **shapes["controls"]["two_objects"]}.items():
        told = "  ".join(f"{key} {of[key]:.3f}" for key in ("relation", "binding", "all"))
        console.print(f"two objects, {name}: {told}")
    console.print(
        "ceiling: real pictures through the autoencoder; floor: the same pictures against another"
        " prompt\n"
    )


def show_open(console: Console, run: Path, result: dict[str, Any]) -> None:
    """The table of an evaluation's `open`."""
    scores = result["open"]
    columns = {"run": scores, **scores["controls"]}
    many = f"{scores['captions']} held-out captions that leave things open, {scores['draws']} draws"
    table = _table(f"{run} at step {result['step']}: {many} of each", list(columns))
    beaten = scores["beats_mu"] or {}

    def row(label: str, path: str) -> None:
        cells, figure = [], re.split("[/_]", path)[0]
        for name, column in columns.items():
            value: Any = column
            for key in path.split("/"):
                value = value.get(key) if value else None
            reached = name == "run" and not beaten.get(figure, True)
            cells.append("" if value is None else f"{value:.3f}{' *' if reached else ''}")
        table.add_row(label, *cells)

    for name in ("named", "sharp", "coverage"):
        row(name, name)
    row("  excess", "coverage_excess")
    row("entropy", "entropy")
    for name in scores["entropy_by_attribute"]:
        row(f"  {name}", f"entropy_by_attribute/{name}")
    row("copies", "copies/nearer")
    row("  distance ratio", "copies/median_ratio")
    row("frechet distance", "frechet")
    console.print(table)
    if not all(beaten.values()):
        console.print("* the caption's mean picture, decode(mu), reaches as much without the flow")
    console.print(
        "named: all that is said is so; sharp: a clean scene; coverage: total variation between"
        " draws and data, excess 0 and entropy 1 as in the data; copies: nearer to a"
        " training latent than 0.99 of held-out pictures, and the medians' ratio"
    )
    few = scores["samples"]
    console.print(
        f"frechet between real pictures {scores['frechet_real']:.3f}; {few['generated']} generated"
        f" and {few['real']} real latents of {few['dims']} dims"
    )
    console.print(
        "ceiling: real pictures that fit, through the autoencoder; shuffled: the same pictures"
        " against another caption; mu, z0: decoded without the flow\n"
    )
