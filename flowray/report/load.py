"""Reads a run or a sweep directory into plain records; the files alone are the interface.

Whatever a killed or failed trial left behind is readable: a missing file is empty, a half-written
last row is dropped.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml

from flowray.config.dotted import dotted
from flowray.config.errors import InputError
from flowray.config.partial import parse_part
from flowray.config.ranking import ranked
from flowray.config.rounding import finite
from flowray.config.rows import Row, parse_rows
from flowray.config.scale import OLDER_UNIT, older_unit
from flowray.report.goodput import spent
from flowray.report.results import Metric, Run, Strip, Sweep, Trial, scales_of

# ten times as fast where it was built: a sweep has a config a trial
_Loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


def _rows(path: Path) -> tuple[list[Row], list[str]]:
    """Rows of a JSON lines file, and a note for unreadable lines other than the last (a killed
    writer truncates that one).
    """
    rows, bad = parse_rows(_text(path))
    notes = (
        [
            f"{path.parent.name}/{path.name}: skipped {len(bad)} unreadable line(s), the first is"
            f" line {bad[0]}"
        ]
        if bad
        else []
    )
    return rows, notes


def is_sweep(path: Path) -> bool:
    return (path / "sweep.yaml").is_file()


def is_run(path: Path) -> bool:
    return (path / "config.yaml").is_file() or (path / "metrics.jsonl").is_file()


def load_run(path: Path) -> Run:
    """Read a run directory; whatever is missing is empty."""
    metrics, notes = _rows(path / "metrics.jsonl")
    probes, more = _rows(path / "probes.jsonl")
    strips = [
        Strip(int(found[1]), file)
        for file in sorted((path / "samples").glob("step_*.png"))
        if (found := re.fullmatch(r"step_(\d+)\.png", file.name))
    ]
    prompts = [line.strip() for line in _text(path / "samples" / "prompts.txt").splitlines()]
    visits, _ = _rows(path / "findings.jsonl")
    config = _text(path / "config.yaml")
    return Run(
        path=path,
        header=_comment_header(config),
        config=_config(config),
        card=tuple(_sections(_text(path / "card.md"))),
        metrics=tuple(metrics),
        probes=tuple(probes),
        strips=tuple(sorted(strips, key=lambda strip: strip.step)),
        prompts=tuple(prompts),
        findings=tuple(visits[-1].get("findings") or ()) if visits else None,
        visited=visits[-1].get("step", 0) if visits else -1,
        notes=tuple(
            notes
            + more
            + _older(probes)
            + _part(_config(config))
            + _left_out(path / "bad_samples.jsonl")
            + _skipped(path / "skipped_steps.jsonl")
            + _gaps(path / "gaps.jsonl")
        ),
        spent=spent(_rows(path / "times.jsonl")[0]),
    )


def _older(probes: list[Row]) -> list[str]:
    """A line where rows have errors in the unit of older versions."""
    steps = [row.get("step") for row in probes if any(older_unit(key, row) for key in row)]
    upto = f" up to step {steps[-1]}" if steps and len(steps) < len(probes) else ""
    return [f"probes.jsonl: shoot/nmse and shoot/cond_gain{upto} {OLDER_UNIT}"] if steps else []


def _part(config: Mapping[str, Any]) -> list[str]:
    """A line where a run was trained on a part of its shards alone."""
    named = config.get("data.partial")
    try:
        part = parse_part(named) if isinstance(named, str) else None
    except ValueError:
        part = None
    return [] if part is None else [f"config.yaml: {part.told}: data.partial={part}"]


def _left_out(file: Path) -> list[str]:
    """A line a split that says how many of its samples the run was trained without, and why."""
    rows, notes = _rows(file)
    splits: dict[str, Counter[str]] = {}
    for row in rows:
        splits.setdefault(str(row.get("split")), Counter())[str(row.get("cause"))] += 1
    for split, causes in splits.items():
        why = ", ".join(f"{cause} x{count}" for cause, count in causes.most_common())
        notes.append(f"{file.name}: {causes.total()} {split} samples left out: {why}")
    return notes


def _skipped(file: Path) -> list[str]:
    """The steps that did not reach the weights, and where the run went back to a checkpoint."""
    rows, notes = _rows(file)
    if rows:
        steps = ", ".join(str(row.get("step")) for row in rows[:10]) + ", ..." * (len(rows) > 10)
        notes.append(f"{file.name}: {len(rows)} steps skipped as not finite: {steps}")
    notes += [
        f"{file.name}: after step {row.get('step')} the weights went back to step {back}"
        for row in rows
        if (back := row.get("rolled_back_to")) is not None
    ]
    return notes


def _gaps(file: Path) -> list[str]:
    """A line for each kind of probe or picture that failed while the run trained."""
    rows, notes = _rows(file)
    kinds: dict[str, list[Row]] = {}
    for row in rows:
        kinds.setdefault(str(row.get("what")), []).append(row)
    for what, failed in kinds.items():
        steps = ", ".join(str(row.get("step")) for row in failed[-3:])
        steps = (
            f"{len(failed)} times, last at steps {steps}" if len(failed) > 1 else f"step {steps}"
        )
        notes.append(f"{file.name}: {what} failed ({steps}): {failed[-1].get('why')}")
    return notes


def load_sweep(path: Path) -> Sweep:
    """Read a sweep directory and its trials' run directories, best first.

    Raises InputError when sweep.yaml cannot be read or names no metric.
    """
    settings = _sweep_yaml(path / "sweep.yaml")
    metrics = _metrics(path / "sweep.yaml", settings)
    rows, notes = _rows(path / "trials.jsonl")
    trials = [_trial(path, row) for row in rows if isinstance(row.get("trial"), int)]
    name = settings.get("name") or path.resolve().name
    # of samples left out every trial says the same
    more = list(dict.fromkeys(note for trial in trials for note in trial.run.notes))
    scales = scales_of(trials, metrics)
    ordered = ranked(trials, metrics[0])
    if len(scales) > 1:  # by scale, then as they were drawn
        place = {
            number: index for index, numbers in enumerate(scales.values()) for number in numbers
        }
        ordered = sorted(
            trials, key=lambda trial: (place.get(trial.number, len(scales)), trial.number)
        )
    return Sweep(path, str(name), settings, metrics, tuple(ordered), scales, tuple(notes + more))


def _trial(sweep: Path, row: Row) -> Trial:
    number, params, metrics = int(row["trial"]), row.get("params"), row.get("metrics")
    return Trial(
        number=number,
        params=params if isinstance(params, dict) else {},
        status="waiting" if row.get("waits") else row.get("status") or "running",
        last_step=int(row.get("last_step") or 0),
        budget_steps=int(row.get("budget_steps") or 0),
        stopped_by=str(row.get("stopped_by") or ""),
        metrics=metrics if isinstance(metrics, dict) else {},
        seconds=finite(row.get("seconds")) or 0.0,
        error=str(row.get("error") or ""),
        repeats=tuple(repeat for repeat in row.get("repeats") or () if isinstance(repeat, dict)),
        run=load_run(sweep / str(number)),
        stop_kind=row.get("stop_kind"),
        stop_rule=row.get("stop_rule"),
    )


def _sweep_yaml(path: Path) -> dict[str, Any]:
    try:
        settings = yaml.load(path.read_text("utf-8"), Loader=_Loader)
    except OSError as error:
        raise InputError(
            f"{path}: cannot be read ({error.strerror}); give a folder that flowray.tune wrote"
        ) from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        raise InputError(
            f"{path}{line}: not valid YAML; restore the file that flowray.tune wrote"
        ) from error
    if not isinstance(settings, dict):
        raise InputError(
            f"{path}: want a mapping with the key metric, got {type(settings).__name__}"
        )
    return settings


def _metrics(path: Path, settings: Mapping[str, Any]) -> tuple[Metric, ...]:
    """The metrics of a sweep, `{name, goal}` or a list of them, and those under more_metrics."""
    first = settings.get("metric")
    found = [
        *(first if isinstance(first, list) and first else [first]),
        *(settings.get("more_metrics") or []),
    ]
    return tuple(_metric(path, value) for value in found)


def _metric(path: Path, value: Any) -> Metric:
    if not isinstance(value, dict) or not isinstance(value.get("name"), str):
        raise InputError(
            f"{path}: metric: got {value!r}, want {{name: ema/shoot/nmse, goal: minimize}}"
        )
    goal = value.get("goal", "minimize")
    if goal not in ("minimize", "maximize"):
        raise InputError(f"{path}: metric.goal: got {goal!r}, want minimize or maximize")
    return Metric(value["name"], goal)


def _config(text: str) -> dict[str, Any]:
    """A recipe in YAML as dotted keys; {} where it cannot be read."""
    try:
        return dotted(yaml.load(text, Loader=_Loader))
    except yaml.YAMLError:
        return {}


def _text(path: Path) -> str:
    try:
        return path.read_text("utf-8", errors="replace")
    except OSError:
        return ""


def _comment_header(text: str) -> str:
    """The leading comment lines of a YAML file, without their hash signs."""
    lines = []
    for line in text.splitlines():
        if not line.startswith("#"):
            break
        lines.append(line.removeprefix("#").removeprefix(" "))
    return "\n".join(lines).strip("\n")


def _sections(markdown: str) -> Iterable[tuple[str, str]]:
    """(heading, text) of each part of a markdown file; empty parts are left out."""
    heading, body = "", list[str]()
    for line in [*markdown.splitlines(), "# "]:
        found = re.match(r"#+\s+(.*)|#+\s*$", line)
        if not found:
            body.append(line)
            continue
        text = "\n".join(body).strip()
        if text:
            yield heading, text
        heading, body = (found[1] or "").strip(), []
