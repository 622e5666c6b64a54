"""Findings about what training is given: numbers that are none, the autoencoder and its latents,
the data.
"""

from __future__ import annotations

from flowray.config.keys import GOOD_PSNR, POOR_PSNR
from flowray.findings.checks import Evidence, above, absent, also, below, every, given, some, unless
from flowray.findings.consequences import (
    BAD_FIELD,
    BAD_PICTURES,
    OPEN,
    STD_FLOOR,
    WEAK_KL,
    too_high_fix,
)
from flowray.findings.finding import Judged
from flowray.findings.reading import Reading
from flowray.findings.rule import Rule

# On prompts like none in training the source is anywhere.
WILD_SOURCE = (("source_inflated", unless(WEAK_KL)), "text_unproven")


def _broken(r: Reading) -> Evidence | None:
    where = r.facts.get("nonfinite") or {}
    shares = [
        key
        for key in ("parameters", "ema", "latents", "forward", "gradients")
        if r.get(f"finite/{key}", 1.0) < 1
    ]
    seen = r.broken()
    if not (where or shares or seen):
        return None
    said = [f"{name} {value}" for name, value in where.items()]
    said += [f"not all {share} are finite" for share in shares]
    said += [key if step is None else f"{key} at step {step}" for key, step in seen[:3]]
    judged = [Judged(f"finite/{share}", r[f"finite/{share}"], "below", 1.0) for share in shares]
    judged += [Judged(key, None, "not finite") for key in dict.fromkeys(key for key, _ in seen)]
    return Evidence("; ".join(said), tuple(judged))


INPUTS: tuple[Rule, ...] = (
    # numbers
    Rule(
        "non_finite",
        "bad",
        _broken,
        "a value overflowed: a learning rate or loss scale too high, half precision, or a broken"
        " sample; the first place is named",
        lambda r: (
            f"{too_high_fix(r)}; train.precision=bf16 in place of fp16; python -m flowray.data"
            " check SHARDS where one sample is named"
        ),
        (
            *BAD_FIELD,
            "lr_too_low",
            "lr_too_high",
            "sampler_mismatch",
            "ema_never_updated",
            "condition_ignored",
            "dead_head",
        ),
    ),
    # the latents and the autoencoder
    # Of rows alone, as a report has them, and of code of one's own: the doctor measures z1 itself,
    # and `flowray.doctor --selfcheck` holds flowray's own interface.
    Rule(
        "moments_as_latents",
        "bad",
        every(
            above("scale/ratio", 3.0, "||z1|| / ||z0||"),
            also("scale/z1_norm", "scale/z0_norm"),
            absent("latent/var"),
            unless(below("std/mean", STD_FLOOR)),  # a narrow source makes z0 small by itself
        ),
        "the posterior's raw moments are used as the latent: encode_moments without sample, so"
        " neither drawn nor scaled; v* = z1 - z0 is then ruled by z1 and the head and its KL get"
        " stuck",
        "z1 = autoencoder.sample(autoencoder.encode_moments(x), noise), in one place; encode again:"
        " python -m flowray.data encode RECIPE. Do not rescale z1 by a norm ratio: it hides the"
        " cause",
        (*BAD_FIELD, "latent_scale_off", "kl_crushing", "kl_drowned"),
    ),
    Rule(
        "wrong_autoencoder",
        "bad",
        above(
            "latent/fit_residual",
            0.1,
            "share of the cached latents that the run's autoencoder does not explain:",
        ),
        "the cached latents were made by another autoencoder (or another resolution) than the one"
        " that decodes",
        "model.autoencoder.path=PATH of the one that made them, or encode again: python -m"
        " flowray.data encode RECIPE",
        ("vae_poor", "latent_scale_off", "captions_shuffled", "seam_cache"),
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
        "source and image latent are not of one size (||z1|| and ||z0|| should be within 3x);"
        " where Var(z1) is not about 1 the scale factor is not this data's, where it is the source"
        " has moved",
        "check the autoencoder interface and std/mean first, then model.autoencoder.scaling_factor;"
        " never rescale by a norm ratio",
    ),
    Rule(
        "vae_poor",
        "warn",
        below("vae/psnr", POOR_PSNR),
        "the autoencoder does not give its own pictures back; nothing after it can",
        "model.autoencoder.path=PATH of an autoencoder that suits the data (one in order reads"
        f" {GOOD_PSNR:g} dB)",
    ),
    # the data
    Rule(
        "captions_shuffled",
        "bad",
        every(
            below(
                "data/agreement_z",
                2.0,
                "captions tell the picture, in standard deviations over chance:",
            ),
            also("data/agreement", "data/agreement_shuffled"),
            given(above("data/samples", 100, "samples")),
        ),
        "captions do not belong to their pictures: shuffled against them, or paired by the"
        " wrong key",
        "python -m flowray.data check SHARDS, and pair caption and picture by the sample's key;"
        " encode again after a change",
        (
            "condition_ignored",
            "clip_weak",
            "dino_weak",
            *BAD_PICTURES,
            "dataset_too_small",
            "text_unproven",
        ),
    ),
    Rule(
        "dataset_duplicated",
        "warn",
        above(
            "data/duplicate_share", 0.3, "share of samples whose latent is that of an earlier one:"
        ),
        "the data set repeats itself: fewer pictures than it counts",
        "python -m flowray.data check SHARDS; remove what is double before packing",
        ("dataset_too_small", "memorised", *BAD_PICTURES, *WILD_SOURCE),
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
        "data.limit=null, or more shards in data.shards; 128 to 512 samples are for the overfit"
        " check only",
        ("memorised", *BAD_PICTURES, *WILD_SOURCE),
    ),
    Rule(
        "memorised",
        "warn",
        some(
            above(
                "shoot/copies", 0.2, "share of shots as near to a training picture as few new are:"
            ),
            # the best that can be said of a picture by its caption is off by what that leaves open
            every(
                given(OPEN),
                given(
                    below(
                        "train_set/shoot_nmse",
                        lambda r: 0.6 * r["data/left_open"],
                        "shoot/nmse on training samples",
                    )
                ),
                above("data/gap", 0.3, "held out minus that:"),
            ),
        ),
        "training pictures are known by heart: their captions bring them back, or pictures are"
        " copies of them",
        "more shards in data.shards (data.limit=null), or fewer train.steps",
    ),
)
