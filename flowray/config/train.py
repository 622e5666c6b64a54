"""Data, optimisation, cadence, probes and resources of a run."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, model_validator

from flowray.config.base import Config
from flowray.config.errors import RuleError
from flowray.config.keys import describe
from flowray.config.partial import PATTERN, parse_part
from flowray.config.paths import (
    OptionalBucket,
    OptionalPath,
    OptionalRun,
    OptionalShards,
    ShardsPath,
)
from flowray.config.prepare import PrepareConfig

Step = Annotated[int, Field(gt=0)]
Positive = Annotated[float, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]


def _part(value: object) -> object:
    if isinstance(value, str) and value not in ("true", "false"):
        parse_part(value)
    return value


PartialText = Annotated[str, Field(pattern=PATTERN)]
# before it is told apart from true and false, so that a text gets one error and not one of each
Partial = Annotated[bool | PartialText, BeforeValidator(_part)]
CHECKED = ("shapes", "shapes_closed")  # data.shards whose pictures can be checked exactly
LEFT_OPEN = "shapes"  # of them the one whose captions leave things open
MomentsKind = Literal["fp16", "bf16", "fp32"]
OPEN_SCORES = ("named", "coverage_excess")  # of flowray.eval's `open`, what sweeps go by
FRECHET = "frechet"  # beside them, and of flowray.eval's `neighbours`
# of `neighbours`, beside the accuracies of what the samples' JSON says
OTHER_SCORES = (FRECHET, "kernel", "precision", "recall", "density", "coverage", "diversity")
_OF_PARTS = ("colour", "shape", "size", "position", "background")
_OF_ONE_OBJECT = ("all_correct", "mean_attribute_accuracy", *_OF_PARTS)
# of `shapes`, on pictures of CHECKED
CHECKED_SCORES = (
    *_OF_ONE_OBJECT,
    *(f"two_objects/{name}" for name in ("relation", "binding", "all")),
    *(f"unseen/{name}" for name in _OF_ONE_OBJECT),
)


class DataConfig(Config):
    """Where the pictures come from.

    shards: `shapes`, `shapes_closed` or `digits` (made on first use), `emoji_64`, `emoji_128` or
    `emoji_256` (as `flowray.data make emoji` made them), a folder or glob of webdataset tars, or
    an address of these: `s3://`, `gs://`, `hf://`, `https://`.
    val_shards: the held-out shards; the named sets bring their own.
    cache: where embedded shards and cached latents live; unless FLOWRAY_CACHE says otherwise,
    `flowray` in XDG_CACHE_HOME or ~/.cache, and where that cannot be written, in the temporary
    folder.
    """

    shards: ShardsPath = "shapes"
    val_shards: OptionalShards = None
    cache: OptionalPath = None
    remote_cache_gb: float = Field(
        20.0,
        gt=0,
        description=(
            "how much of shards that have an address the cache keeps at most, in 1e9 bytes; those"
            " used longest ago go first"
        ),
    )
    partial: Partial = Field(
        False,
        description=(
            "train on the shards of data.shards that are encoded already; a run's config.yaml then"
            " names them, as in 0-11,14/40@1a2b3c4d, and its resumes keep to them"
        ),
    )
    prefetch: int = Field(
        1,
        ge=0,
        le=64,
        description=(
            "how many batches are made ahead of the step that trains, each held until its turn, on"
            " the GPU where there is one; 0: each is made when it is needed"
        ),
    )
    limit: int | None = Field(None, gt=0, description="use only the first `limit` samples")
    max_bad: float = Field(
        0.001,
        ge=0,
        le=1,
        description=(
            "the share of a split's samples that may be left out as bad when latents are made: no"
            " picture, one that does not decode or is of another size, no caption, latents that are"
            " not finite; 0 allows none"
        ),
    )
    prepare: PrepareConfig = PrepareConfig()
    moments: MomentsKind = Field(
        "fp16",
        description=(
            "the numbers that latents are cached in; bf16 for values beyond 65504, fp32 where half"
            " precision moves a sample's by more than 1 % of a channel's std, as encoding says"
        ),
    )
    caption_key: str | None = Field(
        None,
        min_length=1,
        description=(
            "the key of the samples' .json that has their captions; null: `captions`, `caption` or"
            " `text`, else the .txt"
        ),
    )
    aspect_ratios: tuple[Annotated[float, Field(ge=0.25, le=4)], ...] = Field(
        (),
        max_length=63,
        description=(
            "width / height of buckets beside `model.latent`'s own, of no more cells: a training"
            " picture is cropped to the nearest one, a batch is of one; empty: no buckets"
        ),
    )
    aspect_step: int = Field(
        1, gt=0, description="the buckets' latents have sides of multiples of so many cells"
    )
    shuffle_captions: bool = Field(
        False,
        description=(
            "every training picture gets the captions of another one, drawn by `seed`: the control"
            " without a condition"
        ),
    )


class TrainSection(Config):
    """Length, batch and cadence. batch_size is global, over all workers and accumulated
    micro-batches.

    accumulate: a rank's share goes through the model in this many micro-batches, one after the
    other. Losses that compare the samples of a batch with each other (contrastive negatives) see
    one micro-batch at a time; all others give the same gradient.
    grad_every: how often the norms and cosines of the single losses' gradients and the heads'
    update ratios are measured, which costs a backward pass per loss; 0 is never.
    precision: autocast's dtype; weights, path, losses and the optimiser stay fp32. fp16 also scales
    the loss. tf32: fp32, of which a GPU rounds a product's factors to 10 bits of mantissa in a
    step's forward and backward pass.
    max_skipped: a step whose loss or gradient is not finite does not reach the weights and is
    written to skipped_steps.jsonl; after more of them than this in all, training halts.
    rollback_after: after so many in a row, as of a logged step, the weights go back to the last
    checkpoint and training goes on with the next batch; 0 is never.
    """

    steps: Step = 1000
    init_from: OptionalRun = Field(
        None,
        description=(
            "the weights of a run, checkpoint, export or single file that a new run starts from;"
            " its resumes go on from its own"
        ),
    )
    batch_size: Annotated[int, Field(gt=1)] = 32
    log_every: Step = 10
    probe_every: Step = 250
    sample_every: Step = 500
    checkpoint_every: Step = 500
    keep_checkpoints: Annotated[int, Field(ge=1)] = 2
    keep_best: str | None = Field(
        None,
        description=(
            "a key of probes.jsonl: the checkpoint with its best value stays beside the newest,"
            " addressed as RUN/checkpoints/best; of the steps with both a probe and a checkpoint"
        ),
    )
    checkpoint_url: OptionalBucket = Field(
        None,
        description=(
            "a bucket's folder, s3:// or gs://: checkpoints and rows are also sent to"
            " CHECKPOINT_URL/NAME beside training, and a resume looks there too"
        ),
    )
    checkpoint_patience_s: float = Field(
        3600.0,
        ge=0,
        description="how long training goes on while no checkpoint can be sent to checkpoint_url",
    )
    on_changed_data: Literal["refuse", "continue"] = Field(
        "refuse",
        description=(
            "a resume with other samples or another batch_size than the checkpoint was trained"
            " with: `continue` goes on at the sample where it stopped, counted by samples seen, and"
            " lets `data` keys differ; schedules count steps"
        ),
    )
    ema: float = Field(
        0.999, ge=0, lt=1, description="decay; warmed up as (1 + step) / (10 + step)"
    )
    precision: Literal["fp32", "tf32", "bf16", "fp16"] = "fp32"
    velocity_fp32: bool = Field(
        False, description="the velocity network in fp32 under bf16 or fp16"
    )
    loss_scale: float = Field(
        65536.0,
        gt=0,
        description=(
            "fp16's loss scale at the start; halved on overflow, doubled after 2000 good steps"
        ),
    )
    accumulate: Annotated[int, Field(ge=1)] = 1
    grad_every: Annotated[int, Field(ge=0)] = 0
    max_skipped: Annotated[int, Field(ge=0)] = 20
    rollback_after: Annotated[int, Field(ge=0)] = 5
    device: Literal["auto", "cpu", "cuda"] = "auto"
    compile: bool = Field(
        False,
        description=(
            "each block of the velocity network through torch.compile, in training steps alone:"
            " the first step takes some 10 s on a GPU, a minute or two on a CPU"
        ),
    )

    @property
    def is_half(self) -> bool:
        """Whether activations take two bytes."""
        return self.precision in ("bf16", "fp16")

    @property
    def checkpoints_on_disk(self) -> int:
        """How many there are at most, beside the one that is being written."""
        newest = self.keep_checkpoints
        if self.checkpoint_url:  # the one that is being sent, and the one before that waits
            newest = max(newest, 2) + 1
        return newest + (self.keep_best is not None)

    @model_validator(mode="after")
    def _best_has_a_direction(self) -> TrainSection:
        if self.keep_best is not None:
            key = describe(self.keep_best)
            if key is None or key.direction == "none":
                why = "flowray writes no such metric" if key is None else "has no better side"
                raise RuleError(
                    f"keep_best {self.keep_best}: {why}; want one such as ema/shoot/nmse",
                    "keep_best",
                )
        return self

    @model_validator(mode="after")
    def _measured_is_logged(self) -> TrainSection:
        if self.grad_every % self.log_every:
            raise RuleError(
                f"grad_every {self.grad_every} must be a multiple of log_every {self.log_every}, or"
                " its rows would be lost",
                "grad_every",
                "log_every",
            )
        return self


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
    """CosineWarmRestarts; the field notes take T0 = 20k, T_mult = 1, eta_min = 2.5e-7.

    start: the step at which the first cycle begins, lr being constant before it; `resume`: at the
    checkpoint from which the run goes on when it first has this schedule (later resumes keep to
    it). eta_min: the lr at a cycle's end; `current`: the lr with which that checkpoint was reached.
    The logs' cure for a plateau, at twice the lr: `--resume optim.lr=5e-6 'optim.schedule={kind:
    warm_restarts, start: resume, eta_min: current}'`.
    """

    kind: Literal["warm_restarts"] = "warm_restarts"
    warmup: int = Field(0, ge=0, description="linear warm-up, steps")
    t0: int = Field(20_000, gt=0)
    t_mult: int = Field(1, ge=1)
    eta_min: NotNegative | Literal["current"] = 2.5e-7
    start: Annotated[int, Field(ge=0)] | Literal["resume"] = 0

    @model_validator(mode="after")
    def _current_of_what(self) -> WarmRestarts:
        if self.eta_min == "current" and self.start != "resume":
            raise RuleError(
                "eta_min current is the lr of a checkpoint; it needs start resume",
                "eta_min",
                "start",
            )
        return self


LRScheduleConfig = Annotated[ConstantLR | CosineLR | WarmRestarts, Field(discriminator="kind")]


class GroupScales(Config):
    """Each group's lr relative to `optim.lr`."""

    text: Positive = Field(1.0, description="text queries, connector and semantic tower")
    z_head: Positive = Field(1.0, description="the head, tokens to (mu, logvar)")
    trunk: Positive = Field(1.0, description="the velocity network but for its last layer")
    flow_head: Positive = Field(1.0, description="the velocity network's last layer")


class GroupCaps(Config):
    """The most that a group's lr may be, whatever `optim.lr` and its scale; null is no limit
    (the field notes: text 2e-4, trunk 1e-4).
    """

    text: Positive | None = None
    z_head: Positive | None = None
    trunk: Positive | None = None
    flow_head: Positive | None = None


class AdamWMatrices(Config):
    """The matrices of the trunk's blocks by AdamW, as all else."""

    kind: Literal["adamw"] = "adamw"


class MuonMatrices(Config):
    """The matrices of the trunk's blocks by Muon (https://kellerjordan.github.io/posts/muon), whose
    update is the momentum with all singular values brought to about 1; AdamW moves all else.

    Queries, keys and values, and a modulation's shifts, scales and gates, are matrices of their
    own though one layer makes them (arXiv 2608.02502).
    adjust: `match_rms_adamw` makes updates as large as AdamW's usually are, so that one lr does
    for both (arXiv 2502.16982); `original` times sqrt(rows / columns) where that is above 1.
    """

    kind: Literal["muon"] = "muon"
    lr_scale: Positive = Field(1.0, description="their lr relative to the trunk's")
    momentum: float = Field(0.95, ge=0, lt=1)
    nesterov: bool = True
    adjust: Literal["match_rms_adamw", "original"] = "match_rms_adamw"
    iterations: int = Field(5, gt=0, lt=100, description="Newton-Schulz iterations of an update")


MatricesConfig = Annotated[AdamWMatrices | MuonMatrices, Field(discriminator="kind")]


class OptimConfig(Config):
    """AdamW, but where `matrices` says otherwise. The trunk's matrices decay; heads, norms and
    biases do not.
    """

    lr: float = Field(1e-3, gt=0)
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = Field(0.01, ge=0)
    clip_grad: float = Field(1.0, gt=0)
    lr_scale: GroupScales = GroupScales()
    lr_max: GroupCaps = GroupCaps()
    matrices: MatricesConfig = AdamWMatrices()
    schedule: LRScheduleConfig = CosineLR(warmup=50)


class ProbeConfig(Config):
    """The fixed held-out batch of the probes."""

    batch_size: Annotated[int, Field(ge=4)] = 64
    shoot_steps: Annotated[int, Field(gt=0)] = 100
    raw: bool = Field(True, description="probe the raw weights beside the EMA")
    seed: int = 1234
    doctor_every: int = Field(0, ge=0, description="run the doctor at every n-th probe; 0 is never")


class ResourceConfig(Config):
    """What a run takes from the cluster.

    max_failures: deaths in a row, without a new checkpoint between them, that are put up with.
    shard: where weights, gradients, optimiser state and EMA lie: `none`, on every worker (DDP);
    `full`, a part on each (FSDP2); `hybrid`, parts within a node, the same on every node.
    """

    num_workers: Annotated[int, Field(ge=1)] = 1
    min_workers: int | None = Field(
        None,
        ge=1,
        description=(
            "go on with as few as so many where there is no room for num_workers, with more when"
            " there is; null: num_workers or none"
        ),
    )
    cpus_per_worker: Annotated[int, Field(ge=1)] = 1
    gpus_per_worker: float = Field(0, ge=0)
    max_failures: Annotated[int, Field(ge=0)] = 3
    stuck_after_s: float = Field(
        600,
        ge=5,
        description=(
            "several workers start again where one has given no sign of life for so long, or a step"
            " has lasted as long"
        ),
    )
    shard: Literal["none", "full", "hybrid"] = "none"
    shard_text: bool = Field(
        False, description="the frozen text model in parts too, a layer at a time in one piece"
    )

    @property
    def least_workers(self) -> int:
        """How many it takes to train."""
        return min(self.num_workers, self.min_workers or self.num_workers)

    @model_validator(mode="after")
    def _fewer_than_all(self) -> ResourceConfig:
        if self.min_workers is None:
            return self
        if self.min_workers > self.num_workers:
            raise RuleError(
                f"min_workers {self.min_workers} must be at most num_workers {self.num_workers}",
                "min_workers",
                "num_workers",
            )
        if self.shard == "hybrid":
            raise RuleError(
                "min_workers does not go with shard hybrid, which wants as many workers on every"
                " node; set shard full",
                "min_workers",
                "shard",
            )
        return self

    @model_validator(mode="after")
    def _whole_gpus(self) -> ResourceConfig:
        if self.gpus_per_worker > 1 and self.gpus_per_worker != int(self.gpus_per_worker):
            raise RuleError("gpus_per_worker above 1 must be whole", "gpus_per_worker")
        return self
