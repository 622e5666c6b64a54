"""Conditions of rules: each gives what it found against which threshold and trivial baseline, in
words and as numbers, or None.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from flowray.config.rounding import rounded
from flowray.findings.baselines import baseline
from flowray.findings.finding import Judged
from flowray.findings.reading import Absent, Reading


@dataclass(frozen=True)
class Evidence:
    """What a condition found. judged: the numbers at fault, those that it held against a bound."""

    words: str = ""
    judged: tuple[Judged, ...] = ()


Check = Callable[[Reading], Evidence | None]
MEASURED: Mapping[str, str] = {
    "flow": "zero velocity",
    "shoot": "doing nothing",
    "teacher": "doing nothing",
    "vae": "mean colour",
}
Limit = float | Callable[[Reading], float]


def text(value: float) -> str:
    """A number in few characters: three significant digits."""
    return (
        f"{value:,.0f}"
        if 1000 <= abs(value) < 1e6
        else re.sub(r"e([+-])0+", r"e\1", f"{value:.3g}").replace("e+", "e")
    )


def above(key: str, limit: Limit, words: str = "", *, share: bool = False) -> Check:
    """The metric is above the limit.

    words: what to call it, for derived numbers whose key says little; share: write percents.
    """
    return _compare(key, limit, "above", words, share)


def below(key: str, limit: Limit, words: str = "", *, share: bool = False) -> Check:
    """The metric is below the limit."""
    return _compare(key, limit, "below", words, share)


def fact(name: str, *values: Any) -> Check:
    """The recipe or the run has one of these values; without values: it is set and not empty."""

    def check(r: Reading) -> Evidence | None:
        value = r.fact(name)
        held = value in values if values else bool(value)
        return Evidence(f"{name} {_plain(value)}") if held else None

    return check


def every(*checks: Check) -> Check:
    """All of them; a number that one of them lacks makes it silent."""

    def check(r: Reading) -> Evidence | None:
        found = [check(r) for check in checks]  # all are asked: an absent number silences the rule
        held = [one for one in found if one is not None]
        return _joined(held) if len(held) == len(found) else None

    return check


def some(*checks: Check) -> Check:
    """At least one of them; those whose numbers are absent do not count."""

    def check(r: Reading) -> Evidence | None:
        held = [found for one in checks if (found := asked(one, r)) is not None]
        return _joined(held) if held else None

    return check


def unless(check: Check) -> Check:
    """Not this, or not known; says nothing."""
    return lambda r: Evidence() if asked(check, r) is None else None


def absent(key: str) -> Check:
    """This number is not known; says nothing."""

    def check(r: Reading) -> Evidence | None:
        return None if r.has(key) else Evidence()

    return check


def quietly(check: Check) -> Check:
    """The condition without its words; its number is not at fault."""
    return lambda r: None if check(r) is None else Evidence()


def given(check: Check) -> Check:
    """The condition and its words, where its number is not what is at fault but what tells the
    fault from others.
    """
    return lambda r: None if (found := check(r)) is None else Evidence(found.words)


def also(*keys: str) -> Check:
    """Says these numbers too where they are known; never stops a rule."""

    def check(r: Reading) -> Evidence:
        found = []
        for key in keys:
            try:
                found.append(f"{key} {text(r[key])}")
            except Absent:
                continue
        return Evidence(", ".join(found))

    return check


def say(words: Callable[[Reading], str]) -> Check:
    """Adds a sentence computed from the reading; never stops a rule."""

    def check(r: Reading) -> Evidence:
        try:
            return Evidence(words(r))
        except Absent:
            return Evidence()

    return check


def limit_of(r: Reading, limit: Limit) -> float:
    """A limit as a number: some depend on the recipe."""
    return limit(r) if callable(limit) else limit


def _joined(found: Iterable[Evidence]) -> Evidence:
    held = list(found)
    words = "; ".join(one.words for one in held if one.words)
    return Evidence(words, tuple(judged for one in held for judged in one.judged))


def _compare(
    key: str, limit: Limit, side: Literal["above", "below"], words: str, share: bool
) -> Check:
    show = _percent if share else text

    def check(r: Reading) -> Evidence | None:
        (name, value, of), bound = r.find(key), limit_of(r, limit)
        got, end = rounded(value), rounded(bound)  # what is 1 by its formula may read 1.0000001
        if not (got > end if side == "above" else got < end):
            return None
        said = f"{words or key} {show(value)}, {side} {show(bound)}{_trivial(r, key)}"
        return Evidence(said, (Judged(name, value, side, bound, of),))

    return check


def _percent(value: float) -> str:
    return f"{text(100 * value)} %"


def _trivial(r: Reading, key: str) -> str:
    """What trivial predictors score: the known one, and the one measured on the same batch."""
    base, measured = baseline(key), r.get(f"trivial/{key}", math.nan)
    said = [f"{base.words}: {text(base.value)}"] if base else []
    if math.isfinite(measured) and not (base and measured == base.value):
        said.append(f"{MEASURED.get(key.split('/')[0], 'a blind source')}: {text(measured)}")
    return f" ({'; '.join(said)})" if said else ""


def asked(check: Check, r: Reading) -> Evidence | None:
    """The check, where a number that it lacks counts as not found."""
    try:
        return check(r)
    except Absent:
        return None


def _plain(value: Any) -> str:
    return text(value) if isinstance(value, float) else str(value)
