"""Findings about the training itself: what the network is asked to predict, and when; the source
posterior.
"""

from __future__ import annotations

import math

from flowray.findings.checks import (
    above,
    also,
    below,
    every,
    fact,
    given,
    quietly,
    say,
    some,
    text,
    unless,
)
from flowray.findings.consequences import (
    BAD_FIELD,
    BAD_PICTURES,
    FORGOTTEN,
    NO_TEXT,
    OPEN,
    READS_CAPTION,
    STD_CEILING,
    STD_FLOOR,
    WEAK_KL,
    anchored,
    if_anchored,
    near_chance,
)
from flowray.findings.reading import Reading
from flowray.findings.rule import Rule
from flowray.findings.rules_optimiser import RUNAWAY

# shoot/diversity: below, most of what a caption leaves open is not painted; above, most is
AVERAGED, VARIED = 0.6, 0.7


def _lost_kl(r: Reading) -> str:
    grad, weight = r.facts.get("source_grad"), r.get("kl_weight", math.nan)
    if grad == "full" and weight < 0.1:
        return (
            "the flow loss reaches z0 through its target too (source_grad full) and the KL is too"
            " weak to hold the variance: it shrinks"
        )
    if grad == "path" and weight < 0.1:
        return (
            "the target is detached (source_grad path) and the KL is too weak: z0 drifts along the"
            " loss"
        )
    return "the KL does not hold the source's variance"


def _kl_fix(r: Reading) -> str:
    form = "" if r.facts.get("kl_form", "box") == "box" else "loss.kl.form=box "
    weight = max(1.0, 10 * r.get("kl_weight", 0.1))
    grad = " loss.flow.source_grad=full" if r.facts.get("source_grad") == "path" else ""
    return (
        f"{form}loss.kl.weight={text(min(weight, 40.0))}{grad} (useful range 0.01 to 40, mean over"
        " latent dims)"
    )


def _fix_time(r: Reading) -> str:
    if r.facts.get("time_kind", "uniform") == "uniform":
        return "flow.time.kind=uniform, and a uniform_floor in every stage of flow.curriculum"
    return (
        "flow.time.uniform_floor=0.2 (or flow.time.kind=uniform); sampling always starts at t = 0"
    )


TRAINING: tuple[Rule, ...] = (
    # what the network is asked to predict, and when
    Rule(
        "time_untrained",
        "bad",
        some(
            below("time/coverage_min", 0.05, "least trained tenth of [0, 1], uniform 1:"),
            every(
                above("flow/bin_worst", 1.0, "flow/nmse of the worst tenth of t"),
                above(
                    "flow/bin_worst",
                    lambda r: 4 * r["flow/bin_middle"],
                    "flow/nmse of the worst tenth",
                ),
            ),
        ),
        "part of [0, 1] was never trained, and sampling passes through all of it",
        _fix_time,
        BAD_FIELD,
    ),
    # the source posterior
    Rule(
        "logvar_saturated",
        "bad",
        some(
            every(
                above("logvar/clamped_share", 0.1, "share of log-variances at their clamp:"),
                unless(every(anchored, below("std/mean", 1.0))),
            ),
            every(above("logvar/mean", 5.5), also("std/mean")),
            every(below("logvar/mean", -5.5), also("std/mean")),
        ),
        "the log-variance sits at its clamp, where it has no gradient: it cannot come back by"
        " itself",
        lambda r: (
            "start afresh with model.posterior.logvar_min=-6 model.posterior.logvar_max=6"
            f" {_kl_fix(r)}"
        ),
        (
            ("source_collapsed", unless(WEAK_KL)),
            ("source_inflated", unless(WEAK_KL)),
            "latent_scale_off",
            *NO_TEXT,
            "worse_than_nothing",
            "kl_drowned",
        ),
    ),
    Rule(
        "source_averages",
        "bad",
        every(
            given(OPEN),
            below("source/width", 0.1, "sigma^2 over what a caption leaves open:"),
            below("shoot/diversity", AVERAGED),
            also("std/mean", "shoot/energy"),
        ),
        "the source averages over a caption's answers: z0 is their mean with too little noise to"
        " choose one of them by, so the flow paints a blur, or textures on it",
        "model.posterior.logvar_min=-0.01 model.posterior.logvar_max=0.01 (sigma 1, as wide as the"
        " data) and loss.anchor.weight=1, as in the recipe quickstart; with open bounds a"
        " larger loss.kl.weight=2 is what widens it",
        (
            "latent_scale_off",
            "kl_drowned",
            "logvar_saturated",
            ("source_collapsed", anchored),
            "worse_than_nothing",
            "field_weak",
            "gain_would_hurt",
            "plateau",
        ),
    ),
    # Beside a network that reads the caption such a source is as good as noise. A head of attention
    # layers tells captions only after some 150 steps.
    Rule(
        "source_blind",
        "bad",
        every(
            unless(READS_CAPTION),
            unless(below("step", 200)),
            below("source/separation@0", near_chance("0"), "share of z0 that tell their caption:"),
            given(some(above("shoot/diversity", VARIED), above("shoot/diversity_all", VARIED))),
            FORGOTTEN,  # a network may read codes that no neighbour tells apart
            also("shoot/energy"),
        ),
        "the source is varied and ignores its caption: its noise drowns what mu tells, and the"
        " network reads nothing else of it",
        "loss.anchor.weight=1 (mu at the caption's mean picture) with a smaller loss.kl.weight, or"
        " 'model.velocity.condition={kind: adaln}'",
        ("condition_ignored", "text_unproven", "clip_weak", "dino_weak"),
    ),
    Rule(
        "codes_merge",
        "bad",
        every(
            unless(READS_CAPTION),
            given(above("source/separation@0", 0.5)),
            some(
                *(
                    below(
                        f"source/separation@{t}",
                        near_chance(t),
                        f"share of x_t at t = {t} that tell their caption:",
                    )
                    for t in ("0.25", "0.5")
                )
            ),
            FORGOTTEN,  # a network may carry on what it read of close codes at the start
            also("mu/rms", "std/mean"),
        ),
        "the captions' codes run together on the way: z0 tells its caption and x_t soon no more,"
        " for the codes lie close beside what the pictures add; the flow forgets the caption before"
        " there is a picture",
        "model.source.amplitude=3 or loss.anchor.weight=1 (codes as far apart as the pictures), or"
        " 'model.velocity.condition={kind: adaln}'",
        ("condition_ignored", "clip_weak", "dino_weak", "worse_than_nothing", "field_weak"),
    ),
    Rule(
        "source_collapsed",
        "bad",
        every(
            below("std/mean", STD_FLOOR),
            also("kl_weight", "flow/cos", "shoot/nmse"),
            say(
                lambda r: (
                    "a high cosine is no merit here: the field only has to undo a constant"
                    if r["flow/cos"] > 0.8
                    else ""
                )
            ),
        ),
        lambda r: (
            f"the source's variance has collapsed: {_lost_kl(r)}; pictures then start from points"
            " that training never spread around"
        ),
        _kl_fix,
        (
            "worse_than_nothing",
            "latent_scale_off",
            ("logvar_saturated", WEAK_KL),
            ("source_averages", unless(anchored)),
            "clip_saturated",
            "losses_opposed",
        ),
    ),
    Rule(
        "source_inflated",
        "bad",
        every(
            some(above("std/mean", STD_CEILING), above("mu/rms", 5.0, "rms of mu")),
            also("kl_weight", "mu/rms"),
        ),
        lambda r: (
            f"the source has grown far beyond the prior: {_lost_kl(r)}; v* is then mostly minus z0"
            " and cos looks good for nothing"
        ),
        _kl_fix,
        (
            "worse_than_nothing",
            "latent_scale_off",
            ("logvar_saturated", WEAK_KL),
            "losses_opposed",
            ("lr_too_high", RUNAWAY),
        ),
    ),
    Rule(
        "kl_drowned",
        "bad",
        every(
            some(
                below("share/kl", 0.02, "weighted KL gradient over the flow's"),
                below("kl_weight", 0.05),
            ),
            some(
                every(
                    unless(fact("source_capped", True)), below("std/mean", if_anchored(0.05, 0.5))
                ),
                above("std/mean", 2.0),
                above("mu/rms", 3.0),
            ),
        ),
        "the KL is drowned by the other losses: mu and sigma go where the flow loss sends them"
        " (kl : flow should be 0.1-0.3 : 1)",
        lambda r: f"{_kl_fix(r)}; or 'loss.balance={{kind: shares}}'",
        (("logvar_saturated", WEAK_KL), "latent_scale_off"),
    ),
    Rule(
        "kl_crushing",
        "bad",
        every(
            below("text/nats", 3.0, "what mu tells of the prompt, nats:"),
            given(above("std/mean", 0.8)),
            quietly(below("std/mean", 1.25)),
            some(
                every(quietly(fact("kl_form", "box")), above("kl_weight", 60)),
                every(quietly(fact("kl_form", "gaussian")), above("kl_weight", 2)),
            ),
            also("mu/rms"),
        ),
        "the KL crushes the source onto the prior: every prompt gives the same N(0, 1)",
        "loss.kl.form=box loss.kl.weight=2 'loss.kl.schedule={kind: linear, fraction: 0.1}' (mu is"
        " free within 3 in the box form)",
        (*NO_TEXT, *BAD_PICTURES),
    ),
)
