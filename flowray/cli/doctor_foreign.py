"""`flowray.doctor --model PACKAGE.MODULE:NAME --data SHARDS`: the doctor on a model that was not
trained here.
"""

from __future__ import annotations

import importlib
import inspect
import json
import math
import os
import sys
from pathlib import Path
from typing import Any

from rich.console import Console

from flowray.cli.common import FINDINGS, GOOD, refuse_unwritable
from flowray.cli.doctor import MODEL as OPTION
from flowray.cli.doctor import PROG, show, write_page
from flowray.cli.parser import JSON, Parser, number, whole_number
from flowray.cli.progress import IMPORTING, ConsoleProgress, quiet_libraries
from flowray.config.errors import InputError
from flowray.config.paths import argument
from flowray.findings.finding import as_json


def _parser() -> Parser:
    parser = Parser(
        prog=f"{PROG} {OPTION}",
        description="Examine a model that was trained elsewhere: what of the doctor needs neither "
        "flowray's losses nor its optimiser. docs/bring-your-own.md says what the model must have.",
        epilog="Exit code: 0 healthy, 1 a finding is warn or bad, 2 bad input.",
    )
    parser.add_argument(
        OPTION,
        required=True,
        metavar="MODULE:NAME",
        help="the model, or a function without arguments that gives it; the module is looked for "
        "in the current folder too",
    )
    parser.add_argument("--data", required=True, metavar="SHARDS", help="as data.shards names them")
    parser.add_argument("--held-out", metavar="SHARDS", help="as data.val_shards names them")
    parser.add_argument(
        "--resize", type=whole_number(1), metavar="PX", help="bring pictures to PX x PX"
    )
    parser.add_argument("--limit", type=whole_number(8), default=512, help="pictures of each set")
    parser.add_argument("--batch", type=whole_number(8), default=64, help="samples probed")
    parser.add_argument("--seed", type=whole_number(0), default=0, help="of every draw")
    parser.add_argument("--steps", type=whole_number(1), default=50, help="of a picture")
    parser.add_argument("--guidance-scale", type=number(), default=1.0, help="1 is off")
    parser.add_argument(
        "--out", type=argument, metavar="FILE", default=Path("doctor.html"), help="the page"
    )
    parser.add_argument("--json", action="store_true", help=JSON)
    return parser


def load_model(spec: str) -> Any:
    """The object that `MODULE:NAME` names, called if it is a function or class. InputError: there
    is none. What the function raises is its own.
    """
    module, _, name = spec.partition(":")
    if not module or not name:
        raise InputError(f"{OPTION}: got {spec!r}, want PACKAGE.MODULE:NAME")
    here = os.getcwd()
    sys.path.insert(0, here)
    try:
        found: Any = importlib.import_module(module)
    except ImportError as error:
        raise InputError(f"{OPTION}: {module} cannot be imported: {error}") from error
    finally:
        sys.path.remove(here)
    for part in name.split("."):
        if not hasattr(found, part):
            raise InputError(f"{OPTION}: {module} has no {name}")
        found = getattr(found, part)
    return found() if inspect.isroutine(found) or inspect.isclass(found) else found


def main(argv: list[str]) -> int:
    """Run the command; returns its exit code."""
    args = _parser().parse_args(argv)
    quiet_libraries()
    progress = ConsoleProgress()
    refuse_unwritable(args.out, "--out")
    with progress.task(IMPORTING):
        from flowray.doctor.foreign import examine_foreign
    report = examine_foreign(
        load_model(args.model),
        args.data,
        held_out=args.held_out,
        resize=(args.resize, args.resize) if args.resize else None,
        name=args.model,
        limit=args.limit,
        batch=args.batch,
        seed=args.seed,
        guidance_scale=args.guidance_scale,
        steps=args.steps,
        progress=progress,
    )
    found = report.examination
    page = write_page(found, report.findings, args.out)
    if args.json:
        metrics = {
            key: value if math.isfinite(value) else None
            for key, value in sorted(found.metrics.items())
        }
        told = {"model": args.model, "page": str(page), **as_json(report.findings)}
        print(json.dumps(told | {"metrics": metrics, "not_measured": found.facts["notes"]}))
    else:
        show(Console(highlight=False), found, report.findings, page)
    return GOOD if report.healthy else FINDINGS
