"""The training objective: every term's weight, schedule and options."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from flowray.config.base import Config

Weight = Annotated[float, Field(ge=0)]


class Constant(Config):
    """The weight as it is, at every step."""

    kind: Literal["constant"] = "constant"


class Linear(Config):
    """From 0 to the weight, over a number of steps or a fraction of the run (the logs' KL warm-up: the first 10 %)."""

    kind: Literal["linear"] = "linear"
    steps: int | None = Field(None, gt=0)
    fraction: float | None = Field(None, gt=0, le=1)

    @model_validator(mode="after")
    def _one_of(self) -> Linear:
        if (self.steps is None) == (self.fraction is None):
            raise ValueError("a linear schedule takes either steps or fraction")
        return self


class Until(Config):
    """The weight for the first `steps` steps, then 0 (the logs' perceptual loss: the first 50k)."""

    kind: Literal["until"] = "until"
    steps: int = Field(gt=0)


class Cosine(Config):
    """From the weight down to `floor` times it, along half a cosine over the run."""

    kind: Literal["cosine"] = "cosine"
    floor: float = Field(0.0, ge=0, le=1)


ScheduleConfig = Annotated[Constant | Linear | Until | Cosine, Field(discriminator="kind")]


class FlowLossConfig(Config):
    """Velocity MSE. source_grad: how it reaches the text latent: `full` (x_t and target), `path` (x_t only), `none`."""

    weight: Weight = 1.0
    schedule: ScheduleConfig = Constant()
    source_grad: Literal["full", "path", "none"] = "full"


class KLLossConfig(Config):
    """KL of the source posterior to N(0, I), mean over latent dims. box: (0.3 mu)^6 in place of mu^2 (CrossFlow; not nats)."""

    weight: Weight = 1.0
    schedule: ScheduleConfig = Linear(fraction=0.1)
    form: Literal["box", "gaussian"] = "box"


class ClipLossConfig(Config):
    """Symmetric InfoNCE between z0 and a trainable tower's view of z1; a learned, exponentiated, capped logit scale."""

    weight: Weight = 0.0
    schedule: ScheduleConfig = Constant()
    temperature: float = Field(0.07, gt=0, description="initial temperature")
    max_scale: float = Field(100.0, gt=0, description="cap of the logit scale")


class LossConfig(Config):
    """All terms; a term of weight 0 is not built."""

    flow: FlowLossConfig = FlowLossConfig()
    kl: KLLossConfig = KLLossConfig()
    clip: ClipLossConfig = ClipLossConfig()

    @model_validator(mode="after")
    def _everything_trains(self) -> LossConfig:
        if self.flow.weight == 0:
            raise ValueError("flow.weight 0 leaves the velocity network untrained; it must be above 0")
        if self.flow.source_grad == "none" and self.kl.weight == 0 and self.clip.weight == 0:
            raise ValueError("flow.source_grad none with kl.weight 0 and clip.weight 0 leaves the text side untrained; raise one of them")
        return self
