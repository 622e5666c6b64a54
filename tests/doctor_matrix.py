"""Regenerate docs/benchmarks/doctor.md: every planted fault, and healthy runs of every head,
against what the doctor finds.

    python tests/doctor_matrix.py [--home FOLDER] [--only NAME ...] [--train] [--cost RUN] [--out
    docs/benchmarks/doctor.md]

Runs are kept in FOLDER/runs and what the doctor measured of them in FOLDER/seen/NAME.json. A row
that is there is only judged again, by the rules as they are now; --only measures its rows afresh,
on the runs that are there; its names may be patterns, such as 'calib_*'. --train makes the runs
that are missing and looks at none. A row from nothing takes about half a minute of one core. --cost
measures what `flowray.doctor RUN` itself takes, and keeps that too.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from faults import ELSEWHERE, FAULTS, HEALTHY_RUNS, HELD_OUT, Fault, look, plant, rank
from faults_aside import ASIDE
from faults_examples import EXAMPLES
from faults_seen import SEEN
from healthy_runs import CALIB, FRESH, LAST, LATER
from source_faults import SOURCE_FAULTS

from flowray.config.load import load_recipe
from flowray.doctor.selfcheck import selfcheck
from flowray.findings.diagnose import diagnose

DEFAULT_HOME = Path("~/.cache/flowray/doctor-matrix").expanduser()
Row = dict[str, Any]
# a first finding with one of these ids does not claim to know the cause
NO_CLAIM: tuple[str, ...] = ("unlike_healthy",)

# Causes that numbers alone cannot separate, and what the doctor then says.
ALIKE = {
    "KL drowned; source collapsed or inflated": (
        "a KL too weak is the cause and a source off its width the effect; where the KL's "
        "share or weight is tiny both are named, and which of them first is a convention"
    ),
    "EMA never updated; EMA far too slow for the run": (
        "in both the average has not left the start; the fix names both"
    ),
    "head frozen, detached, outside the optimiser, or with an lr of nothing": (
        "in all of them the head does not move"
    ),
    "captions shuffled; captions that say nothing of their picture": (
        "in both no word tells anything of the latent"
    ),
    "a bug that training and the doctor share": (
        "not seen by the doctor on a run; `--selfcheck` has the formulas once more and is told of "
        "no run"
    ),
}


def measure(fault: Fault, home: Path, *, fresh: bool) -> Row:
    """The examination of the fault's run as plain data, kept in home/seen; trained and examined
    now if it is not there.
    """
    kept = home / "seen" / f"{fault.name}.json"
    if fresh or not kept.is_file():
        began = time.perf_counter()
        seen = look(fault, plant(fault, home))
        row = {
            "metrics": seen.metrics,
            "facts": seen.facts,
            "history": seen.history,
            "seconds": time.perf_counter() - began,
        }
        kept.parent.mkdir(parents=True, exist_ok=True)
        kept.write_text(json.dumps(row))
    return json.loads(kept.read_text())


def train_missing(faults: Sequence[Fault], home: Path) -> None:
    """Train each run that is not there; one that fails is told and the others go on."""
    for fault in faults:
        began = time.perf_counter()
        try:
            plant(fault, home)
            print(f"{fault.name:<26} trained {time.perf_counter() - began:5.0f} s", flush=True)
        except Exception as error:
            print(f"{fault.name:<26} FAILED {type(error).__name__}: {error}", flush=True)


def measure_cost(run: Path, home: Path) -> None:
    """What the command takes on a run, imports and page included, on one thread; kept in
    home/cost.json.
    """
    home.mkdir(parents=True, exist_ok=True)
    command = [
        sys.executable,
        "-m",
        "flowray.doctor",
        str(run),
        "--json",
        "--out",
        str(home / "doctor.html"),
    ]
    began = time.perf_counter()
    done = subprocess.run(
        command, env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE, check=False
    )
    wall, used = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_CHILDREN)
    found, recipe = json.loads(done.stdout), load_recipe(str(run / "config.yaml")).recipe
    row = {
        "wall": wall,
        "cpu": used.ru_utime + used.ru_stime,
        "step": found["step"],
        "velocity": recipe.model.velocity.model_dump(),
    }
    row["findings"] = [f"{finding['id']} ({finding['severity']})" for finding in found["findings"]]
    (home / "cost.json").write_text(json.dumps(row))


def judged(fault: Fault, seen: Row) -> Row:
    """One row: the findings with their severities, in the doctor's order."""
    found = diagnose(seen["metrics"], seen["facts"], seen["history"])
    return {
        "name": fault.name,
        "named_by": fault.named_by,
        "kind": fault.kind,
        "about": fault.about,
        "harms": fault.harms,
        "rank": rank(found, fault.named_by),
        "findings": [[f.id, f.severity, f.explained_by, f.evidence] for f in found],
    }


def is_right(row: Row) -> bool:
    """A fault is named first or second; a healthy run has nothing above info."""
    return row["rank"] in (1, 2) if is_planted(row) else exits_with_0(row)


def is_planted(row: Row) -> bool:
    """Whether something is wrong with the run, be it that no finding names it yet."""
    return bool(row["named_by"]) or row["kind"] not in ("", "healthy")


def exits_with_0(row: Row) -> bool:
    """Whether the doctor has nothing above info."""
    return all(severity == "info" for _, severity, *_ in row["findings"])


def is_misled(row: Row) -> bool:
    """Whether the first finding, above info, claims another cause."""
    name, severity = row["findings"][0][:2] if row["findings"] else ("", "info")
    return severity != "info" and name not in (*row["named_by"], *NO_CLAIM)


def checked_source() -> list[tuple[str, str, list[str]]]:
    """(bug, the check that it breaks, the checks that fail) of every bug in the source."""
    rows = []
    for fault in SOURCE_FAULTS:
        with fault.bug():
            failed = [check.id for check in selfcheck() if not check.passed]
        rows.append((fault.name, fault.named_by[0], failed))
    return rows


def _source(rows: Sequence[tuple[str, str, list[str]]]) -> list[str]:
    """The bugs in the source, which no run is needed for."""
    first = sum(failed[:1] == [name] for _, name, failed in rows)
    return [
        "## In the source, by `flowray.doctor --selfcheck`",
        "",
        f"Bugs that only changed source can have: no run is trained. Named first: {first} of"
        f" {len(rows)}. The checks were written with these bugs in sight: each check works,"
        " and nothing is said of other bugs.",
        "",
        "| planted | check | checks that fail |",
        "|---|---|---|",
        *(f"| {bug} | {name} | {', '.join(failed) or '**none**'} |" for bug, name, failed in rows),
    ]


def page(
    every: Sequence[Row],
    source: Sequence[tuple[str, str, list[str]]],
    missing: Sequence[str],
    cost: Row | None,
) -> str:
    """The results as Markdown: a line for each planted fault, those in another recipe, the
    confusion matrix, what looks alike, the cost.
    """
    elsewhere = {fault.name for fault in HELD_OUT}
    later = {fault.name for fault in (*CALIB, *FRESH, *LATER, *LAST, *EXAMPLES, *SEEN, *ASIDE)}
    rows = [row for row in every if row["name"] not in elsewhere | later]
    planted = [row for row in rows if row["named_by"]]
    well = [row for row in rows if not row["named_by"]]
    first = [row for row in planted if row["rank"] == 1]
    text = [
        "# The doctor on planted faults",
        "",
        (
            "Made by `make doctor-matrix`. Each fault of `tests/faults.py` is planted in the same"
            " small run (one-object shapes, a DiT of"
        ),
        (
            "width 64, batch 32, 150 steps), by a recipe key or a bug in the code, and the run"
            " directory is given to the doctor, which is"
        ),
        "told nothing else. The healthy runs are of every head, three seeds each. Runs named `open`"
        " are of 300 steps on captions that leave things open.",
        "",
        (
            f"Named first: {len(first)} of {len(planted)}. Named first or second:"
            f" {sum(map(is_right, planted))} of {len(planted)}. Healthy runs with nothing above"
            f" info: {sum(map(is_right, well))} of {len(well)}."
        ),
        *([f"Not measured yet, and so not counted: {', '.join(missing)}."] if missing else []),
        "",
        (
            "| planted | named by | place | findings above info, most likely cause first (in"
            " brackets: follows from another) |"
        ),
        "|---|---|---|---|",
    ]
    text += map(_line, rows)
    text += ["", *_source(source)]
    text += ["", *_held_out([row for row in every if row["name"] in elsewhere])]
    text += [line for title, cases, why in UNSEEN for line in _unseen(title, why, cases, every)]
    text += _together(every)
    text += ["", *_calibrated(every)]
    alike = ["## What looks alike", "", *(f"- {causes}: {said}." for causes, said in ALIKE.items())]
    return "\n".join([*text, "", *_matrix(planted), "", *alike, *_cost(cost), ""])


def _line(row: Row) -> str:
    named = " or ".join(row["named_by"]) or "nothing"
    return f"| {row['name']} | {named} | {_place(row)} | {_loud(row)} |"


def _loud(row: Row) -> str:
    loud = [
        f"({name})" if by else name
        for name, severity, by, _ in row["findings"]
        if severity != "info"
    ]
    return ", ".join(loud) or "none"


def _place(row: Row) -> str:
    if is_planted(row):
        return str(row["rank"] or "**not named**")
    return "healthy" if is_right(row) else "**false alarm**"


UNSEEN: tuple[tuple[str, Sequence[Fault], str], ...] = (
    ("met in use", EXAMPLES, "What the doctor did not name when it was met."),
    (
        "the half that was seen",
        SEEN,
        "Rules were made better with these in sight. Which half a fault is in follows from a hash"
        " of its name.",
    ),
    (
        "the half set aside",
        ASIDE,
        "Looked at once, when the rules were done; what each should be called was said before, from"
        " its code (five have a name that no finding has, and so count as missed). Who joined the"
        " rules had seen the names of a dozen of them, and nothing else. After that look only"
        " false alarms were mended (half precision, small batches, odd data), none with these in"
        " sight.",
    ),
)

# Each draw was looked at once, by rules that nothing in it had been seen for.
LOOKS: tuple[tuple[str, Sequence[Fault], str, str], ...] = (
    (
        "FRESH",
        FRESH,
        "2 of 40: unlike_healthy; worse_than_zero",
        "a ratio that is positive in every healthy run and spreads over factors is held by factors"
        " above; a field that has less than half of the picture to paint is not held to have learnt"
        " it in some hundred steps",
    ),
    (
        "LATER, after that",
        LATER,
        "3 of 40: source_blind twice, condition_ignored",
        "a source is blind only where the picture does not follow it either; a caption is ignored"
        " only where the velocity does not heed it",
    ),
    ("LAST, after that", LAST, "**1 of 40**: unlike_healthy", "nothing"),
)


def _unseen(title: str, why: str, cases: Sequence[Fault], every: Sequence[Row]) -> list[str]:
    """Faults that the rules were not made for, with what is asked of them in sum."""
    names = {fault.name for fault in cases}
    rows = [row for row in every if row["name"] in names]
    planted = [row for row in rows if is_planted(row)]
    harmful = [row for row in planted if row["harms"]]
    return [
        "",
        f"## Faults that the rules were not made for: {title}",
        "",
        f"{why} Named first or second: {sum(map(is_right, planted))} of {len(planted)}; of those"
        f" that do harm {sum(map(is_right, harmful))} of {len(harmful)}, and exit with 0 on"
        f" {sum(map(exits_with_0, harmful))} of these. The first finding, above info, claims"
        f" another cause: {sum(map(is_misled, planted))} of {len(planted)}.",
        "",
        "| planted | kind | about | place | findings above info |",
        "|---|---|---|---|---|",
        *(
            f"| {row['name']} | {row['kind']}{'' if row['harms'] else ' (harmless)'} |"
            f" {', '.join(row['about'])} | {_place(row)} | {_loud(row)} |"
            for row in rows
        ),
    ]


def _together(every: Sequence[Row]) -> list[str]:
    """Both halves in one sum."""
    names = {fault.name for fault in (*SEEN, *ASIDE)}
    planted = [row for row in every if row["name"] in names and is_planted(row)]
    harmful = [row for row in planted if row["harms"]]
    kinds = {row["kind"] for row in planted}
    return [
        "",
        f"Both halves together, {len(planted)} faults of {len(kinds)} kinds: named first or second"
        f" {sum(map(is_right, planted))}; exit with 0 on {sum(map(exits_with_0, harmful))} of"
        f" {len(harmful)} that do harm; a first finding that claims another cause"
        f" {sum(map(is_misled, planted))}.",
    ]


def _calibrated(every: Sequence[Row]) -> list[str]:
    """False alarms on the healthy runs that thresholds were set by, and on those that they were
    not.
    """

    def said(cases: Sequence[Fault]) -> str:
        names = {fault.name for fault in cases}
        rows = [row for row in every if row["name"] in names]
        alarms = [row for row in rows if not is_right(row)]
        told = "; ".join(f"{row['name']}: {_loud(row)}" for row in alarms)
        return f"{len(alarms)} of {len(rows)}{f' ({told})' if told else ''}"

    return [
        "## Healthy runs not used for calibration",
        "",
        "Runs of many settings, drawn once (`tests/healthy_runs.py`): both sources, all heads,"
        " three data sets, several sizes and lengths. False alarms on those by which thresholds"
        f" were set: {said(CALIB)}. On others:",
        "",
        "| drawn | false alarms at the first look | what was mended for it | false alarms now |",
        "|---|---|---|---|",
        *(
            f"| {name} | {found} | {mended} | {said(cases)} |"
            for name, cases, found, mended in LOOKS
        ),
    ]


def _held_out(rows: Sequence[Row]) -> list[str]:
    """The faults in a recipe that no rule was made for: how many are named, and those that are
    not named first.
    """
    planted = [row for row in rows if row["named_by"]]
    first = [row for row in planted if row["rank"] == 1]
    other = [
        row for row in rows if row not in first and not (is_right(row) and not row["named_by"])
    ]
    healthy = [r for r in rows if not r["named_by"]]
    return [
        "## In a recipe that the rules were not made with",
        "",
        (
            "The thresholds were chosen with the runs above in sight. The same faults in another"
            " one, which was not looked at while choosing"
        ),
        (
            "(one thing was mended after it was: a run that halts at once is no longer said to have"
            " too low a learning rate):"
        ),
        f"`{' '.join(f'{key}={value}' for key, value in ELSEWHERE.items())}`.",
        (
            f"Named first: {len(first)} of {len(planted)}. Named first or second:"
            f" {sum(map(is_right, planted))} of {len(planted)}. The healthy run:"
            f" {'nothing above info' if all(map(is_right, healthy)) else 'a false alarm'}."
            " Those that are not named first:"
        ),
        "",
        (
            "| planted | named by | place | findings above info, most likely cause first (in"
            " brackets: follows from another) |"
        ),
        "|---|---|---|---|",
        *map(_line, other),
    ]


def _matrix(planted: Sequence[Row]) -> list[str]:
    """Planted (rows) against found (columns): the place of the finding where it is one of the
    first three.
    """
    columns = sorted({name for row in planted for name, *_ in row["findings"][:3]})
    lines = [
        "## Confusion matrix",
        "",
        "The place (1 to 3) at which each finding stands; columns: "
        + ", ".join(f"{i} {name}" for i, name in enumerate(columns, 1))
        + ".",
        "",
        "| planted | " + " | ".join(str(i) for i in range(1, len(columns) + 1)) + " |",
        "|---" * (len(columns) + 1) + "|",
    ]
    for row in planted:
        places = {name: str(place) for place, (name, *_) in enumerate(row["findings"][:3], 1)}
        lines.append(
            f"| {row['name']} | " + " | ".join(places.get(name, "") for name in columns) + " |"
        )
    return lines


def _cost(cost: Row | None) -> list[str]:
    if cost is None:
        return []
    net, wall = cost["velocity"], f"{cost['wall']:.0f} s wall"
    if cost["wall"] > 2 * cost["cpu"]:
        wall = "and no wall time to report, for the machine was busy with other work"
    return [
        "",
        "## What it costs",
        "",
        (
            "`python -m flowray.doctor RUN` on a run of the quickstart recipe's size"
            f" ({net['kind']} of width {net['width']} and depth {net['depth']}, step"
            f" {cost['step']}, 32 samples, all probes, the page and the imports included):"
            f" {cost['cpu']:.0f} s of CPU time on one thread, {wall}. It found:"
            f" {', '.join(cost['findings']) or 'nothing'}."
        ),
    ]


def _is_wanted(name: str, only: Sequence[str] | None) -> bool:
    return only is None or any(fnmatchcase(name, pattern) for pattern in only)


def main() -> None:
    """Measure what is missing and write the page."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--home", type=Path, default=DEFAULT_HOME, help="pictures, latents, runs and examinations"
    )
    parser.add_argument(
        "--only", nargs="*", metavar="NAME", help="measure these again, and no others; patterns"
    )
    parser.add_argument("--train", action="store_true", help="only train the runs that are missing")
    parser.add_argument(
        "--cost", type=Path, metavar="RUN", help="measure what the command takes on this run"
    )
    parser.add_argument("--out", type=Path, default=Path("docs/benchmarks/doctor.md"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.cost:
        measure_cost(args.cost, args.home)
    every = (
        *FAULTS,
        *HEALTHY_RUNS,
        *HELD_OUT,
        *EXAMPLES,
        *SEEN,
        *ASIDE,
        *CALIB,
        *FRESH,
        *LATER,
        *LAST,
    )
    cases = {case.name: case for case in every}
    wanted = [name for name in cases if _is_wanted(name, args.only)]
    if args.train:
        train_missing([cases[name] for name in wanted], args.home)
        return
    for name in wanted:
        seen = measure(cases[name], args.home, fresh=args.only is not None)
        row = judged(cases[name], seen)
        word = "ok" if is_right(row) else "WRONG"
        print(
            f"{name:<26} {word:<5} {seen['seconds']:5.0f} s "
            f" {[found for found, *_ in row['findings']][:4]}",
            flush=True,
        )
    known = [
        case for case in cases.values() if (args.home / "seen" / f"{case.name}.json").is_file()
    ]
    missing = [name for name in cases if name not in {case.name for case in known}]
    rows = [judged(case, measure(case, args.home, fresh=False)) for case in known]
    cost = args.home / "cost.json"
    known_cost = json.loads(cost.read_text()) if cost.is_file() else None
    args.out.write_text(page(rows, checked_source(), missing, known_cost))


if __name__ == "__main__":
    main()
