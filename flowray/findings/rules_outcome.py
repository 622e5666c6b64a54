"""Findings about what came out: the condition and the semantic losses, the field, solving and
sampling, structure and budget.
"""

from __future__ import annotations

from flowray.findings.checks import (
    Evidence,
    above,
    absent,
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
from flowray.findings.consequences import ANSWERED, OPEN, PLATEAU, READS_CAPTION, SKILL_FLOOR, YOUNG
from flowray.findings.finding import Judged
from flowray.findings.reading import Absent, Reading
from flowray.findings.rule import Rule
from flowray.findings.rules_optimiser import EMA_STILL

# at rest they hold the others' gradient, so they point against it
# the caption reaches the picture beside the source
FOLLOWS = every(READS_CAPTION, above("shoot/cond_gain", 0.02))
REGULARISERS = {"kl", "tv", "anchor"}


def _opposed(r: Reading) -> Evidence | None:
    """Pairs of losses that pull against each other, both with a share that counts."""
    pairs = [key for key in r.metrics if key.startswith("grad/cos_")] or [
        key for row in r.history[-1:] for key in row if "grad/cos_" in key
    ]
    if not pairs:
        raise Absent("grad/cos_*")
    said, judged = [], []
    for key in pairs:
        first, second = key.removeprefix("grad/cos_").split("_", 1)
        if {first, second} & REGULARISERS:
            continue
        shares = [
            1.0 if name == "flow" else r.get(f"share/{name}", 1.0) for name in (first, second)
        ]
        if (cosine := r.get(key, 0.0)) < -0.5 and min(shares) > 0.1 and max(shares) < 10:
            said.append(f"{key} {text(cosine)}, below -0.5 (unrelated: 0)")
            judged.append(Judged(key, cosine, "below", -0.5))
    return Evidence("; ".join(said), tuple(judged)) if said else None


def _standing_still(r: Reading) -> str:
    if r.has("trivial/shoot/mse"):
        return f"standing still scores {text(r['trivial/shoot/mse'])}"
    return (
        f"standing still likely scores {text(r['shoot/nothing'])} (estimated as Var(z0) + Var(z1),"
        " 1 where it was not measured)"
    )


def _gain_words(r: Reading) -> str:
    """What multiplying the velocity would do to its error: the least-squares gain and the median
    of ||v*|| / ||u||.
    """
    none, best, median = r["gain/nmse_none"], r["gain/nmse_ls"], r["gain/nmse_median"]
    return (
        f"gain {text(r['gain/median'])} (the median ||v*||/||u||) takes flow/nmse from"
        f" {text(none)} to {text(median)}; the best gain {text(r['gain/best'])} to {text(best)}"
    )


def _has_dino(r: Reading) -> bool:
    return "dino" in (r.facts.get("loss_weights") or {})


OUTCOME: tuple[Rule, ...] = (
    # the condition
    Rule(
        "condition_ignored",
        "bad",
        some(
            every(
                unless(FOLLOWS),
                below("text/nats", 1e-3, "what mu tells of the prompt, nats:"),
                also("text/snr", "text/cos_mu", "mu/rms"),
            ),
            every(
                unless(FOLLOWS),
                unless(YOUNG),
                below("text/nats", 3.0, "what mu tells of the prompt, nats:"),
                also("text/snr", "text/cos_mu", "mu/rms"),
            ),
            every(
                unless(YOUNG),
                # a network that heeds its caption and gains nothing by it yet is not deaf to it
                some(absent("input/caption/matters"), below("input/caption/matters", 0.02)),
                below("shoot/cond_gain", 0.02),
                below("flow/cond_gain_cos", 0.002),
            ),
        ),
        "the caption does not reach the picture: mu is the same for every prompt, or the field does"
        " not follow it",
        "loss.clip.weight=0.3 gets the caption into z0 early; check the prompt template and that"
        " text.* and head.* train",
        ("clip_weak", "dino_weak", "worse_than_nothing", "text_unproven"),
    ),
    Rule(
        "guidance_without_null",
        "bad",
        every(
            above("guidance_scale", 1.0, "sample.guidance_scale"),
            below("null_probability", 1e-6, "flow.null_probability"),
        ),
        "pictures are guided by an unconditional field that was never trained",
        "sample.guidance_scale=1 for this run; flow.null_probability=0.1 to train one that can be"
        " guided",
        ("worse_than_nothing",),
    ),
    # the semantic losses
    Rule(
        "clip_weak",
        "warn",
        some(
            every(
                below("grad/clip_of_total", 0.01),
                above("loss/clip", lambda r: 0.15 * r["clip/chance"]),
            ),
            every(
                unless(YOUNG),
                some(
                    above(
                        "loss/clip",
                        lambda r: 0.9 * r["clip/chance"],
                        "loss/clip, of which nothing learnt is ln(batch):",
                    ),
                    every(
                        below("grad/clip_of_total", 0.05),
                        above("loss/clip", lambda r: 0.15 * r["clip/chance"]),
                    ),
                    every(
                        below("clip/cond_gain", 0.05, "loss/clip with captions swapped minus own:"),
                        above("loss/clip", 0.05),
                    ),
                ),
            ),
        ),
        "the contrastive loss teaches nothing: its gradient is too weak, or its temperature too"
        " high",
        "loss.clip.weight=2 loss.clip.temperature=0.07",
    ),
    Rule(
        "clip_saturated",
        "warn",
        every(
            given(below("loss/clip", lambda r: 0.02 * r["clip/chance"], "loss/clip")),
            some(below("grad/clip_of_total", 0.02), above("clip/scale", 98.0, "logit scale")),
        ),
        "the contrastive loss is saturated: every pair of the batch is told apart with ease and the"
        " gradient is gone",
        "loss.clip.max_scale=30, or a larger train.batch_size",
    ),
    Rule(
        "dino_weak",
        "warn",
        some(
            below("grad/dino_of_total", 0.01),
            every(
                unless(YOUNG),
                some(
                    below("grad/dino_of_total", 0.05),
                    every(below("share/dino", 0.05), also("loss/dino")),
                    every(
                        above(
                            "ent/teacher",
                            lambda r: 0.99 * r["ent/chance"],
                            "the teacher's entropy, of which uniform is",
                        ),
                        also("ent/student"),
                    ),
                ),
            ),
        ),
        "DINO's supervision is weak: its gradient should be 0.2-0.5 of the flow's and above"
        " 5-10 % of the total",
        lambda r: (
            f"loss.dino.weight={text(4 * r.fact('loss_weights')['dino'])}"
            if _has_dino(r)
            else "loss.dino.weight=2, and twice again"
        ),
    ),
    Rule(
        "dino_saturated",
        "warn",
        some(
            below("ent/teacher", 0.1),
            every(below("ent/student", 0.1), below("grad/dino_of_total", 0.1)),
        ),
        "DINO's targets or outputs are too sharp: entropy near 0, so the student saturates early"
        " and its gradient is gone",
        "loss.dino.teacher_temperature=0.07 loss.dino.student_temperature=0.2 (twice what they"
        " are)",
        ("dino_weak",),
    ),
    Rule(
        "losses_opposed",
        "warn",
        _opposed,
        "the gradients of two losses point against each other: what one step wins for the one it"
        " loses for the other",
        "'loss.balance={kind: pcgrad}', or the weight of the one that may yield",
    ),
    Rule(
        "flow_drowned",
        "warn",
        below("grad/flow_of_total", 0.1, "the flow loss's share of the gradient"),
        "the flow loss is drowned by the other losses (raise its weight where that lasts)",
        "loss.flow.weight=4, or 'loss.balance={kind: shares}'",
        ("worse_than_nothing", "field_weak"),
    ),
    # the field
    Rule(
        "worse_than_zero",
        "bad",
        every(unless(ANSWERED), above("flow/nmse", 0.98), also("flow/cos", "flow/speed_ratio")),
        "the velocity field is not learnt: it explains the target no better than predicting zero"
        " does",
        "find the cause above, if there is one; else python -m flowray.doctor overfit RECIPE tells"
        " whether the model can learn at all",
        (
            "worse_than_nothing",
            "gain_would_hurt",
            ("velocity_too_large", below("flow/cos", 0.3)),
            "field_weak",
            "plateau",
        ),
    ),
    Rule(
        "velocity_too_small",
        "bad",
        every(
            below("flow/speed_ratio", 0.5),
            given(above("flow/cos", lambda r: 1.4 * r["flow/speed_ratio"], "with flow/cos")),
            # else the size is not what is wrong
            quietly(below("gain/nmse_ls", lambda r: 0.9 * r["gain/nmse_none"])),
            say(_gain_words),
        ),
        "the velocity points the right way but is too small: something scales it down (half"
        " precision, an output gain, a wrong target scale). A gain repairs the amplitude, not the"
        " direction",
        "find what scales it: train.velocity_fp32=true, loss.norm.weight=0.01; a gain on the"
        " sampler is a crutch",
        ("worse_than_nothing", "worse_than_zero", "endpoint_grows"),
    ),
    Rule(
        "gain_would_hurt",
        "warn",
        every(
            unless(ANSWERED),
            unless(YOUNG),
            below("flow/speed_ratio", 0.5),
            below("flow/cos", lambda r: 1.4 * r["flow/speed_ratio"], "with flow/cos"),
            above(
                "gain/nmse_median", lambda r: r["gain/nmse_none"], "flow/nmse after the median gain"
            ),
            say(_gain_words),
        ),
        "the velocity is small because its direction is not learnt: least squares shrinks what it"
        " cannot predict, so a gain adds error",
        "no gain at sampling; train the direction first (flow/cos)",
    ),
    Rule(
        "velocity_too_large",
        "bad",
        every(above("flow/speed_ratio", 2.0), say(_gain_words)),
        "the velocity is too large: a scale is missing or applied twice between network and path",
        "find what scales it; loss.norm.weight=0.01 punishes wrong speeds",
        ("worse_than_nothing", ("worse_than_zero", above("flow/cos", 0.3)), "endpoint_grows"),
    ),
    Rule(
        "field_weak",
        "warn",
        every(
            unless(ANSWERED),
            unless(YOUNG),
            below("flow/cos", 0.5),
            quietly(below("flow/nmse", 0.98)),
        ),
        "the field's direction is weak (0.5 and more is learnt)",
        "longer training: train.steps=N, a wider velocity network, or another lr; python -m"
        " flowray.doctor overfit RECIPE first",
        ("worse_than_nothing", "gain_would_hurt"),
    ),
    Rule(
        "half_precision_velocity",
        "warn",
        every(
            unless(fact("precision", "fp32")),
            unless(fact("velocity_fp32")),
            below(
                "variant/bf16_cos",
                lambda r: r["variant/fp32_cos"] - 0.02,
                "flow/cos of the velocity network in bf16; in fp32, minus 0.02:",
            ),
        ),
        "the velocity network loses direction or amplitude in half precision",
        "train.velocity_fp32=true",
        ("velocity_too_small",),
    ),
    # solving and sampling
    # Of solvers of one's own, and of other code's curves; flowray's own keep fp32, which
    # `flowray.doctor --selfcheck` holds.
    Rule(
        "half_precision_solver",
        "warn",
        some(
            *(
                every(
                    above(
                        f"{curve}/rounding",
                        1e-4,
                        f"the true field, {words}, 100 steps: error over the size of the state",
                    ),
                    above(f"{curve}/growth", 3.0, "times the error of the fewest steps"),
                )
                for curve, words in (
                    ("teacher_native", "in the sampler's dtype"),
                    ("teacher", "integrated"),
                )
            ),
            below("sampler/bits", 20, "bits of the solver's state"),
        ),
        "the solver adds up its steps in half precision: each step's rounding stays, so more steps"
        " make it worse. A curve that grows with N is no proof that the schedule is right",
        "keep the solver's state in fp32 (flow/solver.py does, whatever the model's dtype)",
        ("sampler_mismatch", "seam_steps", "seam_start"),
    ),
    Rule(
        "ema_never_updated",
        "bad",
        some(
            every(
                below(
                    "ema/moved",
                    0.2,
                    "the EMA has moved from the start, over what the weights have:",
                ),
                given(above("moved/velocity", 0.01)),
            ),
            every(
                above(
                    "ema/flow/nmse",
                    lambda r: 1.5 * r["flow/nmse"] + 0.1,
                    "flow/nmse of the EMA weights",
                ),
                above("ema/delta_relative", 0.2, "EMA minus raw weights, relative"),
            ),
            below("optim/replay/ema", EMA_STILL, "in a step made again, its way over its decay's:"),
        ),
        "the EMA weights were not updated (or are far too slow for this run), and pictures are"
        " drawn from them",
        "sample.weights=raw shows the run as it is; train.ema=0.99 for short runs",
        ("sampler_mismatch", "worse_than_nothing"),
    ),
    Rule(
        "raw_sampled",
        "warn",
        some(
            every(
                fact("weights_sampled", "raw"),
                also("shoot/nmse", "ema/shoot/nmse"),
                unless(above("ema/shoot/nmse", lambda r: 1.05 * r["shoot/nmse"])),
            ),
            every(
                quietly(fact("weights_sampled", "ema")),
                above(
                    "sampler/strip_psnr_raw",
                    lambda r: r["sampler/strip_psnr_ema"] + 6,
                    "written samples agree with the raw weights, dB; with the EMA's, plus 6:",
                ),
            ),
        ),
        "pictures are drawn from the raw weights, which are noisier than their average, the EMA",
        "sample.weights=ema",
        ("sampler_mismatch",),
    ),
    # Of heads and velocity networks of one's own that draw, or depend on the rest of the batch;
    # flowray's own sampling is held by `flowray.doctor --selfcheck`.
    Rule(
        "sampler_mismatch",
        "bad",
        some(
            above(
                "sampler/gap", 0.01, "sampler against the probes' own integration, over Var(z1):"
            ),
            below(
                "sampler/psnr",
                40.0,
                "pictures of the sampler against integrating and decoding, dB:",
            ),
        ),
        "sampling does not integrate and decode what was trained: sign, time, step, scale or"
        " weights differ",
        "python -m flowray.doctor --selfcheck holds changed source against theory; a head"
        " or velocity network of your own must answer alike in eval mode, whatever is in the batch",
        ("worse_than_nothing",),
    ),
    Rule(
        "too_few_steps",
        "warn",
        every(
            above("sampler/coarse", 0.05, "latents of twice the steps differ by, over Var(z1):"),
            also("sample_steps"),
        ),
        "the sampler takes too few steps: its pictures are not where the field leads",
        lambda r: f"sample.steps={round(4 * r.get('sample_steps', 12))}",
        ("worse_than_nothing",),
    ),
    Rule(
        "endpoint_grows",
        "warn",
        every(
            above("endpoint/falls_euler", 1.3, "endpoint error at 64 steps over that at 8"),
            also("flow/endpt_rmse@8", "flow/endpt_rmse@64"),
        ),
        "the end point gets worse with more steps: what is integrated is not what was trained",
        "check that the solver adds v dt of the trained v*, with no extra factor",
    ),
    Rule(
        "worse_than_nothing",
        "bad",
        every(
            below("shoot/skill", SKILL_FLOOR),
            # a drawn picture has twice the squared error of a blur, and is no worse
            unless(every(OPEN, below("shoot/energy", lambda r: r["trivial/shoot/energy"]))),
            also("shoot/mse"),
            say(_standing_still),
        ),
        "integrating the field ends further from the picture than standing still at the text"
        " latent",
        "the field or the source is at fault; no solver setting repairs it",
    ),
    # structure, budget
    Rule(
        "no_spatial_structure",
        "warn",
        every(fact("head", "pooled"), PLATEAU, unless(below("train/nmse", 0.3))),
        "the pooled head makes z0 from one global vector, with no place for each part of the"
        " picture: colours are learnt, shapes are not",
        "'model.head={kind: grid}' (queries per cell), or 'model.head={kind: conv}' for the least"
        " change",
    ),
    Rule(
        "plateau",
        "warn",
        every(PLATEAU, unless(fact("head", "pooled"))),
        "the flow loss no longer falls and is still high",
        "optim.lr=1e-3 or a restart, another flow.time, or more capacity; see grad/* and step/* for"
        " what holds it",
    ),
    Rule(
        "text_unproven",
        "info",
        every(
            given(below("text/cos", 0.9, "cosine of drawn z0 over prompts")),
            some(absent("text/snr"), below("text/snr", 0.1)),
        ),
        "a low cosine of drawn latents is no evidence that the text arrives: noise alone gives it"
        " where mu is near 0",
        "look at text/cos_mu and text/snr instead",
    ),
    Rule(
        "time_embedding_loud",
        "info",
        above("time/embed_ratio", 20.0, "norm of the time embedding over the tokens'"),
        "the time embedding is much larger than what it is added to and may drown it",
        "model.velocity.time.bound=layer_norm",
    ),
    Rule(
        "undertrained",
        "info",
        some(
            # right pictures, drawn at random, are off by twice what the caption leaves open
            above("shoot/nmse", lambda r: max(0.6, 2 * r.get("data/left_open", 0.0))),
            above(
                "history/fall", 0.05, "over its last quarter loss/flow still fell by", share=True
            ),
        ),
        "nothing is wrong with the run; it has not seen enough yet",
        lambda r: f"train.steps={round(4 * r['steps'])}" if r.has("steps") else "more train.steps",
        last=True,
    ),
)
