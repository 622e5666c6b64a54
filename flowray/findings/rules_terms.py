"""Findings about the losses themselves: each term of the recipe on a constructed batch with a
known answer. What a run's own code gets wrong there is the cause of whatever else it shows.
"""

from __future__ import annotations

from flowray.findings.checks import Check, above, some
from flowray.findings.consequences import BAD_FIELD, NO_TEXT
from flowray.findings.rule import Rule

# In fp32 a term is within 2e-7 of its closed form, and its gradient within 2e-7 of its norm.
EXACT = 1e-3
_FIELD = (
    *BAD_FIELD,
    "source_collapsed",
    "source_inflated",
    "kl_drowned",
    "undertrained",
    "sampler_mismatch",
    "text_unproven",
    "condition_ignored",
)
_SOURCE = (
    *BAD_FIELD,
    *NO_TEXT,
    "source_collapsed",
    "source_inflated",
    "source_averages",
    "source_blind",
    "kl_drowned",
    "kl_crushing",
    "logvar_saturated",
    "latent_scale_off",
    "lr_too_high",
    "undertrained",
)
_TEXT = (*NO_TEXT, "clip_saturated", "dino_saturated", "losses_opposed", "undertrained")

_LAST = ("undertrained",)

# Where the code is right again when the doctor comes, what training wrote down still tells.
_SEEN: dict[str, tuple[Check, ...]] = {
    "kl": (above("history/kl_negative", 1e-4, "loss/kl, never below 0, was minus"),)
}
# key of the number: (id of the finding, what is wrong, its formula, what follows from it)
TABLE: dict[str, tuple[str, str, str, tuple[str, ...]]] = {
    "path": (
        "path_wrong",
        "x_t or v*",
        "x_t = (1 + t (rho - 1)) z0 + t z1, v* = (rho - 1) z0 + z1",
        _FIELD,
    ),
    "flow": ("flow_loss_wrong", "loss/flow", "mean (u - v*)^2, 0 for a perfect prediction", _FIELD),
    "kl": (
        "kl_wrong",
        "loss/kl",
        "0 for N(0, 1), above 0 for all else, and drawing mu and sigma there",
        _SOURCE,
    ),
    "clip": (
        "contrastive_wrong",
        "loss/clip",
        "-ln softmax of a caption's own picture among all, and the other way",
        _TEXT,
    ),
    "dino": (
        "dino_wrong",
        "loss/dino",
        "cross-entropy of the student with the teacher's softmax",
        _TEXT,
    ),
    "repa": ("repa_wrong", "loss/repa", "minus the mean cosine with the features", _LAST),
    "anchor": ("anchor_wrong", "loss/anchor", "how far mu is from the caption's own z1", _SOURCE),
    "tv": ("tv_wrong", "loss/tv", "mean |difference| of neighbours in z0", _LAST),
    "norm": ("norm_wrong", "loss/norm", "mean (||u|| - ||v*||)^2", _FIELD),
}


def _rule(key: str) -> Rule:
    id, name, formula, explains = TABLE[key]
    off = [above(f"known/{key}", EXACT, f"{name} of a batch with a known answer is off by")]
    if key != "path":
        off.append(above(f"known/{key}_gradient", EXACT, "its gradient, in gradients, by"))
    return Rule(
        id,
        "bad",
        some(*off, *_SEEN.get(key, ())),
        f"{name} is not what the method prescribes ({formula}): the code of this installation was"
        " changed, and training follows what it says",
        "python -m flowray.doctor --selfcheck says which formula and in which file; put it right"
        " and train anew",
        explains,
    )


TERMS: tuple[Rule, ...] = tuple(map(_rule, TABLE))
