"""`flowray.eval RUN`: how many attributes of held-out prompts come out right, beside a ceiling
and a floor.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from flowray.cli.common import GOOD, refuse_unwritable
from flowray.cli.parser import Parser, add_run
from flowray.cli.progress import IMPORTING, LOOKING, ConsoleProgress, quiet_libraries
from flowray.config.errors import InputError
from flowray.config.paths import argument
from flowray.config.progress import Progress
from flowray.config.writing import write_whole
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
    return parser


def evaluate(
    run: Path, overrides: list[str], seed: int, progress: Progress, out: Path | None = None
) -> dict[str, Any]:
    """The evaluation of a run as a JSON-ready object; also in `out`, or `<run>/eval.json`."""
    with progress.task(LOOKING):
        found = find_checkpoint(run, overrides)
    recipe, out = found.recipe, out or found.run.path / "eval.json"
    refuse_unwritable(out, "--out")
    if recipe.data.shards != "shapes":
        trained = f"trained on data.shards {recipe.data.shards!r}"
        raise InputError(f"{run}: {trained}; the exact checker reads `shapes` pictures only")
    with progress.task(IMPORTING):
        import torch

        from flowray.model.autoencoder import load_autoencoder
        from flowray.sample.evaluate import evaluate_shapes
        from flowray.sample.generate import generate
        from flowray.sample.restore import open_run

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with progress.task("loading the models"):
        opened, config = open_run(found, device), recipe.sample
        autoencoder = load_autoencoder(recipe.model.autoencoder, recipe.model.latent).to(device)

    def paint(prompts: Sequence[str]) -> np.ndarray:
        with progress.task("sampling", len(prompts)) as advance:
            return generate(opened.model, autoencoder, prompts, config, seed, advance)

    shapes = evaluate_shapes(paint, autoencoder, seed, progress)
    result = {
        "run": str(opened.path),
        "step": opened.step,
        "sample": config.model_dump(exclude={"prompts"}),
        "seed": seed,
        "shapes": shapes,
    }
    write_whole(out, json.dumps(result, indent=1))
    return result


def main(argv: list[str]) -> int:
    """Run the command; returns its exit code."""
    args = _parser().parse_intermixed_args(argv)
    quiet_libraries()
    result = evaluate(args.run, args.set, args.seed, ConsoleProgress(), args.out)
    if args.json:
        print(json.dumps(result))
        return GOOD
    shapes = result["shapes"]
    table = Table(
        title=f"{args.run} at step {result['step']}: held-out prompts judged by template matching"
    )
    columns = {
        "run": shapes,
        "unseen pairs": shapes["unseen"],
        "ceiling": shapes["controls"]["ceiling"],
        "floor": shapes["controls"]["floor"],
    }
    for name in ("", *columns):
        table.add_column(name, justify="right" if name else "left")
    for key in ("mean_attribute_accuracy", "all_correct"):
        table.add_row(key.replace("_", " "), *(f"{column[key]:.3f}" for column in columns.values()))
    for key in shapes["by_attribute"]:
        table.add_row(
            f"  {key}", *(f"{column['by_attribute'][key]:.3f}" for column in columns.values())
        )
    console = Console(highlight=False)
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
    return GOOD
