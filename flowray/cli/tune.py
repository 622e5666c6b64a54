"""`flowray.tune`: a sweep of a recipe's keys, hopeless trials stopped by their probes."""

from __future__ import annotations

import contextlib
import json
import sys
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from flowray.cli.common import FINDINGS, GOOD, STOPPED
from flowray.cli.parser import Parser
from flowray.config.recipe import Recipe
from flowray.config.sweep import Sweep
from flowray.config.sweepfile import base_recipe, check_trials, load_sweep, packaged_sweeps
from flowray.findings.rules import RULES
from flowray.tune.stop import check_findings

if TYPE_CHECKING:
    from flowray.rayrun.tuner import SweepResult


def main(argv: list[str]) -> int:
    """Run a sweep. 0: a trial did not fail; 1: all failed; 75: stopped by a signal; InputError for bad input."""
    parser = Parser(
        prog="flowray.tune",
        description="Search a recipe's keys with Ray Tune and Optuna; trials without hope stop early, and a line says why.",
        epilog=f"Packaged sweeps: {', '.join(packaged_sweeps()) or 'none'}. Results: <storage_path>/<name>/report.html and best.yaml.",
    )
    parser.add_argument("sweep", metavar="SWEEP.yaml", help="a sweep file, or the name of a packaged one")
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="sweep keys (run_cap=4), recipe keys under set. (set.train.steps=50)"
    )
    parser.add_argument(
        "--resume", action="store_true", help="continue <storage_path>/<name>: unfinished trials first, then the missing ones"
    )
    parser.add_argument("--plan", action="store_true", help="print the space, the trials and the steps; start nothing")
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout, the rest on stderr")
    args = parser.parse_intermixed_args(argv)
    sweep = load_sweep(args.sweep, args.overrides)
    base = base_recipe(sweep)
    check_trials(sweep, base)
    check_findings(sweep.stop, [rule.id for rule in RULES])
    if args.plan:
        _print_plan(plan(sweep, base), args.json)
        return GOOD
    from flowray.rayrun.tuner import run_sweep  # Ray takes seconds to import: not for --help and --plan

    with contextlib.redirect_stdout(sys.stderr) if args.json else contextlib.nullcontext():
        result = run_sweep(sweep, base, resume=args.resume, stream=sys.stderr if args.json else sys.stdout)
        report = _report(result)
    if args.json:
        print(json.dumps(_summary(result)))
    else:
        print("\n".join(report))
    if result.interrupted:
        print(f"stopped by a signal; to continue: python -m flowray.tune {' '.join(argv)} --resume", file=sys.stderr)
        return STOPPED
    return GOOD if any(t.status != "failed" for t in result.trials) else FINDINGS


def plan(sweep: Sweep, base: Recipe) -> dict[str, Any]:
    """What the sweep would do: the space, the trials, the halving rungs, and the steps at most and as halving would have it."""
    from flowray.tune.space import trial_count  # imports Optuna

    trials, steps = trial_count(sweep), base.train.steps
    halving, rungs, expected = sweep.early_terminate, [], float(trials * steps)
    if halving:
        rung = float(halving.min_iter)
        while rung < steps:
            rungs.append(int(rung))
            rung *= halving.eta
        ends = [*rungs, steps]
        expected = sum(trials * halving.eta**-i * (end - start) for i, (start, end) in enumerate(zip([0, *ends], ends, strict=False)))
    return {
        "name": sweep.name,
        "sweep_dir": f"{sweep.storage_path}/{sweep.name}",
        "base": sweep.base,
        "set": sweep.set,
        "method": sweep.method,
        "metric": sweep.metric.model_dump(),
        "parameters": {key: parameter.model_dump(mode="json") for key, parameter in sweep.parameters.items()},
        "stop": [rule.model_dump(exclude_none=True) for rule in sweep.stop],
        "rungs": rungs,
        "trials": trials,
        "budget_steps": steps,
        "steps_at_most": trials * steps,
        "steps_expected": round(expected),
    }


def _print_plan(facts: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print(json.dumps(facts))
        return
    table = Table(title=f"{facts['name']}: {facts['method']} search, {facts['metric']['goal']} {facts['metric']['name']}")
    table.add_column("recipe key")
    table.add_column("drawn from")
    for key, spec in facts["parameters"].items():
        ends = f"{spec['min']:g} .. {spec['max']:g}" if "min" in spec else spec.get("values", spec.get("value"))
        step = f" in steps of {spec['q']:g}" if "q" in spec else ""
        table.add_row(key, escape(f"{spec['distribution']}  {ends}{step}"))
    console = Console(soft_wrap=True, highlight=False)
    console.print(table)
    console.print(f"base {facts['base']}" + "".join(f"  {key}={value}" for key, value in facts["set"].items()), markup=False)
    for rule in facts["stop"]:
        side = "below" if "below" in rule else "above"
        what = f"finding {rule['finding']}" if "finding" in rule else f"{rule['metric']} {side} {rule[side]:g}"
        console.print(f"stop: {what} from step {rule['after']}, {rule['patience']} probes in a row", markup=False)
    if facts["rungs"]:
        console.print(f"halving at steps {', '.join(map(str, facts['rungs']))}")
    console.print(
        f"{facts['trials']} trials of {facts['budget_steps']} steps: at most {facts['steps_at_most']} steps, "
        f"about {facts['steps_expected']} with halving; results in {facts['sweep_dir']}"
    )


def _report(result: SweepResult) -> list[str]:
    """Write report.html; the lines that end the sweep: verdict, stopped trials, what to type next."""
    from flowray.report.load import load_sweep as load_results
    from flowray.report.page import sweep_commands, sweep_verdict, write_sweep_report

    found, page = load_results(result.sweep_dir), write_sweep_report(result.sweep_dir)
    commands = sweep_commands(found)
    early = [
        f"  trial {t.trial} {t.status} at {t.last_step}/{t.budget_steps}: {t.stopped_by or t.error}"
        for t in result.trials
        if t.stopped_by or t.error
    ]
    return ["", sweep_verdict(found), *early, "", *(f"{label}:\n  {command}" for label, command in commands.items()), f"Report:\n  {page}"]


def _summary(result: SweepResult) -> dict[str, Any]:
    return {
        "sweep_dir": str(result.sweep_dir),
        "best": asdict(result.best) if result.best else None,
        "saved": result.saved,
        "interrupted": result.interrupted,
        "trials": [asdict(trial) for trial in result.trials],
    }
