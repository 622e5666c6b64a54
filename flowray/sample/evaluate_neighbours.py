"""Evaluation on any set of pictures whose captions have several of them: draws of held-out captions
among all real pictures, in features.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch

from flowray.config.cache import cache_dir
from flowray.config.progress import SILENT, Progress
from flowray.config.recipe import Recipe
from flowray.config.writing import write_whole
from flowray.data.pictures import decode_image, decode_sized
from flowray.data.prepare import AS_THEY_ARE, Preparation
from flowray.model.autoencoder import Autoencoder
from flowray.sample.asked import Prepared, Samples
from flowray.sample.clipscore import open_clip
from flowray.sample.distances import mean
from flowray.sample.evaluate import decode, encode
from flowray.sample.judges import LATENTS, PIXELS, Judge, open_judge
from flowray.sample.neighbours import (
    CLIP,
    Judged,
    Real,
    Shown,
    accuracies,
    accuracies_of,
    beats_mu,
    by_caption,
    judge,
    of_groups,
    scores,
    uncertainties,
)
from flowray.sample.painters import painters
from flowray.sample.restore import OpenedRun
from flowray.store.encode import ENCODE_BATCH
from flowray.store.fingerprints import pictures_fingerprint
from flowray.store.latents import LatentSet, ensure_latents, load_latents, others
from flowray.store.sums import Sums

SHOWN_CAPTIONS, SHOWN_DRAWS = 12, 6
Fitting = Callable[[np.ndarray, Sequence[str]], np.ndarray]  # pictures, a caption each -> (N,)


def features_of(
    samples: Samples,
    judge: Judge,
    cache: Path,
    progress: Progress,
    prepare: Preparation = AS_THEY_ARE,
) -> np.ndarray:
    """Features (N, dims) of all pictures of shards, kept in the cache: a network takes minutes.

    InputError names a picture of another size than the first.
    """
    pictures = pictures_fingerprint(samples.reader, Sums(cache), prepare)
    made_of = f"{judge.fingerprint} {pictures}"
    file = cache / f"features-{hashlib.sha256(made_of.encode()).hexdigest()[:16]}.npy"
    if judge.name != PIXELS and (kept := _kept(file)) is not None:
        return kept
    reader = samples.reader
    size = decode_image(reader, 0, prepare).shape[:2]
    with progress.task("looking at real pictures", len(samples)) as advance:
        parts = []
        for start in range(0, len(samples), judge.batch):
            indices = range(start, min(start + judge.batch, len(samples)))
            parts.append(judge.look([decode_sized(reader, i, size, prepare) for i in indices]))
            advance(len(indices))
    found = np.concatenate(parts)
    if judge.name != PIXELS:
        whole = io.BytesIO()
        np.save(whole, found)
        with suppress(OSError):  # a read-only or full disk: they are made again another time
            write_whole(file, whole.getvalue(), shared=True)
    return found


def _kept(file: Path) -> np.ndarray | None:
    """What a file holds; None where there is none, or it is not whole."""
    try:
        found: np.ndarray = np.load(file, allow_pickle=False)
    except (OSError, ValueError, EOFError):
        return None
    return found


def _latents(latents: LatentSet, without: Collection[int]) -> np.ndarray:
    """The mean latents of all samples but those at these places of the pictures' shards,
    (N, dims) fp32, as LATENTS has them.
    """
    kept = np.flatnonzero([place not in without for place in latents.places().tolist()])
    parts = []
    for start in range(0, len(kept), ENCODE_BATCH):
        moments = latents.moments(kept[start : start + ENCODE_BATCH])
        means = latents.scale.sample(moments, torch.zeros_like(moments.mean))
        parts.append(means.flatten(1).numpy())
    return np.concatenate(parts)


def _features(
    prepared: Prepared, recipe: Recipe, judge: Judge, progress: Progress
) -> list[np.ndarray]:
    """Of all pictures of every split; of latents those that training has encoded."""
    folders = dict[str, Path]()
    # with buckets, training's are of several sizes: all are made of the pictures
    if judge.name == LATENTS and not recipe.data.aspect_ratios:
        made_of = recipe.data, recipe.model.autoencoder, recipe.model.latent
        folders = ensure_latents(*made_of, progress)
    cache, features = cache_dir(recipe.data.cache), []
    for split, samples in prepared.samples.items():
        if split in folders:
            with progress.task(f"reading {split} latents"):
                kept = load_latents(folders[split], samples.reader.limit)
                features.append(_latents(kept, samples.reader.without))
        else:
            features.append(features_of(samples, judge, cache, progress, prepared.prepare))
    return features


def score_neighbours(
    prepared: Prepared,
    opened: OpenedRun,
    autoencoder: Autoencoder,
    seed: int,
    progress: Progress = SILENT,
) -> tuple[dict[str, Any], np.ndarray]:
    """`evaluate_neighbours` of a run; InputError where its judge cannot be had."""
    recipe, device = opened.recipe, next(autoencoder.parameters()).device
    judging = open_judge(prepared.features, autoencoder, recipe.model.autoencoder, device)
    fitting = open_clip(prepared.clip, device) if prepared.clip else None
    features = _features(prepared, recipe, judging, progress)
    drawn = _drawn(prepared, opened, autoencoder, seed, progress)
    return evaluate_neighbours(
        prepared, judging, features, autoencoder, drawn, seed, progress, fitting
    )


def evaluate_neighbours(
    prepared: Prepared,
    judging: Judge,
    features: Sequence[np.ndarray],
    autoencoder: Autoencoder,
    drawn: Mapping[str, np.ndarray],
    seed: int,
    progress: Progress = SILENT,
    fitting: Fitting | None = None,
) -> tuple[dict[str, Any], np.ndarray]:
    """The `neighbours` object of `flowray.eval`: draws of each caption beside controls; and the
    first SHOWN_CAPTIONS captions' pictures, uint8 (captions, 1 + draws, H, W, 3), a real one first.

    features: of the real pictures of each split, as `features_of` gives them. fitting: scores
    pictures against captions.
    drawn: pictures uint8 (captions * draws, H, W, 3) of `run` and, where there are such, of `z0`;
    of `mu` one for each caption.
    Controls: `ceiling`, held-out real pictures through the autoencoder; `real`, these pictures as
    they are, each without itself among the real ones; `shuffled`, the draws judged against another
    caption; `mu` and `z0`, decoded without the flow, None of a source that depends on no caption.
    """
    training = [np.full(len(each), split == "train") for split, each in prepared.samples.items()]
    marks, matched = np.concatenate(training), len(drawn["run"])
    real = Real(np.concatenate(features), prepared.values(), marks, matched, seed)
    indices = _held_out(prepared, seed)
    images = [decode_image(prepared.lent.reader, i, prepared.prepare) for i in indices]
    with progress.task("real pictures through the autoencoder"):
        rebuilt = decode(autoencoder, encode(autoencoder, images, seed))
    columns: dict[str, Judged] = {}
    with progress.task("judging pictures", len(rebuilt) + sum(map(len, drawn.values()))) as advance:
        for name, pictures in drawn.items():
            columns[name] = _of_draws(prepared, real, judging.look_at(pictures))
            advance(len(pictures))
        columns |= _of_real(prepared, real, judging.look_at(rebuilt), indices)
        advance(len(rebuilt))
    shuffled = None
    if fitting:
        with progress.task("scoring pictures against captions"):
            shown = {**drawn, "ceiling": rebuilt, "real": np.stack(images)}
            shuffled = _fit(prepared, columns, shown, indices, fitting, seed)
    with progress.task("standard errors"):
        result = _composed(prepared, columns, real, seed, shuffled)
    return result, _sheet(prepared, drawn["run"])


def _sheet(prepared: Prepared, pictures: np.ndarray) -> np.ndarray:
    first = prepared.asked[:SHOWN_CAPTIONS]
    reader, prepare = prepared.lent.reader, prepared.prepare
    real = np.stack([decode_image(reader, one.index, prepare) for one in first])[:, None]
    draws = pictures.reshape(len(prepared.asked), prepared.draws, *pictures.shape[1:])
    return np.concatenate([real, draws[: len(first), :SHOWN_DRAWS]], axis=1)


def _drawn(
    prepared: Prepared, opened: OpenedRun, autoencoder: Autoencoder, seed: int, progress: Progress
) -> dict[str, np.ndarray]:
    """Pictures of the run, of its z0, and of its mu once for a caption."""
    flow, source = painters(opened, seed, progress)
    texts = [one.text for one in prepared.asked for _ in range(prepared.draws)]
    latents = {"run": flow(texts)}
    if source is not None:
        with progress.task("the source without the flow"):
            mu, latents["z0"] = source(texts)
            latents["mu"] = mu[:: prepared.draws]
    with progress.task("decoding pictures", sum(map(len, latents.values()))) as advance:
        return {name: decode(autoencoder, made, advance) for name, made in latents.items()}


def _held_out(prepared: Prepared, seed: int) -> np.ndarray:
    """As many held-out pictures as there are draws, by index: those of the asked labels, then any
    others.
    """
    labels = prepared.lent.values(prepared.fields.label)
    asked = [str(one.wanted[prepared.fields.caption]) for one in prepared.asked]
    order = np.random.default_rng(seed).permutation(len(labels))
    order = order[np.argsort(~np.isin(labels[order], asked), kind="stable")]
    return order[: len(asked) * prepared.draws]


def _of_draws(prepared: Prepared, real: Real, features: np.ndarray) -> Judged:
    """Draws of every caption, or one picture that stands for all draws of it."""
    every = np.arange(len(prepared.asked))
    caption = np.repeat(every, prepared.draws)
    drawn = np.repeat(features, len(caption) // len(features), axis=0)
    spreads = np.array([real.spread(one.wanted) for one in prepared.asked])
    shown = Shown(drawn, caption, prepared.wanted(every))
    return judge(shown, real, spreads, prepared.fields.caption)


def _of_real(
    prepared: Prepared, real: Real, rebuilt: np.ndarray, indices: np.ndarray
) -> dict[str, Judged]:
    """`ceiling` and `real`, of held-out pictures by index; a caption is all those of a label."""
    places = prepared.offset() + indices
    wanted = {name: values[places] for name, values in real.values.items()}
    label = prepared.fields.caption
    kinds, caption = np.unique(wanted[label].astype(str), return_inverse=True)
    spreads = np.array([real.spread({label: kind}) for kind in kinds])
    return {
        "ceiling": judge(Shown(rebuilt, caption, wanted), real, spreads, label),
        "real": judge(Shown(real.features[places], caption, wanted, places), real, spreads, label),
    }


def _fit(
    prepared: Prepared,
    columns: Mapping[str, Judged],
    shown: Mapping[str, np.ndarray],
    indices: np.ndarray,
    fitting: Fitting,
    seed: int,
) -> float:
    """Give every column its scores against captions, of real pictures against their own first
    ones; returns that of the draws against another caption.
    """
    texts = [one.text for one in prepared.asked]
    own = [str(prepared.lent.captions[i]) for i in indices]
    for name, pictures in shown.items():
        each = len(pictures) // len(texts)
        asked = [text for text in texts for _ in range(each)]
        scores = fitting(pictures, own if name in ("ceiling", "real") else asked)
        caption = columns[name].shown.caption
        every = np.repeat(scores, len(caption) // len(scores))
        columns[name].rows[CLIP] = by_caption(every, caption)
    another = [texts[i] for i in others(len(texts), seed) for _ in range(prepared.draws)]
    return float(fitting(shown["run"], another).mean())


def _composed(
    prepared: Prepared,
    columns: dict[str, Judged],
    real: Real,
    seed: int,
    shuffled_clip: float | None = None,
) -> dict[str, Any]:
    run, fields, count = columns["run"], prepared.fields, len(prepared.asked)
    told = {name: scores(judged, real) for name, judged in columns.items()}
    another, sure = prepared.wanted(others(count, seed)), uncertainties(run, real, seed)
    shuffled = accuracies(real, another, run.found, run.shown.caption, fields.caption)
    return {
        "features": {"of": prepared.features, "why": prepared.why, "dims": real.features.shape[1]},
        "label": fields.caption,
        "captions": count,
        "draws": prepared.draws,
        **told.pop("run"),
        "standard_error": {name: one and one.error for name, one in sure.items()},
        "interval": {name: one and one.interval for name, one in sure.items()},
        "beats_mu": beats_mu(run, columns["mu"], real, seed) if "mu" in columns else None,
        "controls": {
            **{name: told.get(name) for name in ("ceiling", "real", "mu", "z0")},
            "shuffled": {name: mean(values) for name, values in shuffled.items()}
            | ({} if shuffled_clip is None else {CLIP: shuffled_clip}),
        },
        "by_group": _by_group(prepared, columns),
        "samples": {
            "generated": len(run.found.near),
            "ceiling": len(columns["ceiling"].found.near),
            "reference": len(real.reference),
            "matched": len(real.manifold.features),
            "training": int(real.training.sum()),
            "real": len(real.training),
            "left_out": prepared.left_out,
        },
        "by_caption": [
            {
                "caption": one.text,
                **one.wanted,
                **{name: mean(run.rows[name][i : i + 1]) for name in accuracies_of(run)},
            }
            for i, one in enumerate(prepared.asked)
        ],
    }


def _by_group(prepared: Prepared, columns: dict[str, Judged]) -> dict[str, Any] | None:
    """Accuracies and diversity of each group of captions, of the run and the ceiling; None where
    samples have no group.
    """
    lent, fields = prepared.lent, prepared.fields
    if fields.group is None:
        return None
    of_label = dict(zip(lent.values(fields.label), lent.values(fields.group), strict=True))
    labels = columns["ceiling"].shown.wanted[fields.caption]
    groups = {
        "run": [lent.values(fields.group)[one.index] for one in prepared.asked],
        "ceiling": [of_label[label] for label in np.unique(labels.astype(str))],
    }
    return of_groups(columns, groups, [*accuracies_of(columns["run"]), "diversity"])
