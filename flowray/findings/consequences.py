"""What findings of several kinds share: the groups that faults upstream explain, and the states
of a run that excuse one.
"""

from __future__ import annotations

from flowray.findings.checks import (
    Evidence,
    Limit,
    above,
    absent,
    also,
    below,
    every,
    fact,
    some,
    text,
    unless,
)
from flowray.findings.reading import Reading

# What any fault upstream of the field does to the picture at the end. The autoencoder's own round
# trip is not among them: neither captions nor a network can spoil it.
BAD_PICTURES = ("worse_than_nothing", "worse_than_zero", "field_weak", "endpoint_grows")
BAD_FIELD = (
    *BAD_PICTURES,
    "velocity_too_small",
    "velocity_too_large",
    "gain_would_hurt",
    "plateau",
)
NO_TEXT = (
    "caption_unused",
    "condition_ignored",
    "source_blind",
    "text_unproven",
    "clip_weak",
    "dino_weak",
    "captions_shuffled",
)

# Pairs that cannot both be true: the doctor shows the first of them alone.
CONTRADICTIONS: tuple[frozenset[str], ...] = tuple(
    frozenset(pair)
    for pair in (
        ("lr_too_low", "lr_too_high"),
        ("velocity_too_small", "velocity_too_large"),
        ("velocity_too_small", "gain_would_hurt"),
        ("kl_drowned", "kl_crushing"),
        ("clip_weak", "clip_saturated"),
        ("dino_weak", "dino_saturated"),
        ("unlike_healthy", "undertrained"),
    )
)

# A run of its first steps, or one whose loss still falls fast, has not had the time to show some
# faults.
YOUNG = some(below("step", 100), above("history/fall", 0.05))
# The velocity network is given the caption beside x_t, so that z0 need not carry it.
READS_CAPTION = fact("condition", "adaln", "cross_attention")
# A caption has many right pictures, far apart.
OPEN = above("data/left_open", 0.2, "share of the data's variance that a caption leaves open:")
# Where captions fix the picture z0 alone becomes it, and what is left for the field is jitter; a
# field that has less than half of the picture to paint takes more than some hundred steps to start.
ANSWERED = some(
    below("trivial/shoot/nmse", 0.1),
    every(below("trivial/shoot/nmse", 0.5), unless(OPEN), below("step", 1000)),
)
WEAK_KL = below("kl_weight", 0.1)
PLATEAU = every(
    unless(fact("lr_schedule", "cosine")),  # its end is flat by intent
    unless(below("step", 1000)),  # the loss of so few steps moves by more than it falls
    below("history/fall", 0.02, "over its last quarter loss/flow fell by", share=True),
    some(
        above("train/nmse", 0.3, "training nmse"),
        every(absent("train/nmse"), above("loss/flow", 0.5)),
    ),
    also("loss/flow"),
)


def anchored(r: Reading) -> Evidence | None:
    """mu is drawn to the mean picture: a narrow source starts where it should, and standing
    still is hard to beat.
    """
    return Evidence() if (r.facts.get("loss_weights") or {}).get("anchor", 0) > 0 else None


def if_anchored(limit: float, otherwise: float) -> Limit:
    return lambda r: otherwise if anchored(r) is None else limit


# Where a source has collapsed, and where it has grown away. A drawn picture has up to twice the
# error of the mean one, so from an anchored source a skill of -1 is the floor.
STD_FLOOR, STD_CEILING = if_anchored(0.05, 0.3), 1.6
SKILL_FLOOR = if_anchored(-1.0, -0.05)


def near_chance(t: str) -> Limit:
    """Of source/separation@t: a tenth of the way from a blind source to certainty."""
    return lambda r: 0.9 * r[f"trivial/source/separation@{t}"] + 0.1


# Another caption hardly changes the picture: by less than a quarter of what captions say of it.
FORGOTTEN = below("shoot/cond_gain", lambda r: 0.25 * (1 - r.get("data/left_open", 0.0)))


def too_high_fix(r: Reading) -> str:
    if not r.has("lr_peak"):
        return "optim.lr=1e-3, or a tenth of what it is"
    return f"optim.lr={text(r['lr_peak'] / 10)}"
