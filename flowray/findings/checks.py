"""Conditions of rules: each says in words what it found against which threshold and trivial baseline, or nothing."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from typing import Any

from flowray.findings.baselines import baseline
from flowray.findings.reading import Absent, Reading

Check = Callable[[Reading], str | None]
MEASURED: Mapping[str, str] = {"flow": "zero velocity", "shoot": "doing nothing", "teacher": "doing nothing", "vae": "mean colour"}
Limit = float | Callable[[Reading], float]


def text(value: float) -> str:
    """A number in few characters: three significant digits."""
    return f"{value:,.0f}" if 1000 <= abs(value) < 1e6 else re.sub(r"e([+-])0+", r"e\1", f"{value:.3g}").replace("e+", "e")


def above(key: str, limit: Limit, words: str = "", *, share: bool = False) -> Check:
    """The metric is above the limit. words: what to call it, for derived numbers whose key says little; share: write percents."""
    return _compare(key, limit, "above", words, share)


def below(key: str, limit: Limit, words: str = "", *, share: bool = False) -> Check:
    """The metric is below the limit."""
    return _compare(key, limit, "below", words, share)


def near(key: str, want: float, within: float, words: str = "") -> Check:
    """The metric differs from `want` by `within` at most."""

    def check(r: Reading) -> str | None:
        value = r[key]
        return f"{words or key} {text(value)}, about {text(want)}" if abs(value - want) <= within else None

    return check


def fact(name: str, *values: Any) -> Check:
    """The recipe or the run has one of these values; without values: it is set and not empty."""

    def check(r: Reading) -> str | None:
        value = r.fact(name)
        return f"{name} {_plain(value)}" if (value in values if values else bool(value)) else None

    return check


def every(*checks: Check) -> Check:
    """All of them; a number that one of them lacks makes it silent."""

    def check(r: Reading) -> str | None:
        words = [check(r) for check in checks]
        return None if any(word is None for word in words) else "; ".join(word for word in words if word)

    return check


def some(*checks: Check) -> Check:
    """At least one of them; those whose numbers are absent do not count."""

    def check(r: Reading) -> str | None:
        words = [word for one in checks if (word := _asked(one, r)) is not None]
        return "; ".join(word for word in words if word) if words else None

    return check


def unless(check: Check) -> Check:
    """Not this, or not known; says nothing."""
    return lambda r: "" if _asked(check, r) is None else None


def absent(key: str) -> Check:
    """This number is not known; says nothing."""

    def check(r: Reading) -> str | None:
        return "" if math.isnan(r.get(key, math.nan)) else None

    return check


def quietly(check: Check) -> Check:
    """The condition without its words."""
    return lambda r: None if check(r) is None else ""


def also(*keys: str) -> Check:
    """Says these numbers too where they are known; never stops a rule."""

    def check(r: Reading) -> str | None:
        found = []
        for key in keys:
            try:
                found.append(f"{key} {text(r[key])}")
            except Absent:
                continue
        return ", ".join(found)

    return check


def say(words: Callable[[Reading], str]) -> Check:
    """Adds a sentence computed from the reading; never stops a rule."""

    def check(r: Reading) -> str | None:
        try:
            return words(r)
        except Absent:
            return ""

    return check


def _compare(key: str, limit: Limit, side: str, words: str, share: bool) -> Check:
    show = _percent if share else text

    def check(r: Reading) -> str | None:
        value, bound = r[key], _limit(r, limit)
        if not (value > bound if side == "above" else value < bound):
            return None
        return f"{words or key} {show(value)}, {side} {show(bound)}{_trivial(r, key)}"

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


def _limit(r: Reading, limit: Limit) -> float:
    return limit(r) if callable(limit) else limit


def _asked(check: Check, r: Reading) -> str | None:
    try:
        return check(r)
    except Absent:
        return None


def _plain(value: Any) -> str:
    return text(value) if isinstance(value, float) else str(value)
