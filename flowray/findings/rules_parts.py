"""Findings about parts and inputs that take no part in what is computed, one for each row of a
table: flowray/doctor/parts.py asks them all the same three questions.
"""

from __future__ import annotations

from dataclasses import dataclass

from flowray.findings.checks import (
    Check,
    Evidence,
    Limit,
    above,
    asked,
    below,
    every,
    fact,
    given,
    say,
    some,
    text,
    unless,
)
from flowray.findings.consequences import BAD_FIELD, BAD_PICTURES, NO_TEXT
from flowray.findings.finding import Severity
from flowray.findings.reading import Reading
from flowray.findings.rule import Rule

# Nothing at all. After a hundred steps of a learning rate of next to nothing what lies behind the
# zero layers still has 1e-9 of the greatest gradient; healthy small runs have 4e-4 and more.
NO_GRADIENT = 1e-10
# Healthy runs: 0.16 to 1. A group at a hundredth of the lr is somebody's choice.
STILL = 1e-3
# The first steps open the gates, which start at 0, and the network's last layer.
LEARNT = unless(below("step", 20))
SOURCE = ("source_collapsed", "source_inflated", "logvar_saturated", "kl_crushing", "kl_drowned")


@dataclass(frozen=True)
class Part:
    """name: of part/NAME/*, words: what it is, names: its parameters, group: of optim.lr_scale.

    input: of input/NAME/matters, whose silence is the same fault. unfelt: below this share of the
    velocity nobody notices it. within: a part that is nothing without it, nor it without that; what
    befalls both is said of that.
    """

    id: str
    name: str
    words: str
    names: str
    group: str = "trunk"
    unfelt: float = 1e-6
    input: str = ""
    within: str = ""
    severity: Severity = "bad"
    explains: tuple[str, ...] = ()

    def dead(self, kind: str, limit: float, words: str) -> Check:
        """The number is below the limit, and of which piece it is."""
        key = f"part/{self.name}/{kind}"

        def piece(r: Reading) -> str:
            least = (r.facts.get("least") or {}).get(key)
            return f"the least of several, of {least}" if least else ""

        return every(LEARNT, below(key, limit, words), say(piece))

    @property
    def ungiven(self) -> Check:
        found = self.dead("grad", NO_GRADIENT, "gradient, over the greatest of any part:")
        both = below(f"part/{self.within}/grad", NO_GRADIENT)
        return every(found, unless(both)) if self.within else found

    @property
    def still(self) -> Check:
        found = self.dead("moved", STILL, "moved from the start, over the most of any part:")
        given = unless(below(f"part/{self.name}/grad", NO_GRADIENT))
        return every(found, given) if self.within else found

    @property
    def unheard(self) -> Check:
        """Without it the velocity is the same."""
        if self.within:
            return lambda r: None
        missing = self.dead("matters", self.unfelt, "change of the velocity without it, as a share")
        if not self.input:
            return missing
        other = below(
            f"input/{self.input}/matters", self.unfelt, "change of the velocity with another one's"
        )
        return some(missing, every(LEARNT, other))

    def cause(self, r: Reading) -> str:
        ungiven, still, unheard = (
            asked(check, r) is not None for check in (self.ungiven, self.still, self.unheard)
        )
        if ungiven and unheard:
            return (
                f"{self.words}: neither a gradient nor an effect; nothing reads what it makes, or"
                " it is detached and still the zero that it started as"
            )
        if ungiven:
            return (
                f"{self.words}: computed with, but without a gradient; detached, under no_grad or"
                " with requires_grad off"
            )
        if still:
            return (
                f"{self.words}: has a gradient and does not move; left out of the optimiser, or"
                " with a learning rate of nothing"
            )
        return f"{self.words}: trains, and the velocity is the same without it"

    def fix(self, r: Reading) -> str:
        if asked(self.ungiven, r) is None and asked(self.still, r) is not None:
            return (
                f"optim.lr_scale.{self.group}=1; {self.names} must be among model.trainable() and"
                " in a group of the optimiser"
            )
        return f"follow {self.names} through the forward pass: to be called, added and not detached"

    def rule(self) -> Rule:
        when = some(self.ungiven, self.still, self.unheard)
        return Rule(self.id, self.severity, when, self.cause, self.fix, self.explains)


# Upstream last: where a later one is cut off, those before it are without a gradient too.
TRUNK = (
    "gates_idle",
    "block_idle",
    "patches_unheard",
    "time_unused",
    "null_unused",
    "caption_idle",
    "patches_idle",
)
TEXT = ("connector_idle", "queries_idle")
TABLE = (
    Part(
        "output_idle",
        "output",
        "the velocity network's last layer",
        "velocity.patch_out (dimr: velocity.*.out)",
        "flow_head",
        explains=(*TRUNK, *TEXT, *BAD_FIELD, "dead_head", "head_idle", "positions_unused"),
    ),
    Part(
        "gates_idle",
        "gates",
        "the gates of the blocks (adaLN)",
        "velocity.blocks.*.modulation",
        within="blocks",
        explains=(
            "block_idle",
            "patches_unheard",
            "time_unused",
            "null_unused",
            "caption_idle",
            *BAD_FIELD,
        ),
    ),
    Part(
        "block_idle",
        "blocks",
        "a block of the velocity network, or the gate that lets it in",
        "velocity.blocks.*",
        explains=(
            "patches_idle",
            "patches_unheard",
            "positions_unused",
            "time_unused",
            "null_unused",
            *BAD_FIELD,
        ),
    ),
    Part("patches_idle", "patches", "the layer that reads x_t", "velocity.patch_in", input="x"),
    Part(
        "time_unused",
        "time",
        "the time code's embedding",
        "velocity.time (dimr: the time-dependent norms)",
        input="time",
        explains=(*BAD_FIELD, "time_untrained"),
    ),
    Part(
        "null_unused",
        "null",
        "the null indicator's embedding",
        "velocity.null",
        unfelt=1e-7,
        input="null",
        severity="warn",
    ),
    Part(
        "caption_idle",
        "caption",
        "what reads the caption beside x_t",
        "velocity.pooled or velocity.caption",
        explains=("caption_unused", *TEXT, *NO_TEXT),
    ),
    Part(
        "head_idle",
        "head",
        "the head, which makes z0 of the text's tokens",
        "head",
        "z_head",
        explains=(
            "caption_unused",
            "clip_detached",
            "dino_detached",
            "anchor_detached",
            *TEXT,
            *NO_TEXT,
            *BAD_PICTURES,
            *SOURCE,
            "dead_head",
            "gain_would_hurt",
        ),
    ),
    Part(
        "connector_idle",
        "connector",
        "the connector behind the text model",
        "text.connector",
        "text",
        explains=("caption_unused", "queries_idle", *NO_TEXT),
    ),
    Part(
        "mu_idle",
        "mu",
        "mu, the mean of z0",
        "mu",
        "z_head",
        explains=("caption_unused", *NO_TEXT, *SOURCE),
    ),
    Part("queries_idle", "queries", "the meta queries", "text.queries", "text", unfelt=1e-7),
    Part(
        "tower_idle",
        "tower",
        "the contrastive tower",
        "semantic.clip.tower",
        "text",
        explains=("clip_weak",),
    ),
    Part(
        "student_idle",
        "student",
        "the DINO student",
        "semantic.dino.student",
        "text",
        explains=("dino_weak",),
    ),
    Part("projector_idle", "projector", "REPA's projector", "semantic.repa.projector", "text"),
)


def _drawn(key: str, limit: Limit, words: str) -> Check:
    return below(f"input/{key}", limit, words)


def _null_words(r: Reading) -> str:
    return f"null samples {text(r['input/null/share'])}, flow.null_probability asks"


TIME_ROWS = _drawn("time/rows", 0.2, "spread of t within a batch, over the recipe's:")
TIME_STEPS = _drawn("time/steps", 0.05, "difference of t from step to step, over the recipe's:")
AS_DRAWN = "flow/draws.py and train/step.py of changed source: a stream is seeded by the step"

DRAWN: tuple[Rule, ...] = (
    Rule(
        "noise_unused",
        "bad",
        some(
            _drawn("noise/std", 0.7, "std of z0 about its mean, in sigmas:"),
            above("input/noise/std", 1.4, "std of z0 about its mean, in sigmas:"),
        ),
        "z0 is not mean + sigma * noise: training starts from the mean, or noise of another width",
        "posterior.sample(noise) once, with noise ~ N(0, 1)",
        ("noise_shared", "noise_frozen", *SOURCE, *BAD_FIELD),
    ),
    Rule(
        "noise_shared",
        "bad",
        _drawn("noise/rows", 0.5, "how the noise of two samples differs (1 - cosine):"),
        "all samples of a batch have the same noise: the field learns one start of a picture",
        AS_DRAWN,
        ("time_untrained", *BAD_FIELD),
    ),
    Rule(
        "noise_frozen",
        "bad",
        _drawn("noise/steps", 0.5, "how the noise of two steps differs (1 - cosine):"),
        "every step has the same noise: training never leaves a few starts, and pictures are drawn"
        " from others",
        AS_DRAWN,
        (*BAD_FIELD, "memorised"),
    ),
    Rule(
        "time_frozen",
        "bad",
        some(TIME_ROWS, TIME_STEPS),
        lambda r: (
            "the time code is one number for the whole batch"
            if asked(TIME_ROWS, r)
            else "every step has the same times"
        ),
        f"{AS_DRAWN}; time_code(t) of the sample's own t is what the network is given",
        ("time_misdrawn", "time_unused", "time_untrained", *BAD_FIELD),
    ),
    Rule(
        "time_misdrawn",
        "warn",
        # of a sample of the right distribution 5e-5 are above
        above("input/time/off", 2.3, "distance of the drawn t from flow.time (Kolmogorov):"),
        "training times are not distributed as the recipe says",
        "flow/time.py of changed source, and flow.curriculum: which stage is in force at this step",
        ("time_untrained", *BAD_FIELD),
    ),
    Rule(
        "null_misdrawn",
        "warn",
        every(
            above("input/null/off", 4.5, "share of null samples, in standard errors off:"),
            say(_null_words),
            fact("null_probability"),
        ),
        "null samples are not as many as the recipe asks: what guidance would need is not trained,"
        " or too much of the rest is lost",
        "null_partners in flow/draws.py, and that the flag reaches the velocity network",
        ("null_unused", "guidance_without_null"),
    ),
    Rule(
        "positions_unused",
        "bad",
        every(
            LEARNT,
            _drawn(
                "position/matters", 1e-3, "change of the velocity when patches change places, share"
            ),
        ),
        "the velocity network does not know where a patch lies: without positions attention treats"
        " a picture as a bag of patches",
        "velocity.positions added to the tokens of x_t (model/dit.py of changed source)",
        BAD_FIELD,
    ),
    Rule(
        "patches_unheard",
        "bad",
        every(
            LEARNT,
            _drawn("patches/heard", 0.5, "share of patches whose change other patches notice:"),
        ),
        "the velocity of a patch does not see most of the others: attention is cut off, by a mask"
        " or a window too narrow",
        "attention over all tokens of x_t (model/layers.py of changed source)",
        (*BAD_FIELD, "positions_unused"),
    ),
    Rule(
        "caption_unused",
        "bad",
        every(
            LEARNT,
            _drawn(
                "caption/matters", 1e-6, "change of the velocity with other captions, as a share"
            ),
        ),
        "the velocity is the same whatever the captions say: they are lost between text and z0,"
        " and not read beside it",
        "follow the captions through model.source: tokens, head, posterior; or"
        " 'model.velocity.condition={kind: adaln}'",
        (*NO_TEXT, "queries_idle", "connector_idle"),
    ),
)


def _has_head(r: Reading) -> Evidence | None:
    return Evidence() if r.has("part/head/grad") else None


def _detached(loss: str, words: str, explains: tuple[str, ...]) -> Rule:
    """Of losses whose share in the source's gradient is 4e-4 or more, however weak or saturated."""
    return Rule(
        f"{loss}_detached",
        "bad",
        every(
            _has_head,
            given(above(f"weight/{loss}", 0.0)),
            below(
                f"grad/{loss}_head",
                lambda r: 1e-9 * r["grad/total"],
                f"gradient of loss/{loss} in head and text",
            ),
        ),
        f"{words} trains nothing of the source: z0 or mu is detached before it",
        f"follow z0 from model.source to loss/{loss}: no detach(), no no_grad",
        explains,
    )


DETACHED = (
    _detached("clip", "the contrastive loss", (*NO_TEXT, "tower_idle")),
    _detached("dino", "the DINO loss", ("dino_weak", "student_idle")),
    _detached("anchor", "the anchor", ("source_collapsed", "source_averages", *NO_TEXT)),
)
PARTS: tuple[Rule, ...] = (*DRAWN, *(part.rule() for part in TABLE), *DETACHED)
