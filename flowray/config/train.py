"""Data, optimisation, cadence, probes and resources of a run."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from flowray.config.base import Config

Step = Annotated[int, Field(gt=0)]


class DataConfig(Config):
    """Where the pictures come from.

    shards: `shapes` or `digits` (made on first use), or a folder or glob of webdataset tars.
    val_shards: the held-out shards; the embedded sets bring their own.
    cache: where embedded shards and cached latents live; `~/.cache/flowray` unless FLOWRAY_CACHE says otherwise.
    """

    shards: str = "shapes"
    val_shards: str | None = None
    cache: str | None = None
    limit: int | None = Field(None, gt=0, description="use only the first `limit` samples")


class TrainSection(Config):
    """Length, batch and cadence. batch_size is global, over all workers and accumulated micro-batches."""

    steps: Step = 1000
    batch_size: Annotated[int, Field(gt=1)] = 32
    log_every: Step = 10
    probe_every: Step = 250
    sample_every: Step = 500
    checkpoint_every: Step = 500
    keep_checkpoints: Annotated[int, Field(ge=1)] = 2
    ema: float = Field(0.999, ge=0, lt=1, description="decay; warmed up as (1 + step) / (10 + step)")
    precision: Literal["fp32", "bf16"] = "fp32"
    device: Literal["auto", "cpu", "cuda"] = "auto"


class ConstantLR(Config):
    """lr after the warm-up."""

    kind: Literal["constant"] = "constant"
    warmup: int = Field(0, ge=0, description="linear warm-up, steps")


class CosineLR(Config):
    """Half a cosine from lr to floor * lr over the run."""

    kind: Literal["cosine"] = "cosine"
    warmup: int = Field(0, ge=0, description="linear warm-up, steps")
    floor: float = Field(0.0, ge=0, le=1)


class WarmRestarts(Config):
    """CosineWarmRestarts; the logs take T0 = 20k, T_mult = 1, eta_min = 2.5e-7."""

    kind: Literal["warm_restarts"] = "warm_restarts"
    warmup: int = Field(0, ge=0, description="linear warm-up, steps")
    t0: int = Field(20_000, gt=0)
    t_mult: int = Field(1, ge=1)
    eta_min: float = Field(2.5e-7, ge=0)


LRScheduleConfig = Annotated[ConstantLR | CosineLR | WarmRestarts, Field(discriminator="kind")]


class OptimConfig(Config):
    """AdamW. Heads, norms and biases take no decay; the multipliers set a group's lr relative to `lr`."""

    lr: float = Field(1e-3, gt=0)
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = Field(0.01, ge=0)
    clip_grad: float = Field(1.0, gt=0)
    head_lr_scale: float = Field(1.0, gt=0, description="text queries, head and semantic tower")
    schedule: LRScheduleConfig = CosineLR(warmup=50)


class ProbeConfig(Config):
    """The fixed held-out batch of the probes."""

    batch_size: Annotated[int, Field(ge=4)] = 64
    shoot_steps: Annotated[int, Field(gt=0)] = 100
    raw: bool = Field(True, description="probe the raw weights beside the EMA")
    seed: int = 1234


class ResourceConfig(Config):
    """What a run takes from the cluster. threads: torch threads of each worker; `auto` is cpus_per_worker."""

    num_workers: Annotated[int, Field(ge=1)] = 1
    cpus_per_worker: Annotated[int, Field(ge=1)] = 1
    gpus_per_worker: float = Field(0, ge=0)
    max_failures: Annotated[int, Field(ge=0)] = 3

    @model_validator(mode="after")
    def _whole_gpus(self) -> ResourceConfig:
        if self.gpus_per_worker > 1 and self.gpus_per_worker != int(self.gpus_per_worker):
            raise ValueError("gpus_per_worker above 1 must be whole")
        return self
