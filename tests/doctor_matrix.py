"""Regenerate docs/benchmarks/doctor.md: every planted fault, and healthy runs of every head, against what the doctor finds.

    python tests/doctor_matrix.py [--home FOLDER] [--only NAME ...] [--out docs/benchmarks/doctor.md]

What the doctor measured is kept in FOLDER/seen and only judged again; a row not measured yet takes about a minute on one thread.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from faults import FAULTS, HEALTHY_RUNS, Fault, look, plant, rank

from flowray.findings.diagnose import diagnose

DEFAULT_HOME = Path("~/.cache/flowray/doctor-matrix").expanduser()


def measure(fault: Fault, home: Path, *, fresh: bool) -> dict[str, Any]:
    """The examination of the fault's run as plain data, kept in home/seen; trained and examined now if it is not there."""
    kept = home / "seen" / f"{fault.name}.json"
    if fresh or not kept.is_file():
        began = time.perf_counter()
        seen = look(fault, plant(fault, home))
        row = {"metrics": seen.metrics, "facts": seen.facts, "history": seen.history, "seconds": time.perf_counter() - began}
        kept.parent.mkdir(parents=True, exist_ok=True)
        kept.write_text(json.dumps(row))
    return json.loads(kept.read_text())


def judged(fault: Fault, seen: dict[str, Any]) -> dict[str, Any]:
    """One row: the findings with their severities, in the doctor's order."""
    found = diagnose(seen["metrics"], seen["facts"], seen["history"])
    return {
        "name": fault.name,
        "named_by": fault.named_by,
        "rank": rank(found, fault.named_by),
        "findings": [[f.id, f.severity, f.explained_by, f.evidence] for f in found],
    }


def is_right(row: dict[str, Any]) -> bool:
    """A fault is named first or second; a healthy run has nothing above info."""
    if row["named_by"]:
        return row["rank"] in (1, 2)
    return all(severity == "info" for _, severity, *_ in row["findings"])


def page(rows: Sequence[dict[str, Any]]) -> str:
    """The results as Markdown: a line for each planted fault, then the confusion matrix of first findings."""
    planted = [row for row in rows if row["named_by"]]
    well = [row for row in rows if not row["named_by"]]
    first = [row for row in planted if row["rank"] == 1]
    text = [
        "# The doctor on planted faults",
        "",
        "Made by `python tests/doctor_matrix.py`. Each fault of `tests/faults.py` is planted in the same small run (one-object shapes,",
        "a DiT of width 64, batch 32, 150 steps), by a recipe key or a bug in the code, and the run directory is given to the doctor.",
        "",
        f"Named first: {len(first)} of {len(planted)}. Named first or second: {sum(map(is_right, planted))} of {len(planted)}. "
        f"Healthy runs with nothing above info: {sum(map(is_right, well))} of {len(well)}.",
        "",
        "| planted | named by | place | findings above info, most likely cause first (in brackets: follows from another) |",
        "|---|---|---|---|",
    ]
    for row in rows:
        loud = [f"({name})" if by else name for name, severity, by, _ in row["findings"] if severity != "info"]
        named = " or ".join(row["named_by"]) or "nothing"
        place = row["rank"] or "**not named**" if row["named_by"] else "healthy" if is_right(row) else "**false alarm**"
        text.append(f"| {row['name']} | {named} | {place} | {', '.join(loud) or 'none'} |")
    return "\n".join([*text, "", *_matrix(planted), ""])


def _matrix(planted: Sequence[dict[str, Any]]) -> list[str]:
    """Planted (rows) against found (columns): the place of the finding where it is one of the first three."""
    columns = sorted({name for row in planted for name, *_ in row["findings"][:3]})
    lines = [
        "## Confusion matrix",
        "",
        "The place (1 to 3) at which each finding stands; columns: " + ", ".join(f"{i} {name}" for i, name in enumerate(columns, 1)) + ".",
        "",
        "| planted | " + " | ".join(str(i) for i in range(1, len(columns) + 1)) + " |",
        "|---" * (len(columns) + 1) + "|",
    ]
    for row in planted:
        places = {name: str(place) for place, (name, *_) in enumerate(row["findings"][:3], 1)}
        lines.append(f"| {row['name']} | " + " | ".join(places.get(name, "") for name in columns) + " |")
    return lines


def main() -> None:
    """Measure what is missing and write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--home", type=Path, default=DEFAULT_HOME, help="pictures, latents, runs and examinations")
    parser.add_argument("--only", nargs="*", metavar="NAME", help="measure these again, and no others")
    parser.add_argument("--out", type=Path, default=Path("docs/benchmarks/doctor.md"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for case in [*FAULTS, *HEALTHY_RUNS]:
        wanted = not args.only or case.name in args.only
        if not wanted and not (args.home / "seen" / f"{case.name}.json").is_file():
            continue
        seen = measure(case, args.home, fresh=bool(args.only) and wanted)
        rows.append(judged(case, seen))
        word = "ok" if is_right(rows[-1]) else "WRONG"
        print(f"{case.name:<26} {word:<5} {seen['seconds']:5.0f} s  {[name for name, *_ in rows[-1]['findings']][:4]}", flush=True)
    args.out.write_text(page(rows))


if __name__ == "__main__":
    main()
