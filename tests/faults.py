"""Faults planted in an otherwise healthy small run, by config or by a bug in the code, and what the
doctor makes of them.

The doctor is told nothing: it gets the run directory. A bug in the code is there while training
and, unless `mended`, while the doctor looks, because whoever runs the doctor runs the same code.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor

from flowray.config.load import load_recipe, override_recipe
from flowray.config.losses import ClipLossConfig
from flowray.config.recipe import Recipe
from flowray.data.make import DigitsSet, EmbeddedSet, ShapesSet, write_set
from flowray.data.reader import ShardReader
from flowray.data.shards import MANIFEST, find_shards, write_shards
from flowray.doctor import subject as subject_module
from flowray.doctor.battery import PARTS
from flowray.doctor.examine import Examination, examine
from flowray.doctor.subject import open_subject
from flowray.findings.diagnose import diagnose
from flowray.findings.finding import Finding
from flowray.flow import path as flow_path
from flowray.losses import terms, total
from flowray.model.assemble import FlowModel
from flowray.model.autoencoder import Autoencoder
from flowray.model.dit import DiT
from flowray.model.latent import Moments
from flowray.sample import generate as generate_module
from flowray.store.checkpoint import newest_checkpoint
from flowray.store.found import find_checkpoint
from flowray.store.latents import LatentSet, ensure_latents
from flowray.store.run import RunDirectory
from flowray.train.group import Group
from flowray.train.loop import train
from flowray.train.optim import Ema
from flowray.train.state import Halted

Bug = AbstractContextManager[Any]
Pictures = Literal["closed", "open", "digits"]
SETS = {"train": 768, "val": 64, "unseen": 1}
# captions that leave things open: enough held-out pictures that some share one
OPEN_SETS = {"train": 1536, "val": 512, "unseen": 1}
# the healthy pictures, by the folder they lie in; shapes: one object a scene
PICTURES: dict[Pictures, tuple[str, EmbeddedSet]] = {
    "closed": ("pictures", ShapesSet(two_share=0.0, closed=True, **SETS)),
    "open": ("pictures-open", ShapesSet(two_share=0.0, **OPEN_SETS)),
    "digits": ("pictures-digits", DigitsSet()),
}

# on top of quickstart_closed; a source of its own making, since an anchored one leaves the velocity
# little to do
SMALL = {
    "loss.anchor.weight": 0.0,
    "loss.kl.weight": 2.0,
    "loss.clip.weight": 0.3,
    "optim.lr_scale.z_head": 1.0,
    "flow.time": {"kind": "uniform"},
    "resources.num_workers": 1,
    "model.velocity.width": 64,
    "model.velocity.depth": 2,
    "optim.schedule.warmup": 20,
    "train.steps": 150,
    "train.batch_size": 32,
    "train.log_every": 5,
    "train.probe_every": 75,
    "train.sample_every": 10_000,
    "train.checkpoint_every": 10_000,
    "train.ema": 0.98,
    "train.device": "cpu",
    "probes.raw": True,
}


@dataclass(frozen=True)
class Fault:
    """What is wrong with a run and by which findings the doctor names it.

    keys: recipe keys; bug: a fault of the code; mended: the code is right again when the doctor
    comes; late: the code of sampling, which training does not use, so the doctor looks at the run
    `healthy`, which is without it; pictures: `closed` captions name all of their picture, those of
    `open` and `digits` leave things open; data: makes the training shards, in a folder given, from
    the healthy ones; harms: the results suffer; kind, about: where it lies, and what a finding that
    names it is about, in plain words.
    """

    name: str
    named_by: tuple[str, ...]
    keys: dict[str, Any] = field(default_factory=dict)
    bug: Callable[[], Bug] = nullcontext
    mended: bool = False
    late: bool = False
    healthy: str = "healthy"
    pictures: Pictures = "closed"
    data: Callable[[Path, Path], Path] | None = None
    harms: bool = True
    kind: str = ""
    about: tuple[str, ...] = ()


def make_sets(home: Path, pictures: Pictures = "closed") -> dict[str, Path]:
    """The healthy pictures: split -> folder."""
    folder, what = PICTURES[pictures]
    return write_set(what, home / folder)


def small_recipe(home: Path, name: str, pictures: Pictures = "closed", **keys: Any) -> Recipe:
    """The healthy run's recipe."""
    sets = make_sets(home, pictures)
    places = {
        "data.shards": str(sets["train"]),
        "data.val_shards": str(sets["val"]),
        "data.cache": str(home / "cache"),
    }
    base = override_recipe(
        load_recipe("quickstart_closed").recipe,
        {**SMALL, **places, "storage_path": str(home / "runs"), "name": name},
    )
    return override_recipe(base, keys) if keys else base


def train_quietly(recipe: Recipe) -> RunDirectory:
    """Train without Ray; training that halts is left as it halted."""
    run = RunDirectory(Path(recipe.storage_path) / recipe.name)
    with suppress(Halted):
        train(recipe, run, Group(0, 1, torch.device("cpu")), lambda row: None)
    return run


def plant(fault: Fault, home: Path, steps: int | None = None) -> RunDirectory:
    """Train the run with the fault in it, unless it lies in `home` already."""
    if fault.late:
        return plant(replace(fault, name=fault.healthy, bug=nullcontext, late=False), home, steps)
    keys = dict(fault.keys)
    if steps is not None:
        keys = {"train.steps": steps, "train.probe_every": steps, **keys}
    if fault.data is not None:
        keys["data.shards"] = str(
            fault.data(make_sets(home, fault.pictures)["train"], home / f"pictures-{fault.name}")
        )
    recipe = small_recipe(home, fault.name, fault.pictures, **keys)
    run = RunDirectory(Path(recipe.storage_path) / recipe.name)
    if newest_checkpoint(run.checkpoints) is None:
        # the cache is made by code without the bug
        ensure_latents(recipe.data, recipe.model.autoencoder, recipe.model.latent)
        with fault.bug():
            train_quietly(recipe)
    return run


def look(
    fault: Fault, run: RunDirectory, batch: int = 32, parts: Collection[str] = PARTS
) -> Examination:
    """The doctor's examination of the run, the bug still there unless it was mended."""
    with nullcontext() if fault.mended else fault.bug():
        return examine(open_subject(find_checkpoint(run.path)), batch=batch, parts=parts)


def judge(seen: Examination) -> list[Finding]:
    """What the numbers mean."""
    return diagnose(seen.metrics, seen.facts, seen.history)


def rank(findings: list[Finding], named_by: tuple[str, ...]) -> int | None:
    """The place, from 1, of the first finding that names the fault."""
    return next(
        (place for place, finding in enumerate(findings, 1) if finding.id in named_by), None
    )


# ---- bugs in the code


def replacing(owner: Any, name: str, make: Callable[[Any], Any]) -> Callable[[], Bug]:
    """A bug that puts make(original) in the place of owner.name."""
    return lambda: patch.object(owner, name, make(getattr(owner, name)))


def target(make: Callable[[Tensor, Tensor], Tensor]) -> Callable[[], Bug]:
    """The velocity that the loss asks for, of (x0, x1)."""
    return replacing(
        flow_path, "velocity_target", lambda _: lambda x0, x1, rho: make(x0.float(), x1.float())
    )


def in_bf16(original: Any) -> Any:
    def integrate(
        config: Any, velocity_fn: Any, x: Tensor, grid: list[float], *rest: Any
    ) -> Tensor:
        x = x.bfloat16()
        for before, after in pairwise(grid):
            t = torch.full((len(x),), (before + after) / 2)
            x = x + (after - before) * velocity_fn(x.float(), t).bfloat16()
        return x.float()

    return integrate


def _one_text(original: Any) -> Any:
    def posterior(self: FlowModel, prompts: Any) -> Any:
        made = original(self, prompts)
        return type(made)(*(x.mean(0, keepdim=True).expand_as(x) for x in (made.mu, made.logvar)))

    return posterior


def _worse_in_eval(original: Any) -> Any:
    def levels(self: DiT, x: Tensor, *others: Any) -> tuple[Tensor, ...]:
        return original(self, x if self.training else x.flip(-1), *others)

    return levels


def _corrupt_sample(original: Any) -> Any:
    def moments(self: LatentSet, indices: np.ndarray) -> Moments:
        made = original(self, indices)
        if len(self) == SETS["train"]:
            made.mean[torch.from_numpy(np.asarray(indices) == 700)] = torch.nan
        return made

    return moments


def _other_weights(original: Any) -> Any:
    """Another autoencoder under the same name: every weight a little off."""

    def load(*args: Any) -> Autoencoder:
        autoencoder = original(*args)
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for p in autoencoder.net.parameters():
                if p.numel() > 1:
                    p += 0.5 * p.std() * torch.randn(p.shape, generator=generator)
        return autoencoder

    return load


def _against_the_flow(original: Any) -> Any:
    """The contrastive loss pulls against the flow's."""

    def loss_term(config: Any, forward: Any) -> Tensor:
        if isinstance(config, ClipLossConfig):
            return -0.7 * terms.flow_mse(forward.v_pred, forward.path.v_target)
        return original(config, forward)

    return loss_term


def of_its_own(info_nce: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The text contrasted with itself: every pair is found at once, and nothing is learnt from
    it.
    """
    return lambda text, image, scale, gather: info_nce(text, text, scale, gather=gather)


# ---- faults of the data


def few_pictures_many_times(healthy: Path, folder: Path) -> Path:
    """As many samples as before, but only eight different ones."""
    reader = ShardReader(find_shards(str(healthy)))

    def sample(i: int) -> dict[str, Any]:
        return {
            "__key__": f"copy-{i:05d}",
            **{extension: reader.read(i % 8, extension) for extension in ("png", "txt", "json")},
        }

    if not (folder / MANIFEST).is_file():
        write_shards(folder, (sample(i) for i in range(512)), meta={})
    return folder


HEALTHY = Fault("healthy", ())
# Quickstart's own source: mu drawn to the mean picture, sigma narrow.
ANCHORED = {"loss.anchor.weight": 4.0, "loss.kl.weight": 0.03, "optim.lr_scale.z_head": 0.4}
# The caption's mean picture with noise as wide as the data, the network told nothing else.
OPEN = {
    "loss.anchor.weight": 1.0,
    "loss.kl.weight": 0.1,
    "loss.clip.weight": 0.0,
    "model.posterior": {"logvar_min": -0.01, "logvar_max": 0.01},
    "train.steps": 300,
}
ADALN = {"model.velocity.condition": {"kind": "adaln"}}
NOISE = {
    **ADALN,
    "model.source": {"kind": "noise"},
    "loss.anchor.weight": 0.0,
    "loss.kl.weight": 0.0,
}
HEALTHY_RUNS = tuple(
    Fault(f"healthy_{head['kind']}_{seed}", (), {"model.head": head, "seed": seed})
    for head in (
        {"kind": "pooled"},
        {"kind": "grid"},
        {"kind": "conv"},
        {"kind": "transencoder", "layers": 2, "ffn": 256},
    )
    for seed in (0, 1, 2)
) + tuple(Fault(f"healthy_anchored_{seed}", (), {**ANCHORED, "seed": seed}) for seed in (0, 1, 2))
HEALTHY_RUNS += tuple(
    Fault(f"healthy_open_{name}", (), {**OPEN, **keys}, pictures="open")
    for name, keys in (("text", {}), ("text_adaln", ADALN), ("noise", NOISE))
)
FAULTS: tuple[Fault, ...] = (
    # the autoencoder
    Fault(
        "autoencoder_wrong",
        ("wrong_autoencoder",),
        bug=replacing(subject_module, "load_autoencoder", _other_weights),
        late=True,
    ),
    Fault(
        "velocity_small",
        ("velocity_too_small",),
        bug=target(lambda x0, x1: 0.3 * (x1 - x0)),
        mended=True,
    ),
    # the source
    Fault("source_collapsed", ("source_collapsed",), {"loss.kl.weight": 0.003}),
    Fault(
        "source_inflated",
        ("source_inflated",),
        {"loss.kl.weight": 3e-4, "loss.flow.source_grad": "path"},
    ),
    Fault("logvar_saturated", ("logvar_saturated",), {"model.posterior.logvar_min": -0.3}),
    Fault("kl_drowned", ("kl_drowned", "source_collapsed"), {"loss.kl.weight": 1e-5}),
    Fault("kl_crushing", ("kl_crushing",), {"loss.kl.weight": 300.0, "loss.kl.form": "gaussian"}),
    Fault(
        "condition_ignored",
        ("caption_unused", "condition_ignored"),
        bug=replacing(FlowModel, "posterior", _one_text),
    ),
    Fault("captions_shuffled", ("captions_shuffled",), {"data.shuffle_captions": True}),
    # optimisation
    Fault("lr_too_low", ("lr_too_low",), {"optim.lr": 2.5e-7}),
    Fault("lr_too_high", ("lr_too_high",), {"optim.lr": 0.1, "train.checkpoint_every": 25}),
    Fault(
        "dead_head", ("head_idle", "dead_head", "group_too_slow"), {"optim.lr_scale.z_head": 1e-8}
    ),
    Fault(
        "dead_flow_head",
        ("output_idle", "dead_head", "group_too_slow"),
        {"optim.lr_scale.flow_head": 1e-8},
    ),
    Fault(
        "ema_never_updated",
        ("ema_never_updated",),
        bug=replacing(Ema, "update", lambda _: lambda self, step: None),
    ),
    Fault("raw_sampled", ("raw_sampled",), {"sample.weights": "raw"}),
    Fault(
        "losses_opposed",
        ("losses_opposed", "contrastive_wrong"),
        {"loss.clip.weight": 1.0, "train.grad_every": 50},
        bug=replacing(total, "loss_term", _against_the_flow),
    ),
    Fault("contrastive_weak", ("clip_weak",), {"loss.clip.weight": 1e-4}),
    Fault(
        "contrastive_saturated",
        ("clip_saturated", "tower_idle", "contrastive_wrong"),
        {"loss.clip.weight": 3.0},
        bug=replacing(terms, "info_nce", of_its_own),
    ),
    Fault("dino_weak", ("dino_weak",), {"loss.dino.weight": 1e-3}),
    Fault(
        "dino_saturated",
        ("dino_saturated",),
        {"loss.dino.weight": 1.0, "loss.dino.teacher_temperature": 1e-4},
    ),
    Fault(
        "non_finite",
        ("non_finite",),
        {"train.checkpoint_every": 1, "train.log_every": 1},
        bug=replacing(LatentSet, "moments", _corrupt_sample),
    ),
    # time and the sampler
    Fault(
        "time_untrained",
        ("time_untrained",),
        {"flow.time": {"kind": "alpha", "low": 0.6, "high": 0.98, "uniform_floor": 0.0}},
    ),
    Fault(
        "solver_bf16",
        ("half_precision_solver",),
        bug=replacing(generate_module, "integrate", in_bf16),
        late=True,
    ),
    Fault(
        "guidance_without_null",
        ("guidance_without_null",),
        {"flow.null_probability": 0.0, "sample.guidance_scale": 4.0},
    ),
    Fault("eval_differs", ("seam_velocity",), bug=replacing(DiT, "levels", _worse_in_eval)),
    # the data
    Fault("dataset_small", ("dataset_too_small",), {"data.limit": 8}),
    Fault("dataset_duplicated", ("dataset_duplicated",), data=few_pictures_many_times),
    Fault("undertrained", ("undertrained",), {"train.steps": 40, "train.probe_every": 40}),
    # captions that leave things open
    Fault(
        "open_narrow",
        ("source_averages",),
        {
            **OPEN,
            **ANCHORED,
            "model.posterior": {"logvar_min": -5.7, "logvar_max": -5.6},
            "flow.time": {"kind": "alpha", "low": 0.0, "high": 0.15, "uniform_floor": 0.35},
        },
        pictures="open",
    ),
    Fault(
        "open_blind", ("source_blind",), {**OPEN, "model.source.amplitude": 0.02}, pictures="open"
    ),
    Fault(
        "open_merging",
        ("codes_merge",),
        {
            **OPEN,
            # codes that look like no picture, and lie close
            "loss.anchor.weight": 0.0,
            "loss.clip.weight": 0.3,
            "loss.flow.source_grad": "none",
            "model.source.amplitude": 0.05,
            "model.posterior": {"logvar_min": -4.7, "logvar_max": -4.6},
        },
        pictures="open",
    ),
    Fault("open_memorised", ("memorised",), {**OPEN, "data.limit": 64}, pictures="open"),
)

# The rules' thresholds were chosen with the runs above in sight, so the same faults are planted in
# a recipe that was not looked at.
ELSEWHERE = {
    "model.head.kind": "conv",
    "seed": 7,
    "flow.time": {"kind": "log_snr"},
    "train.batch_size": 48,
    "optim.lr": 2e-3,
}
HELD_OUT = tuple(
    replace(
        fault,
        name=f"{fault.name}_elsewhere",
        healthy="healthy_elsewhere",
        keys={**ELSEWHERE, **fault.keys},
    )
    for fault in (*FAULTS, HEALTHY)
)
