"""The probes of a run on a fixed held-out batch with fixed noise: deterministic, read-only, the
same for every trial.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from flowray.config.errors import InputError
from flowray.config.recipe import Recipe
from flowray.config.scale import UNIT
from flowray.flow.draws import Draws
from flowray.flow.guidance import conditional, with_time_code
from flowray.flow.path import sample_path, time_code
from flowray.model.assemble import FlowModel, Source
from flowray.model.latent import Moments
from flowray.model.posterior import Posterior
from flowray.probes.answers import (
    DRAWN,
    SEARCHED,
    Answers,
    answer_metrics,
    left_open,
    same_captions,
    source_metrics,
    strangers,
)
from flowray.probes.copies import NEW, NUMBERS, Seen, make_seen
from flowray.probes.field import BINS, cosines, field_metrics
from flowray.probes.latent import posterior_metrics, scale_metrics, start_metrics, text_metrics
from flowray.probes.rollout import (
    ENDPOINT_STEPS,
    TEACHER_STEPS,
    endpoint_metrics,
    ends_of,
    mse,
    shoot,
    shoot_metrics,
    teacher_metrics,
)
from flowray.store.latents import LatentSet


@dataclass(frozen=True)
class ProbeBatch:
    """Held-out captions and latents with the noise that every probe uses; latents and noises (B, C,
    H, W).

    times: (BINS, B), one stratified t per bin and sample. others: a derangement of the batch (B,)
    across different captions. variance: of z1 per dim about the set's mean latent. answers: what
    else of the data's would answer the captions.
    """

    captions: list[str]
    z1: Tensor
    noise: Tensor
    other_noise: Tensor
    times: Tensor
    others: Tensor
    variance: float
    answers: Answers
    seen: Seen | None = None


def derangement(captions: list[str]) -> Tensor:
    """For every sample another one: the smallest cyclic shift of the sorted batch that gives each a
    different caption.

    Where one caption fills more than half of the batch no order can; then some of its samples get
    each other. InputError where all captions are the same.
    """
    order = sorted(range(len(captions)), key=lambda i: captions[i])
    shift = max((captions.count(text) for text in set(captions)), default=1)
    if len(set(captions)) < 2:
        raise InputError(
            f"data.val_shards: all of the first {len(captions)} captions are alike; probes need two"
            " that differ"
        )
    others = torch.empty(len(captions), dtype=torch.long)
    for place, index in enumerate(order):
        others[index] = order[(place + shift) % len(order)]
    return others


def make_probe_batch(
    recipe: Recipe, held_out: LatentSet, device: torch.device, training: LatentSet | None = None
) -> ProbeBatch:
    """The first `probes.batch_size` held-out samples, fewer where there are fewer.

    training: what copies are looked for in, those of its latents that have the held-out ones' size.
    """
    own = None if training is None else training.of_own_size()
    size = min(recipe.probes.batch_size, len(held_out))
    draws = Draws(recipe.probes.seed, 0, size, slice(None), device)
    shape = recipe.model.latent.shape
    captions = [held_out.captions(i)[0] for i in range(size)]
    z1 = _latents(held_out, np.arange(size), draws.normal("posterior", shape))
    edges = torch.arange(BINS, dtype=torch.float32)[:, None]
    times = torch.stack([draws.uniform(f"time{b}") for b in range(BINS)])
    return ProbeBatch(
        captions=captions,
        z1=z1,
        noise=draws.normal("source", shape),
        other_noise=draws.normal("other source", shape),
        times=((edges + times) / BINS).to(device),
        others=derangement(captions).to(device),
        variance=held_out.variance,
        answers=_answers(recipe, held_out, captions, z1),
        seen=None if own is None else _seen(recipe, own, held_out, device),
    )


def _latents(held_out: LatentSet, indices: np.ndarray, noise: Tensor) -> Tensor:
    """z1 of samples, drawn with noise (B, C, H, W), on the noise's device."""
    mean, logvar = held_out.moments(indices)
    return held_out.scale.sample(Moments(mean.to(noise.device), logvar.to(noise.device)), noise)


def _answers(recipe: Recipe, held_out: LatentSet, captions: list[str], z1: Tensor) -> Answers:
    """Found once, by the first SEARCHED captions of the set."""
    size, seed = len(z1), recipe.probes.seed
    draws = Draws(seed, 0, size, slice(None), z1.device)
    shape = recipe.model.latent.shape
    u = torch.stack([draws.uniform(f"drawn {i}") for i in range(DRAWN)])
    drawn = [
        _latents(held_out, indices.numpy(), draws.normal(f"drawn posterior {i}", shape))
        for i, indices in enumerate(strangers(u, len(held_out)))
    ]
    rows, samples = same_captions(
        captions, (held_out.captions(i) for i in range(min(len(held_out), SEARCHED)))
    )
    partners = z1[:0]
    if samples:
        noise = Draws(seed, 0, len(samples), slice(None), z1.device).normal("partners", shape)
        partners = _latents(held_out, np.array(samples), noise)
    return Answers(
        z1, torch.stack(drawn), torch.tensor(rows, dtype=torch.long).to(z1.device), partners
    )


def _seen(recipe: Recipe, training: LatentSet, held_out: LatentSet, device: torch.device) -> Seen:
    """Of training latents as they are in the mean, and held-out ones drawn, as shots are."""
    seed, shape = recipe.probes.seed, recipe.model.latent.shape
    few = max(1, NUMBERS // math.prod(shape))
    known, new = (
        np.random.default_rng(seed).permutation(len(of))[:count]
        for of, count in ((training, few), (held_out, min(few, NEW)))
    )
    noise = Draws(seed, 0, len(new), slice(None), device).normal("new", shape)
    none = torch.zeros(len(known), *shape, device=device)
    return make_seen(_latents(training, known, none), _latents(held_out, new, noise))


class Looked(NamedTuple):
    """What passes through the model make of some samples of a batch, b of them; all (b, C, H, W).

    own, swapped: the velocity at the batch's time in each bin, of the sample's own caption and of
    another's: the source and what the network is told of it. shots: from two draws of the source.
    ends: `ends_of`, or none.
    """

    own: list[Tensor]
    swapped: list[Tensor]
    shots: list[Tensor]
    ends: list[Tensor]

    def to(self, device: torch.device) -> Looked:
        """The same on another device."""
        return Looked(*([x.to(device) for x in latents] for latents in self))


def together(parts: Sequence[Looked]) -> Looked:
    """Of the samples of all parts, in their order."""
    by_field = zip(*parts, strict=True)
    return Looked(*([torch.cat(x) for x in zip(*field, strict=True)] for field in by_field))


@contextmanager
def _seeing(model: FlowModel) -> Iterator[None]:
    """A block without gradients, in eval mode."""
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(was_training)


def read_source(model: FlowModel, batch: ProbeBatch) -> Source:
    """Where the paths of all of the batch's captions begin."""
    with _seeing(model):
        return model.source(batch.captions, batch.noise)


def look(
    model: FlowModel,
    recipe: Recipe,
    batch: ProbeBatch,
    source: Source,
    rows: slice = slice(None),
    *,
    endpoints: bool,
) -> Looked:
    """The model's passes over `rows` of the batch, one sample at least; source: of the whole
    batch.
    """
    with _seeing(model):
        mine = source.rows(rows)
        velocity_fn = conditional(with_time_code(model.field(mine)))
        other = source.posterior.sample(batch.other_noise)[rows]
        return Looked(
            _velocities(model, recipe, batch, mine, rows),
            _velocities(model, recipe, batch, source.rows(batch.others[rows]), rows),
            [shoot(velocity_fn, z0, recipe.probes.shoot_steps) for z0 in (mine.z0, other)],
            ends_of(velocity_fn, mine.z0) if endpoints else [],
        )


def _velocities(
    model: FlowModel, recipe: Recipe, batch: ProbeBatch, source: Source, rows: slice
) -> list[Tensor]:
    """On the paths of `source` to z1 of some rows, at one t in each bin."""
    network, z1 = model.field(source), batch.z1[rows]
    null = torch.zeros(len(z1), dtype=torch.bool, device=z1.device)
    paths = (sample_path(t, source.z0, z1, recipe.flow.path.rho) for t in batch.times[:, rows])
    return [network(p.xt, time_code(p.t), null).float() for p in paths]


@torch.no_grad()
def probe_metrics(
    model: FlowModel, recipe: Recipe, batch: ProbeBatch, source: Source, looked: Looked
) -> dict[str, float]:
    """Every probe, of what the model's passes made of all samples; it is not run for this."""
    posterior, z0, rho = source.posterior, source.z0, recipe.flow.path.rho
    rows = _field(batch, source, looked, rho) | start_metrics(z0)
    if model.head is not None:
        rows |= posterior_metrics(posterior)
        rows |= text_metrics(posterior, batch.noise, batch.other_noise)
        rows |= source_metrics(posterior, z0, batch.captions, batch.answers, rho)
    z_end, other_end = looked.shots
    rows |= shoot_metrics(z_end, z0, batch.z1, batch.others, batch.variance)
    rows |= answer_metrics(z_end, other_end, batch.answers)
    rows |= left_open(batch.answers) | {UNIT: batch.variance}
    if batch.seen is not None:
        rows["shoot/copies"] = batch.seen.copies(torch.cat([z_end, other_end]))
    rows |= teacher_metrics(z0, batch.z1, rho)
    if looked.ends:
        rows |= endpoint_metrics(looked.ends, batch.z1)
    trivial = trivial_metrics(posterior, z0, batch, rho)
    return rows | {f"trivial/{key}": value for key, value in trivial.items() if key in rows}


def run_probes(
    model: FlowModel, recipe: Recipe, batch: ProbeBatch, *, endpoints: bool
) -> dict[str, float]:
    """Every probe of the model's present weights; leaves weights, gradients, RNG and module
    modes as they were.
    """
    source = read_source(model, batch)
    looked = look(model, recipe, batch, source, endpoints=endpoints)
    return probe_metrics(model, recipe, batch, source, looked)


def trivial_metrics(
    posterior: Posterior, z0: Tensor, batch: ProbeBatch, rho: float
) -> dict[str, float]:
    """What the same formulas give for a field that stands still and a source that is blind to the
    caption.

    The blind source is the batch's mean posterior, given to every prompt.
    """
    paths = [sample_path(times, z0, batch.z1, rho) for times in batch.times]
    v_target = torch.cat([path.v_target for path in paths])
    rows = field_metrics(torch.zeros_like(v_target), v_target, batch.times.flatten()) | {
        "flow/cond_gain_cos": 0.0
    }
    rows |= shoot_metrics(z0, z0, batch.z1, batch.others, batch.variance)
    rows |= answer_metrics(z0, posterior.sample(batch.other_noise), batch.answers)
    rows |= endpoint_metrics([z0] * len(ENDPOINT_STEPS), batch.z1)
    rows |= {f"teacher/mse@{n}": mse(z0, batch.z1) for n in TEACHER_STEPS}
    mu, logvar = (x.mean(0, keepdim=True).expand_as(x) for x in (posterior.mu, posterior.logvar))
    blind = Posterior(mu, logvar, posterior.amplitude)
    source = blind.sample(batch.noise)
    middle = sample_path(torch.full_like(batch.times[0], 0.5), source, batch.z1, rho)
    return (
        rows
        | start_metrics(source)
        | posterior_metrics(blind)
        | text_metrics(blind, batch.noise, batch.other_noise)
        | source_metrics(blind, source, batch.captions, batch.answers, rho)
        | scale_metrics(middle)
    )


def _field(batch: ProbeBatch, source: Source, looked: Looked, rho: float) -> dict[str, float]:
    """flow/* and scale/* over every sample at one t in each bin, with the sample's own caption and
    with another's.
    """

    def targets(z0: Tensor) -> Tensor:
        return torch.cat([sample_path(times, z0, batch.z1, rho).v_target for times in batch.times])

    z0 = source.z0
    v_pred, v_target = torch.cat(looked.own), targets(z0)
    swapped = cosines(torch.cat(looked.swapped), targets(z0[batch.others]))
    gain = float(cosines(v_pred, v_target).mean() - swapped.mean())
    middle = sample_path(torch.full_like(batch.times[0], 0.5), z0, batch.z1, rho)
    rows = field_metrics(v_pred, v_target, batch.times.flatten())
    return rows | {"flow/cond_gain_cos": gain} | scale_metrics(middle)
