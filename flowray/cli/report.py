"""`flowray.report DIR`: write the HTML report of a sweep or a run and print where it is."""

from __future__ import annotations

import argparse
from pathlib import Path

from flowray.cli.common import GOOD
from flowray.config.errors import InputError, did_you_mean
from flowray.report.load import is_run, is_sweep
from flowray.report.page import write_run_report
from flowray.report.sweep_page import write_sweep_report


def main(argv: list[str]) -> int:
    """Write `DIR/report.html`, and of a sweep `DIR/report.md`; print their paths."""
    parser = argparse.ArgumentParser(
        prog="flowray.report",
        description="Write DIR/report.html, one self-contained page: of a sweep (the best trial, curves, sample grid, what each "
        "parameter did; also report.md, which keeps the conclusion that you write into it) or of a single run (losses, probes "
        "against trivial baselines, samples over time).",
    )
    parser.add_argument("dir", metavar="DIR", type=Path, help="a folder that flowray.tune or flowray.train wrote")
    folder: Path = parser.parse_args(argv).dir
    if is_sweep(folder):
        print(page := write_sweep_report(folder), page.with_suffix(".md"), sep="\n")
    elif is_run(folder):
        print(write_run_report(folder))
    else:
        raise InputError(_neither(folder))
    return GOOD


def _neither(folder: Path) -> str:
    want = "want a sweep (it has sweep.yaml) or a run (config.yaml)"
    if not folder.exists():
        known = [path.name for path in folder.parent.iterdir() if path.is_dir()] if folder.parent.is_dir() else []
        return f"{folder}: no such folder{did_you_mean(folder.name, known)}; {want}"
    if not folder.is_dir():
        return f"{folder}: a file; {want}"
    inside = next((path for path in sorted(folder.iterdir()) if is_sweep(path) or is_run(path)), None)
    return f"{folder}: neither a sweep nor a run; {want}" + (f"; type flowray.report {inside}" if inside else "")
