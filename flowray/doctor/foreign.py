"""The doctor on a model that was not trained here: what of the battery needs neither flowray's
losses nor its optimiser, on latents that the model itself makes of a set's pictures.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from flowray.config.flow import EulerSolver, FlowConfig, PathConfig, SampleConfig, SolverConfig
from flowray.config.losses import KLLossConfig, LossConfig
from flowray.config.prepare import AS_DECODED, PrepareConfig
from flowray.config.progress import SILENT, Progress
from flowray.config.recipe import Recipe
from flowray.config.train import DataConfig, ProbeConfig, TrainSection
from flowray.data.order import BatchSizes
from flowray.data.pictures import decode_image
from flowray.data.pixels import from_pictures, to_pictures
from flowray.data.prepare import Preparation
from flowray.data.reader import ShardReader
from flowray.doctor.examine import Examination, examine
from flowray.doctor.subject import Subject
from flowray.findings.diagnose import diagnose
from flowray.findings.finding import Finding, healthy
from flowray.findings.rules_foreign import FOREIGN
from flowray.flow.path import sample_path, time_code
from flowray.losses.total import Objective
from flowray.model.condition import told
from flowray.model.foreign import (
    Foreign,
    ForeignAutoencoder,
    ForeignModel,
    device_of,
    latent_of,
    refuse_unlike,
)
from flowray.model.latent import LatentScale, Moments
from flowray.probes.battery import make_probe_batch
from flowray.probes.field import nmse
from flowray.probes.vae import round_trip
from flowray.store.latents import LatentSet, split_shards
from flowray.train.step import whole_batches

LIMIT = 512  # pictures of each split that are encoded
BATCH = 32
SHOWN = 8
# Of flowray.doctor.battery.PARTS, in its order; the others need what flowray's training keeps.
ASKED = ("data", "standard", "field", "sampler")
SKIPPED: dict[str, str] = {
    "weights": "how far weights have moved, and the EMA: needs the weights of step 0 and the EMA's",
    "training": "losses, gradients, the optimiser, and training against sampling at every seam:"
    " need flowray's losses and optimiser",
    "autoencoder scale and cache": "the latent's scale is the model's own, and nothing is cached",
    "trained times and learning rates": "are not known of a model that was trained elsewhere",
}
# What a model might take for the t in [0, 1] that it is told.
OTHER_TIMES = {
    "reversed": lambda t: 1 - t,
    "thousand": lambda t: 1000 * t,
    "thousandth": lambda t: t / 1000,
    "thousand_reversed": lambda t: 1000 * (1 - t),
    "code": lambda t: 4 - 8 * t,
}
# Numbers and facts that flowray's defaults would give, and that say nothing of this model.
OURS = ("lr/", "data/epochs", "data/batch_alike", "time/share_t", "time/coverage")


class Report(NamedTuple):
    """findings: most likely cause first. skipped: what was not asked, and why."""

    examination: Examination
    findings: list[Finding]
    skipped: dict[str, str]

    @property
    def healthy(self) -> bool:
        """No finding is warn or bad."""
        return healthy(self.findings)


@dataclass(frozen=True)
class HeldLatents(LatentSet):
    """A set whose latents are in memory, not in shards; its reader has the pictures."""

    held: Tensor | None = None

    def moments(self, indices: np.ndarray) -> Moments:
        assert self.held is not None
        z = self.held[torch.from_numpy(np.asarray(indices))]
        return Moments(z, torch.full_like(z, -30.0))


class Opened(NamedTuple):
    """A foreign model as flowray's sampler and evaluation take it."""

    model: ForeignModel
    autoencoder: ForeignAutoencoder


def open_foreign(model: Foreign, size: tuple[int, int]) -> Opened:
    """For flowray.sample: `generate(*open_foreign(model, (64, 64)), prompts, SampleConfig(), 0)`.

    size: (height, width) in px of its pictures. InputError where it lacks a method or its latents
    have no (B, C, H, W).
    """
    refuse_unlike(model)
    if isinstance(model, nn.Module):
        model.eval()
    latent = latent_of(model, torch.zeros(1, 3, *size))
    return Opened(ForeignModel(model, latent).eval(), ForeignAutoencoder(model, latent, size))


def encoded(
    autoencoder: ForeignAutoencoder,
    shards: tuple[Path, ...],
    prepare: PrepareConfig,
    limit: int,
    progress: Progress = SILENT,
) -> HeldLatents:
    """The first `limit` samples of picture shards. InputError where a picture does not decode, or
    is not of the model's size and `prepare` does not resize.
    """
    reader = ShardReader(shards, limit)
    preparing, parts = Preparation(prepare, autoencoder.picture_size, strict=True), []
    with progress.task("encoding pictures", len(reader)) as advance:
        for places in np.array_split(np.arange(len(reader)), -(-len(reader) // BATCH)):
            pictures = [decode_image(reader, int(i), preparing) for i in places]
            parts.append(autoencoder.encode_moments(to_pictures(pictures)).mean.float().cpu())
            advance(len(places))
    z = torch.cat(parts)
    return HeldLatents(
        reader, LatentScale(1.0, 0.0, deterministic=True), shards, prepare=prepare, held=z
    )


def examine_foreign(
    model: Foreign,
    data: str,
    *,
    held_out: str | None = None,
    resize: tuple[int, int] | None = None,
    name: str | None = None,
    step: int = 0,
    limit: int = LIMIT,
    batch: int = 64,
    seed: int = 0,
    sigma_min: float = 0.0,
    guidance_scale: float = 1.0,
    steps: int = 50,
    solver: SolverConfig | None = None,
    progress: Progress = SILENT,
) -> Report:
    """What flowray's doctor says of a model that was trained elsewhere.

    data, held_out: shards as `data.shards` and `data.val_shards` name them; held-out ones may be
    left out for a set that flowray makes, such as `shapes`. resize: (height, width) in px; None:
    pictures as they are, all of one size. limit: pictures of each that are encoded. sigma_min: what
    remains of z0 at t = 1. guidance_scale, steps, solver: how its pictures are drawn. InputError,
    one line: a method or shards missing, shapes that do not fit.
    """
    refuse_unlike(model)
    config = DataConfig(shards=data, val_shards=held_out)
    splits = split_shards(config, progress)
    prepare = PrepareConfig(resize="area") if resize else AS_DECODED
    first = decode_image(ShardReader(splits["val"], 1), 0, Preparation(prepare, resize))
    opened = open_foreign(model, (first.shape[0], first.shape[1]))
    _try_out(opened, ShardReader(splits["val"], 1).captions(0)[:1] * 2)
    sets = {
        split: encoded(opened.autoencoder, splits[split], prepare, limit, progress)
        for split in ("train", "val")
    }
    recipe = Recipe(
        seed=seed,
        data=config,
        model=opened.model.config,
        loss=LossConfig(kl=KLLossConfig(weight=0.0)),
        flow=FlowConfig(path=PathConfig(sigma_min=sigma_min)),
        probes=ProbeConfig(batch_size=max(batch, 4)),
        train=TrainSection(batch_size=min(64, len(sets["train"]))),
        sample=SampleConfig(
            solver=solver or EulerSolver(),
            steps=steps,
            guidance_scale=guidance_scale,
            weights="raw",
        ),
    )
    where = name or type(model).__name__
    subject = _subject(where, recipe, opened, step, sets)
    found = examine(subject, batch=batch, seed=seed, parts=ASKED, progress=progress)
    with progress.task("probing: what else a foreign model may take otherwise"):
        found = _completed(found, subject, opened)
    return Report(found, diagnose(found.metrics, found.facts, (), FOREIGN), dict(SKIPPED))


@torch.no_grad()
def _try_out(opened: Opened, captions: list[str]) -> None:
    """InputError now, and not a note of every part later, where shapes do not fit."""
    model, device = opened.model, device_of(opened.model)
    source = model.source(captions, torch.zeros(2, *model.config.latent.shape, device=device))
    t = torch.full((2,), 0.5, device=device)
    model.field(source)(source.z0, time_code(t), t > 1)
    opened.autoencoder.decode(source.z0)


def _subject(
    where: str, recipe: Recipe, opened: Opened, step: int, sets: dict[str, HeldLatents]
) -> Subject:
    device = device_of(opened.model)
    return Subject(
        where=where,
        recipe=recipe,
        step=step,
        model=opened.model,
        objective=Objective(opened.model, recipe.flow, recipe.loss),
        parameters=opened.model.trainable(),
        ema={},
        slots={},
        lr=0.0,
        restart=(0, 1.0),
        multipliers={},
        initial=None,
        latents=sets["train"],
        held_out=sets["val"],
        autoencoder=opened.autoencoder,
        sizes=BatchSizes.of(recipe.train.batch_size),
        batches=whole_batches(recipe, sets["train"], device),
        history=[],
        strip=None,
    )


@torch.no_grad()
def _completed(found: Examination, subject: Subject, opened: Opened) -> Examination:
    """Without what flowray's defaults put in, with the round trip and the times of `OTHER_TIMES`,
    and with what was not asked as notes.
    """
    metrics = {key: x for key, x in found.metrics.items() if not key.startswith(OURS)}
    kept = ("samples", "val_samples", "duplicates", "run", "seconds", "parameters", "prompts")
    facts: dict[str, Any] = {key: found.facts[key] for key in kept if key in found.facts}
    notes = list(found.facts["notes"])
    facts |= {"latent": list(subject.recipe.model.latent.shape), "condition": "adaln"}
    facts |= {"guidance_scale": subject.recipe.sample.guidance_scale}
    facts |= {"sample_steps": subject.recipe.sample.steps, "precision": "fp32"}
    rows, shown = _round_trip(subject.held_out, opened.autoencoder)
    metrics |= rows
    try:
        metrics |= _time_rows(subject, opened.model)
    except Exception as error:  # the network may refuse a time in whatever way
        notes.append(f"other times: the model refuses one: {error}")
    broken = [name for name, p in opened.model.named_parameters() if not p.isfinite().all()]
    metrics["finite/parameters"] = 1.0 - len(broken) / max(len(subject.parameters), 1)
    if broken:
        facts["nonfinite"] = {"parameter": broken[0]}
    facts["notes"] = notes + [f"{part}: {why}" for part, why in SKIPPED.items()]
    curves = dict(found.curves)
    curves["t"] = {name: x for name, x in curves.get("t", {}).items() if name != "train_share"}
    shown = found.pictures | shown
    return replace(found, metrics=metrics, facts=facts, pictures=shown, curves=curves)


def _round_trip(
    held_out: LatentSet, autoencoder: ForeignAutoencoder
) -> tuple[dict[str, float], dict[str, np.ndarray]]:
    """vae/psnr of encode_image and decode on held-out pictures, and the first of them."""
    reader = held_out.picture_reader()
    prepare = Preparation(held_out.prepare, autoencoder.picture_size)
    count = min(BATCH, len(held_out))
    pictures = to_pictures([decode_image(reader, i, prepare) for i in range(count)])
    pictures = pictures.to(device_of(autoencoder))
    moments = autoencoder.encode_moments(pictures)
    rows, made = round_trip(autoencoder, pictures, moments, torch.zeros_like(moments.mean))
    shown = {"orig": from_pictures(pictures[:SHOWN]), "recon_wrap": from_pictures(made[:SHOWN])}
    return rows, shown


def _time_rows(subject: Subject, model: ForeignModel) -> dict[str, float]:
    """foreign/nmse_*: flow/nmse where the model is told another time than t; `told`: t itself."""
    device = device_of(model)
    batch = make_probe_batch(subject.recipe, subject.held_out, device)
    source, rho = model.source(batch.captions, batch.noise), subject.recipe.flow.path.rho
    text = told(source.text)
    null = torch.zeros(len(batch.z1), dtype=torch.bool, device=device)
    paths = [sample_path(t, source.z0, batch.z1, rho) for t in batch.times]
    target, rows = torch.cat([p.v_target for p in paths]), {}
    for name, as_ in ({"told": lambda t: t} | OTHER_TIMES).items():
        made = [model.given.velocity(p.xt, as_(p.t), null, text).float() for p in paths]
        value = float(nmse(torch.cat(made), target))
        if math.isfinite(value):  # it may overflow far outside [0, 1]
            rows[f"foreign/nmse_{name}"] = value
    return rows
