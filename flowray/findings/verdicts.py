"""What the health checks expect of their short runs: arrows, each a number and which way it should
go, as the field notes list them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

from flowray.config.losses import KLLossConfig
from flowray.config.rows import Row

Word = Literal["pass", "fail", "unclear", "not judged"]

FALL = 0.2  # the flow loss of a few samples must fall by more than this
LEARNT_COS = 0.5  # from here on a direction counts as learnt
# a steady KL: the last quarter at most 1.5x the quarter before, but for this much (per dim)
KL_GROWTH, KL_FLOOR = 1.5, 0.05
# a change of a cosine, or share of an error, that is clear; one that is none
CLEAR, NONE = 0.2, 0.05
MARGIN = 0.1  # by which share a statistic must differ between two runs to count

CHECKLIST = "pipeline checklist 2025-09-07, step 5"
LOG_0901 = "log 0901, health checks"
QUICK = "loss debugging notes, quick ablations"


@dataclass(frozen=True)
class Verdict:
    """One arrow: in which run (`arm`), what was expected, what was measured, and which note expects
    it.

    unclear: too little changed to say; not judged: the recipe gives the arrow no ground, `measured`
    says why.
    """

    arm: str
    expected: str
    verdict: Word
    measured: str
    source: str


@dataclass(frozen=True)
class Arm:
    """The rows of one short run; refused: why it could not run or did not finish, in words.

    prefix: `ema/` where pictures are drawn from the EMA: a few hundred steps at a constant rate
    leave the raw weights noisy.
    """

    rows: Sequence[Row] = ()
    probes: Sequence[Row] = ()
    dims: int = 1
    refused: str = ""
    prefix: str = ""

    def last(self, key: str) -> float:
        """A number of the last probe, nan where there is none."""
        row = self.probes[-1] if self.probes else {}
        value = row.get(key if key.startswith("trivial/") else f"{self.prefix}{key}")
        return math.nan if value is None else float(value)

    def series(self, key: str) -> list[float]:
        """A metric over the logged steps."""
        return [float(row[key]) for row in self.rows if row.get(key) is not None]


def overfit_verdicts(arm: Arm) -> list[Verdict]:
    """A few samples learnt by heart: flow loss down by more than FALL, cosine up to LEARNT_COS, KL
    steady.

    With loss.anchor the source starts as noise, whose flow is easy to predict, and narrows onto the
    pictures: the cosine falls from about 0.5 before it rises, for hundreds of steps, in a sound
    run. There mu must come nearer to the pictures and the velocity explain CLEAR of its target.
    """
    verdict = partial(Verdict, "overfit", source=CHECKLIST)
    if arm.refused or len(arm.rows) < 8:
        why = arm.refused or f"only {len(arm.rows)} logged steps; take more --steps"
        return [verdict("it trains", "fail" if arm.refused else "unclear", why)]
    flow, cos, anchor = arm.series("loss/flow"), arm.series("train/cos"), arm.series("loss/anchor")
    kl = [value / arm.dims for value in arm.series("loss/kl_raw")]
    fall, quarter = 1 - _end(flow) / flow[0], max(1, len(kl) // 4)
    late, before = _mean(kl[-quarter:]), _mean(kl[-2 * quarter : -quarter])
    steady = _word(late <= max(KL_GROWTH * before, before + KL_FLOOR)) if kl else "not judged"
    risen = f"{cos[0]:.3f} -> {_end(cos):.3f}"
    if anchor:
        nmse, held = _end(arm.series("train/nmse")), 1 - _end(anchor) / anchor[0]
        size = _change(1 - nmse)
        if size == "fail" and _end(cos) > NONE and abs(1 - nmse) > 1e-3:
            # it points the right way; a dead velocity is 0, or next to it whatever its direction
            size = "unclear"
        narrows = f"{risen}; loss.anchor narrows the source, and with it what is left"
        learnt = [
            verdict("train/cos rises", "not judged", narrows),
            verdict(f"train/nmse down from 1, by {CLEAR:.0%} or more", size, f"{nmse:.3f}"),
            verdict(
                f"loss/anchor falls by more than {FALL:.0%}",
                _word(held > FALL),
                f"{anchor[0]:.3f} -> {_end(anchor):.3f} ({-held:+.0%})",
            ),
        ]
    else:
        rises = _word(_end(cos) > max(cos[0], LEARNT_COS))
        learnt = [verdict(f"train/cos rises, to {LEARNT_COS} or more", rises, risen)]
    return [
        verdict(
            f"loss/flow falls by more than {FALL:.0%}",
            _word(fall > FALL),
            f"{flow[0]:.3f} -> {_end(flow):.3f} ({-fall:+.0%})",
            source=LOG_0901,
        ),
        *learnt,
        verdict(
            f"KL steady: the last quarter at most {KL_GROWTH}x the one before",
            steady,
            f"{before:.3f} -> {late:.3f} per dim" if kl else "loss.kl.weight is 0 in this recipe",
        ),
    ]


def free_mu(kl: KLLossConfig, anchor: float) -> str:
    """Why the KL does not pull mu towards 0 by a share that would show, in words; empty where it
    does.

    The notes' arrow is about the gaussian form, whose pull is the weight times mu. With
    loss.anchor, a (mu - z1)^2, the two settle at mu = E[z1] / (1 + kl / 2a) where nothing else
    acts.
    """
    if kl.form == "box":
        return "the box form leaves mu free within about 3"
    if anchor > 0 and (shrunk := kl.weight / (2 * anchor)) < MARGIN:
        return (
            f"loss.anchor holds mu at the mean picture; the KL shortens it by {100 * shrunk:.1g} %"
        )
    return ""


def ablation_verdicts(
    whole: Arm, flow_only: Arm, no_kl: Arm, shuffled: Arm, mu_is_free: str = ""
) -> list[Verdict]:
    """The notes' arrows, one by one.

    whole: the recipe as it is; the others: see flowray/cli/health.py; mu_is_free: see `free_mu`.
    """
    return [*_flow_only(flow_only), *_kl_off(whole, no_kl, mu_is_free), *_shuffled(whole, shuffled)]


def _flow_only(arm: Arm) -> list[Verdict]:
    verdict = partial(Verdict, "flow only", source=QUICK)
    if arm.refused:
        return [verdict("the flow is learnt", "unclear", arm.refused)]
    cos, nmse = arm.last("flow/cos"), arm.last("flow/nmse")
    rmse, still = arm.last("flow/endpt_rmse@32"), arm.last("trivial/flow/endpt_rmse@32")
    # Before step 1 the velocity is 0 and mu about 0: the distance of a source of the first width
    # from the pictures.
    start = math.sqrt(
        arm.last("scale/z1_norm") ** 2 / arm.dims + (arm.series("std/mean") or [1.0])[0] ** 2
    )
    nearer = _change(1 - rmse / start) if rmse < (1 - NONE) * still else "fail"
    by = f"by {CLEAR:.0%} or more"
    return [
        verdict(f"flow/cos up from 0, by {CLEAR} or more", _change(cos), f"{cos:.3f}"),
        verdict(f"flow/nmse down from 1, {by}", _change(1 - nmse), f"{nmse:.3f}"),
        verdict(
            f"flow/endpt_rmse@32 down from the start, {by}, and below standing still",
            nearer,
            f"{rmse:.3f}, at the start {start:.3f}, standing still {still:.3f}",
        ),
    ]


def _kl_off(whole: Arm, off: Arm, mu_is_free: str) -> list[Verdict]:
    verdict = partial(Verdict, "KL off", source=QUICK)
    if refused := whole.refused or off.refused:
        return [verdict("the KL is seen to work", "unclear", refused)]
    mu, std = (tuple(arm.last(key) for arm in (whole, off)) for key in ("mu/rms", "std/mean"))
    # |ln std|: a width of 0.1 is as far from 1 as one of 10, and |std - 1| cannot tell a narrow
    # source from a collapsed one
    width = (abs(math.log(max(value, 1e-12))) for value in std)
    pulled: Word = "not judged" if mu_is_free else _larger(*mu)
    why = f"; {mu_is_free}" if mu_is_free else ""
    return [
        verdict("mu/rms no longer pulled to 0: larger", pulled, f"{_pair(mu, 'without')}{why}"),
        verdict(
            "std/mean no longer pulled to 1: further off", _larger(*width), _pair(std, "without")
        ),
    ]


def _shuffled(whole: Arm, shuffled: Arm) -> list[Verdict]:
    verdict = partial(Verdict, "captions shuffled", source=QUICK)
    if refused := whole.refused or shuffled.refused:
        return [verdict("the condition is seen to work", "unclear", refused)]
    verdicts = []
    for key in ("shoot/cond_gain", "flow/cond_gain_cos"):
        with_text, without = gains = whole.last(key), shuffled.last(key)
        # a cosine gains little: neighbouring sources are much alike
        noise = NONE if key.startswith("shoot") else NONE / 10
        word: Word = "fail" if with_text <= max(without, 0.0) else "unclear"
        if with_text > max(2 * abs(without), noise):
            word = "pass"
        verdicts.append(verdict(f"{key} clearly down", word, _pair(gains, "shuffled")))
    for key in ("loss/clip", "loss/dino", "loss/anchor"):
        pair = [_end(arm.series(key)) for arm in (whole, shuffled) if arm.series(key)]
        if len(pair) == 2:
            verdicts.append(verdict(f"{key} worse", _larger(*pair), _pair(pair, "shuffled")))
    return verdicts


def _pair(values: Sequence[float], other: str) -> str:
    return f"{values[0]:.3f} with, {values[1]:.3f} {other}"


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
    """Whether `after` is larger by MARGIN; smaller by as much fails; of two next to nothing
    neither is.
    """
    if max(before, after) < NONE:
        return "unclear"
    if after > before * (1 + MARGIN):
        return "pass"
    return "fail" if after < before * (1 - MARGIN) else "unclear"
