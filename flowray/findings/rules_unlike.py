"""What is said where no rule names a cause and the run is not like healthy ones: that the cause is
not known, and which numbers to look at.
"""

from __future__ import annotations

from collections.abc import Mapping

from flowray.config.keys import describe
from flowray.findings.calibration import (
    Range,
    Unlike,
    domain,
    healthy_ranges,
    most_unlike,
    unlike_limit,
)
from flowray.findings.checks import Evidence, text
from flowray.findings.finding import Judged
from flowray.findings.reading import Absent, Reading
from flowray.findings.rule import Rule

UNITS = ("-", "cosine", "share")  # of numbers that do not grow with the size of the model or data
# gains are 1 over a speed that is small by right; seams and known answers have limits of their own
NOT_HELD = (
    "lr/",
    "weight/",
    "trivial/",
    "ema/",
    "balance/",
    "time/share",
    "gain/",
    "seam/",
    "known/",
)


def held(ranges: Mapping[str, Range]) -> list[str]:
    """Of these keys those that runs of any size have in common."""
    return [
        key
        for key in ranges
        if not key.startswith(NOT_HELD)
        and ((known := describe(key)) is None or known.unit in UNITS)
    ]


def _in_domain(r: Reading) -> bool:
    """Whether healthy runs of about this size, in fp32 as this one, were measured."""
    if r.facts.get("precision", "fp32") != "fp32":
        return False
    try:
        return all(low <= r[name] <= high for name, (low, high) in domain().items())
    except Absent:
        return False


def _said(one: Unlike) -> str:
    low, high = one.healthy.quantiles[0], one.healthy.quantiles[-1]
    return f"{one.key} {text(one.value)} (healthy runs {text(low)} to {text(high)})"


def _unlike(r: Reading) -> Evidence | None:
    """Of a run of another size nothing is said: its steps, say, lead further without a fault."""
    found = most_unlike(r, healthy_ranges(), held(healthy_ranges()))
    if len(found) < 3 or found[-1].far <= unlike_limit() or not _in_domain(r):
        return None
    judged = tuple(
        Judged(one.key, one.value, "above", one.healthy.quantiles[-1])
        if one.value > one.healthy.quantiles[-1]
        else Judged(one.key, one.value, "below", one.healthy.quantiles[0])
        for one in found
    )
    return Evidence("; ".join(map(_said, found)), judged)


UNLIKE: tuple[Rule, ...] = (
    Rule(
        "unlike_healthy",
        "warn",
        _unlike,
        "the cause is not known: no rule holds, and yet these numbers are like no healthy run's",
        "python -m flowray.doctor overfit RECIPE and python -m flowray.doctor ablations RECIPE"
        " narrow it down; of changed source python -m flowray.doctor --selfcheck",
        last=True,
    ),
)
