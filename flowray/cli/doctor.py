"""`flowray.doctor RUN`: why a run paints textures, most likely cause first, with evidence and
what to type.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from flowray.cli.common import FINDINGS, GOOD, refuse_unwritable
from flowray.cli.parser import JSON, Parser, whole_number
from flowray.cli.progress import IMPORTING, LOOKING, ConsoleProgress, quiet_libraries
from flowray.config.paths import argument
from flowray.config.progress import Progress
from flowray.findings.diagnose import diagnose
from flowray.findings.finding import Finding, Severity, as_json, healthy
from flowray.store.found import Found, find_checkpoint

if TYPE_CHECKING:
    from flowray.doctor.examine import Examination

STYLES: dict[Severity, str] = {"bad": "bold red", "warn": "yellow", "info": "cyan"}
SHOWN = 6  # causes on the first screen
PROG = "flowray.doctor"
SELFCHECK = "--selfcheck"
MODEL = "--model"  # of a model that was not trained here


def _parser() -> Parser:
    parser = Parser(
        prog=PROG,
        description="Say why a run paints textures instead of pictures: numbers against thresholds "
        "and trivial baselines, the most likely cause first, and the recipe override to type. "
        "Writes RUN/doctor.html with plots and pictures.",
        epilog=f"Health checks that train for a minute: {PROG} overfit RECIPE, {PROG} ablations "
        f"RECIPE (see their --help). Without a run, whether this installation computes what the "
        f"method prescribes: {PROG} {SELFCHECK}. Of a model that was trained elsewhere: {PROG} "
        f"{MODEL} MODULE:NAME --data SHARDS. "
        "Exit code: 0 healthy, 1 a finding is warn or bad, 2 bad input.",
    )
    parser.add_argument(
        "run",
        type=argument,
        metavar="RUN",
        help="a run directory, or one of its checkpoints/step_* folders",
    )
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="key=value",
        help="recipe keys to examine it with, e.g. sample.guidance_scale=3",
    )
    parser.add_argument(
        "--checkpoint", type=argument, metavar="PATH", help="this checkpoint instead of the newest"
    )
    parser.add_argument("--batch", type=whole_number(8), help="samples probed (probes.batch_size)")
    parser.add_argument("--seed", type=whole_number(0), default=0, help="of every draw (default 0)")
    parser.add_argument(
        "--out", type=argument, metavar="FILE", help="where the page goes (default RUN/doctor.html)"
    )
    parser.add_argument(
        "--json",
        action="store_true",
        help="print one JSON object on stdout: the findings and every number measured",
    )
    return parser


def examine_run(found: Found, args: argparse.Namespace, progress: Progress) -> Examination:
    """The examination that the command line asks for."""
    with progress.task(IMPORTING):
        import torch

        from flowray.doctor.examine import examine
        from flowray.doctor.subject import open_subject

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    subject = open_subject(found, device=device, progress=progress)
    return examine(subject, batch=args.batch, seed=args.seed, progress=progress)


def write_page(found: Examination, findings: Sequence[Finding], out: Path) -> Path:
    """Write the examination's page."""
    from flowray.report.doctor_page import DoctorData, write_doctor_page

    data = DoctorData(
        found.where,
        found.step,
        findings,
        found.metrics,
        found.facts,
        found.history,
        found.pictures,
        found.curves,
    )
    return write_doctor_page(out, data)


def main(argv: list[str]) -> int:
    """Run the command; returns its exit code."""
    from flowray.cli import health

    if argv and argv[0] in health.CHECKS and not Path(argv[0]).is_dir():
        return health.main(argv)
    if SELFCHECK in argv:
        return _selfcheck(argv)
    if any(word.partition("=")[0] == MODEL for word in argv):
        from flowray.cli import doctor_foreign

        return doctor_foreign.main(argv)
    args = _parser().parse_intermixed_args(argv)
    quiet_libraries()
    progress = ConsoleProgress()
    with progress.task(LOOKING):
        run = find_checkpoint(args.checkpoint or args.run, args.overrides)
    out = args.out or run.run.path / "doctor.html"
    refuse_unwritable(out, "--out")  # before the minute that the probes take
    found = examine_run(run, args, progress)
    findings = diagnose(found.metrics, found.facts, found.history)
    with progress.task("writing the page"):
        page = write_page(found, findings, out)
    if args.json:
        metrics = {
            key: value if math.isfinite(value) else None
            for key, value in sorted(found.metrics.items())
        }
        measured = {"metrics": metrics, "not_measured": found.facts["notes"]}
        print(
            json.dumps(
                {
                    "run": found.where,
                    "step": found.step,
                    "page": str(page),
                    **as_json(findings),
                    **measured,
                }
            )
        )
    else:
        show(Console(highlight=False), found, findings, page)
    return GOOD if healthy(findings) else FINDINGS


def _selfcheck(argv: list[str]) -> int:
    """Hold the installation's formulas against theory, a line for each check."""
    parser = Parser(
        prog=f"{PROG} {SELFCHECK}",
        description="Hold the formulas of this installation against theory on tiny tensors, in "
        "seconds and without a run: for those who have changed its source.",
        epilog="Exit code: 0 all hold, 1 one does not, 2 bad input.",
    )
    parser.add_argument(SELFCHECK, action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--json", action="store_true", help=JSON)
    args = parser.parse_args(argv)
    quiet_libraries()
    with ConsoleProgress().task(IMPORTING):
        from flowray.doctor.selfcheck import selfcheck
    checks = selfcheck()
    passed = all(check.passed for check in checks)
    if args.json:
        rows = [asdict(check) for check in checks]
        print(json.dumps({"check": "selfcheck", "passed": passed, "checks": rows}))
    else:
        for check in checks:
            where = "" if check.passed else f"; {check.where}"
            word = "ok" if check.passed else "FAILED"
            print(f"{word:<7}{check.id:<14}{check.theory} ({check.measured}{where})")
    return GOOD if passed else FINDINGS


def show(console: Console, found: Any, findings: Sequence[Finding], page: Path) -> None:
    """The findings on one screen: the causes, each with its evidence, cause and fix; what they
    explain in one line each.
    """
    causes = [finding for finding in findings if not finding.explained_by]
    verdict = "healthy" if healthy(findings) else "most likely cause first"
    table = Table(
        title=f"{found.where} at step {found.step}: {verdict}",
        show_lines=True,
        title_justify="left",
        expand=True,
    )
    table.add_column("", width=4)
    table.add_column("finding, evidence, likely cause", ratio=5, overflow="fold")
    table.add_column("what to type", ratio=3, overflow="fold")
    for finding in causes[:SHOWN]:
        words = Text.assemble(
            (finding.id, "bold"), f"\n{finding.evidence}\n", (finding.cause, "italic")
        )
        if finding.sure:
            words.append(f"\n{finding.sure}", style="dim")
        follows = [other.id for other in findings if other.explained_by == finding.id]
        if follows:
            words.append(f"\nexplains: {', '.join(follows)}", style="dim")
        table.add_row(
            Text(finding.severity, style=STYLES[finding.severity]), words, Text(finding.fix)
        )
    if causes:
        console.print(table)
    else:
        console.print(f"{found.where} at step {found.step}: healthy, nothing to say")
    if len(causes) > SHOWN:
        console.print(f"also: {', '.join(finding.id for finding in causes[SHOWN:])}")
    for note in found.facts.get("notes") or []:
        console.print(f"not measured: {note}", style="dim", markup=False)
    console.print(f"plots and pictures: {page}", markup=False, soft_wrap=True)
