"""Findings of the optimiser's arithmetic: which factor makes the steps too small or too large, and
whether a step of training is the one that the recipe asks for.

Of healthy runs the arithmetic is exact: a repeated step differs from AdamW by 1e-5, the steps are
counted to the last, and weights go 0.5 to 2.7 times as far as a random walk of their rates. The
limits lie well outside.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from flowray.findings.checks import (
    Check,
    above,
    absent,
    also,
    below,
    every,
    fact,
    given,
    quietly,
    some,
    text,
    unless,
)
from flowray.findings.consequences import BAD_FIELD, NO_TEXT, PLATEAU, WEAK_KL, too_high_fix
from flowray.findings.reading import Reading
from flowray.findings.rule import Rule
from flowray.findings.rules_parts import TABLE

NETWORK, SOURCE = ("trunk", "flow_head"), ("text", "z_head")
MAIN = (*NETWORK, *SOURCE)  # without the trunk's biases, whose gradients may be next to nothing
ALL = (*MAIN, "trunk_plain")

# What follows from weights that hardly move, and from those that move too far.
SLOW = (
    *BAD_FIELD,
    *NO_TEXT,
    *(part.id for part in TABLE),
    "moves_too_little",
    "dead_head",
    "kl_crushing",
    "kl_drowned",
    "ema_never_updated",
    "flow_drowned",
    "losses_opposed",
    "latent_scale_off",
    "source_averages",
    "no_spatial_structure",
)
FAST = (
    *BAD_FIELD,
    *NO_TEXT,
    "non_finite",
    "source_collapsed",
    "logvar_saturated",
    "kl_crushing",
    "kl_drowned",
    "losses_opposed",
    "latent_scale_off",
    "flow_drowned",
    "second_moment_inflated",
    "decay_wins",
)


def of(groups: tuple[str, ...], check: Callable[[str], Check]) -> Check:
    """The check holds of one of the groups, or of some."""
    return some(*(check(group) for group in groups))


def _far(r: Reading) -> float:
    """Multiples of their initial norm that weights may have moved: steps that undo each other go
    as far as the root of their number.
    """
    return 5.0 * math.sqrt(max(1.0, r.get("step", 1000.0) / 1000))


def _lr_fix(r: Reading) -> str:
    """The lr at which a step is some 3 % of a weight; where that is not known, a warm restart at
    twice the base lr.
    """
    base = r.get("lr_peak", math.nan)
    pace = r.get("optim/pace", math.nan)
    if math.isfinite(base) and pace > 0 and pace < PACE:
        return (
            f"optim.lr={text(base * PACE / pace)} (steps of some 3 % of a weight); from scratch,"
            " 1e-4 to 3e-3"
        )
    lr = text(2 * base) if math.isfinite(base) else "5e-6"
    return (
        f"--resume optim.lr={lr} 'optim.schedule={{kind: warm_restarts, start: resume, eta_min:"
        " current}' (a restart: watch loss/flow for 3-5k steps; from scratch,"
        " optim.lr=1e-4)"
    )


def _too_high_fix(r: Reading) -> str:
    """Down to the usual step; of the group alone where its scale made it so."""
    wild = [g for g in MAIN if r.get(f"optim/rate/{g}", 0.0) > _most(g) and _scale(r, g) > 3]
    if wild and r.get("optim/pace", 0.0) > 0:
        return " ".join(f"optim.lr_scale.{group}=1" for group in wild)
    return too_high_fix(r)


def _scale(r: Reading, group: str) -> float:
    return r.get(f"optim/scale/{group}", 1.0)


def _most(group: str) -> float:
    """A group's highest rate over the size of its weights; healthy: 0.06 and 0.17."""
    return 0.4 if group in NETWORK else 1.2


PACE, EMA_STILL = 0.03, 0.2
# The rate itself is what is too low: at its peak all the way, the network could move by a fifth of
# its weights at most. Healthy: 4 and more, 1e-2 a step.
LOW_RATE = every(
    below("optim/reach_peak", 0.2, "sum over the run of the peak rate, over the weights' size:"),
    below("optim/pace", 1e-3, "the peak rate over the weights' size:"),
)
EPS_TAKES = every(
    above("optim/eps_value", 1e-7, "AdamW's eps (1e-8 is usual):"),
    of(
        MAIN,
        lambda g: below(
            f"optim/eps_unclipped/{g}", 0.5, f"of {g}'s step eps leaves (healthy 0.99), the share"
        ),
    ),
)
CLIP_TAKES = every(
    of(
        MAIN,
        lambda g: every(
            below(f"optim/eps/{g}", 0.5, f"of {g}'s step eps leaves, the share"),
            given(
                above(
                    f"optim/eps_unclipped/{g}",
                    lambda r: 1.5 * r[f"optim/eps/{g}"],
                    "without clipping",
                )
            ),
        ),
    ),
    below("optim/clip/kept", 0.1, "clipping leaves of the gradient the share"),
    also("clip_grad"),
)
TOO_FAST = some(
    of(
        MAIN,
        lambda g: above(
            f"optim/rate/{g}", _most(g), f"{g}'s highest rate over the size of its weights:"
        ),
    ),
    every(absent("optim/pace"), above("step/z_head_update_ratio_peak", 0.3)),
    above("moved/most", _far, "weights have moved, in multiples of their initial norm,"),
)
# The loss rises with a source that no KL holds, at steps of ordinary size.
RUNAWAY = every(WEAK_KL, unless(TOO_FAST))


def _stepped_otherwise(group: str) -> Check:
    return every(
        above(f"optim/replay/error/{group}", 0.02, f"{group}: off AdamW's step by the share"),
        also(f"optim/replay/size/{group}"),
    )


OPTIMISER: tuple[Rule, ...] = (
    # which factor makes the steps small
    Rule(
        "group_left_out",
        "bad",
        of(
            ALL,
            lambda g: above(
                f"optim/left_out/{g}", 0.01, f"{g}: never stepped, though it has a gradient, share"
            ),
        ),
        "parameters that train never reached the optimiser, which has no state of them",
        "every parameter of FlowModel.trainable() belongs into a group of parameter_groups"
        " (flowray/train/optim.py)",
        (*SLOW, "step_differs", "gradient_accumulates", "clip_too_tight"),
    ),
    Rule(
        "warmup_too_long",
        "bad",
        every(
            unless(below("steps", 50)),
            below(
                "optim/schedule/highest_planned", 0.5, "highest rate of the whole run / optim.lr"
            ),
            also("warmup", "steps"),
        ),
        "the warm-up takes the whole run or more, which ends before the rate is where it should be",
        lambda r: f"optim.schedule.warmup={max(1, round(r.get('steps', 1000) / 20))}",
        (*SLOW, "lr_too_low"),
    ),
    Rule(
        "schedule_spent",
        "bad",
        every(
            above(
                "optim/schedule/idle",
                0.25,
                "share of the run, to its end, at less than 1 % of the rate (cosine: 0.07)",
            ),
            also("optim/schedule/used", "optim/schedule/planned", "lr"),
        ),
        "the learning rate is already next to nothing: what the last part of the run computed"
        " never reached the weights",
        "'optim.schedule={kind: cosine, warmup: 50}' comes to 0 at train.steps, not before; lr_at"
        " in flowray/train/optim.py is its code",
        (*SLOW, "lr_too_low", "lr_not_applied", "step_differs"),
    ),
    Rule(
        "lr_not_applied",
        "bad",
        some(
            above("optim/schedule/agrees", 1.1, "logged rates of late over the recipe's:"),
            below("optim/schedule/agrees", 0.9, "logged rates of late over the recipe's:"),
        ),
        "the rate that was applied is not the one that the recipe's schedule gives",
        "set_lr and lr_at in flowray/train/optim.py, and who calls them in flowray/train/step.py",
        (*SLOW, *FAST, "lr_too_low", "lr_too_high", "step_differs", "moves_too_much"),
    ),
    Rule(
        "eps_too_large",
        "bad",
        EPS_TAKES,
        "AdamW's eps is larger than the root of the second moment it stands beside: it, and not the"
        " gradient's size, sets the step, which is too small",
        "AdamW's eps back to 1e-8 (build_optimizer in flowray/train/optim.py)",
        (*SLOW, "lr_too_low", "step_differs", "decay_wins", "clip_too_tight"),
    ),
    Rule(
        "clip_too_tight",
        "bad",
        CLIP_TAKES,
        "optim.clip_grad is so small that what it leaves of the gradient is drowned by AdamW's eps"
        " (a larger one would change nothing: AdamW divides by the gradient's size)",
        "optim.clip_grad=1",
        (*SLOW, "lr_too_low", "decay_wins"),
    ),
    Rule(
        "second_moment_inflated",
        "bad",
        of(
            NETWORK,
            lambda g: every(
                below(f"optim/gradient/{g}", 0.1, f"{g}: gradient over root of its second moment:"),
                below(f"optim/direction/{g}", 0.07, "step over its rate (healthy 0.08 to 0.8):"),
            ),
        ),
        "a spike of the gradient lies in AdamW's second moment and makes every step since too"
        " small",
        "'optim.betas=[0.9, 0.95]' forgets it in 60 steps; optim.clip_grad=1 keeps the next one"
        " out",
        (*SLOW, "decay_wins"),
    ),
    Rule(
        "decay_wins",
        "bad",
        of(
            MAIN,
            lambda g: every(
                above(f"optim/decay/{g}", 0.15, f"share of {g}'s step that is weight decay:"),
                # else there is no gradient that could build them
                given(above(f"optim/eps/{g}", 0.5, "eps leaves of it")),
                quietly(above(f"optim/direction/{g}", 1e-4)),
                also("weight_decay"),
            ),
        ),
        "weight decay shrinks the weights about as fast as the gradient builds them",
        "optim.weight_decay=0.01",
        SLOW,
    ),
    Rule(
        "gradient_accumulates",
        "bad",
        every(
            above("optim/gradient_logged", 3.0, "logged gradient norm over the one measured now:"),
            of(MAIN, lambda g: above(f"optim/snr/{g}", 0.35, f"{g}: first moment^2 over second")),
        ),
        "training's gradient is several times the batch's own and hardly changes from step to step:"
        " it is not set to zero between steps",
        "optimizer.zero_grad() before each backward pass (train_step in flowray/train/step.py)",
        (*SLOW, *FAST, "step_differs"),
    ),
    # which steps there were
    Rule(
        "optimiser_steps_twice",
        "bad",
        of(MAIN, lambda g: above(f"optim/count/{g}", 1.01, f"{g}: optimiser's steps / the run's")),
        "the optimiser makes more than one step of each gradient: the true rate is as many times as"
        " high and the moments are of one gradient",
        "one optimizer.step() a step (_update in flowray/train/step.py)",
        (*FAST, "step_differs", "moves_too_much"),
    ),
    Rule(
        "optimiser_reset",
        "warn",
        every(
            unless(fact("precision", "fp16")),  # which leaves out steps that overflow
            unless(below("step", 20)),
            of(
                MAIN,
                lambda g: below(f"optim/count/{g}", 0.99, f"{g}: optimiser's steps / the run's"),
            ),
        ),
        "the optimiser has made fewer steps than the run: its state was lost at a resume, or steps"
        " were left out",
        "--resume from a checkpoint with its optim.safetensors; without it the first steps are"
        " blind to what came before",
        ("step_differs", "moves_too_little"),
    ),
    Rule(
        "momentum_stale",
        "warn",
        every(
            unless(below("steps", 50)),
            some(
                above("optim/memory", 1.0, "steps that the first moment remembers over the run's:"),
                # a little above 0 many a run goes well
                above("optim/betas", 0.05, "beta1^2 - beta2 (usual: below 0):"),
            ),
        ),
        "AdamW's first moment remembers longer than the run, or far longer than the second: a step"
        " points where the gradient pointed long ago, and may be larger than its rate",
        "'optim.betas=[0.9, 0.95]'",
        (*SLOW, *FAST, "lr_too_high"),
    ),
    Rule(
        "step_differs",
        "bad",
        some(
            of(ALL, _stepped_otherwise),
            above("optim/replay/count", 1.01, "steps of the optimiser in one of training:"),
            below("optim/replay/count", 0.99, "steps of the optimiser in one of training:"),
            below("optim/replay/gradient_cos", 0.9, "cosine of its gradient with the losses' own:"),
            below("optim/replay/gradient", 0.8, "size of its gradient over the losses' own:"),
            above("optim/replay/gradient", 1.25, "size of its gradient over the losses' own:"),
            every(
                below("optim/replay/ema", 0.9, "the EMA's way over what its decay asks:"),
                unless(below("optim/replay/ema", EMA_STILL)),  # ema_never_updated
            ),
            above("optim/replay/ema", 1.1, "the EMA's way over what its decay asks:"),
        ),
        "a step of training, made again on a copy, is not the AdamW step that the recipe asks for",
        "train_step and _update in flowray/train/step.py, build_optimizer and Ema in"
        " flowray/train/optim.py",
        (*SLOW, *FAST, "lr_too_high"),
    ),
    Rule(
        "moves_too_little",
        "bad",
        every(
            unless(below("step", 20)),
            of(
                MAIN,
                lambda g: every(
                    below(
                        f"optim/travel_walk/{g}",
                        lambda r: 0.15 * r[f"optim/eps/{g}"],  # a gradient of nothing moves none
                        f"{g} has moved, over a random walk of its rates,",
                    ),
                    below(f"optim/moved/{g}", 0.3, "and over the size of its weights"),
                ),
            ),
        ),
        "the weights have moved far less than the applied rates make them, whatever the gradient:"
        " something takes the steps away (eps, a skipped step, weights restored)",
        "compare build_optimizer and _update (flowray/train) with those that trained the run",
        (*(name for name in SLOW if name != "moves_too_little"), "lr_too_low"),
    ),
    Rule(
        "moves_too_much",
        "bad",
        of(
            MAIN,
            lambda g: above(
                f"optim/travel_straight/{g}",
                1.5,
                f"{g} has moved, over all its rates in one direction,",
            ),
        ),
        "the weights lie further from their start than the logged rates can have taken them: they"
        " come from elsewhere, or the rates were higher than logged",
        "compare the run's lr/* with optim.lr, and its seed with that of the weights",
        FAST,
    ),
    # the rate itself
    Rule(
        "lr_too_low",
        "bad",
        some(
            every(LOW_RATE, also("lr_peak")),
            every(
                absent("optim/pace"),
                below("step/z_head_update_ratio_peak", 1e-5),
                below("step/flow_head_update_ratio_peak", 1e-5),
                also("lr_peak"),
            ),
            every(
                absent("optim/pace"),
                below("moved/most", 0.01, "weights have moved by the share"),
                some(above("train/nmse", 0.5, "training nmse"), above("flow/nmse", 0.5)),
                also("lr_peak"),
            ),
            every(
                PLATEAU,
                some(below("lr", 1e-6, "the actual lr"), below("lr_peak", 3e-6, "optim.lr")),
            ),
        ),
        "the learning rate is far too low: the weights hardly move and the loss stays on its"
        " plateau",
        _lr_fix,
        SLOW,
    ),
    Rule(
        "lr_too_high",
        "bad",
        every(
            some(
                TOO_FAST,
                every(
                    above("history/rise", 1.5, "last flow loss, and training nmse, over its best:"),
                    # steps of nothing undo nothing
                    unless(every(*(below(f"optim/rate/{g}", 5e-3) for g in NETWORK))),
                ),
            ),
            unless(LOW_RATE),
        ),
        "the learning rate is too high: a step undoes what the last ones learnt",
        _too_high_fix,
        (*FAST, ("source_inflated", unless(RUNAWAY))),
    ),
    Rule(
        "dead_head",
        "bad",
        some(
            *(
                every(
                    below(f"step/{one}_update_ratio_peak", 1e-5),
                    unless(below(f"step/{other}_update_ratio_peak", 1e-4)),
                )
                for one, other in (("z_head", "flow_head"), ("flow_head", "z_head"))
            )
        ),
        "a head does not learn: frozen, detached, outside the optimiser or with an lr of nothing",
        "optim.lr_scale.z_head=2 or optim.lr_scale.flow_head=2 (2 to 5 times), and check that"
        " its parameters reach the optimiser",
        (*NO_TEXT, *BAD_FIELD, "group_too_slow", "kl_crushing", "kl_drowned", "logvar_saturated"),
    ),
    Rule(
        "group_too_slow",
        "bad",
        every(
            unless(LOW_RATE),
            of(
                MAIN,
                lambda g: every(
                    below(f"optim/reach/{g}", 0.02, f"all of {g}'s steps over its weights' size:"),
                    below(f"optim/scale/{g}", 0.1, "its rate over optim.lr"),
                ),
            ),
        ),
        "a group's own learning rate is so low that it cannot learn in this run",
        lambda r: " ".join(
            f"optim.lr_scale.{group}=1"
            for group in MAIN
            if r.get(f"optim/reach/{group}", 1.0) < 0.02
        ),
        SLOW,
    ),
    Rule(
        "ema_off",
        "info",
        below("ema_decay", 1e-9, "train.ema"),
        "the EMA is the raw weights: pictures miss what averaging wins",
        "train.ema=0.999",
    ),
)
