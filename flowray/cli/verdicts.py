"""What the health checks expect of their short runs: the field notes' arrows as rules over metric and probe rows."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

Row = dict[str, Any]
Word = Literal["pass", "fail", "unclear"]

FALL = 0.2  # log 0901: the flow loss of a few samples must fall by more than this
LEARNT_COS = 0.5  # the logs' healthy flow cosine
KL_GROWTH, KL_FLOOR = 1.5, 0.05  # a steady KL: the last quarter at most 1.5x the quarter before, but for this much (per dim)
CLEAR, NONE = 0.2, 0.05  # a change of a cosine, or share of an error, that is clear; one that is none
MARGIN = 0.1  # by which share a statistic must differ between two runs to count

CHECKLIST = "pipeline checklist 2025-09-07, step 5"
LOG_0901 = "log 0901, health checks"
QUICK = "loss debugging notes, quick ablations"


@dataclass(frozen=True)
class Verdict:
    """One arrow: in which run (`arm`), what was expected, what was measured, and which note expects it."""

    arm: str
    expected: str
    verdict: Word
    measured: str
    source: str


@dataclass(frozen=True)
class Arm:
    """The rows of one short run; refused: why it could not run or did not finish, in words."""

    rows: Sequence[Row] = ()
    probes: Sequence[Row] = ()
    dims: int = 1
    refused: str = ""

    def last(self, key: str) -> float:
        """A number of the last probe, nan where there is none."""
        value = self.probes[-1].get(key) if self.probes else None
        return math.nan if value is None else float(value)

    def series(self, key: str) -> list[float]:
        """A metric over the logged steps."""
        return [float(row[key]) for row in self.rows if row.get(key) is not None]


def overfit_verdicts(arm: Arm) -> list[Verdict]:
    """A few samples learnt by heart: flow loss down by more than FALL, cosine up to LEARNT_COS, KL steady."""
    name = "overfit"
    if arm.refused or len(arm.rows) < 8:
        why = arm.refused or f"only {len(arm.rows)} logged steps; take more --steps"
        return [Verdict(name, "it trains", "fail" if arm.refused else "unclear", why, CHECKLIST)]
    flow, cos = arm.series("loss/flow"), arm.series("train/cos")
    kl = [value / arm.dims for value in arm.series("loss/kl_raw")]
    fall, quarter = 1 - _end(flow) / flow[0], max(1, len(kl) // 4)
    late, before = _mean(kl[-quarter:]), _mean(kl[-2 * quarter : -quarter])
    steady = late <= max(KL_GROWTH * before, before + KL_FLOOR)
    return [
        Verdict(
            name,
            f"loss/flow falls by more than {FALL:.0%}",
            _word(fall > FALL),
            f"{flow[0]:.3f} -> {_end(flow):.3f} ({-fall:+.0%})",
            LOG_0901,
        ),
        Verdict(
            name,
            f"train/cos rises, to {LEARNT_COS} or more",
            _word(_end(cos) > cos[0] and _end(cos) >= LEARNT_COS),
            f"{cos[0]:.3f} -> {_end(cos):.3f}",
            CHECKLIST,
        ),
        Verdict(
            name,
            f"KL steady: the last quarter at most {KL_GROWTH}x the one before",
            _word(steady),
            f"{before:.3f} -> {late:.3f} per dim",
            CHECKLIST,
        ),
    ]


def ablation_verdicts(whole: Arm, flow_only: Arm, no_kl: Arm, shuffled: Arm) -> list[Verdict]:
    """The notes' arrows, one by one. whole: the recipe as it is; the others: see flowray/cli/health.py."""
    return [*_flow_only(flow_only), *_kl_off(whole, no_kl), *_shuffled(whole, shuffled)]


def _flow_only(arm: Arm) -> list[Verdict]:
    name = "flow only"
    if arm.refused:
        return [Verdict(name, "the flow is learnt", "unclear", arm.refused, QUICK)]
    cos, nmse = arm.last("flow/cos"), arm.last("flow/nmse")
    rmse, still = arm.last("flow/endpt_rmse@32"), arm.last("trivial/flow/endpt_rmse@32")
    return [
        Verdict(name, f"flow/cos up from 0, by {CLEAR} or more", _change(cos), f"{cos:.3f}", QUICK),
        Verdict(name, f"flow/nmse down from 1, by {CLEAR:.0%} or more", _change(1 - nmse), f"{nmse:.3f}", QUICK),
        Verdict(
            name,
            f"flow/endpt_rmse@32 down from standing still, by {CLEAR:.0%} or more",
            _change(1 - rmse / still),
            f"{rmse:.3f}, standing still {still:.3f}",
            QUICK,
        ),
    ]


def _kl_off(whole: Arm, off: Arm) -> list[Verdict]:
    name, source = "KL off", QUICK
    if refused := whole.refused or off.refused:
        return [Verdict(name, "the KL is seen to work", "unclear", refused, source)]
    mu = whole.last("mu/rms"), off.last("mu/rms")
    width = abs(whole.last("std/mean") - 1), abs(off.last("std/mean") - 1)
    off_by = f"off by {width[0]:.3f} with, {width[1]:.3f} without"
    return [
        Verdict(name, "mu/rms no longer pulled to 0: larger", _larger(*mu), f"{mu[0]:.3f} with, {mu[1]:.3f} without", source),
        Verdict(name, "std/mean no longer pulled to 1: further off", _larger(*width), off_by, source),
    ]


def _shuffled(whole: Arm, shuffled: Arm) -> list[Verdict]:
    name = "captions shuffled"
    if refused := whole.refused or shuffled.refused:
        return [Verdict(name, "the condition is seen to work", "unclear", refused, QUICK)]
    verdicts = []
    for key in ("shoot/cond_gain", "flow/cond_gain_cos"):
        with_text, without = whole.last(key), shuffled.last(key)
        noise = NONE if key.startswith("shoot") else NONE / 10  # a cosine gains little: neighbouring sources are much alike
        if with_text > max(2 * abs(without), noise):
            word: Word = "pass"
        elif with_text <= max(without, 0.0):
            word = "fail"
        else:
            word = "unclear"
        verdicts.append(Verdict(name, f"{key} clearly down", word, f"{with_text:.3f} with, {without:.3f} shuffled", QUICK))
    for key in ("loss/clip", "loss/dino"):
        pair = [_end(arm.series(key)) for arm in (whole, shuffled) if arm.series(key)]
        if len(pair) == 2:
            verdicts.append(Verdict(name, f"{key} worse", _larger(*pair), f"{pair[0]:.3f} with, {pair[1]:.3f} shuffled", QUICK))
    return verdicts


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else math.nan


def _end(values: Sequence[float]) -> float:
    """Mean of the last tenth, at least three: a single batch is noise."""
    return _mean(values[-max(3, len(values) // 10) :])


def _word(good: bool) -> Word:
    return "pass" if good else "fail"


def _change(gained: float) -> Word:
    return "pass" if gained >= CLEAR else "unclear" if gained > NONE else "fail"


def _larger(before: float, after: float) -> Word:
    """Whether `after` is larger by MARGIN; smaller by as much fails."""
    if after > before * (1 + MARGIN):
        return "pass"
    return "fail" if after < before * (1 - MARGIN) else "unclear"
