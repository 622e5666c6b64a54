"""The recipe: everything that decides a run."""

from __future__ import annotations

import re
from typing import Annotated

from pydantic import AfterValidator, Field, model_validator

from flowray.config.base import Config
from flowray.config.buckets import check_buckets
from flowray.config.errors import RuleError
from flowray.config.flow import FlowConfig, SampleConfig
from flowray.config.losses import LossConfig
from flowray.config.model import DiTVelocity, ModelConfig
from flowray.config.paths import StoragePath
from flowray.config.train import DataConfig, OptimConfig, ProbeConfig, ResourceConfig, TrainSection


def _folder_name(name: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
        raise ValueError("a name becomes a folder: letters, digits, '.', '_' and '-' only")
    return name


Name = Annotated[str, AfterValidator(_folder_name)]


class CardConfig(Config):
    """The hand-written fields of the experiment card; the rest of it is computed."""

    title: str = ""
    purpose: str = ""
    dataset: str = ""
    hardware: str = ""
    tags: tuple[str, ...] = ()
    notes: str = ""


class Recipe(Config):
    """A run, whole: `python -m flowray.train RECIPE` needs nothing else.

    storage_path: the folder that holds run directories; the run writes `<storage_path>/<name>`.
    """

    name: Name = "run"
    storage_path: StoragePath = "runs"
    seed: Annotated[int, Field(ge=0)] = 0
    card: CardConfig = CardConfig()
    data: DataConfig = DataConfig()
    model: ModelConfig = ModelConfig()
    flow: FlowConfig = FlowConfig()
    loss: LossConfig = LossConfig()
    optim: OptimConfig = OptimConfig()
    train: TrainSection = TrainSection()
    probes: ProbeConfig = ProbeConfig()
    sample: SampleConfig = SampleConfig()
    resources: ResourceConfig = ResourceConfig()

    @model_validator(mode="after")
    def _batch_splits(self) -> Recipe:
        workers, batch, parts = (
            self.resources.num_workers,
            self.train.batch_size,
            self.train.accumulate,
        )
        if batch % workers:
            raise RuleError(
                f"train.batch_size {batch} must be a multiple of resources.num_workers {workers}",
                "train.batch_size",
                "resources.num_workers",
            )
        if batch % (workers * parts):
            raise RuleError(
                f"train.batch_size {batch} must be a multiple of resources.num_workers {workers} x"
                f" train.accumulate {parts}",
                "train.batch_size",
                "resources.num_workers",
                "train.accumulate",
            )
        return self

    @model_validator(mode="after")
    def _batch_splits_whoever_is_left(self) -> Recipe:
        least, most, batch = (
            self.resources.least_workers,
            self.resources.num_workers,
            self.train.batch_size,
        )
        if unlike := [count for count in range(least, most) if batch % count]:
            raise RuleError(
                f"train.batch_size {batch} must be a multiple of every number of workers from"
                f" resources.min_workers {least} to resources.num_workers {most}, and is not of"
                f" {unlike[0]}",
                "train.batch_size",
                "resources.min_workers",
                "resources.num_workers",
            )
        return self

    def for_workers(self, count: int) -> Recipe:
        """The recipe with `train.accumulate` for another number of workers: their micro-batches are
        as large as those of `resources.num_workers`, or the next smaller size that fits, so that
        they take no more memory for them. The global batch stays.
        """
        planned, share = self.resources.num_workers, self.train.batch_size // count
        least = -(-self.train.accumulate * planned // count)
        parts = next(parts for parts in range(least, share + 1) if share % parts == 0)
        return self.model_copy(
            update={"train": self.train.model_copy(update={"accumulate": parts})}
        )

    @model_validator(mode="after")
    def _parts_suffice(self) -> Recipe:
        """What needs all weights, or each loss's own gradient, on one worker."""
        shard = self.resources.shard
        whole = {
            "loss.balance.kind": self.loss.balance.kind != "none",
            "train.grad_every": self.train.grad_every > 0,
            "probes.doctor_every": self.probes.doctor_every > 0,
        }
        if shard != "none" and (wanted := [key for key, on in whole.items() if on]):
            raise RuleError(
                f"resources.shard {shard} leaves no worker all weights, as"
                f" {' and '.join(wanted)} would have it; set one of them to"
                " none or 0",
                "resources.shard",
                *wanted,
            )
        if self.resources.shard_text and (shard == "none" or self.model.text.cache):
            # workers that find a caption kept would not ask for the parts, and others wait
            raise RuleError(
                "resources.shard_text wants resources.shard full or hybrid and model.text.cache"
                " false",
                "resources.shard_text",
                "resources.shard",
                "model.text.cache",
            )
        return self

    @model_validator(mode="after")
    def _losses_have_a_source(self) -> Recipe:
        if self.model.source.kind == "noise" and (idle := self.loss.on_source):
            keys = [f"loss.{name}.weight" for name in idle]
            raise RuleError(
                f"model.source noise trains no source: set {', '.join(keys)} to 0",
                "model.source.kind",
                *keys,
            )
        return self

    @model_validator(mode="after")
    def _repa_hears_every_token(self) -> Recipe:
        velocity, repa = self.model.velocity, self.loss.repa
        if repa.weight == 0 or not isinstance(velocity, DiTVelocity):
            return self
        if repa.depth - 1 in velocity.routed:
            first, last = velocity.routed[0] + 1, velocity.routed[-1] + 1
            raise RuleError(
                f"loss.repa.depth {repa.depth} reads a block that model.velocity.route sends only a"
                f" part of the tokens through; blocks {first} to {last} are such",
                "loss.repa.depth",
                "model.velocity.route",
            )
        return self

    @model_validator(mode="after")
    def _buckets_fit(self) -> Recipe:
        check_buckets(self.data, self.model, self.loss, self.train)
        return self
