"""The data of a run, asked questions: is each picture there once, do captions tell their pictures,
does the cache hold what the autoencoder makes of them.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from flowray.data.order import evenly
from flowray.data.pictures import decode_image
from flowray.data.pixels import from_pictures, to_pictures
from flowray.data.prepare import Preparation
from flowray.doctor.measured import Measured
from flowray.doctor.subject import Subject
from flowray.flow.draws import Draws
from flowray.model.autoencoder import Autoencoder
from flowray.model.latent import Moments, over_channels
from flowray.model.ranks import rank_and_world
from flowray.probes.agreement import (
    agreement_metrics,
    coverage_metrics,
    duplicate_share,
    time_shares,
)
from flowray.probes.field import BIN_CENTRES
from flowray.probes.interface import (
    batch_slope,
    cache_metrics,
    oddest,
    round_trips,
    stale_share,
    unusual,
)
from flowray.probes.likeness import near_metrics, spread_dims
from flowray.probes.told import caption_metrics, told_metrics
from flowray.probes.words import colour_metrics, side_metrics
from flowray.store.latents import LatentSet, channel_metrics, channel_statistics
from flowray.train.step import whole_batches

SHOWN = 8  # pictures of every kind
PICTURES = 32  # pictures encoded afresh, held-out and training ones
SUSPECTS = 16  # most unusual training latents, whose pictures are encoded afresh too
SURVEYED = 4096  # samples from all over the set whose latents and captions are looked through
RUN = 32  # of these stand beside each other
HELD_OUT = 512  # held-out ones that are looked for among them
AGREEMENT = 1024  # training pairs in the caption test
SEEN = 512  # and in that of colours and sides
CHUNK = 256
DECODED = 16  # pictures at a time at their full size
SIDE = 64  # pixels that words are held against, at most
BATCHES = 8  # whose means are compared: of fewer, shuffled ones differ by chance


@dataclass(frozen=True)
class Survey:
    """Of samples from all over a set. indices: which; bad: those whose latent is not finite; z,
    sigma: mean and standard deviation of z1 (N, dims), on some of its dims; features: what broken
    latents have otherwise (N, features).
    """

    indices: np.ndarray
    bad: list[int]
    duplicates: float
    z: Tensor
    sigma: Tensor
    features: Tensor

    def suspects(self) -> list[int]:
        """The samples with the most unusual latents."""
        odd = oddest(self.features, self.z, SUSPECTS)
        found: list[int] = self.indices[odd.numpy()].tolist()
        return found


def spread(count: int, most: int) -> np.ndarray:
    """At most `most` (a multiple of RUN) of `count` indices, in runs spread evenly over all: a set
    may be sorted by what it shows, and near copies often stand beside each other.
    """
    if count <= most:
        return np.arange(count)
    starts = evenly(count - RUN + 1, most // RUN)
    return (starts[:, None] + np.arange(RUN)).ravel()


def surveyed(latents: LatentSet, most: int = SURVEYED) -> Survey:
    """Looked through a part at a time, of which no whole latent is kept: large models' are many."""
    indices = spread(len(latents), most)
    scale, z, sigma, kinds, digests, finite = latents.scale, [], [], [], [], []
    for chunk in np.array_split(indices, -(-len(indices) // CHUNK)):
        moments = latents.moments(chunk)
        mean = scale.sample(moments, torch.zeros_like(moments.mean))
        width = (0.5 * moments.logvar).exp() * over_channels(scale.scale, mean)
        z.append(spread_dims(mean))
        sigma.append(spread_dims(torch.zeros_like(width) if scale.deterministic else width))
        kinds.append(unusual(mean))
        finite.append(moments.mean.isfinite().flatten(1).all(dim=1))
        raw = np.ascontiguousarray(moments.mean.numpy())
        digests += [np.frombuffer(hashlib.sha256(row).digest(), np.uint8) for row in raw]
    bad: list[int] = indices[~torch.cat(finite).numpy()].tolist()
    duplicates = duplicate_share(np.stack(digests))
    return Survey(indices, bad, duplicates, torch.cat(z), torch.cat(sigma), torch.cat(kinds))


def ask_data(subject: Subject, made: Measured) -> None:
    """Duplicates, coverage of t, statistics of z1, and whether the training path's captions tell
    its pictures.
    """
    latents, recipe, rows = subject.latents, subject.recipe, made.metrics
    shares = time_shares(recipe.flow, subject.step, recipe.train.steps)
    made.metrics |= coverage_metrics(shares)
    made.curves["t"] = {"x": BIN_CENTRES, "train_share": shares}
    rows["data/samples"] = float(len(latents))
    rows["data/epochs"] = subject.sizes.seen(subject.step) / len(latents)
    with made.trying("data: training latents"):
        seen = surveyed(latents)
        rows["finite/latents"] = 1 - len(seen.bad) / len(seen.z)
        if seen.bad:
            keys = [latents.reader.key(i) for i in seen.bad[:5]]
            made.facts.setdefault("nonfinite", {})["keys"] = keys
        rows["data/duplicate_share"] = seen.duplicates
        mean, std = channel_statistics(latents)
        rows["latent/mean"] = float(mean.mean())
        rows["latent/var"] = float((std.square() + mean.square()).mean() - mean.mean().square())
        rows |= near_metrics(seen.z, seen.sigma)
        made.facts["suspects"] = seen.suspects()
        with made.trying("data: held-out latents"):
            rows |= channel_metrics(subject.held_out)
            new = surveyed(subject.held_out, HELD_OUT).z
            rows |= near_metrics(seen.z, seen.sigma, new)
    with made.trying("data: captions"):
        firsts = [latents.captions(i)[0] for i in spread(len(latents), SURVEYED).tolist()]
        rows["data/caption_classes"] = float(len(set(firsts)))
        rows |= caption_metrics(firsts)
    if rank_and_world()[1] == 1:
        _ask_pairs(subject, made)


def _ask_pairs(subject: Subject, made: Measured) -> None:
    """Captions against z1 and against the pictures themselves, as the training path joins them."""
    with made.trying("data: captions and pictures"):
        captions, z1 = _pairs(subject)
        if (alike := batch_alike(z1, subject.recipe.train.batch_size)) is not None:
            made.metrics["data/batch_alike"] = alike
        made.metrics |= agreement_metrics(captions, z1) | told_metrics(captions, z1)
        with made.trying("data: training pictures"):
            order = _order(subject, min(len(captions), SEEN))
            pictures = small_pictures(subject.latents, order, subject.autoencoder)
            said = captions[: len(pictures)]
            made.metrics |= colour_metrics(said, pictures) | side_metrics(said, pictures)


def _pairs(subject: Subject) -> tuple[list[str], np.ndarray]:
    """Captions and z1 of the first epoch's first samples, each once, as the training path joins
    them.
    """
    sizes, most = subject.sizes, min(len(subject.latents), AGREEMENT)
    captions: list[str] = []
    z1: list[Tensor] = []
    step = 0
    while step == 0 or sizes.seen(step + 1) <= most:
        batch = subject.batches(step)
        captions += batch.captions[:most]  # a batch may be larger than what is asked for
        z1.append(batch.z1[:most].cpu())
        step += 1
    return captions, torch.cat(z1).numpy()


def batch_alike(z1: np.ndarray, size: int) -> float | None:
    """How much the batches' mean latents vary, over what random batches of `size` of the same
    latents (N, ...) would; None of fewer than BATCHES batches.
    """
    batches = z1.reshape(len(z1), -1)[: len(z1) // size * size].reshape(-1, size, z1[0].size)
    if len(batches) < BATCHES or size < 2:
        return None
    means = batches.mean(axis=1, dtype=np.float64)
    return float(
        size * means.var(axis=0, ddof=1).sum() / batches.reshape(-1, z1[0].size).var(0).sum()
    )


def indices_of(subject: Subject, step: int) -> np.ndarray:
    """Which training samples stand in the global batch of a step."""
    made_of = subject.recipe, subject.latents, subject.device, subject.sizes
    return whole_batches(*made_of).indices(step)


def _order(subject: Subject, count: int) -> np.ndarray:
    """The first `count` samples in the order of training."""
    parts: list[np.ndarray] = []
    while subject.sizes.seen(len(parts)) < count:
        parts.append(indices_of(subject, len(parts)))
    return np.concatenate(parts)[:count]


def _pictures(latents: LatentSet, indices: np.ndarray, autoencoder: Autoencoder) -> Tensor:
    """The pictures (B, 3, H, W) in [-1, 1] that latents were made of."""
    reader = latents.picture_reader()
    prepare = Preparation(latents.prepare, autoencoder.picture_size)
    return to_pictures([decode_image(reader, int(i), prepare) for i in indices])


def small_pictures(latents: LatentSet, indices: np.ndarray, autoencoder: Autoencoder) -> Tensor:
    """The pictures of latents, averaged over areas down to at most SIDE pixels a side: words of
    colours and sides need no more, and pictures of a large model are many bytes.
    """
    made = []
    for chunk in np.array_split(indices, -(-len(indices) // DECODED)):
        pictures = _pictures(latents, chunk, autoencoder)
        height, width = (min(n, SIDE) for n in pictures.shape[2:])
        made.append(F.adaptive_avg_pool2d(pictures, (height, width)))
    return torch.cat(made)


@torch.no_grad()
def ask_autoencoder(subject: Subject, made: Measured) -> None:
    """The autoencoder on held-out pictures, its round trip; is the cache, of both sets, its own."""
    autoencoder, held_out = subject.autoencoder, subject.held_out
    with made.trying("autoencoder: held-out pictures"):
        indices = np.arange(min(PICTURES, len(held_out)))
        pictures = _pictures(held_out, indices, autoencoder).to(subject.device)
        fresh = autoencoder.encode_moments(pictures)
        made.metrics |= cache_metrics(autoencoder, held_out, fresh, indices)
        noise = Draws(
            subject.recipe.probes.seed, 0, len(indices), slice(None), subject.device
        ).normal("posterior", subject.recipe.model.latent.shape)
        rows, drawn = round_trips(autoencoder, pictures, fresh, noise, SHOWN)
        made.metrics |= rows | {"trace/real_pixel_std": float(((pictures[:SHOWN] + 1) / 2).std())}
        made.pictures |= {"orig": from_pictures(pictures[:SHOWN])} | {
            name: from_pictures(x) for name, x in drawn.items()
        }
    with made.trying("autoencoder: training pictures"):
        _ask_cache(subject, made)


def _ask_cache(subject: Subject, made: Measured) -> None:
    """Training latents from all over the set, and the most unusual ones, against fresh ones."""
    latents, autoencoder = subject.latents, subject.autoencoder

    def encoded(indices: np.ndarray) -> Moments:
        pictures = _pictures(latents, indices, autoencoder)
        return autoencoder.encode_moments(pictures.to(subject.device))

    order = _order(subject, min(PICTURES, len(latents)))
    fresh = encoded(order)
    fit = cache_metrics(autoencoder, latents, fresh, order)
    made.metrics |= {f"{key}_train": value for key, value in fit.items()}
    made.metrics |= stale_share(autoencoder, latents, fresh, order, "latent/stale_share")
    # the data's survey has found them, where that was asked for
    odd = np.array(made.facts.get("suspects") or surveyed(latents).suspects())
    made.metrics |= stale_share(autoencoder, latents, encoded(odd), odd, "latent/stale_suspects")
    if rank_and_world()[1] == 1:
        z1 = subject.batches(0).z1[: len(order)].cpu()
        few = Moments(*(part[: len(z1)] for part in fresh))
        made.metrics["latent/batch_slope"] = batch_slope(z1, autoencoder, few)
