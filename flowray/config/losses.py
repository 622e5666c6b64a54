"""The training objective: every term's weight, schedule and options."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from flowray.config.balance import BalanceConfig, NoBalance
from flowray.config.base import Config
from flowray.config.errors import RuleError
from flowray.config.paths import OptionalPath
from flowray.config.towers import ClipNet, DinoV2Net, ImageNetConfig, SiglipNet

Weight = Annotated[float, Field(ge=0)]


class Constant(Config):
    """The weight as it is, at every step."""

    kind: Literal["constant"] = "constant"


class Linear(Config):
    """From 0 to the weight, over a number of steps or a fraction of the run (such as the KL
    warm-up: the first 10 %).
    """

    kind: Literal["linear"] = "linear"
    steps: int | None = Field(None, gt=0)
    fraction: float | None = Field(None, gt=0, le=1)

    @model_validator(mode="after")
    def _one_of(self) -> Linear:
        if (self.steps is None) == (self.fraction is None):
            raise RuleError(
                "a linear schedule takes either steps or fraction",
                "steps",
                "fraction",
                exclusive=True,
            )
        return self


class Until(Config):
    """The weight for the first `steps` steps, then 0; the field notes: LPIPS in the first 50k."""

    kind: Literal["until"] = "until"
    steps: int = Field(gt=0)


class Cosine(Config):
    """From the weight down to `floor` times it, along half a cosine over the run."""

    kind: Literal["cosine"] = "cosine"
    floor: float = Field(0.0, ge=0, le=1)


ScheduleConfig = Annotated[Constant | Linear | Until | Cosine, Field(discriminator="kind")]


class TermConfig(Config):
    """What every term has: a weight, and the weight as a function of the step. Weight 0: the
    term is not built.
    """

    weight: Weight = 0.0
    schedule: ScheduleConfig = Constant()


class FlowLossConfig(TermConfig):
    """Velocity MSE. source_grad: how it reaches the text latent: `full` (x_t and target), `path`
    (x_t only), `none`.
    """

    weight: Weight = 1.0
    source_grad: Literal["full", "path", "none"] = "full"


class KLLossConfig(TermConfig):
    """KL of the source posterior to N(0, I), mean over latent dims.

    box: (0.3 mu)^6 in place of mu^2 (CrossFlow; not nats).
    """

    weight: Weight = 1.0
    schedule: ScheduleConfig = Linear(fraction=0.1)
    form: Literal["box", "gaussian"] = "box"


class ClipLossConfig(TermConfig):
    """Symmetric InfoNCE between z0 and the semantic tower's view of z1; a learned,
    exponentiated, capped logit scale.
    """

    temperature: float = Field(0.07, gt=0, description="initial temperature")
    max_scale: float = Field(100.0, gt=0, description="cap of the logit scale")
    gather: bool = Field(
        True,
        description="negatives from every rank, with gradient; false: this rank's only (CrossFlow)",
    )


class EmaTeacher(Config):
    """The teacher is the student's moving average and sees the image latent z1; nothing to
    download.
    """

    kind: Literal["ema"] = "ema"
    momentum: float = Field(0.996, ge=0, lt=1)


class DinoLossConfig(TermConfig):
    """Cross-entropy of a student head on z0 with a teacher's centred, sharpened view of the same
    pair's image (DINO).

    teacher: `ema`, on z1, or a frozen picture encoder, on the decoded z1, whose pooled feature is
    read by its cosines with `prototypes` fixed random directions. Raise a temperature where
    ent/teacher or ent/student is near 0.
    """

    teacher: Annotated[
        EmaTeacher | DinoV2Net | SiglipNet | ClipNet, Field(discriminator="kind")
    ] = EmaTeacher()
    student_temperature: float = Field(0.1, gt=0)
    teacher_temperature: float = Field(0.04, gt=0)
    centre_momentum: float = Field(0.9, ge=0, le=1, description="1 switches the centring off")
    prototypes: int = Field(1024, gt=1)
    hidden: int = Field(64, gt=0, description="channels of the student's convolutions")
    bottleneck: int = Field(256, gt=0)

    @model_validator(mode="after")
    def _teacher_knows(self) -> DinoLossConfig:
        _wants_weights(self.teacher)
        return self


class RepaLossConfig(TermConfig):
    """Negative mean cosine of projected hidden tokens of the velocity network and a frozen
    encoder's patches (arXiv 2410.06940).
    """

    teacher: ImageNetConfig = DinoV2Net(path="facebook/dinov2-base")
    depth: int = Field(2, gt=0, description="the tokens are the output of this block, 1 the first")
    hidden: int = Field(2048, gt=0, description="width of the projector")

    @model_validator(mode="after")
    def _teacher_knows(self) -> RepaLossConfig:
        _wants_weights(self.teacher)
        return self


class LpipsLossConfig(TermConfig):
    """LPIPS (arXiv 1801.03924) of the decoded estimate x_t + (1 - t) v and the decoded target, on
    VGG16 features.

    vgg: VGG16 weights with torchvision's names (`features.N.weight`), .safetensors or .pth; linear:
    LPIPS's own layer weights (`linK.model.1.weight`), else all channels count alike. Not computed
    while its weight is 0: give it an `until` schedule.
    """

    schedule: ScheduleConfig = Until(steps=50_000)
    vgg: OptionalPath = None
    linear: OptionalPath = None
    size: int | None = Field(
        None, ge=16, description="side the pictures are resized to, px; as decoded if left out"
    )
    samples: int | None = Field(
        None,
        gt=0,
        description="only the first of each rank's batch: decoding with gradient is dear",
    )

    @model_validator(mode="after")
    def _has_weights(self) -> LpipsLossConfig:
        if self.weight > 0 and self.vgg is None:
            raise RuleError(
                "lpips needs vgg, a file of VGG16 weights such as vgg16.safetensors", "vgg"
            )
        return self


class TVLossConfig(TermConfig):
    """Mean |difference of neighbouring cells| of z0 (useful weights: 1e-6 to 5e-6)."""


class NormLossConfig(TermConfig):
    """Mean (||v|| - ||v*||)^2 over samples, the target detached."""


class AnchorLossConfig(TermConfig):
    """The source starts at the caption's pictures (a data-dependent prior, arXiv 2106.06406,
    2310.03725). form: `mse`, mean (mu - z1)^2, draws mu to their mean; `likelihood`, mean of (mu -
    z1)^2 / (2 sigma^2) + ln sigma, fits sigma to their spread too.

    The flow loss alone lets mu write down what a caption says in any code, however faint; the
    velocity network must then learn to read it. Anchored, whatever moves z1 moves mu as far and in
    the same direction, and the flow only adds what the caption leaves open.
    """

    form: Literal["mse", "likelihood"] = "mse"


def _wants_weights(teacher: Config) -> None:
    if getattr(teacher, "path", "") is None:
        raise RuleError("a frozen teacher needs a path; random weights teach nothing", "path")


class LossConfig(Config):
    """All terms; a term of weight 0 is not built."""

    flow: FlowLossConfig = FlowLossConfig()
    kl: KLLossConfig = KLLossConfig()
    clip: ClipLossConfig = ClipLossConfig()
    dino: DinoLossConfig = DinoLossConfig()
    repa: RepaLossConfig = RepaLossConfig()
    lpips: LpipsLossConfig = LpipsLossConfig()
    tv: TVLossConfig = TVLossConfig()
    norm: NormLossConfig = NormLossConfig()
    anchor: AnchorLossConfig = AnchorLossConfig()
    balance: BalanceConfig = NoBalance()

    @property
    def on_source(self) -> tuple[str, ...]:
        """The terms of weight above 0 that look at z0 or its posterior alone, by name."""
        named = ("kl", "clip", "dino", "tv", "anchor")
        return tuple(name for name in named if getattr(self, name).weight > 0)

    @model_validator(mode="after")
    def _everything_trains(self) -> LossConfig:
        if self.flow.weight == 0:
            raise RuleError(
                "flow.weight 0 leaves the velocity network untrained; it must be above 0",
                "flow.weight",
            )
        if (
            self.flow.source_grad == "none"
            and self.kl.weight == self.clip.weight == self.dino.weight == self.anchor.weight == 0
        ):
            raise RuleError(
                "flow.source_grad none with the weights of kl, clip, dino and anchor at 0 leaves"
                " the text side untrained; raise one of them",
                "flow.source_grad",
            )
        return self
