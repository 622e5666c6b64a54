"""Write flowray/findings/healthy.json: what healthy runs measure.

    python tests/doctor_calibration.py SEEN.json ...

SEEN.json: examinations of healthy runs, as tests/doctor_matrix.py keeps them in HOME/seen. The
limit of `unlike_healthy` is set so that of these runs, each held against the others, at most a
fortieth is beyond it.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from flowray.findings.calibration import FILE, most_unlike, ranges_of
from flowray.findings.derived import DERIVED
from flowray.findings.reading import Reading
from flowray.findings.rules_unlike import held

FALSE_ALARMS = 1 / 40
SAID_BY_THE_RECIPE = ("trivial/", "weight/", "lr/", "time/share")
SIZES = ("step", "steps", "batch_size", "parameters")  # facts that say how large a run is


def reading(seen: dict[str, Any]) -> Reading:
    return Reading(seen["metrics"], seen["facts"], seen["history"], DERIVED)


def numbers(seen: dict[str, Any]) -> dict[str, float]:
    """What was measured, and what follows from it."""
    r = reading(seen)
    keys = [key for key in [*seen["metrics"], *DERIVED] if not key.startswith(SAID_BY_THE_RECIPE)]
    return {key: r[key] for key in keys if r.has(key)}


def limit(seen: Sequence[dict[str, Any]]) -> float:
    """See the top; half as much again, for the runs that are to come."""
    rows, thirds = [numbers(one) for one in seen], []
    for left_out, one in enumerate(seen):
        ranges = ranges_of([row for i, row in enumerate(rows) if i != left_out])
        found = most_unlike(reading(one), ranges, held(ranges))
        thirds.append(found[-1].far if len(found) == 3 else 0.0)
    thirds.sort()
    return 1.5 * thirds[-1 - int(FALSE_ALARMS * len(seen))]


def main() -> None:
    seen = [json.loads(Path(name).read_text()) for name in sys.argv[1:]]
    ranges = ranges_of([numbers(one) for one in seen])
    sizes = {name: [one["facts"][name] for one in seen if name in one["facts"]] for name in SIZES}
    kept = {
        "runs": len(seen),
        "limit": round(limit(seen), 3),
        "domain": {name: [min(found), max(found)] for name, found in sizes.items() if found},
        "ranges": {key: [one.runs, one.quantiles] for key, one in ranges.items()},
    }
    FILE.write_text(json.dumps(kept, indent=None).replace("]], ", "]],\n") + "\n")
    print(f"{len(seen)} runs, {len(ranges)} keys, limit {kept['limit']}")


if __name__ == "__main__":
    main()
