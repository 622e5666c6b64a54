"""Which of a run's checkpoints is the best, by a number of its probes."""

from __future__ import annotations

import json
from typing import Any

from flowray.config.keys import describe
from flowray.config.rounding import finite, rounded
from flowray.config.rows import read_rows
from flowray.config.writing import write_whole
from flowray.store.checkpoint import list_checkpoints, step_of
from flowray.store.run import RunDirectory

BEST = "best.json"  # in a run's checkpoints/: {step, metric, value}


def name_best(run: RunDirectory, metric: str) -> int | None:
    """Write down which checkpoint has the best probe row and return its step; None, and nothing
    written, where none has one yet. Of equal ones the earlier.

    It follows from rows and checkpoints alone, as the best so far is always among those: a resume
    and a run in the bucket come to the same.
    """
    there, key = set(map(step_of, list_checkpoints(run.checkpoints))), describe(metric)
    sign = -1 if key is not None and key.direction == "higher" else 1
    rows = [
        (sign * rounded(value), row["step"], value)
        for row in read_rows(run.probes)
        if row["step"] in there and (value := finite(row.get(metric))) is not None
    ]
    if not rows:
        return None
    _, step, value = min(rows)
    best = {"step": step, "metric": metric, "value": value}
    if _read(run) != best:
        write_whole(run.checkpoints / BEST, json.dumps(best) + "\n")
    return int(step)


def best_step(run: RunDirectory) -> int | None:
    """The step that was written down; None where none was."""
    step = _read(run).get("step")
    return step if isinstance(step, int) else None


def _read(run: RunDirectory) -> dict[str, Any]:
    try:
        found = json.loads((run.checkpoints / BEST).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
