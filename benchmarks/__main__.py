"""`python -m flowray.bench`: measurements that end in a ratio, and the record that one needs."""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import sys
from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.table import Table

from flowray.cli.common import FINDINGS, GOOD, entry
from flowray.cli.parser import Parser, whole_number
from flowray.cli.progress import quiet_libraries
from flowray.config.errors import InputError
from flowray.config.paths import argument
from flowray.sweepconfig.file import load_sweep

SHOWN = 8  # metrics in the table; --page has more, --json all


def main(argv: list[str], name: str = "benchmarks") -> int:
    """Run one subcommand; name: of the command, for its help.

    0: all guards hold; 1: one does not, or a record is not complete; InputError for bad input.
    """
    parser = Parser(
        prog=name, description="Measurements that end in a ratio, stated so that higher is better."
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND", dest="command")
    for add in (
        *(_add_sweep, _add_record, _add_answers, _add_pair),
        *(_add_overhead, _add_startup, _add_data),
        *(_add_train, _add_step, _add_sample, _add_scaling),
    ):
        add(commands)
    args, more = parser.parse_known_args(argv)  # argparse gives up on key=value after an option
    if wrong := [
        text for text in more if text.startswith("-") or "=" not in text or "overrides" not in args
    ]:
        parser.error(f"unrecognized arguments: {' '.join(wrong)}")
    if more:
        args.overrides += more
    quiet_libraries()
    return int(args.run(args))


def _add_sweep(commands: argparse._SubParsersAction[Parser]) -> None:
    about = (
        "compute until one of the best configurations is found: the default sweep against simpler"
        " searches, on a recorded pool"
    )
    parser = commands.add_parser(
        "sweep", help=about, description=f"What the probes save: {about}. Trains nothing."
    )
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="key=value",
        help="sweep keys: metric.name=ema/flow/nmse early_terminate.min_iter=50",
    )
    parser.add_argument("--sweep", default="head", help="the sweep that is judged, default head")
    parser.add_argument(
        "--pool",
        type=argument,
        metavar="FILE",
        help="what `record` wrote; left out: the record that comes with flowray",
    )
    parser.add_argument("--seeds", type=int, default=40, help="replays of every search, default 40")
    parser.add_argument(
        "--loss",
        default="loss/flow",
        help="the metric of the search on the training loss, default loss/flow",
    )
    parser.add_argument(
        "--page", type=argument, metavar="FILE.md", help="write a page and, beside it, its figure"
    )
    parser.add_argument(
        "--json", action="store_true", help="one JSON object on stdout, the rest on stderr"
    )
    parser.set_defaults(run=_sweep)


def _add_record(commands: argparse._SubParsersAction[Parser]) -> None:
    about = (
        "train configurations of a sweep in full and judge their pictures; again after a kill, it"
        " goes on where it stopped"
    )
    parser = commands.add_parser(
        "record",
        help=about,
        description=f"For `benchmarks sweep`: {about}. Writes FOLDER/pool.jsonl.",
    )
    parser.add_argument("folder", type=argument, metavar="FOLDER")
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="key=value",
        help="sweep keys and, under set., recipe keys: set.train.steps=400",
    )
    parser.add_argument(
        "--sweep",
        default="head",
        help="the sweep whose space is drawn from, with its seed; default head",
    )
    parser.add_argument("--count", type=int, default=60, help="configurations, default 60")
    parser.add_argument(
        "--processes",
        type=int,
        default=1,
        help="configurations trained at once, one core each; default 1",
    )
    parser.set_defaults(run=_record)


def _add_answers(commands: argparse._SubParsersAction[Parser]) -> None:
    from benchmarks.answers_arms import ARMS

    about = (
        "text source, text source with a condition and noise source on captions with many right"
        " pictures, at equal training time; again after a kill, it goes on where it stopped"
    )
    parser = commands.add_parser(
        "answers",
        help=about,
        description=f"Sources beside each other: {about}. Writes FOLDER/answers.md and .png.",
    )
    parser.add_argument("folder", type=argument, metavar="FOLDER")
    parser.add_argument(
        "--minutes", type=float, default=9.0, help="of one core, for each training; default 9"
    )
    parser.add_argument(
        "--seeds", type=int, nargs="+", default=[0, 1, 2], metavar="N", help="default 0 1 2"
    )
    parser.add_argument(
        "--arms",
        nargs="+",
        choices=ARMS,
        default=list(ARMS),
        metavar="ARM",
        help=f"of {', '.join(ARMS)}; default: all",
    )
    parser.add_argument(
        "--processes",
        type=whole_number(1),
        default=1,
        metavar="N",
        help="trainings at once, one core each; default 1",
    )
    parser.set_defaults(run=_answers)


def _add_pair(commands: argparse._SubParsersAction[Parser]) -> None:
    about = (
        "what a change of a recipe changes: both from the same seeds, at equal steps and at equal"
        " time; again after a kill, it goes on where it stopped"
    )
    parser = commands.add_parser("pair", help=about, description=f"An ablation: {about}.")
    parser.add_argument("folder", type=argument, metavar="FOLDER")
    parser.add_argument("recipe", metavar="RECIPE")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="for both sides")
    parser.add_argument(
        "--change",
        action="append",
        required=True,
        metavar="key=value",
        help="what the changed side has; again for more",
    )
    parser.add_argument(
        "--seeds", type=int, nargs="+", default=[0, 1, 2], metavar="N", help="default 0 1 2"
    )
    parser.add_argument(
        "--processes",
        type=whole_number(1),
        default=1,
        metavar="N",
        help="trainings at once, one core each; default 1",
    )
    parser.add_argument(
        "--pictures", action="store_true", help="score pictures too, of a recipe on shapes"
    )
    parser.add_argument(
        "--json", action="store_true", help="one JSON object on stdout, the rest on stderr"
    )
    parser.set_defaults(run=_pair)


def _add_overhead(commands: argparse._SubParsersAction[Parser]) -> None:
    about = (
        "seconds a trial and metric rows a second of a synthetic sweep, against stock Ray Tune with"
        " Optuna and ASHA"
    )
    parser = commands.add_parser(
        "tune-overhead", help=about, description=f"What the tuner costs: {about}."
    )
    parser.add_argument(
        "--trials", type=int, default=200, help="trials of a round on each side, default 200"
    )
    parser.add_argument(
        "--rows", type=int, default=10, help="rows that a trial reports, default 10"
    )
    parser.add_argument(
        "--rounds",
        type=int,
        default=3,
        help="rounds, the sides one after the other in each; default 3",
    )
    parser.add_argument(
        "--json", action="store_true", help="one JSON object on stdout, the rest on stderr"
    )
    parser.set_defaults(run=_overhead)


def _add_scaling(commands: argparse._SubParsersAction[Parser]) -> None:
    about = "images a second and their cost on 8 to 512 GPUs, by a model of one step"
    parser = commands.add_parser(
        "scaling", help=about, description=f"The tables of docs/scaling.md: {about}."
    )
    parser.add_argument(
        "--price", type=float, default=3.0, metavar="DOLLARS", help="of a GPU hour; default 3"
    )
    parser.set_defaults(run=_scaling)


def _scaling(args: argparse.Namespace) -> int:
    from benchmarks.scaling import page

    if not (math.isfinite(args.price) and args.price > 0):
        raise InputError(f"--price: got {args.price:g}, want dollars above 0")
    print(page(args.price), end="")
    return GOOD


def _add_startup(commands: argparse._SubParsersAction[Parser]) -> None:
    about = (
        "seconds from a trial being asked for to its training loop and to its first row, against"
        " stock Ray Tune with a TorchTrainer"
    )
    parser = commands.add_parser(
        "trial-startup", help=about, description=f"What a trial costs before it trains: {about}."
    )
    parser.add_argument(
        "--trials",
        type=int,
        default=5,
        help="trials of a round on each side, one after the other; default 5, at least 2",
    )
    parser.add_argument(
        "--workers",
        type=int,
        default=1,
        help="workers of a trial, default 1; with more, flowray has them started as well",
    )
    parser.add_argument(
        "--rounds",
        type=int,
        default=3,
        help="rounds, the sides one after the other in each; default 3",
    )
    parser.add_argument(
        "--json", action="store_true", help="one JSON object on stdout, the rest on stderr"
    )
    parser.set_defaults(run=_startup)


def _add_data(commands: argparse._SubParsersAction[Parser]) -> None:
    about = (
        "samples a second of one core from latent and picture tars, seconds to a resume's first"
        " batch, memory of an index, against stock webdataset"
    )
    parser = commands.add_parser("data", help=about, description=f"What reading costs: {about}.")
    parser.add_argument(
        "--samples",
        type=whole_number(512),
        default=8192,
        metavar="N",
        help="latents, a multiple of 256; default 8192",
    )
    parser.add_argument(
        "--side",
        type=whole_number(1),
        default=32,
        metavar="N",
        help="cells of a latent's side, with 4 channels; default 32, pictures of 256 px",
    )
    parser.add_argument(
        "--rounds",
        type=whole_number(1),
        default=7,
        metavar="N",
        help="the sides one after the other in each; default 7",
    )
    parser.add_argument(
        "--quick", action="store_true", help="one round of small sets, to see that the guards hold"
    )
    parser.add_argument(
        "--json", action="store_true", help="one JSON object on stdout, the rest on stderr"
    )
    parser.set_defaults(run=_data)


def _add_train(commands: argparse._SubParsersAction[Parser]) -> None:
    about = (
        "steps a second under Ray against torchrun, what a checkpoint delays, seconds to come back"
        " from a kill against stock Ray Train, goodput under kills"
    )
    parser = commands.add_parser("train", help=about, description=f"What training loses: {about}.")
    _add_rounds(parser, 9)
    parser.add_argument(
        "--only",
        nargs="+",
        choices=("throughput", "checkpoints", "recovery", "goodput"),
        metavar="PART",
        help="throughput, checkpoints, recovery, goodput; all take an hour, goodput half of it",
    )
    parser.set_defaults(run=_train)


def _add_step(commands: argparse._SubParsersAction[Parser]) -> None:
    about = (
        "seconds of quickstart's training step on one core against a plain eager loop with the"
        " autoencoder on the fly and against an older commit, and the probes' share"
    )
    parser = commands.add_parser("step", help=about, description=f"What a step costs: {about}.")
    _add_rounds(parser, 9)
    parser.add_argument(
        "--before", metavar="COMMIT", help="the older commit; default: the one that step.py names"
    )
    parser.set_defaults(run=_step)


def _add_sample(commands: argparse._SubParsersAction[Parser]) -> None:
    about = (
        "seconds of quickstart's sampling loop on one core against the same loop on diffusers'"
        " FlowMatchEulerDiscreteScheduler and against its own with a compiled network"
    )
    parser = commands.add_parser("sample", help=about, description=f"What drawing costs: {about}.")
    _add_rounds(parser, 15)
    parser.set_defaults(run=_sample)


def _add_rounds(parser: Parser, rounds: int) -> None:
    parser.add_argument(
        "--rounds",
        type=whole_number(1),
        default=rounds,
        metavar="N",
        help=f"the arms one after the other in each; default {rounds}",
    )
    parser.add_argument(
        "--quick", action="store_true", help="one round of tiny runs, to see that the guards hold"
    )
    parser.add_argument(
        "--json", action="store_true", help="one JSON object on stdout, the rest on stderr"
    )


def _sweep(args: argparse.Namespace) -> int:
    from benchmarks.page import write_page
    from benchmarks.pool import packaged_pool, read_pool
    from benchmarks.sweep import ranked, run, summary

    pool = read_pool(args.pool or packaged_pool())
    bench = run(
        pool, load_sweep(args.sweep, args.overrides), seeds=args.seeds, loss=args.loss, say=_say
    )
    facts = summary(bench)
    if args.page:
        write_page(bench, args.page)
        _say(f"wrote {args.page} and {args.page.with_suffix('.png').name} beside it")
    if not args.json:
        _print_arms(facts)
        known = Table(
            "metric", "10 %", "33 %", "end", title="Spearman's rho with the final picture score"
        )
        for name in ranked(bench)[:SHOWN]:
            known.add_row(name, *(f"{rho:+.2f}" for rho in bench.correlations[name].values()))
        Console(highlight=False).print(known)
    return _end(facts, args.json)


def _print_arms(facts: Mapping[str, Any]) -> None:
    table = Table(
        "search",
        "full budgets, mean",
        "median",
        "best lost to stops",
        title="Compute until one of the best is trained in full",
    )
    for name, arm in facts["arms"].items():
        table.add_row(
            name,
            f"{arm['mean_budgets']:.1f}",
            f"{arm['median_budgets']:.1f}",
            f"{arm['best_lost']:.0%}",
        )
    Console(highlight=False).print(table)


def _record(args: argparse.Namespace) -> int:
    from benchmarks.record import picture_score, record

    pool = record(
        args.folder,
        load_sweep(args.sweep, args.overrides),
        args.count,
        picture_score,
        processes=args.processes,
    )
    _say(f"{len(pool.entries)} of {pool.drawn} configurations in {args.folder / 'pool.jsonl'}")
    if len(pool.entries) < pool.drawn:
        _say("the rest comes when the same command is run again")
        return FINDINGS
    return GOOD


def _answers(args: argparse.Namespace) -> int:
    from benchmarks.answers import page, run

    if not 0 < args.minutes < math.inf:
        raise InputError(f"--minutes: got {args.minutes:g}, want more than 0")
    seeds, arms = (list(dict.fromkeys(given)) for given in (args.seeds, args.arms))
    cases = run(args.folder, args.minutes, seeds, args.processes, arms)
    page(cases, args.minutes, args.folder / "answers.md")
    print((args.folder / "answers.md").read_text())
    return GOOD


def _pair(args: argparse.Namespace) -> int:
    from benchmarks.pairs import PLAIN, Pair, run

    pair = Pair(args.recipe, tuple(args.overrides), tuple(args.change), args.pictures)
    facts = run(args.folder.absolute(), pair, list(dict.fromkeys(args.seeds)), args.processes)
    if args.json:
        print(json.dumps(_plain(facts), allow_nan=False))
        return GOOD
    steps = facts["steps"]
    others = [side for side in steps if side != PLAIN]
    seeds = ", ".join(map(str, facts["seeds"]))
    table = Table(
        "metric",
        f"{PLAIN}, {steps[PLAIN]} steps",
        *(f"{side}, {steps[side]}" for side in others),
        title=f"{', '.join(args.change)}: mean difference, seeds {seeds}",
    )
    for key, sides in facts["metrics"].items():
        cells = []
        for side in others:
            error = sides[side]["standard_error"]
            spread = "" if error is None else f" ± {error:.3f}"
            cells.append(f"{sides[side]['difference']:+.3f}{spread}")
        table.add_row(key, f"{sides[PLAIN]:.3f}", *cells)
    Console(highlight=False).print(table)
    return GOOD


def _overhead(args: argparse.Namespace) -> int:
    from benchmarks.overhead import run

    with contextlib.redirect_stdout(sys.stderr):  # Tune has a word to say at every start
        facts = run(args.trials, args.rows, args.rounds, _say)
    if not args.json:
        table = Table(
            "side",
            "seconds a trial",
            "rows a second",
            title=f"{args.trials} trials that only report",
        )
        for name, seconds in facts["seconds_per_trial"].items():
            table.add_row(name, f"{seconds:.3f}", f"{facts['rows_per_second'][name]:.1f}")
        Console(highlight=False).print(table)
    return _end(facts, args.json)


def _startup(args: argparse.Namespace) -> int:
    from benchmarks.startup import run

    if args.trials < 2:
        raise InputError(
            f"--trials: got {args.trials}, want at least 2, as the first is told apart; type"
            " --trials 2"
        )
    with contextlib.redirect_stdout(sys.stderr):
        facts = run(args.trials, args.rounds, args.workers, _say)
    if not args.json:
        table = Table(
            "side",
            "to the loop",
            "to the first row",
            "first trial: loop",
            "row",
            title="Seconds from being asked for",
        )
        for name, seconds in facts["seconds"].items():
            table.add_row(
                name, *(f"{seconds[key]:.2f}" for key in ("loop", "row", "first_loop", "first_row"))
            )
        Console(highlight=False).print(table)
    return _end(facts, args.json)


def _data(args: argparse.Namespace) -> int:
    from benchmarks.data import QUICK, Scale, run
    from benchmarks.data_arms import BATCH

    if args.samples % BATCH:
        raise InputError(f"--samples: got {args.samples}, want a multiple of {BATCH}")
    scale = QUICK if args.quick else Scale(args.samples, args.side, args.rounds)
    facts = run(scale, _say)
    if not args.json:
        table = Table("microseconds a sample", "flowray", "webdataset")
        for name, cost in facts["microseconds"].items():
            table.add_row(name, *(f"{cost[side]:.1f}" for side in ("flowray", "webdataset")))
        Console(highlight=False).print(table)
    return _end(facts, args.json)


def _train(args: argparse.Namespace) -> int:
    from benchmarks.train import PARTS, QUICK, Scale, run

    scale = QUICK if args.quick else Scale(rounds=args.rounds)
    with contextlib.redirect_stdout(sys.stderr):
        facts = run(scale, _say, args.only or PARTS)
    if not args.json:
        _print_seconds(facts["seconds"])
    return _end(facts, args.json)


def _step(args: argparse.Namespace) -> int:
    from benchmarks.step import BEFORE, QUICK, Scale, run

    facts = run(QUICK if args.quick else Scale(rounds=args.rounds), args.before or BEFORE, _say)
    if not args.json:
        _print_seconds(facts["seconds"])
        print(f"probes: {facts['probes_share']:.2%} of the training time")
    return _end(facts, args.json)


def _sample(args: argparse.Namespace) -> int:
    from benchmarks.sampler import QUICK, Scale, run

    facts = run(QUICK if args.quick else Scale(rounds=args.rounds), _say)
    if not args.json:
        _print_seconds(facts["seconds"])
    return _end(facts, args.json)


def _print_seconds(seconds: Mapping[str, float]) -> None:
    table = Table("median", "seconds")
    for name, value in seconds.items():
        table.add_row(name, f"{value:.4f}")
    Console(highlight=False).print(table)


def _end(facts: Mapping[str, Any], as_json: bool) -> int:
    """Print the ratios; the exit code from the guards."""
    if as_json:
        print(json.dumps(_plain(facts), allow_nan=False))
    else:
        table = Table("ratio", "median", "min", "max", "rounds", title="higher is better")
        for name, ratio in facts["ratios"].items():
            table.add_row(
                name,
                *(f"{ratio[key]:.2f}" for key in ("median", "min", "max")),
                str(ratio["rounds"]),
            )
        Console(highlight=False).print(table)
    failed = [name for name, holds in facts["guards"].items() if not holds]
    if failed:
        _say(f"guards that do not hold: {', '.join(failed)}")
    return FINDINGS if failed else GOOD


def _plain(value: Any) -> Any:
    """Numbers that JSON has no word for become null."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _plain(inner) for key, inner in value.items()}
    return [_plain(inner) for inner in value] if isinstance(value, list | tuple) else value


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    entry(main)
