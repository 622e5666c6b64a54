"""`flowray.report DIR`: write the HTML report of a sweep or a run and print where it is."""

from __future__ import annotations

from pathlib import Path

from flowray.cli.common import GOOD, refuse_unwritable
from flowray.cli.parser import Parser
from flowray.cli.progress import IMPORTING, ConsoleProgress
from flowray.config.errors import InputError, did_you_mean
from flowray.config.load import load_recipe
from flowray.config.paths import argument, exists
from flowray.report.load import is_run, is_sweep


def main(argv: list[str]) -> int:
    """Write `DIR/report.html`, and of a sweep `DIR/report.md`; print their paths."""
    parser = Parser(
        prog="flowray.report",
        description=(
            "Write DIR/report.html, one self-contained page: of a sweep (the best trial, curves,"
            " sample grid, probes; also report.md, which keeps the conclusion that"
            " you write into it) or of a single run (losses, probes against trivial baselines,"
            " samples over time)."
        ),
    )
    parser.add_argument(
        "dir",
        metavar="DIR",
        type=argument,
        help="a folder that flowray.tune or flowray.train wrote",
    )
    folder: Path = parser.parse_args(argv).dir
    whole_sweep = is_sweep(folder)
    if not whole_sweep and not is_run(folder):
        raise InputError(_neither(folder))
    if not whole_sweep and exists(config := folder / "config.yaml"):
        load_recipe(str(config))  # a page on another recipe's defaults would mislead
    for name in ("report.html", "report.md") if whole_sweep else ("report.html",):
        refuse_unwritable(folder / name)
    progress = ConsoleProgress()
    with progress.task(IMPORTING):
        from flowray.report.page import write_run_report
        from flowray.report.sweep_page import write_sweep_report
    with progress.task(f"writing the report of {folder}"):
        page = write_sweep_report(folder) if whole_sweep else write_run_report(folder)
    print(*([page, page.with_suffix(".md")] if whole_sweep else [page]), sep="\n")
    return GOOD


def _neither(folder: Path) -> str:
    want = "want a sweep (it has sweep.yaml) or a run (config.yaml)"
    if not folder.exists():
        known = (
            [path.name for path in folder.parent.iterdir() if path.is_dir()]
            if folder.parent.is_dir()
            else []
        )
        return f"{folder}: no such folder{did_you_mean(folder.name, known)}; {want}"
    if not folder.is_dir():
        return f"{folder}: a file; {want}"
    inside = next(
        (path for path in sorted(folder.iterdir()) if is_sweep(path) or is_run(path)), None
    )
    return f"{folder}: neither a sweep nor a run; {want}" + (
        f"; type flowray.report {inside}" if inside else ""
    )
