"""The path, the training times, the solver and the guidance of sampling."""

from __future__ import annotations

from itertools import pairwise
from typing import Annotated, Literal

from pydantic import Field, model_validator

from flowray.config.base import Config
from flowray.config.errors import RuleError

Share = Annotated[float, Field(ge=0, le=1)]


class PathConfig(Config):
    """Noise-free linear path; rho = sigma_min / sigma_max is what remains of z0 at t = 1
    (CrossFlow).
    """

    sigma_min: float = Field(1e-5, ge=0)
    sigma_max: float = Field(1.0, gt=0)

    @property
    def rho(self) -> float:
        return self.sigma_min / self.sigma_max


class UniformTime(Config):
    """t ~ U[0, 1]."""

    kind: Literal["uniform"] = "uniform"
    uniform_floor: Share = 0.0


class LogitNormalTime(Config):
    """t = sigmoid(N(mean, std)) (Stable Diffusion 3; CrossFlow uses mean 0, std 1)."""

    kind: Literal["logit_normal"] = "logit_normal"
    mean: float = 0.0
    std: float = Field(1.0, gt=0)
    uniform_floor: Share = 0.1


class LogSNRTime(Config):
    """lambda ~ U[low, high], t = sigmoid(lambda / 2): log-SNR in [-2, 6] is t in
    [0.27, 0.95].
    """

    kind: Literal["log_snr"] = "log_snr"
    low: float = -2.0
    high: float = 6.0
    uniform_floor: Share = 0.2

    @model_validator(mode="after")
    def _ordered(self) -> LogSNRTime:
        if self.low >= self.high:
            raise RuleError(f"low {self.low} must lie below high {self.high}", "low", "high")
        return self


class AlphaTime(Config):
    """t ~ U[low, high] inside [0, 1]: alpha in [0.6, 0.98]."""

    kind: Literal["alpha"] = "alpha"
    low: Share = 0.6
    high: Share = 0.98
    uniform_floor: Share = 0.2

    @model_validator(mode="after")
    def _ordered(self) -> AlphaTime:
        if self.low >= self.high:
            raise RuleError(f"low {self.low} must lie below high {self.high}", "low", "high")
        return self


TimeConfig = Annotated[
    UniformTime | LogitNormalTime | LogSNRTime | AlphaTime, Field(discriminator="kind")
]


def _must_cover_0(time: UniformTime | LogitNormalTime | LogSNRTime | AlphaTime, where: str) -> None:
    covered = time.kind == "uniform" or (time.kind == "alpha" and time.low == 0)
    if not covered and time.uniform_floor == 0:
        raise RuleError(
            f"time {time.kind} {where} leaves t = 0 untrained; its uniform_floor must be above 0",
            "time",
            "uniform_floor",
        )


class TimeStage(Config):
    """The training times until a step or a fraction of the run; a range must leave a floor, since
    sampling starts at t = 0.

    The logs' first 30k steps: `{steps: 30000, time: {kind: alpha, low: 0.8, high: 1.0}}`.
    """

    steps: int | None = Field(None, gt=0)
    fraction: float | None = Field(None, gt=0, le=1)
    time: TimeConfig

    @model_validator(mode="after")
    def _whole(self) -> TimeStage:
        if (self.steps is None) == (self.fraction is None):
            raise RuleError(
                "a stage of flow.curriculum takes either steps or fraction, the end of the stage"
                " counted from step 0",
                "steps",
                "fraction",
                exclusive=True,
            )
        _must_cover_0(self.time, "in flow.curriculum")
        return self


class FlowConfig(Config):
    """Path, training times and the share of null samples that classifier-free guidance needs.

    curriculum: stages of other training times before `time` takes over, in order, such as `[{steps:
    30000, time: {kind: alpha, low: 0.8, high: 1.0}}]`. With one, every stage and `time` must cover
    t = 0.
    """

    path: PathConfig = PathConfig()
    time: TimeConfig = UniformTime()
    curriculum: tuple[TimeStage, ...] = ()
    null_probability: Share = 0.1

    @model_validator(mode="after")
    def _stages_follow(self) -> FlowConfig:
        for ends in (
            [stage.steps for stage in self.curriculum if stage.steps],
            [s.fraction for s in self.curriculum if s.fraction],
        ):
            if any(later <= earlier for earlier, later in pairwise(ends)):
                raise RuleError(
                    f"the stages of curriculum must end one after the other, got {ends}",
                    "curriculum",
                )
        if self.curriculum:
            _must_cover_0(self.time, "after flow.curriculum")
        return self


class EulerSolver(Config):
    """Euler steps; the velocity is read at each interval's midpoint, left edge, or
    CrossFlow's endpoint grid.
    """

    kind: Literal["euler"] = "euler"
    nodes: Literal["midpoint", "left", "endpoint"] = "midpoint"


class HeunSolver(Config):
    """Explicit trapezoid, order 2, two evaluations a step."""

    kind: Literal["heun"] = "heun"


class MidpointSolver(Config):
    """Explicit midpoint, order 2, two evaluations a step."""

    kind: Literal["midpoint"] = "midpoint"


class Dopri5Solver(Config):
    """Dormand-Prince 5(4) with its own step for every sample."""

    kind: Literal["dopri5"] = "dopri5"
    rtol: float = Field(1e-5, gt=0)
    atol: float = Field(1e-5, gt=0)
    max_steps: int = Field(1000, gt=0)


SolverConfig = Annotated[
    EulerSolver | HeunSolver | MidpointSolver | Dopri5Solver, Field(discriminator="kind")
]


class SampleConfig(Config):
    """How pictures are drawn: solver, time grid, guidance scale s (1 is off; a scale w that is off
    at 0 is s - 1).

    guidance_interval: the times, both ends counted, between which there is guidance
    (Kynkaanniemi et al. 2024, arXiv 2404.07724); guidance_rescale: how far, 0 to 1, the guided
    velocity is brought back to the size of the plain one (Lin et al. 2023, arXiv 2305.08891).
    batch_size: how many pictures are drawn at once, always as many: a smaller rest is filled up, so
    that a picture is the same to the last bit whatever is drawn beside it. precision: autocast's
    dtype of head and velocity network; the state stays fp32.
    """

    solver: SolverConfig = EulerSolver()
    steps: int = Field(20, gt=0)
    grid: Literal["uniform", "logit_normal"] = "uniform"
    guidance_scale: float = Field(1.0, ge=0)
    guidance_interval: tuple[Share, Share] = (0.0, 1.0)
    guidance_rescale: Share = 0.0
    batch_size: int = Field(16, gt=0)
    precision: Literal["fp32", "bf16"] = "fp32"
    weights: Literal["ema", "raw"] = "ema"
    prompts: tuple[str, ...] = Field(
        (), description="prompts of the sample grid; empty: some of the held-out captions"
    )

    @model_validator(mode="after")
    def _interval_in_order(self) -> SampleConfig:
        low, high = self.guidance_interval
        if low > high:
            raise RuleError(
                f"guidance_interval begins at {low} and ends at {high}; its end must not lie before"
                " its beginning",
                "guidance_interval",
            )
        return self
