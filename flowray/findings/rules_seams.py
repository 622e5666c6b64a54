"""Findings about training against sampling: one rule for each seam at which flowray.doctor compares
them, in the order of the data flow. The first that differs explains what comes after it.

They are due to changed source, or to a network, head or solver of one's own.
"""

from __future__ import annotations

from dataclasses import dataclass

from flowray.findings.checks import Limit, above, also, every, say
from flowray.findings.consequences import BAD_FIELD, BAD_PICTURES, NO_TEXT
from flowray.findings.reading import Reading
from flowray.findings.rule import Rule

# where training runs in half precision its rounding is no fault
CLOSE = 0.01
ROUNDED = 0.1
# What a z0 that training and sampling, or the KL and the flow, do not share does to the source.
BAD_SOURCE = (
    "source_averages",
    "source_blind",
    "codes_merge",
    "source_collapsed",
    "source_inflated",
    "logvar_saturated",
    "kl_drowned",
    "kl_crushing",
    "latent_scale_off",
    "noise_unused",
    "noise_shared",
    "noise_frozen",
)
SELFCHECK = "python -m flowray.doctor --selfcheck holds changed source against theory"
OWN = "a network of your own must do the same in training and in eval mode"


def _close(r: Reading) -> float:
    return CLOSE if r.facts.get("precision", "fp32") == "fp32" else ROUNDED


@dataclass(frozen=True)
class Seam:
    """One place where the two ways are compared: the rule seam_NAME on the row seam/NAME.

    number: what the row is, in words; part: the part of the model whose first module that differs
    the evidence names; wide: the fault spoils the field and what is measured of it, not the
    sampler's pictures alone.
    """

    name: str
    limit: Limit
    number: str
    cause: str
    fix: str
    part: str = ""
    wide: bool = True


SEAMS: tuple[Seam, ...] = (
    Seam(
        "weights",
        1e-3,
        "weights that sampling opens, off those that sample.weights names by",
        "sampling does not draw with the weights of the checkpoint: some are not loaded, or others",
        f"flowray/sample/restore.py copies every trainable tensor; {SELFCHECK}",
        wide=False,
    ),
    Seam(
        "captions",
        0.0,
        "share of captions changed on one way:",
        "training reads other captions than sampling: another template, case or wording, or those"
        " of other samples than their pictures'",
        "give the text model the captions as the data have them, in training as in sampling"
        f" (a template belongs in model.text.template); {SELFCHECK}",
    ),
    Seam(
        "tokens",
        0.0,
        "share of token ids or mask that differ:",
        "the same captions become other tokens in sampling than in training: template, special"
        " tokens or truncation differ",
        "model.text.template and model.text.max_tokens are the one place for both; no second"
        f" tokenizer call beside model.text.tokenize; {SELFCHECK}",
    ),
    Seam(
        "text",
        _close,
        "the text model's tokens differ by",
        "the text model answers the same tokens otherwise in sampling than in training",
        f"{OWN}; no dtype of its own on one way (model.text.dtype)",
        "text",
    ),
    Seam(
        "mu",
        _close,
        "the mean of z0 differs by",
        "the source's mean is another in sampling than in training: the head, or an amplitude on"
        " one way",
        f"{OWN}; model.source.amplitude is the one place for an amplitude",
        "head",
    ),
    Seam(
        "std",
        _close,
        "sigma differs by",
        "the source's sigma is another in sampling than in training: the head, or the bounds of"
        " its log-variance on one way",
        f"{OWN}; model.posterior.logvar_min and logvar_max bound it for both",
        "head",
    ),
    Seam(
        "draws_trained",
        0.3,
        "spread of training's z0 over draws, off the posterior's by",
        "training does not draw z0 from its posterior: the mean in place of a draw, noise that is"
        " the same at every step or for every caption, or of another size",
        "z0 = mean + sigma noise with fresh noise for every sample and step"
        f" (flowray/model/posterior.py, flowray/train/step.py); {SELFCHECK}",
    ),
    Seam(
        "draws_sampled",
        0.3,
        "spread of sampling's z0 over seeds, off the posterior's by",
        "sampling does not draw z0 from its posterior: the mean in place of a draw, or noise that"
        " is the same for every seed or prompt",
        "z0 = mean + sigma noise with noise of its own for every seed and prompt (source_noise in"
        f" flowray/sample/generate.py); {SELFCHECK}",
    ),
    Seam(
        "z0",
        _close,
        "z0 of the same noise differs by",
        "from the same posterior and noise training makes another z0 than sampling: an amplitude,"
        " a mean in place of a draw, or another noise on one way",
        f"z0 comes from Posterior.sample alone (flowray/model/posterior.py); {SELFCHECK}",
    ),
    Seam(
        "latents",
        0.015,
        "z1 of a training batch, off the cache by",
        "training batches hold other latents than the cache: a scale on one way, another sample's,"
        " or not drawn as their posterior says",
        "z1 = scale.sample(moments, noise), once, in flowray/train/step.py; " + SELFCHECK,
    ),
    Seam(
        "target",
        1e-3,
        "v*, against the way from training's x_0 to its x_1, is off by",
        "the loss asks for another velocity than leads along training's own path: sign, size, or"
        " z0, z1 or noise in place of the difference",
        f"v* = (rho - 1) z0 + z1 (flowray/flow/path.py); {SELFCHECK}",
    ),
    Seam(
        "start",
        _close,
        "the first state of sampling differs from training's x at t = 0 by",
        "sampling does not begin where training's path does",
        f"the solver starts at the source's z0, unscaled, and t = 0 is z0 on the path; {SELFCHECK}",
    ),
    Seam(
        "steps",
        1e-3,
        "led by the true velocity the sampler ends off training's x at t = 1 by",
        "the sampler's steps do not add up to the way that the velocity is trained for: sign, dt, a"
        " step left out, a scale, or half precision",
        f"x + (t_next - t) v over a grid from 0 to 1, in fp32 (flowray/flow/solver.py);"
        f" {SELFCHECK}",
        wide=False,
    ),
    Seam(
        "time_code",
        0.02,
        "at the same place of the path the time code is off by",
        "sampling tells the network another time than training does at the same place of the path",
        "both call flow.path.time_code, once, with the t of the state, in [0, 1] from z0 to z1;"
        f" {SELFCHECK}",
    ),
    Seam(
        "null",
        0.0,
        "share of samples whose null flag is not as it was given:",
        "the null flag is turned on one way: with the caption the network is told that there is"
        " none, or the other way round",
        f"null is True for the samples without a caption (flowray/flow/guidance.py); {SELFCHECK}",
    ),
    Seam(
        "velocity",
        _close,
        "the velocity of the same x, t and caption differs by",
        "the velocity network answers the same question otherwise in sampling (eval mode, fp32)"
        " than in training: batch statistics, a branch on `training`, or precision. Dropout is"
        " left out of this",
        f"{OWN}; train.velocity_fp32=true where precision differs",
        "velocity",
    ),
    Seam(
        "guidance",
        lambda r: 0.01 if _close(r) == CLOSE else 0.3,
        "the guided velocity, against v_null + s (v - v_null) of training's own answers, is off by",
        "guidance does not put together what training answers with and without the caption",
        f"v_null + sample.guidance_scale (v - v_null) (flowray/flow/guidance.py); {SELFCHECK}",
        wide=False,
    ),
    Seam(
        "loss",
        0.05,
        "loss/flow, against mean |u - v*|^2 of its own batch, is off by",
        "the flow loss is not the squared error of the velocity: a factor, or another form",
        f"loss/flow = mean (u - v*)^2 (flowray/losses/terms.py); {SELFCHECK}",
    ),
    Seam(
        "pixels",
        0.1,
        "the sampler's pictures differ from the decoded latents, over their contrast, by",
        "sampling decodes its latents otherwise than training: scale, channels, sign or range",
        "autoencoder.decode(z) once, from_pictures once (flowray/sample/generate.py); " + SELFCHECK,
        wide=False,
    ),
)


def _where(part: str, r: Reading) -> str:
    place = (r.facts.get("seams") or {}).get(part)
    return f"first in {place}" if place else ""


def _rule(place: int, seam: Seam) -> Rule:
    later = tuple(f"seam_{other.name}" for other in SEAMS[place + 1 :])
    wide = (*BAD_FIELD, *NO_TEXT, *BAD_SOURCE, "losses_opposed")
    spoilt = (*(wide if seam.wide else BAD_PICTURES), "vae_poor")
    return Rule(
        f"seam_{seam.name}",
        "bad",
        every(
            above(f"seam/{seam.name}", seam.limit, seam.number),
            say(lambda r: _where(seam.part, r)),
            also("same_batch/ratio"),
        ),
        seam.cause,
        seam.fix,
        (*later, "sampler_mismatch", *spoilt),
    )


SEAM_RULES: tuple[Rule, ...] = tuple(_rule(place, seam) for place, seam in enumerate(SEAMS))
