"""The table of findings for a model that was not trained here: what may be wrong at its interface,
and those of the other rules that ask neither for losses nor for an optimiser, with what to look at
in place of recipe keys.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from flowray.findings.checks import Evidence, above, also, below, every, text
from flowray.findings.consequences import BAD_FIELD, NO_TEXT
from flowray.findings.finding import Judged
from flowray.findings.reading import Absent, Reading
from flowray.findings.rule import Rule
from flowray.findings.rules import RULES

SPOILT = (*BAD_FIELD, *NO_TEXT, "too_few_steps")
TAKEN_OTHERWISE = ("velocity_points_back", "time_read_otherwise", *SPOILT)
# time as a model may take it, by the end of the key foreign/nmse_*
TIMES: Mapping[str, str] = {
    "reversed": "1 - t (its time runs from the picture to the source)",
    "thousand": "1000 t",
    "thousandth": "t / 1000",
    "thousand_reversed": "1000 (1 - t), as diffusers' schedulers count",
    "code": "4 - 8 t (CrossFlow's log_snr)",
}
CLEARLY = 0.6  # of the error under t


def _best(r: Reading) -> str:
    """The other time under which the field is least wrong."""
    known = [name for name in TIMES if r.has(f"foreign/nmse_{name}")]
    if not known:
        raise Absent("foreign/nmse_*")
    return min(known, key=lambda name: r[f"foreign/nmse_{name}"])


def _other_time(r: Reading) -> Evidence | None:
    """A time under which the field is right, and clearly less wrong than under t."""
    name, own = _best(r), r["foreign/nmse_told"]
    other = r[f"foreign/nmse_{name}"]
    if other > CLEARLY * own or other > 0.9:
        return None
    said = f"flow/nmse {text(own)} at t (predicting zero: 1); {text(other)} told {TIMES[name]}"
    return Evidence(said, (Judged("foreign/nmse_told", own, "above", other / CLEARLY),))


INTERFACE: tuple[Rule, ...] = (
    Rule(
        "picture_predicted",
        "bad",
        every(
            above("field/fit_share", 0.5, "share of the output that a x1 + b x0 explains:"),
            above("field/fit_x1", 0.6, "a"),
            above("field/fit_x0", -0.25, "b (the velocity has -1)"),
            below("field/fit_x0", 0.35, "b"),
        ),
        "the network's output is the picture's latent, not the velocity",
        "velocity(...) must give (prediction - x) / (1 - t), with t kept below 1",
        TAKEN_OTHERWISE,
    ),
    Rule(
        "source_predicted",
        "bad",
        every(
            above("field/fit_share", 0.5, "share of the output that a x1 + b x0 explains:"),
            above("field/fit_x0", 0.6, "b (the velocity has -1)"),
            above("field/fit_x1", -0.25, "a"),
            below("field/fit_x1", 0.25, "a"),
        ),
        "the network's output is the source, or its noise (an epsilon prediction), not the"
        " velocity",
        "velocity(...) must give (x - prediction) / t, with t kept above 0",
        TAKEN_OTHERWISE,
    ),
    Rule(
        "velocity_points_back",
        "bad",
        every(
            below("flow/cos", -0.2, "cosine of the velocity with z1 - z0"),
            also("field/fit_x1", "field/fit_x0"),
        ),
        "the velocity points from the picture to the source: it is d/dsigma with sigma = 1 - t"
        " (diffusers, SD3, FLUX), or its sign is lost",
        "velocity(...) must give dx/dt with t from 0 at the source to 1 at the picture: return -v,"
        " and tell the network 1 - t where it counts time from the picture",
        SPOILT,
    ),
    Rule(
        "time_read_otherwise",
        "bad",
        _other_time,
        "the model takes the time it is told for another one than it was trained on",
        lambda r: f"in velocity(...), hand the network {TIMES[_best(r)]} in place of t",
        SPOILT,
    ),
    Rule(
        "guidance_ignored",
        "warn",
        every(
            above("guidance_scale", 1.0, "guidance scale"),
            below("guidance/gap", 1e-4, "null velocity off the conditional one by"),
        ),
        "velocity(...) gives the same with and without the caption, so guidance does nothing",
        "velocity(...) must leave the caption out where `null` is True",
    ),
    Rule(
        "decode_unlike",
        "bad",
        below(
            "vae/psnr",
            lambda r: r["trivial/vae/psnr"],
            "encode_image, then decode, dB, against a picture's mean colour:",
        ),
        "decode does not undo encode_image: a scale or shift is missing on one side, or applied"
        " twice",
        "encode_image gives (raw - shift) * scale, decode takes that and undoes it itself",
        ("vae_poor", "latent_scale_off"),
    ),
)

# of the other rules, and what to look at here
_FIXES: Mapping[str, str] = {
    "non_finite": "look at the part that is named; half precision overflows first",
    "latent_scale_off": "encode_image must give the latents scaled as the velocity was trained on",
    "vae_poor": "look at the pictures of the page; an autoencoder in order reads 25 dB and more",
    "condition_ignored": "does encode_text reach `posterior` or `velocity`? `null` must be False",
    "worse_than_zero": "is it trained on such captions and such latents? Else see encode_image",
    "velocity_too_small": "find what scales the velocity down between network and interface",
    "velocity_too_large": "find what scales the velocity up between network and interface",
    "gain_would_hurt": "no gain at sampling; the direction is what is not learnt",
    "field_weak": "longer training, or captions and pictures nearer to those it was trained on",
    "sampler_mismatch": "velocity and posterior must answer alike whatever else is in the batch",
    "too_few_steps": "take more steps",
    "endpoint_grows": "velocity must be dx/dt of the path that it was trained on",
    "worse_than_nothing": "the field or the source is at fault; no solver setting repairs it",
    "logvar_saturated": "posterior's log-variance lies at -30 or 20: is it a log of a variance?",
    "source_collapsed": "posterior's sigma is next to 0: train with a larger weight of the KL",
    "source_inflated": "posterior's mu or sigma has left the prior: a larger weight of the KL",
    "text_unproven": "look at text/cos_mu and text/snr instead",
    "undertrained": "train it longer, or examine it on what it was trained on",
}
_OF_DATA = (
    "captions_shuffled",
    "captions_partly_wrong",
    "captions_empty",
    "captions_repeat",
    "captions_cut",
    "channels_swapped",
    "pictures_grey",
    "sides_swapped",
    "pictures_mirrored",
    "held_out_seen",
    "dataset_near_copies",
    "dataset_duplicated",
)

FOREIGN: tuple[Rule, ...] = (
    *INTERFACE,
    *(
        replace(rule, fix=_FIXES.get(rule.id, rule.fix))
        for rule in RULES
        if rule.id in _FIXES or rule.id in _OF_DATA
    ),
)
