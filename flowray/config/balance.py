"""How the gradients of the losses are weighed against each other, beyond their weights."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field

from flowray.config.base import Config

Over = Literal["all", "source"]
Every = Annotated[int, Field(gt=0)]


def _band(value: Any) -> Any:
    """A single number is a band of no width."""
    return (value, value) if isinstance(value, int | float | str) else value


def _ordered(band: tuple[float, float]) -> tuple[float, float]:
    if not 0 < band[0] <= band[1]:
        raise ValueError(f"want 0 < low <= high, or one number above 0, got {list(band)}")
    return band


Band = Annotated[tuple[float, float], BeforeValidator(_band), AfterValidator(_ordered)]


class NoBalance(Config):
    """The weights as they are: one backward pass of the weighted sum."""

    kind: Literal["none"] = "none"


class ShareTargets(Config):
    """Weighted gradient norm of each loss relative to the flow loss's: [low, high], one number,
    or null: the loss keeps its weight.
    """

    kl: Band | None = (0.1, 0.3)
    clip: Band | None = None
    dino: Band | None = (0.2, 0.5)
    repa: Band | None = None
    lpips: Band | None = None
    tv: Band | None = None
    norm: Band | None = None
    anchor: Band | None = None


class SharesBalance(Config):
    """Hold each loss's weighted gradient norm, relative to the flow loss's, inside a band (the
    logs: dino:flow:kl 0.2-0.5 : 1 : 0.1-0.3).

    The band holds for the weight before its schedule, so that a warm-up stays a warm-up. The
    multipliers move every `every` steps, as an exponential average of their logarithm with
    `smoothing`, inside [1 / limit, limit]. over: gradients with respect to all parameters, or to
    the `source` side alone (text queries and head), which every loss reaches.
    """

    kind: Literal["shares"] = "shares"
    targets: ShareTargets = ShareTargets()
    every: Every = 50
    smoothing: float = Field(0.8, ge=0, lt=1)
    limit: float = Field(100.0, gt=1)
    over: Over = "all"


class GradNormBalance(Config):
    """GradNorm (Chen et al. 2018, arXiv 1711.02257): losses that fall slowly get larger gradients,
    the more so the larger alpha.

    lr: step of the multipliers, relative to the mean gradient norm. Every measured step costs a
    backward pass per loss.
    """

    kind: Literal["gradnorm"] = "gradnorm"
    alpha: float = Field(1.5, ge=0)
    lr: float = Field(0.025, gt=0)
    every: Every = 1
    over: Over = "source"


class PCGradBalance(Config):
    """PCGrad (Yu et al. 2020, arXiv 2001.06782): from each loss's gradient, the parts against
    another's are projected out.

    Needs torchjd. Costs a backward pass per loss at every step.
    """

    kind: Literal["pcgrad"] = "pcgrad"
    over: Over = "all"


BalanceConfig = Annotated[
    NoBalance | SharesBalance | GradNormBalance | PCGradBalance, Field(discriminator="kind")
]
