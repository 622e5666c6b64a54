"""Parameters whose best value lies at the end of what was searched, and the override with which
flowray.tune searches beyond it.
"""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from flowray.config.errors import InputError
from flowray.config.rounding import finite
from flowray.report.results import Sweep, numeric
from flowray.sweepconfig.check import base_recipe, check_trials
from flowray.sweepconfig.file import load_sweep as load_file

EDGE = 0.05  # a best value within this share of the range from its end is at the edge
REACHES = (1.0, 1 / 2, 1 / 4, 1 / 8, 1 / 16, 1 / 32)  # how far beyond, until the recipe takes it
Takes = Callable[..., bool]


@dataclass(frozen=True)
class Edge:
    """A parameter whose best value lies at the end of what was searched.

    widen: the override that widens the range.
    """

    key: str
    words: str
    widen: str

    @property
    def typed(self) -> str:
        """The override as a shell takes it."""
        return shlex.quote(self.widen)


def edges(sweep: Sweep) -> list[Edge]:
    """Parameters whose best value is at the end of their range, or the least or greatest of at
    least three numbers.

    Only those that can be widened: where the recipe takes nothing beyond the end, the best value is
    where it can be.
    """
    best, space = sweep.best, sweep.settings.get("parameters")
    if best is None or not isinstance(space, dict):
        return []
    takes = _taker(sweep)
    found = [
        _edge(key, spec, finite(best.params.get(key)), takes)
        for key, spec in space.items()
        if isinstance(spec, dict)
    ]
    return [edge for edge in found if edge is not None]


def wider_command(sweep: Sweep, found: Sequence[Edge]) -> str:
    """The command that searches on beyond all edges, from the trials that there are; '' where
    there is none that flowray.tune takes.
    """
    settings = sweep.settings
    overrides = [f"name={sweep.name}-wider", *(edge.widen for edge in found)]
    if settings.get("method") != "grid" and settings.get("task") != "sample":
        overrides.append(f"warm_start={json.dumps([str(sweep.path)])}")
        overrides += ["points=[]"] if settings.get("points") else []
    if not found or not _taker(sweep)(*overrides):
        return ""
    return f"python -m flowray.tune {shlex.join([str(sweep.path / 'sweep.yaml'), *overrides])}"


def _taker(sweep: Sweep) -> Takes:
    """Whether flowray.tune takes the sweep with overrides.

    Where it no longer takes it as it stands (its base is gone), any will do.
    """

    def takes(*overrides: str) -> bool:
        try:
            made = load_file(str(sweep.path / "sweep.yaml"), overrides)
            check_trials(made, base_recipe(made))
        except InputError:
            return False
        return True

    once = cache(takes)
    return lambda *overrides: not once() or takes(*overrides)


def _edge(key: str, spec: Mapping[str, Any], value: float | None, takes: Takes) -> Edge | None:
    if value is None:
        return None
    if isinstance(values := spec.get("values"), list) and numeric(values) and len(set(values)) > 2:
        return _edge_of_values(key, sorted(set(values)), value, takes)
    low, high = finite(spec.get("min")), finite(spec.get("max"))
    if low is None or high is None or low >= high:
        return None
    kind = str(spec.get("distribution", ""))
    log = "log" in kind and low > 0 and value > 0
    q = (
        1.0
        if kind == "int_uniform"
        else (finite(spec.get("q")) or 1.0)
        if kind.startswith("q_")
        else 0.0
    )
    # the greatest that is drawn
    last = low + q * math.floor((high - low) / q + 1e-9) if q and not log else high
    place = math.log(value / low) / math.log(last / low) if log else (value - low) / (last - low)
    place = round(place, 9)  # 0.15 of 0.1 to 1.1 is at 0.05, and at 0.04999999999999999
    if EDGE <= place <= 1 - EDGE or (place < EDGE and low == 0):
        return None
    side, bound, away = (
        ("lower", "min", (last - low) / -2) if place < EDGE else ("upper", "max", (last - low) / 2)
    )
    for end in _ends_beyond(low if away < 0 else last, away, log=log, q=q):
        widen = f"parameters.{key}.{bound}={end}"
        if takes(widen):
            words = (
                f"{key}: the best value {value:.3g} is at the {side} edge of the range {low:g} to"
                f" {high:g}: widen it"
            )
            return Edge(key, words, widen)
    return None


def _ends_beyond(old: float, away: float, *, log: bool, q: float) -> list[str]:
    """Ends beyond the old one, the farthest first: three times it on a log range, `away` from it
    on an even one; in whole steps of q.
    """
    if log:
        found = [old * 3 ** math.copysign(reach, away) for reach in REACHES]
    else:
        found = [old + away * reach for reach in REACHES]
    if q:
        found = [old + math.copysign(q, away) * max(1, round(abs(end - old) / q)) for end in found]
    elif found[0] <= 0 < old:  # where only numbers above 0 are allowed
        found.insert(1, old / 2)
    ends = [end if q else _rounded(old, end) for end in found]
    return list(
        dict.fromkeys(f"{round(end)}" if end == round(end) else f"{end:.12g}" for end in ends)
    )


def _rounded(old: float, end: float) -> float:
    """With two digits, or as many as it takes not to come back."""
    rounded = (float(f"{end:.{digits}g}") for digits in range(2, 17))
    return next(
        (x for x in rounded if (x - old) * (end - old) > 0 and abs(x - end) <= abs(end - old) / 2),
        end,
    )


def _edge_of_values(key: str, ordered: Sequence[float], value: float, takes: Takes) -> Edge | None:
    # 0 is off, not an edge
    if value not in (ordered[0], ordered[-1]) or (value == 0 == ordered[0]):
        return None
    least = value == ordered[0]
    side, step = (
        ("least", ordered[0] - ordered[1]) if least else ("greatest", ordered[-1] - ordered[-2])
    )
    whole = all(isinstance(v, int) for v in ordered)
    for reach in REACHES:
        beyond = value + step * reach
        if least and beyond <= 0 < value:
            beyond = value / 2
        beyond = round(beyond) if whole or beyond == round(beyond) else float(f"{beyond:.6g}")
        wider = json.dumps(sorted([*ordered, beyond]), separators=(",", ":"))
        widen = f"parameters.{key}.values={wider}"
        if beyond not in ordered and takes(widen):
            words = (
                f"{key}: the best value {value:g} is the {side} of"
                f" {', '.join(f'{v:g}' for v in ordered)}: widen it"
            )
            return Edge(key, words, widen)
    return None
