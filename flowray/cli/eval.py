"""`flowray.eval RUN`: how many attributes of held-out prompts come out right, beside a ceiling
and a floor; of captions that leave things open also whether what is left open varies. On other
pictures than shapes: which real pictures the drawn ones lie near to.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.console import Console
from rich.table import Table

from flowray.cli.common import GOOD, refuse_unwritable
from flowray.cli.eval_neighbours import show_neighbours
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
    from flowray.sample.restore import OpenedRun

NO_CHOICE = Choices()


def _parser() -> Parser:
    parser = Parser(
        prog="flowray.eval",
        description=(
            "Score a run: on shapes with an exact checker, on other pictures by their nearest"
            " neighbours among the real ones."
        ),
    )
    add_run(parser)
    parser.add_argument(
        "--out",
        type=argument,
        metavar="FILE",
        help="where the scores go, as JSON (default RUN/eval.json)",
    )
    whole = whole_number(2)
    parser.add_argument(
        "--captions",
        type=whole,
        metavar="N",
        help=f"held-out captions to draw (default {CAPTIONS} on {LEFT_OPEN}, else"
        f" {OTHER_CAPTIONS} or all)",
    )
    parser.add_argument(
        "--draws",
        type=whole,
        metavar="N",
        help=f"pictures of each (default {DRAWS} on {LEFT_OPEN}, else {PICTURES} in all)",
    )
    others = parser.add_argument_group(f"on other pictures than {' and '.join(CHECKED)}")
    others.add_argument(
        "--features",
        type=argument,
        metavar="pixels|latents|FOLDER",
        help="what pictures are compared by: a folder holds EfficientNet-Lite0, SigLIP, CLIP or"
        " DINOv2 (default latents)",
    )
    for option, field, default in (
        ("--label", "that says which pictures are of one caption", "label, else the first caption"),
        ("--attribute", "to judge where a caption names it; again for more", "style"),
        ("--group", "to break the scores down by", "group"),
    ):
        others.add_argument(
            option,
            metavar="FIELD",
            action="append" if option == "--attribute" else "store",
            help=f"field of the samples' JSON {field} (default {default})",
        )
    others.add_argument(
        "--held-out",
        type=expand,
        metavar="SHARDS",
        help="pictures whose captions are drawn (default data.val_shards)",
    )
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
    it a sheet of pictures (`eval.png`) of a run on other pictures than shapes.
    """
    with progress.task(LOOKING):
        found = find_checkpoint(run, overrides)
    out = out or found.run.path / "eval.json"
    if out.suffix.lower() == ".png":
        raise InputError(f"--out {out}: is for the scores, as JSON; want another ending")
    refuse_unwritable(out, "--out")
    shards, recipe = found.recipe.data.shards, found.recipe
    if shards in CHECKED and (odd := choices.of_other_pictures()):
        raise InputError(f"{run}: {odd} is of a run on other pictures, this one is on {shards}")
    if shards in CHECKED and shards != LEFT_OPEN and (choices.captions or choices.draws):
        raise InputError(
            f"{run}: --captions and --draws are not of a run on {shards}, whose captions leave"
            " nothing open"
        )
    with progress.task(IMPORTING):
        import torch

        from flowray.model.autoencoder import load_autoencoder
        from flowray.sample.restore import open_run

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

    def opened() -> tuple[OpenedRun, Autoencoder]:
        with progress.task("loading the models"):
            autoencoder = load_autoencoder(recipe.model.autoencoder, recipe.model.latent)
            return open_run(found, device), autoencoder.to(device)

    if shards in CHECKED:
        scores, sheet = _of_shapes(recipe, opened, choices, seed, progress), None
    else:
        scores, sheet = _of_others(recipe, opened, choices, seed, progress)
    result = {
        "run": str(found.run.path),
        "step": load_state(found.checkpoint)["step"],
        "sample": recipe.sample.model_dump(exclude={"prompts"}),
        "seed": seed,
        **scores,
    }
    write_whole(out, json.dumps(result, indent=1))
    if sheet:
        # by name: of eval-0.5 and eval-0.7 the suffix is no ending
        sheet(out.with_name(out.name.removesuffix(".json") + ".png"))
    return result


Open = Callable[[], "tuple[OpenedRun, Autoencoder]"]


def _of_shapes(
    recipe: Recipe, models: Open, choices: Choices, seed: int, progress: Progress
) -> dict[str, Any]:
    """`shapes` and, of captions that leave things open, `open`."""
    from flowray.sample.evaluate import evaluate_shapes
    from flowray.sample.evaluate_open import ask, closed_caption, score_open
    from flowray.sample.generate import generate

    asked = None
    if recipe.data.shards == LEFT_OPEN:
        try:
            asked = ask(choices.captions or CAPTIONS, seed)
        except TooMany as error:
            raise InputError(
                f"--captions: want at most {error.most}, got {choices.captions}"
            ) from error
    opened, autoencoder = models()

    def paint(prompts: Sequence[str]) -> np.ndarray:
        with progress.task("sampling", len(prompts)) as advance:
            return generate(opened.model, autoencoder, prompts, recipe.sample, seed, advance)

    said, left_open = {}, {}
    if asked:
        said = {"say": closed_caption}
        draws = choices.draws or DRAWS
        left_open["open"] = score_open(opened, autoencoder, asked, draws, seed, progress)
    return {**left_open, "shapes": evaluate_shapes(paint, autoencoder, seed, progress, **said)}


def _of_others(
    recipe: Recipe, models: Open, choices: Choices, seed: int, progress: Progress
) -> tuple[dict[str, Any], Callable[[Path], None]]:
    """`neighbours`, and what writes its sheet of pictures."""
    from flowray.sample.asked import prepare
    from flowray.sample.evaluate_neighbours import score_neighbours
    from flowray.sample.sheet import save_sheet

    prepared = prepare(recipe, choices, seed, progress)
    opened, autoencoder = models()
    scores, pictures = score_neighbours(prepared, opened, autoencoder, seed, progress)
    first = prepared.asked[: len(pictures)]
    captions = [one.text for one in first]
    labels = [one.wanted[prepared.fields.caption] for one in first]
    return {"neighbours": scores}, lambda path: save_sheet(path, captions, labels, pictures)


def main(argv: list[str]) -> int:
    """Run the command; returns its exit code."""
    args = _parser().parse_intermixed_args(argv)
    quiet_libraries()
    result = evaluate(
        args.run,
        args.set,
        args.seed,
        ConsoleProgress(),
        args.out,
        Choices(
            captions=args.captions,
            draws=args.draws,
            features=str(args.features) if args.features else None,
            label=args.label,
            attributes=tuple(args.attribute or ()),
            group=args.group,
            held_out=args.held_out or None,
        ),
    )
    if args.json:
        print(json.dumps(result))
        return GOOD
    console = Console(highlight=False)
    if "neighbours" in result:
        show_neighbours(console, args.run, result)
        return GOOD
    if "open" in result:
        show_open(console, args.run, result)
    _show_shapes(console, args.run, result)
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
    pairs = shapes["two_objects"]
    console.print(
        f"two objects: relation {pairs['relation']:.3f}  binding {pairs['binding']:.3f}  all"
        f" {pairs['all']:.3f}"
    )
    console.print(
        "ceiling: real pictures through the autoencoder; floor: the same pictures against another"
        " prompt"
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
