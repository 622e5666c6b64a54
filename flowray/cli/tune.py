"""`flowray.tune`: a sweep of a recipe's keys, hopeless trials stopped by their probes."""

from __future__ import annotations

import contextlib
import json
import shlex
import sys
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from flowray.cli.common import FINDINGS, GOOD, STOPPED
from flowray.cli.parser import Parser, whole_number
from flowray.cli.progress import IMPORTING, ConsoleProgress, quiet_libraries
from flowray.cli.tune_plan import plan, print_plan, problems
from flowray.config.errors import InputError
from flowray.config.paths import exists
from flowray.config.progress import Progress
from flowray.config.sources import packaged_sweeps
from flowray.findings.rules import RULES
from flowray.sweepconfig.check import base_recipe, check_trials
from flowray.sweepconfig.file import load_sweep
from flowray.sweepconfig.schema import sweep_schema
from flowray.sweepconfig.stop import check_rules
from flowray.sweepconfig.sweep import Sweep
from flowray.tune.folder import sweep_folder
from flowray.tune.ledger import Ledger

if TYPE_CHECKING:
    from flowray.rayrun.tuner import SweepResult


def _parser() -> Parser:
    parser = Parser(
        prog="flowray.tune",
        description=(
            "Search a recipe's keys with Ray Tune and Optuna; trials without hope stop early, and a"
            " line says why."
        ),
        epilog=(
            f"Packaged sweeps: {', '.join(packaged_sweeps()) or 'none'}. Results:"
            " <storage_path>/<name>/report.html and best.yaml."
        ),
    )
    parser.add_argument(
        "sweep", metavar="SWEEP.yaml", nargs="?", help="a sweep file, or the name of a packaged one"
    )
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="key=value",
        help="sweep keys (run_cap=4), recipe keys under set. (set.train.steps=50)",
    )
    parser.add_argument(
        "--resume",
        action="store_true",
        help=(
            "continue <storage_path>/<name> also where caps, budgets, stops or resources have"
            " changed"
        ),
    )
    parser.add_argument(
        "--finish",
        metavar="N",
        type=whole_number(0),
        action="append",
        help="train the stopped trial N to the end, nothing else",
    )
    planned = (
        "print space, trials, hours, storage and problems, exit code 1 for any; starts no trial"
    )
    parser.add_argument("--plan", action="store_true", help=planned)
    parser.add_argument(
        "--schema", action="store_true", help="print the JSON schema of sweep files, for editors"
    )
    parser.add_argument(
        "--json", action="store_true", help="one JSON object on stdout, the rest on stderr"
    )
    return parser


def main(argv: list[str]) -> int:
    """Run a sweep, or finish trials of one.

    0: a trial did not fail; 1: all failed; 75: stopped by a signal; InputError for bad input.
    """
    args = _parser().parse_intermixed_args(argv)
    if args.schema:
        print(json.dumps(sweep_schema(), indent=1))
        return GOOD
    if args.sweep is None:
        raise InputError(
            f"which sweep? type a file, or one of {', '.join(packaged_sweeps())}; see `python -m"
            " flowray.tune --help`"
        )
    sweep = load_sweep(args.sweep, args.overrides, in_place=True)
    base = base_recipe(sweep)
    check_trials(sweep, base)
    check_rules(sweep.stop, [rule.id for rule in RULES])
    quiet_libraries()
    progress = ConsoleProgress()
    _look(sweep, args.resume, args.finish or (), progress)
    if args.plan:
        with progress.task("planning"):  # torch takes seconds to import
            facts = plan(sweep, base, resume=args.resume)
        print(json.dumps(facts)) if args.json else print_plan(facts)
        return FINDINGS if facts["problems"] else GOOD
    with progress.task(IMPORTING):
        from flowray.rayrun.failures import no_room
        from flowray.rayrun.tuner import run_sweep

    for problem in problems(sweep, base):
        raise InputError(problem)
    finish, resume = args.finish or (), args.resume or bool(args.finish)
    try:
        with contextlib.redirect_stdout(sys.stderr):  # what comes before the end is progress
            result = run_sweep(
                sweep, base, resume=resume, finish=finish, stream=sys.stderr, progress=progress
            )
            with progress.task("writing the report"):
                report = _report(result)
    except OSError as error:
        if no_room(error) is None:
            raise
        folder = sweep_folder(sweep)
        raise InputError(
            f"{folder}: {error.strerror}; make room and type the same command again: what is done"
            " is kept"
        ) from error
    if result.interrupted:
        why = "the time budget ran out" if result.out_of_time else "stopped by a signal"
        print(
            f"{why}; to continue: python -m flowray.tune {shlex.join(argv)}",
            file=sys.stderr,
            flush=True,
        )
    elif result.left:
        resume = ["--resume"] if args.resume else []
        rest = shlex.join([args.sweep, *args.overrides, *resume])
        print(
            f"{result.left} trials of the sweep are left; to go on: python -m flowray.tune {rest}",
            file=sys.stderr,
            flush=True,
        )
    if args.json:
        print(json.dumps(_summary(result)))
    else:
        print("\n".join(report))
    if result.interrupted and not result.out_of_time:
        return STOPPED
    return GOOD if any(t.status != "failed" for t in result.trials) else FINDINGS


def _look(sweep: Sweep, resume: bool, finish: Sequence[int], progress: Progress) -> None:
    """What there is to continue, before anything slow.

    InputError for a trial that cannot be finished; a line where there is no sweep to resume.
    """
    folder = sweep_folder(sweep)
    if not exists(folder / "sweep.yaml"):
        where = "name=NAME or storage_path=FOLDER says where another one is"
        if finish:
            raise InputError(f"--finish {finish[0]}: {folder} holds no sweep; {where}")
        if resume:
            progress.say(f"{folder} holds no sweep to continue: it starts with trial 0; {where}")
    ledger = Ledger(folder / "trials.jsonl")
    for number in finish:
        ledger.to_finish(number)


def _report(result: SweepResult) -> list[str]:
    """Write report.html and report.md; the lines that end the sweep, the verdict last."""
    from flowray.report.ending import ending
    from flowray.report.lines import columns
    from flowray.report.sweep_page import write_pages

    return ending(result.report, write_pages(result.report), columns())


def _summary(result: SweepResult) -> dict[str, Any]:
    return {
        "sweep_dir": str(result.sweep_dir),
        "best": asdict(result.best) if result.best else None,
        "saved": result.saved,
        "interrupted": result.interrupted,
        "trials": [asdict(trial) for trial in result.trials],
    }
