"""`flowray.eval RUN`: how many attributes of held-out prompts come out right, beside a ceiling
and a floor; of captions that leave things open also whether what is left open varies.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from flowray.cli.common import GOOD, refuse_unwritable
from flowray.cli.parser import Parser, add_run, whole_number
from flowray.cli.progress import IMPORTING, LOOKING, ConsoleProgress, quiet_libraries
from flowray.config.errors import InputError
from flowray.config.paths import argument
from flowray.config.progress import Progress
from flowray.config.train import CHECKED, LEFT_OPEN
from flowray.config.writing import write_whole
from flowray.data.open_shapes import TooMany
from flowray.sample.open_scores import CAPTIONS, DRAWS
from flowray.store.found import find_checkpoint


def _parser() -> Parser:
    parser = Parser(
        prog="flowray.eval",
        description=(
            "Score a run on shapes with an exact checker: template matching, nothing learnt."
        ),
    )
    add_run(parser)
    parser.add_argument(
        "--out",
        type=argument,
        metavar="FILE",
        help="where the scores go, as JSON (default RUN/eval.json)",
    )
    for option, count, of in (
        ("--captions", CAPTIONS, "captions that leave things open, of a run on shapes"),
        ("--draws", DRAWS, "pictures of each of them"),
    ):
        parser.add_argument(
            option, type=whole_number(2), metavar="N", help=f"{of} (default {count})"
        )
    return parser


def evaluate(
    run: Path,
    overrides: list[str],
    seed: int,
    progress: Progress,
    out: Path | None = None,
    *,
    captions: int | None = None,
    draws: int | None = None,
) -> dict[str, Any]:
    """The evaluation of a run as a JSON-ready object; also in `out`, or `<run>/eval.json`.

    captions, draws: how many that leave things open, and pictures of each; of a run on shapes.
    """
    with progress.task(LOOKING):
        found = find_checkpoint(run, overrides)
    recipe, out = found.recipe, out or found.run.path / "eval.json"
    refuse_unwritable(out, "--out")
    shards = recipe.data.shards
    if shards not in CHECKED:
        trained = f"trained on data.shards {shards!r}"
        raise InputError(
            f"{run}: {trained}; the exact checker reads pictures of {' and '.join(CHECKED)} only"
        )
    if shards != LEFT_OPEN and (captions or draws):
        raise InputError(
            f"{run}: --captions and --draws are of a run on {LEFT_OPEN}, this one is on {shards}"
        )
    with progress.task(IMPORTING):
        import torch

        from flowray.model.autoencoder import load_autoencoder
        from flowray.sample.evaluate import evaluate_shapes
        from flowray.sample.evaluate_open import ask, closed_caption, score_open
        from flowray.sample.generate import generate
        from flowray.sample.restore import open_run

    asked = None
    if shards == LEFT_OPEN:
        try:
            asked = ask(captions or CAPTIONS, seed)
        except TooMany as error:
            raise InputError(f"--captions: want at most {error.most}, got {captions}") from error
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with progress.task("loading the models"):
        opened, config = open_run(found, device), recipe.sample
        autoencoder = load_autoencoder(recipe.model.autoencoder, recipe.model.latent).to(device)

    def paint(prompts: Sequence[str]) -> np.ndarray:
        with progress.task("sampling", len(prompts)) as advance:
            return generate(opened.model, autoencoder, prompts, config, seed, advance)

    said, left_open = {}, {}
    if asked:
        said = {"say": closed_caption}
        left_open["open"] = score_open(opened, autoencoder, asked, draws or DRAWS, seed, progress)
    result = {
        "run": str(opened.path),
        "step": opened.step,
        "sample": config.model_dump(exclude={"prompts"}),
        "seed": seed,
        **left_open,
        "shapes": evaluate_shapes(paint, autoencoder, seed, progress, **said),
    }
    write_whole(out, json.dumps(result, indent=1))
    return result


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
        captions=args.captions,
        draws=args.draws,
    )
    if args.json:
        print(json.dumps(result))
        return GOOD
    console = Console(highlight=False)
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
