"""The table of findings: conditions on metrics, what they mean, what to type. From upstream to downstream, causes before effects.

Thresholds are the logs' where the logs have one (DESIGN, numbers from the logs); the others lie between what healthy small runs
and runs with the fault planted show.
"""

from __future__ import annotations

import math

from flowray.findings.checks import Check, Limit, above, absent, also, below, every, fact, near, quietly, say, some, text, unless
from flowray.findings.reading import Absent, Reading
from flowray.findings.rule import Rule

# What any fault upstream of the field does to the picture at the end.
BAD_PICTURES = ("worse_than_nothing", "worse_than_zero", "field_weak", "vae_poor", "endpoint_grows")
BAD_FIELD = (
    *BAD_PICTURES,
    "velocity_too_small",
    "velocity_too_large",
    "gain_would_hurt",
    "time_code_mismatch",
    "same_batch_mismatch",
    "plateau",
)
NO_TEXT = ("condition_ignored", "text_unproven", "clip_weak", "dino_weak", "captions_shuffled")

SF_FIX = "model.autoencoder.scaling_factor=null uses the autoencoder's own factor; then encode again: python -m flowray.data encode RECIPE"
REGULARISERS = {"kl", "tv", "anchor"}  # at rest they hold the others' gradient, so they point against it
WEAK_KL = below("kl_weight", 0.1)


def _anchored(r: Reading) -> str | None:
    """mu is drawn to the mean picture: a narrow source starts where it should, and standing still is hard to beat."""
    return "" if (r.facts.get("loss_weights") or {}).get("anchor", 0) > 0 else None


def _if_anchored(limit: float, otherwise: float) -> Limit:
    return lambda r: otherwise if _anchored(r) is None else limit


def _handled(power: float) -> Check:
    """Every channel of z1, cached or in a training batch, is what it should be times its own scale to this power."""
    sides = {"fit": "cached z1 over freshly encoded z1", "batch": "the training batch's z1 over the cached latents"}
    return some(
        *(
            every(
                near(f"latent/{name}_power", power, 0.25, f"{words}: each channel's scale to the power"),
                quietly(some(below(f"latent/{name}_away", 0.15), absent(f"latent/{name}_away"))),
                also(f"latent/{name}_slope"),
            )
            for name, words in sides.items()
        )
    )


def _lr_fix(r: Reading) -> str:
    """The logs' restart at twice the base lr; where the update ratio is known, the lr that would make it 1e-3."""
    base = r.get("lr_peak", math.nan)
    ratio = max(r.get(f"step/{head}_update_ratio_peak", math.nan) for head in ("z_head", "flow_head"))
    if math.isfinite(base) and ratio > 0 and math.isfinite(ratio):
        return f"optim.lr={text(base * 1e-3 / ratio)} (update ratios of about 1e-3); from scratch, 1e-4 to 3e-3"
    lr = text(2 * base) if math.isfinite(base) else "5e-6"
    return (
        f"--resume optim.lr={lr} 'optim.schedule={{kind: warm_restarts, start: resume, eta_min: current}}' "
        "(the logs' restart, watch loss/flow for 3-5k steps; from scratch, optim.lr=1e-4)"
    )


def _too_high_fix(r: Reading) -> str:
    base = r.get("lr_peak", math.nan)
    return f"optim.lr={text(base / 10)}" if math.isfinite(base) else "optim.lr=1e-3, or a tenth of what it is"


def _standing_still(r: Reading) -> str:
    if math.isfinite(r.get("trivial/shoot/mse", math.nan)):
        return f"standing still scores {text(r['trivial/shoot/mse'])}"
    return f"standing still likely scores {text(r['shoot/nothing'])} (estimated as Var(z0) + Var(z1), 1 where it was not measured)"


def _opposed(r: Reading) -> str | None:
    """Pairs of losses that pull against each other, both with a share that counts."""
    pairs = [key for key in r.metrics if key.startswith("grad/cos_")] or [
        key for row in r.history[-1:] for key in row if "grad/cos_" in key
    ]
    if not pairs:
        raise Absent("grad/cos_*")
    against = []
    for key in pairs:
        first, second = key.removeprefix("grad/cos_").split("_", 1)
        if {first, second} & REGULARISERS:
            continue
        shares = [1.0 if name == "flow" else r.get(f"share/{name}", 1.0) for name in (first, second)]
        if (cosine := r.get(key, 0.0)) < -0.5 and min(shares) > 0.1 and max(shares) < 10:
            against.append(f"{key} {text(cosine)}, below -0.5 (unrelated: 0)")
    return "; ".join(against) or None


def _gain_words(r: Reading) -> str:
    """What multiplying the velocity would do to its error: the least-squares gain and the logs' median."""
    none, best, median = r["gain/nmse_none"], r["gain/nmse_ls"], r["gain/nmse_median"]
    return (
        f"gain {text(r['gain/median'])} (the logs' median ||v*||/||u||) takes flow/nmse from {text(none)} to {text(median)}; "
        f"the best gain {text(r['gain/best'])} to {text(best)}"
    )


def _broken(r: Reading) -> str | None:
    where = r.facts.get("nonfinite") or {}
    shares = [key for key in ("parameters", "ema", "latents", "forward", "gradients") if r.get(f"finite/{key}", 1.0) < 1]
    seen = r.broken()[:3]
    if not (where or shares or seen):
        return None
    said = [f"{name} {value}" for name, value in where.items()]
    return "; ".join(said + [f"not all {share} are finite" for share in shares] + seen) or None


def _lost_kl(r: Reading) -> str:
    grad, weight = r.facts.get("source_grad"), r.get("kl_weight", math.nan)
    if grad == "full" and weight < 0.1:
        return "the flow loss reaches z0 through its target too (source_grad full) and the KL is too weak to hold the variance: it shrinks"
    if grad == "path" and weight < 0.1:
        return "the target is detached (source_grad path) and the KL is too weak: z0 drifts along the loss"
    return "the KL does not hold the source's variance"


def _kl_fix(r: Reading) -> str:
    form = "" if r.facts.get("kl_form", "box") == "box" else "loss.kl.form=box "
    weight = max(1.0, 10 * r.get("kl_weight", 0.1))
    grad = " loss.flow.source_grad=full" if r.facts.get("source_grad") == "path" else ""
    return f"{form}loss.kl.weight={text(min(weight, 40.0))}{grad} (useful range 0.01 to 40, mean over latent dims)"


def _fix_time(r: Reading) -> str:
    if r.facts.get("time_kind", "uniform") == "uniform":
        return "flow.time.kind=uniform, and a uniform_floor in every stage of flow.curriculum"
    return "flow.time.uniform_floor=0.2 (or flow.time.kind=uniform); sampling always starts at t = 0"


# A run of its first steps, or one whose loss still falls fast, has not had the time to show these faults.
YOUNG = some(below("step", 100), above("history/fall", 0.05))
PLATEAU = every(
    unless(fact("lr_schedule", "cosine")),  # its end is flat by intent
    below("history/fall", 0.02, "over its last quarter loss/flow fell by", share=True),
    some(above("train/nmse", 0.3, "training nmse"), every(absent("train/nmse"), above("loss/flow", 0.5))),
    also("loss/flow"),
)

RULES: tuple[Rule, ...] = (
    # numbers
    Rule(
        "non_finite",
        "bad",
        _broken,
        "a value overflowed: a learning rate or loss scale too high, half precision, or a broken sample; the first place is named",
        lambda r: (
            f"{_too_high_fix(r)}; train.precision=bf16 in place of fp16; python -m flowray.data check SHARDS where one sample is named"
        ),
        (*BAD_FIELD, "sampler_mismatch", "ema_never_updated", "condition_ignored", "dead_head"),
    ),
    # the latents and the autoencoder
    Rule(
        "scale_twice",
        "bad",
        some(
            _handled(1),
            every(
                above("latent/std_power", 0.6, "std(z1) is the autoencoder's scale to the power"),
                below("vae/scale_power", -0.5, "pictures are best when decoded after multiplying by scale to the power"),
            ),
        ),
        "the latent scale is applied twice: the autoencoder's `sample` applies it, and so did something outside",
        f"never multiply by scale_factor outside the autoencoder. {SF_FIX}",
        (*BAD_FIELD, "latent_scale_off", "wrong_autoencoder"),
    ),
    Rule(
        "moments_as_latents",
        "bad",
        some(
            *(
                every(below(key, 0.3, f"posterior noise in {which} latents, over its sigma:"), unless(fact("deterministic")))
                for key, which in (
                    ("latent/batch_noise_ratio", "the training batch's"),
                    ("latent/noise_ratio_train", "the training batch's"),
                    ("latent/noise_ratio", "the held-out"),
                )
            ),
            every(
                above("scale/ratio", 3.0, "||z1|| / ||z0||"),
                also("scale/z1_norm", "scale/z0_norm"),
                unless(below("latent/rms", 2.0)),
                unless(every(below("latent/std_power", -0.6), above("latent/noise_ratio", 0.3))),
                unless(above("latent/noise_ratio_train", 0.3)),
            ),
        ),
        "the posterior's raw moments are used as the latent: encode_moments without sample, so neither drawn nor scaled; v* = z1 - z0 is "
        "then ruled by z1 and the head and its KL get stuck",
        "z1 = autoencoder.sample(autoencoder.encode_moments(x), noise), in one place; encode again: python -m flowray.data encode RECIPE. "
        "Do not rescale z1 by a norm ratio: it hides the cause",
        (*BAD_FIELD, "scale_never", "latent_scale_off", "kl_crushing", "kl_drowned"),
    ),
    Rule(
        "scale_inverted",
        "bad",
        _handled(-2),
        "the latent scale is inverted: encoding divides where it should multiply",
        SF_FIX,
        (*BAD_FIELD, "scale_never", "latent_scale_off"),
    ),
    Rule(
        "scale_never",
        "bad",
        some(
            _handled(-1),
            every(
                below("latent/std_power", -0.6, "std(z1) is the autoencoder's scale to the power"),
                above("vae/scale_power", 0.5, "pictures are best when decoded after multiplying by scale to the power"),
            ),
        ),
        "the latent scale is never applied on the way in, and undone on the way out",
        SF_FIX,
        (*BAD_FIELD, "latent_scale_off"),
    ),
    Rule(
        "decode_scale",
        "bad",
        every(
            some(above("vae/scale_power", 0.5), below("vae/scale_power", -0.5)),
            also("vae/psnr", "vae/psnr_raw", "vae/psnr_sf-2", "vae/psnr_sf-1", "vae/psnr_sf1", "vae/psnr_sf2"),
            unless(above("latent/std_power", 0.6)),
            unless(below("latent/std_power", -0.6)),
        ),
        "latents are made with the right scale but decoded with a wrong one: decode must divide by the scale exactly once "
        "(power 0 is right, -1: it does not divide, -2: it multiplies, 1: it divides twice)",
        "decode(z), with nothing multiplied or divided outside it; model.autoencoder.scaling_factor=null",
        ("vae_poor", "sampler_mismatch"),
    ),
    Rule(
        "autoencoder_in_train_mode",
        "bad",
        some(
            above("vae/training", 0.5, "modules of the autoencoder in train mode:"),
            above("vae/repeat_error", 1e-3, "two encodings of one picture differ by the share"),
        ),
        "the autoencoder is in train mode: its dropout or batch norms change what a latent means from call to call",
        "autoencoder.eval() wherever it is used, then encode again: python -m flowray.data encode RECIPE",
        ("wrong_autoencoder", "decode_scale", "vae_poor", "sampler_mismatch", "latent_scale_off"),
    ),
    Rule(
        "wrong_autoencoder",
        "bad",
        above("latent/fit_residual", 0.1, "share of the cached latents that the run's autoencoder does not explain:"),
        "the cached latents were made by another autoencoder (or another resolution) than the one that decodes",
        "model.autoencoder.path=PATH of the one that made them, or encode again: python -m flowray.data encode RECIPE",
        (
            "vae_poor",
            "decode_scale",
            "latent_scale_off",
            "scale_twice",
            "scale_never",
            "scale_inverted",
            "moments_as_latents",
            "captions_shuffled",
        ),
    ),
    Rule(
        "latent_scale_off",
        "warn",
        every(
            some(
                above("latent/var", 4.0, "Var(z1)"),
                below("latent/var", 0.25, "Var(z1)"),
                above("scale/ratio", 3.0),
                below("scale/ratio", 1 / 3),
            ),
            also("scale/z0_norm", "scale/z1_norm"),
        ),
        "source and image latent are not of one size (the logs want ||z1|| and ||z0|| within 3x); where Var(z1) is not about 1 the scale "
        "factor is not this data's, where it is the source has moved",
        "check the autoencoder interface and std/mean first, then model.autoencoder.scaling_factor; never rescale by a norm ratio",
    ),
    Rule(
        "vae_poor",
        "warn",
        below("vae/psnr", 24.0),
        "the autoencoder does not give its own pictures back; nothing after it can",
        "model.autoencoder.path=PATH of an autoencoder that suits the data (the logs' reads 29 dB)",
    ),
    # the data
    Rule(
        "captions_shuffled",
        "bad",
        every(
            below("data/agreement_z", 2.0, "captions tell the picture, in standard deviations over chance:"),
            also("data/agreement", "data/agreement_shuffled"),
            above("data/samples", 100, "samples"),
        ),
        "captions do not belong to their pictures: shuffled against them, or paired by the wrong key",
        "python -m flowray.data check SHARDS, and pair caption and picture by the sample's key; encode again after a change",
        ("condition_ignored", "clip_weak", "dino_weak", *BAD_PICTURES, "dataset_too_small", "text_unproven"),
    ),
    Rule(
        "dataset_duplicated",
        "warn",
        above("data/duplicate_share", 0.3, "share of samples whose latent is that of an earlier one:"),
        "the data set repeats itself: fewer pictures than it counts",
        "python -m flowray.data check SHARDS; remove what is double before packing",
        ("dataset_too_small", *BAD_PICTURES),
    ),
    Rule(
        "dataset_too_small",
        "warn",
        some(
            below("data/samples", 600, "training samples"),
            every(
                above("data/epochs", 50, "passes over the data"),
                above("data/gap", 0.3, "shoot/nmse held out minus on training samples:"),
            ),
        ),
        "too few different samples: the model learns them by heart",
        "data.limit=null, or more shards in data.shards; 128 to 512 samples are for the overfit check only",
        BAD_PICTURES,
    ),
    # what the network is asked to predict, and when
    Rule(
        "velocity_sign",
        "bad",
        some(
            every(below("field/fit_x1", -0.15, "u is z1 times"), also("field/fit_x0", "field/cos_x1", "field/cos_x0")),
            every(below("flow/cos", -0.3), absent("field/fit_x1")),
        ),
        "the velocity has the wrong sign: trained on z0 - z1, or negated on the way; healthy is u = a z1 - a z0",
        "the target is v* = z1 - z0 (flow/path.py), and sampling adds v dt from t = 0 to 1; change neither sign",
        (*BAD_FIELD, "sampler_mismatch", "epsilon_target", "condition_ignored"),
    ),
    Rule(
        "x1_target",
        "bad",
        every(
            above("field/fit_x1", 0.4, "u is z1 times"),
            quietly(below("field/x0_share", 0.35)),
            quietly(some(above("field/fit_share", 0.5), absent("field/fit_share"))),
            say(lambda r: f"and z0 times {text(r['field/fit_x0'])} (a velocity: -{text(r['field/fit_x1'])})"),
            also("field/cos_x1", "flow/cos"),
        ),
        "the network predicts the image latent z1 itself, not the velocity z1 - z0",
        "the target is path.v_target = z1 - z0; do not mix in x1 prediction without converting it: v = (x1 - x_t) / (1 - t)",
        (*BAD_FIELD, "condition_ignored"),
    ),
    Rule(
        "epsilon_target",
        "bad",
        some(
            every(above("field/cos_eps", 0.5, "cos(u, source noise)"), also("field/cos_x0", "flow/cos")),
            every(
                above("field/fit_x0", 0.4, "u is z0 times"),
                quietly(below("field/x1_share", 0.35)),
                say(lambda r: f"and z1 times {text(r['field/fit_x1'])}"),
            ),
        ),
        "the network predicts the noise (DDPM's epsilon, or z0), not the velocity z1 - z0",
        "the target is path.v_target = z1 - z0; epsilon and score belong to another process",
        (*BAD_FIELD, "condition_ignored"),
    ),
    Rule(
        "time_code_mismatch",
        "bad",
        some(
            above("time/train_gap", 1e-3, "training's time code minus (4 - 8t), at most"),
            above("time/sample_gap", 1e-3, "the sampler's time code minus (4 - 8t), at most"),
            *(
                above(f"time/cos_{kind}", lambda r: r["sampled/cos"] + 0.02, f"flow/cos with the time code {words}:")
                for kind, words in (("reversed", "mirrored"), ("plain", "t itself"), ("log_snr", "the path's log-SNR"))
            ),
            below("shoot/nmse_reversed", lambda r: 0.6 * r["shoot/nmse_dt1"], "shoot/nmse with time run backwards"),
        ),
        "training and sampling tell the network different times for the same x_t; the code is 4 - 8t, which is not the log-SNR",
        "use flow.path.time_code(t) on both sides; t = 0 is the text latent",
        (*BAD_FIELD, "sampler_mismatch"),
    ),
    Rule(
        "time_untrained",
        "bad",
        some(
            below("time/coverage_min", 0.05, "least trained tenth of [0, 1], uniform 1:"),
            every(
                above("flow/bin_worst", 1.0, "flow/nmse of the worst tenth of t"),
                above("flow/bin_worst", lambda r: 4 * r["flow/bin_middle"], "flow/nmse of the worst tenth"),
            ),
        ),
        "part of [0, 1] was never trained, and sampling passes through all of it",
        _fix_time,
        BAD_FIELD,
    ),
    Rule(
        "same_batch_mismatch",
        "bad",
        every(
            above("same_batch/gap", math.log(1.3), "|ln(evaluation loss / training loss)| on the very same batch"),
            also("same_batch/train_loss", "same_batch/eval_loss"),
        ),
        "training and evaluation do not compute the same thing on the same batch: mode, precision, scale, time code or target differ",
        "compare the two calls; model.eval() with the same path, time code and latents; train.velocity_fp32=true if precision differs",
        (*BAD_PICTURES, "velocity_too_small", "velocity_too_large", "gain_would_hurt"),
    ),
    # optimisation
    Rule(
        "lr_too_low",
        "bad",
        some(
            every(
                below("step/z_head_update_ratio_peak", 1e-5),
                below("step/flow_head_update_ratio_peak", 1e-5),
                also("lr_peak"),
            ),
            every(
                below("moved/most", 0.01, "weights have moved by the share"),
                some(above("train/nmse", 0.5, "training nmse"), above("flow/nmse", 0.5)),
                also("lr_peak"),
            ),
            every(
                PLATEAU,
                some(below("lr", 1e-6, "the actual lr"), below("lr_peak", 3e-6, "optim.lr")),
            ),
        ),
        "the learning rate is far too low: the weights hardly move and the loss stays on its plateau",
        _lr_fix,
        (
            *BAD_FIELD,
            *NO_TEXT,
            "dead_head",
            "kl_crushing",
            "kl_drowned",
            "ema_never_updated",
            "flow_drowned",
            "losses_opposed",
            "x1_target",
            "epsilon_target",
            "velocity_sign",
            "latent_scale_off",
        ),
    ),
    Rule(
        "lr_too_high",
        "bad",
        some(
            above("step/z_head_update_ratio_peak", 0.3),
            above("moved/most", 15.0, "weights have moved, in multiples of their initial norm,"),
            every(above("history/rise", 1.5, "last loss/flow over its best:"), also("loss/flow")),
        ),
        "the learning rate is too high: a step undoes what the last ones learnt",
        _too_high_fix,
        (
            *BAD_FIELD,
            *NO_TEXT,
            "non_finite",
            "velocity_sign",
            "x1_target",
            "epsilon_target",
            "source_inflated",
            "source_collapsed",
            "logvar_saturated",
            "kl_crushing",
            "kl_drowned",
            "losses_opposed",
            "latent_scale_off",
            "flow_drowned",
        ),
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
            ),
            every(below("moved/head", 1e-4, "the head's weights have moved by the share"), unless(below("moved/velocity", 0.01))),
            every(below("grad/flow_head", 1e-9, "gradient of the flow loss in head and text"), unless(fact("source_grad", "none"))),
        ),
        "a head does not learn: frozen, detached, outside the optimiser or with an lr of nothing",
        "optim.lr_scale.z_head=2 or optim.lr_scale.flow_head=2 (the logs: 2 to 5), and check that its parameters reach the optimiser",
        (*NO_TEXT, *BAD_PICTURES, "plateau", "velocity_too_small", "gain_would_hurt", "kl_crushing", "kl_drowned", "logvar_saturated"),
    ),
    # the source posterior
    Rule(
        "logvar_saturated",
        "bad",
        some(
            every(
                above("logvar/clamped_share", 0.1, "share of log-variances at their clamp:"),
                unless(every(_anchored, below("std/mean", 1.0))),
            ),
            every(above("logvar/mean", 5.5), also("std/mean")),
            every(below("logvar/mean", -5.5), also("std/mean")),
        ),
        "the log-variance sits at its clamp, where it has no gradient: it cannot come back by itself",
        lambda r: f"start afresh with model.posterior.logvar_min=-6 model.posterior.logvar_max=6 {_kl_fix(r)}",
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
        "source_collapsed",
        "bad",
        every(
            below("std/mean", _if_anchored(0.05, 0.3)),
            also("kl_weight", "flow/cos", "shoot/nmse"),
            say(lambda r: "a high cosine is no merit here: the field only has to undo a constant" if r["flow/cos"] > 0.8 else ""),
        ),
        lambda r: f"the source's variance has collapsed: {_lost_kl(r)}; pictures then start from points that training never spread around",
        _kl_fix,
        ("worse_than_nothing", "latent_scale_off", ("logvar_saturated", WEAK_KL), "clip_saturated", "losses_opposed"),
    ),
    Rule(
        "source_inflated",
        "bad",
        every(some(above("std/mean", 1.6), above("mu/rms", 5.0, "rms of mu")), also("kl_weight", "mu/rms")),
        lambda r: f"the source has grown far beyond the prior: {_lost_kl(r)}; v* is then mostly minus z0 and cos looks good for nothing",
        _kl_fix,
        ("worse_than_nothing", "latent_scale_off", ("logvar_saturated", WEAK_KL), "losses_opposed"),
    ),
    Rule(
        "kl_on_scaled",
        "bad",
        every(
            above("kl/deviation", 0.05, "|ln(loss/kl / the formula on mu and logvar)|"),
            also("kl/ratio", "loss/kl", "kl/closed_form"),
        ),
        "the KL is not computed on the unscaled mu and logvar: on scaled latents, or on the drawn z; its target is then not N(0, I)",
        "kl_per_dim(posterior.mu, posterior.logvar), before any latent scale",
        ("source_collapsed", "source_inflated", "kl_drowned", "kl_crushing"),
    ),
    Rule(
        "kl_drowned",
        "bad",
        every(
            some(below("share/kl", 0.02, "weighted KL gradient over the flow's"), below("kl_weight", 0.05)),
            some(
                every(unless(fact("source_capped", True)), below("std/mean", _if_anchored(0.05, 0.5))),
                above("std/mean", 2.0),
                above("mu/rms", 3.0),
            ),
        ),
        "the KL is drowned by the other losses: mu and sigma go where the flow loss sends them (the logs hold kl : flow at 0.1-0.3 : 1)",
        lambda r: f"{_kl_fix(r)}; or 'loss.balance={{kind: shares}}'",
        (("logvar_saturated", WEAK_KL), "latent_scale_off"),
    ),
    Rule(
        "kl_crushing",
        "bad",
        every(
            below("text/nats", 3.0, "what mu tells of the prompt, nats:"),
            above("std/mean", 0.8),
            quietly(below("std/mean", 1.25)),
            some(
                every(quietly(fact("kl_form", "box")), above("kl_weight", 60)),
                every(quietly(fact("kl_form", "gaussian")), above("kl_weight", 2)),
            ),
            also("mu/rms"),
        ),
        "the KL crushes the source onto the prior: every prompt gives the same N(0, 1)",
        "loss.kl.form=box loss.kl.weight=2 'loss.kl.schedule={kind: linear, fraction: 0.1}' (mu is free within 3 in the box form)",
        (*NO_TEXT, *BAD_PICTURES),
    ),
    # the condition
    Rule(
        "condition_ignored",
        "bad",
        some(
            every(below("text/nats", 1e-3, "what mu tells of the prompt, nats:"), also("text/snr", "text/cos_mu", "mu/rms")),
            every(
                unless(YOUNG),
                below("text/nats", 3.0, "what mu tells of the prompt, nats:"),
                also("text/snr", "text/cos_mu", "mu/rms"),
            ),
            every(unless(YOUNG), below("shoot/cond_gain", 0.02), below("flow/cond_gain_cos", 0.002)),
        ),
        "the caption does not reach the picture: mu is the same for every prompt, or the field does not follow it",
        "loss.clip.weight=0.3 gets the caption into z0 early; check the prompt template and that text.* and head.* train",
        ("clip_weak", "dino_weak", "worse_than_nothing", "text_unproven"),
    ),
    Rule(
        "guidance_without_null",
        "bad",
        every(above("guidance_scale", 1.0, "sample.guidance_scale"), below("null_probability", 1e-6, "flow.null_probability")),
        "pictures are guided by an unconditional field that was never trained",
        "sample.guidance_scale=1 for this run; flow.null_probability=0.1 to train one that can be guided",
        ("worse_than_nothing",),
    ),
    # the semantic losses
    Rule(
        "clip_weak",
        "warn",
        every(
            unless(YOUNG),
            some(
                above("loss/clip", lambda r: 0.9 * r["clip/chance"], "loss/clip, of which nothing learnt is ln(batch):"),
                every(below("grad/clip_of_total", 0.05), above("loss/clip", lambda r: 0.15 * r["clip/chance"])),
                every(below("clip/cond_gain", 0.05, "loss/clip with captions swapped minus own:"), above("loss/clip", 0.05)),
            ),
        ),
        "the contrastive loss teaches nothing: its gradient is too weak, or its temperature too high",
        "loss.clip.weight=2 (the logs) loss.clip.temperature=0.07",
    ),
    Rule(
        "clip_saturated",
        "warn",
        every(
            below("loss/clip", lambda r: 0.02 * r["clip/chance"], "loss/clip"),
            some(below("grad/clip_of_total", 0.02), above("clip/scale", 98.0, "logit scale")),
        ),
        "the contrastive loss is saturated: every pair of the batch is told apart with ease and the gradient is gone",
        "loss.clip.max_scale=30, or a larger train.batch_size",
    ),
    Rule(
        "dino_weak",
        "warn",
        every(
            unless(YOUNG),
            some(
                below("grad/dino_of_total", 0.05),
                every(below("share/dino", 0.05), also("loss/dino")),
                every(
                    above("ent/teacher", lambda r: 0.99 * r["ent/chance"], "the teacher's entropy, of which uniform is"),
                    also("ent/student"),
                ),
            ),
        ),
        "DINO's supervision is weak: the logs want its gradient at 0.2-0.5 of the flow's and above 5-10 % of the total",
        lambda r: f"loss.dino.weight={text(4 * r.fact('loss_weights')['dino'])}" if _has_dino(r) else "loss.dino.weight=2, and twice again",
    ),
    Rule(
        "dino_saturated",
        "warn",
        some(
            below("ent/teacher", 0.1),
            every(below("ent/student", 0.1), below("grad/dino_of_total", 0.1)),
        ),
        "DINO's targets or outputs are too sharp: entropy near 0, so the student saturates early and its gradient is gone",
        "loss.dino.teacher_temperature=0.07 loss.dino.student_temperature=0.2 (twice what they are)",
        ("dino_weak",),
    ),
    Rule(
        "losses_opposed",
        "warn",
        _opposed,
        "the gradients of two losses point against each other: what one step wins for the one it loses for the other",
        "'loss.balance={kind: pcgrad}', or the weight of the one that may yield",
    ),
    Rule(
        "flow_drowned",
        "warn",
        below("grad/flow_of_total", 0.1, "the flow loss's share of the gradient"),
        "the flow loss is drowned by the other losses (the logs: under 10 % for long, raise it)",
        "loss.flow.weight=4, or 'loss.balance={kind: shares}'",
        ("worse_than_nothing", "field_weak"),
    ),
    # the field
    Rule(
        "worse_than_zero",
        "bad",
        every(above("flow/nmse", 0.98), also("flow/cos", "flow/speed_ratio")),
        "the velocity field is not learnt: it explains the target no better than predicting zero does",
        "find the cause above, if there is one; else python -m flowray.doctor overfit RECIPE tells whether the model can learn at all",
        ("worse_than_nothing", "gain_would_hurt", ("velocity_too_large", below("flow/cos", 0.3)), "field_weak", "plateau"),
    ),
    Rule(
        "velocity_too_small",
        "bad",
        every(
            below("flow/speed_ratio", 0.5),
            above("flow/cos", lambda r: 1.4 * r["flow/speed_ratio"], "with flow/cos"),
            quietly(below("gain/nmse_ls", lambda r: 0.9 * r["gain/nmse_none"])),  # else the size is not what is wrong
            say(_gain_words),
        ),
        "the velocity points the right way but is too small: something scales it down (half precision, an output gain, a wrong target "
        "scale). A gain repairs the amplitude, not the direction",
        "find what scales it: train.velocity_fp32=true, loss.norm.weight=0.01; a gain on the sampler is a crutch",
        ("worse_than_nothing", "worse_than_zero", "endpoint_grows", "same_batch_mismatch"),
    ),
    Rule(
        "gain_would_hurt",
        "warn",
        every(
            unless(YOUNG),
            below("flow/speed_ratio", 0.5),
            below("flow/cos", lambda r: 1.4 * r["flow/speed_ratio"], "with flow/cos"),
            above("gain/nmse_median", lambda r: r["gain/nmse_none"], "flow/nmse after the logs' gain"),
            say(_gain_words),
        ),
        "the velocity is small because its direction is not learnt: least squares shrinks what it cannot predict, so a gain adds error",
        "no gain at sampling; train the direction first (flow/cos)",
    ),
    Rule(
        "velocity_too_large",
        "bad",
        every(above("flow/speed_ratio", 2.0), say(_gain_words)),
        "the velocity is too large: a scale is missing or applied twice between network and path",
        "find what scales it; loss.norm.weight=0.01 punishes wrong speeds",
        ("worse_than_nothing", ("worse_than_zero", above("flow/cos", 0.3)), "endpoint_grows", "same_batch_mismatch"),
    ),
    Rule(
        "field_weak",
        "warn",
        every(unless(YOUNG), below("flow/cos", 0.5), quietly(below("flow/nmse", 0.98))),
        "the field's direction is weak (the logs: 0.5 and more is learnt)",
        "longer training: train.steps=N, a wider velocity network, or another lr; python -m flowray.doctor overfit RECIPE first",
        ("worse_than_nothing", "gain_would_hurt"),
    ),
    Rule(
        "half_precision_velocity",
        "warn",
        every(
            unless(fact("precision", "fp32")),
            unless(fact("velocity_fp32")),
            above("variant/fp32_cos", lambda r: r["variant/bf16_cos"] + 0.02, "flow/cos of the velocity network in fp32, beside bf16:"),
        ),
        "the velocity network loses direction or amplitude in half precision",
        "train.velocity_fp32=true",
        ("velocity_too_small",),
    ),
    # solving and sampling
    Rule(
        "sample_on_latent",
        "bad",
        every(
            below("sampler/psnr", 40.0, "pictures of the sampler against integrating and decoding, dB:"),
            above("sampler/psnr_resampled", lambda r: r["sampler/psnr"] + 6, "against sample() on the integrated latent"),
        ),
        "autoencoder.sample() is applied to an integrated latent (log 0826): it takes moments, and scales and adds noise once more",
        "decode(z_end) as it is",
        ("sampler_mismatch",),
    ),
    Rule(
        "half_precision_solver",
        "warn",
        some(
            *(
                every(
                    above(f"{curve}/mse@100", 1e-7, f"the true field, {words}, 100 steps: error"),
                    above(f"{curve}/growth", 3.0, "times the error of the fewest steps"),
                )
                for curve, words in (("teacher_native", "in the sampler's dtype"), ("teacher", "integrated"))
            ),
            below("sampler/bits", 20, "bits of the solver's state"),
        ),
        "the solver adds up its steps in half precision: each step's rounding stays, so more steps make it worse. A curve that grows "
        "with N is no proof that the schedule is right",
        "keep the solver's state in fp32 (flow/solver.py does, whatever the model's dtype)",
        ("sampler_mismatch",),
    ),
    Rule(
        "ema_never_updated",
        "bad",
        some(
            every(below("ema/moved", 0.2, "the EMA has moved from the start, over what the weights have:"), above("moved/velocity", 0.01)),
            every(
                above("ema/flow/nmse", lambda r: 1.5 * r["flow/nmse"] + 0.1, "flow/nmse of the EMA weights"),
                above("ema/delta_relative", 0.2, "EMA minus raw weights, relative"),
            ),
        ),
        "the EMA weights were not updated (or are far too slow for this run), and pictures are drawn from them",
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
        "pictures are drawn from the raw weights; the logs train the raw ones and draw from the EMA",
        "sample.weights=ema",
        ("sampler_mismatch",),
    ),
    Rule(
        "sampler_mismatch",
        "bad",
        some(
            above("sampler/gap", 0.01, "sampler against the probes' own integration, over Var(z1):"),
            below("sampler/psnr", 40.0, "pictures of the sampler against integrating and decoding, dB:"),
        ),
        "sampling does not integrate and decode what was trained: sign, time, step, scale or weights differ",
        "draw with flowray.sample, which integrates z += v dt from t = 0 to 1 and decodes once",
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
        # A drawn picture has up to twice the error of the mean one, so from an anchored source a skill of -1 is the floor.
        every(below("shoot/skill", _if_anchored(-1.0, -0.05)), also("shoot/mse"), say(_standing_still)),
        "integrating the field ends further from the picture than standing still at the text latent",
        "the field or the source is at fault; no solver setting repairs it",
    ),
    # structure, budget
    Rule(
        "no_spatial_structure",
        "warn",
        every(fact("head", "pooled"), PLATEAU, unless(below("train/nmse", 0.3))),
        "the pooled head makes z0 from one global vector, with no place for each part of the picture: colours are learnt, shapes are not",
        "'model.head={kind: grid}' (queries per cell), or 'model.head={kind: conv}' for the least change",
    ),
    Rule(
        "plateau",
        "warn",
        every(PLATEAU, unless(fact("head", "pooled"))),
        "the flow loss no longer falls and is still high",
        "optim.lr=1e-3 or a restart, another flow.time, or more capacity; see grad/* and step/* for what holds it",
    ),
    Rule(
        "text_unproven",
        "info",
        every(
            below("text/cos", 0.9, "cosine of drawn z0 over prompts"),
            some(absent("text/snr"), below("text/snr", 0.1)),
        ),
        "a low cosine of drawn latents is no evidence that the text arrives: noise alone gives it where mu is near 0",
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
            above("shoot/nmse", 0.6),
            above("history/fall", 0.05, "over its last quarter loss/flow still fell by", share=True),
        ),
        "nothing is wrong with the run; it has not seen enough yet",
        lambda r: f"train.steps={round(4 * r['steps'])}" if math.isfinite(r.get("steps", math.nan)) else "more train.steps",
        last=True,
    ),
)


def _has_dino(r: Reading) -> bool:
    return "dino" in (r.facts.get("loss_weights") or {})
