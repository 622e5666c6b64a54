"""Findings about what training is given: numbers that are none, the autoencoder and its latents,
the data.
"""

from __future__ import annotations

from flowray.config.keys import GOOD_PSNR, POOR_PSNR
from flowray.findings.checks import (
    Check,
    Evidence,
    above,
    absent,
    also,
    below,
    every,
    given,
    say,
    some,
    unless,
)
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

# Another autoencoder's latents have no scale to speak of.
WELL_FITTED = unless(
    some(above("latent/fit_residual", 0.1), above("latent/fit_residual_train", 0.1))
)
# On prompts like none in training the source is anywhere.
WILD_SOURCE = (("source_inflated", unless(WEAK_KL)), "text_unproven")

FEW_CAPTIONS = 20  # different ones
SIDES = {"across": "left, right", "down": "top, bottom"}
UNFLIPPED = (
    "take the flip out of what writes the pictures, or keep captions that name sides out of it;"
    " pack and encode again"
)


def _side(axis: str, limit: float) -> Check:
    """Fewer pictures than the limit are as their captions' words for the sides say."""
    return every(
        below(
            f"data/side_{axis}_high",
            limit,
            f"pictures with their mass on the side that their captions name ({SIDES[axis]}), plus"
            " two standard deviations:",
            share=True,
        ),
        also(f"data/side_{axis}"),
    )


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
        (*BAD_FIELD, "vae_poor", "latent_scale_off", "kl_crushing", "kl_drowned"),
    ),
    Rule(
        "wrong_autoencoder",
        "bad",
        # of both sets: other pictures, or some broken latents, are not an autoencoder's doing
        every(
            above(
                "latent/fit_residual",
                0.1,
                "share of the cached latents that the run's autoencoder does not explain:",
            ),
            unless(below("latent/stale_share", 0.9)),
        ),
        "the cached latents were made by another autoencoder (or another resolution) than the one"
        " that decodes",
        "model.autoencoder.path=PATH of the one that made them, or encode again: python -m"
        " flowray.data encode RECIPE",
        (
            "vae_poor",
            "latent_scale_off",
            "captions_shuffled",
            "captions_partly_wrong",
            "cache_stale",
            "cache_scaled",
            "dataset_near_copies",
        ),
    ),
    Rule(
        "cache_scaled",
        "bad",
        some(
            *(
                check
                for key, words in (
                    ("latent/fit_slope", "held-out latents are times fresh ones:"),
                    ("latent/fit_slope_train", "training latents are times fresh ones:"),
                    ("latent/batch_slope", "z1 of a training batch is times fresh latents:"),
                )
                for check in (
                    every(above(key, 1.1, f"cached {words}"), WELL_FITTED),
                    every(below(key, 0.9, f"cached {words}"), WELL_FITTED),
                )
            )
        ),
        "the cached latents, or z1 as training makes it of them, are of another scale than what the"
        " run's autoencoder encodes and decodes",
        "encode again: python -m flowray.data encode RECIPE (the scale belongs to the cache: change"
        " model.autoencoder.scaling_factor before it, never after)",
        ("cache_stale", "latent_scale_off", *BAD_PICTURES, "undertrained"),
    ),
    Rule(
        "cache_stale",
        "bad",
        some(
            above(
                "latent/stale_share",
                0.0,
                "cached training latents that are not what encoding their pictures gives:",
                share=True,
            ),
            above(
                "latent/stale_suspects",
                0.0,
                "of the most unusual training latents those that are not:",
                share=True,
            ),
        ),
        "the cache does not hold its pictures' latents: damaged, of another autoencoder, or the"
        " pictures changed after encoding",
        "delete the folder of the cache that data.cache names and encode again: python -m"
        " flowray.data encode RECIPE",
        (
            "latent_scale_off",
            "captions_partly_wrong",
            "dataset_near_copies",
            *BAD_FIELD,
            "undertrained",
        ),
    ),
    Rule(
        "latent_scale_off",
        "warn",
        every(
            some(
                # 4.9 on digits, which learn as well as any
                above("latent/var", 9.0, "Var(z1)"),
                below("latent/var", 0.1, "Var(z1)"),
                # of rows alone, as a report has them
                every(
                    absent("latent/var"),
                    unless(below("std/mean", STD_FLOOR)),  # a narrow source is small by itself
                    some(above("scale/ratio", 3.0), below("scale/ratio", 1 / 3)),
                ),
            ),
            also("scale/z0_norm", "scale/z1_norm"),
        ),
        "image latents are far from variance 1: the scale factor is not this data's, and a"
        " source as wide as the prior does not fit them",
        "check the autoencoder interface first, then model.autoencoder.scaling_factor; never"
        " rescale by a norm ratio",
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
                2.5,
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
        "captions_partly_wrong",
        "warn",  # words that a caption uses loosely look the same
        every(
            above(
                "data/captions_wrong_low",
                0.06,
                "captions whose picture is not what they say, less two standard deviations:",
                share=True,
            ),
            also("data/captions_wrong", "data/word_auc"),
            given(above("data/samples", 200, "samples")),
        ),
        "part of the captions belong to other pictures: shifted, shuffled in one part of the set,"
        " or written for something else; or words loosely used",
        "python -m flowray.data check SHARDS; look at pictures beside their captions and pair them"
        " by the sample's key; encode again after a change",
        (*BAD_PICTURES, "clip_weak", "dino_weak", "text_unproven", "undertrained"),
    ),
    Rule(
        "captions_empty",
        "warn",
        # a tenth is often left empty on purpose, for guidance
        above("data/caption_wordless", 0.3, "captions without a word:", share=True),
        "captions say nothing: empty, or signs alone",
        "caption those pictures, or leave them out: python -m flowray.data check SHARDS",
        ("captions_repeat", "condition_ignored", "clip_weak", "text_unproven"),
    ),
    Rule(
        "captions_repeat",
        "warn",
        every(
            # of few captions, as of classes or of one prompt, each is meant to stand there often
            unless(below("data/caption_classes", FEW_CAPTIONS)),
            some(
                above("data/caption_same", 0.5, "captions that are one and the same:", share=True),
                every(
                    above(
                        "data/caption_same", 0.15, "captions that are one and the same:", share=True
                    ),
                    above("data/caption_over_next", 5.0, "times as many as the next:"),
                ),
            ),
        ),
        "one caption stands beside a large part of the pictures: there is nothing in it to tell"
        " them apart by",
        "caption those pictures anew, or leave them out: python -m flowray.data check SHARDS",
        ("captions_shuffled", "condition_ignored", "clip_weak", "text_unproven"),
    ),
    Rule(
        "captions_cut",
        "warn",
        every(
            above("data/caption_broken", 0.1, "captions that end within a word:", share=True),
            above("data/caption_full", 0.3, "as long as the longest:", share=True),
        ),
        "captions were cut at one length: what stood behind it is lost",
        "write the captions whole and encode again; model.text.max_tokens=N where it is the"
        " tokenizer that cuts",
        ("condition_ignored", "clip_weak", "text_unproven"),
    ),
    Rule(
        "channels_swapped",
        "bad",
        every(
            above(
                "data/colour_other",
                lambda r: r["data/colour_told"] + 0.1,
                "colours fit their names with channels exchanged or inverted; as they are, plus"
                " 0.1:",
            ),
            given(above("data/colour_z", 4.0, "names of colours change pictures, in sd:")),
        ),
        "pictures have their channels in another order than RGB, or are negatives: their colours"
        " are not those that captions name",
        "read the pictures as RGB (OpenCV gives BGR: image[..., ::-1]), pack and encode again",
        (*BAD_PICTURES, "vae_poor", "captions_partly_wrong"),
    ),
    Rule(
        "pictures_grey",
        "warn",
        every(
            below("data/colour_chroma", 0.01, "mean difference of a pixel's channels"),
            say(lambda r: "captions name colours"),
        ),
        "pictures are grey, and their captions name colours",
        "read the pictures in colour, pack and encode again",
    ),
    Rule(
        "sides_swapped",
        "bad",
        some(*(_side(axis, 0.4) for axis in SIDES)),
        "pictures are mirrored or upside down, and their captions name sides",
        UNFLIPPED,
        ("pictures_mirrored", *BAD_PICTURES, "captions_partly_wrong"),
    ),
    Rule(
        "pictures_mirrored",
        "warn",
        some(
            *(
                every(
                    _side(axis, 0.75),
                    given(above(f"data/side_{axis}_low", 0.25)),
                    # as many on the wrong side, where captions do tell the rest
                    unless(below("data/agreement_z", 5.0)),
                )
                for axis in SIDES
            )
        ),
        "part of the pictures are mirrored or upside down, as by random flips, and their captions"
        " name sides; or the words mean something else in this set (the right one, a top)",
        UNFLIPPED,
        (*BAD_PICTURES, "captions_partly_wrong"),
    ),
    Rule(
        "held_out_seen",
        "warn",
        above(
            "data/seen_share", 0.25, "held-out samples that stand in the training set:", share=True
        ),
        "the held-out set is part of the training set: probes and comparisons measure what was"
        " learnt by heart",
        "data.val_shards=PATH of pictures that are not in data.shards",
    ),
    Rule(
        "dataset_near_copies",
        "warn",
        every(
            above(
                "data/near_share",
                0.4,
                "samples whose picture is nearly an earlier one:",
                share=True,
            ),
            also("data/near_typical", "data/duplicate_share"),
        ),
        "the data set consists of near copies: fewer pictures than it counts",
        "python -m flowray.data check SHARDS; keep one of each group of near copies",
        ("dataset_too_small", "memorised", "undertrained", *BAD_PICTURES, *WILD_SOURCE),
    ),
    Rule(
        "batches_alike",
        "bad",
        above(
            "data/batch_alike",
            3.0,
            "variance of the batches' mean pictures, over that of random batches:",
        ),
        "the samples of a batch are of one kind: the set is read in its own order, and each step"
        " undoes what the last one learnt of another kind",
        "the order of training is a shuffle of the whole set (data/order.py of changed source);"
        " shuffle samples before packing where a reader of your own keeps their order",
        (*BAD_PICTURES, "lr_too_high", "clip_weak", "losses_opposed"),
    ),
    Rule(
        "dataset_duplicated",
        "warn",
        above(
            "data/duplicate_share", 0.3, "share of samples whose latent is that of an earlier one:"
        ),
        "the data set repeats itself: fewer pictures than it counts",
        "python -m flowray.data check SHARDS; remove what is double before packing",
        ("dataset_near_copies", "dataset_too_small", "memorised", *BAD_PICTURES, *WILD_SOURCE),
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
