"""Evaluation on captions that leave things open: many draws of each held-out caption, judged for
what is named and for how what is left open differs from draw to draw.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from flowray.config.progress import SILENT, Progress, counted
from flowray.data.open_shapes import Description, caption, distribution, lone_descriptions, whole
from flowray.data.shapes import Scene, render, single_scenes
from flowray.flow.draws import Draws
from flowray.model.autoencoder import Autoencoder
from flowray.sample.checker import ShapesChecker
from flowray.sample.distances import (
    beats,
    copies,
    frechet,
    frechet_beats,
    is_nearer,
    nearest,
    standard_error,
)
from flowray.sample.evaluate import decode, encode
from flowray.sample.open_scores import CaptionScores, Truth, figures, judge, per_caption
from flowray.sample.painters import Flow, WithoutFlow, painters
from flowray.sample.restore import OpenedRun
from flowray.store.latents import LatentSet, ensure_latents, load_latents, load_training, others

TRAINING = 4096  # training latents, at most, that copies are looked for among
HIGHER = {"named": True, "sharp": True, "coverage": False, "entropy": True}  # whether it is better


@dataclass(frozen=True)
class Asked:
    """A caption, what it says, and how what it leaves open is distributed in the data."""

    text: str
    description: Description
    truths: dict[str, Truth]


@dataclass(frozen=True)
class RealLatents:
    """Of one-object pictures, (N, dims): those trained on and held-out ones."""

    training: np.ndarray
    held_out: np.ndarray


@dataclass(frozen=True)
class Judged:
    """Pictures of all captions: scores by caption, and their latents (captions, draws, dims)."""

    rows: list[CaptionScores]
    latents: np.ndarray


def closed_caption(scene: Scene, rng: np.random.Generator) -> str:
    """One that names everything, in the words of the captions that leave things open."""
    return caption(whole(scene), rng)


def ask(count: int, seed: int) -> list[Asked]:
    """`count` held-out captions; TooMany where there are not that many."""
    return [
        Asked(
            caption(said, np.random.default_rng([seed, i])),
            said,
            {name: distribution(said, name) for name in said.left_open},
        )
        for i, said in enumerate(lone_descriptions(count, seed, held_out=True))
    ]


def real_latents(training: LatentSet, held_out: LatentSet, seed: int) -> RealLatents:
    """A random TRAINING of the training latents as they are in the mean, and all held-out ones
    drawn, as generated ones are.
    """
    chosen = np.random.default_rng(seed).permutation(_lone(training))[:TRAINING]
    return RealLatents(_latents(training, chosen, None), _latents(held_out, _lone(held_out), seed))


def _lone(latents: LatentSet) -> np.ndarray:
    """Indices of the pictures of one object; of all where a `data.limit` has left none."""
    scenes = (json.loads(latents.reader.read(i, "json"))["scene"] for i in range(len(latents)))
    lone = [i for i, scene in enumerate(scenes) if len(scene["things"]) == 1]
    return np.array(lone or range(len(latents)))


def _latents(latents: LatentSet, indices: np.ndarray, seed: int | None) -> np.ndarray:
    moments = latents.moments(indices)
    noise = torch.zeros_like(moments.mean)
    if seed is not None:
        drawn = Draws(seed, 0, len(noise), slice(None), noise.device)
        noise = drawn.normal("posterior", tuple(noise.shape[1:]))
    return latents.scale.sample(moments, noise).flatten(1).numpy()


def _fitting(asked: Sequence[Asked], draws: int, seed: int) -> list[np.ndarray]:
    """Real pictures of every caption: of training scenes that fit, drawn evenly."""
    scenes, pictures = single_scenes("train"), []
    for i, one in enumerate(asked):
        rng = np.random.default_rng([seed, i])
        fit = [scene for scene in scenes if one.description.fits(scene)]
        pictures += [render(fit[rng.integers(len(fit))], rng) for _ in range(draws)]
    return pictures


def score_open(
    opened: OpenedRun,
    autoencoder: Autoencoder,
    asked: Sequence[Asked],
    draws: int,
    seed: int,
    progress: Progress = SILENT,
) -> dict[str, Any]:
    """`evaluate_open` of a run, beside the pictures that it has learnt from."""
    recipe = opened.recipe
    made_of = recipe.data, recipe.model.autoencoder, recipe.model.latent
    folders = ensure_latents(*made_of, progress)
    with progress.task("reading latents"):
        sets = load_training(folders["train"], recipe), load_latents(folders["val"])
        real = real_latents(*sets, seed)

    flow, source = painters(opened, seed, progress)
    return evaluate_open(flow, source, autoencoder, real, asked, draws, seed, progress)


def evaluate_open(
    flow: Flow,
    source: WithoutFlow | None,
    autoencoder: Autoencoder,
    real: RealLatents,
    asked: Sequence[Asked],
    draws: int,
    seed: int,
    progress: Progress = SILENT,
) -> dict[str, Any]:
    """The `open` object of `flowray.eval`: `draws` pictures of each caption, beside controls.

    source: None of a model whose source does not depend on the caption; it then has no `mu` and
    `z0`. Controls: `ceiling`, real pictures that fit, through the autoencoder; `shuffled`, the
    generated pictures judged against another caption; `mu` and `z0`, decoded without the flow.
    """
    with progress.task("drawing the checker's templates"):
        checker = ShapesChecker()
    texts = [one.text for one in asked for _ in range(draws)]
    latents = {"run": flow(texts)}
    with progress.task("real pictures through the autoencoder"):
        latents["ceiling"] = encode(autoencoder, _fitting(asked, draws, seed), seed)
    if source is not None:
        with progress.task("the source without the flow"):
            latents["mu"], latents["z0"] = source(texts)
    another = [asked[i] for i in others(len(asked), seed)]
    judged: dict[str, Judged] = {}
    once = {name: draws if name == "mu" else 1 for name in latents}  # draws that are all the same
    apart = {name: made[:: once[name]] for name, made in latents.items()}
    pictures = sum(map(len, apart.values()))
    with progress.task("decoding pictures", pictures) as advance:
        shown = {name: decode(autoencoder, made, advance) for name, made in apart.items()}
    with progress.task("judging pictures", pictures) as advance:
        for name, made in latents.items():
            found = counted(checker.read(shown[name]), advance)
            readings = [reading for reading in found for _ in range(once[name])]
            flat = made.flatten(1).cpu().numpy().reshape(len(asked), draws, -1)
            grouped = [readings[i : i + draws] for i in range(0, len(readings), draws)]
            judged[name] = Judged(_rows(asked, grouped), flat)
            if name == "run":
                shuffled = _rows(another, grouped)
    with progress.task("comparing latents"):
        return _composed(judged, shuffled, real, asked, seed)


def _rows(asked: Sequence[Asked], grouped: Sequence[Any]) -> list[CaptionScores]:
    return [
        judge(one.description, one.truths, readings)
        for one, readings in zip(asked, grouped, strict=True)
    ]


def _composed(
    judged: dict[str, Judged],
    shuffled: list[CaptionScores],
    real: RealLatents,
    asked: Sequence[Asked],
    seed: int,
) -> dict[str, Any]:
    run = judged["run"]
    captions, draws, dims = run.latents.shape
    near_real = nearest(real.held_out, real.training)
    near = {name: nearest(_flat(one), real.training) for name, one in judged.items()}
    mixed = np.random.default_rng(seed).permutation(real.held_out)
    half, rest = np.split(mixed, [min(captions * draws, len(mixed) // 2)])

    def scores(name: str) -> dict[str, Any]:
        return {
            **figures(judged[name].rows),
            "copies": copies(near[name], near_real),
            "frechet": frechet(_flat(judged[name]), rest),
        }

    beats_mu = None
    if mu := judged.get("mu"):
        nearer = [
            is_nearer(near[name], near_real).reshape(captions, draws).mean(1)
            for name in ("mu", "run")
        ]
        beats_mu = {
            **{name: beats(_gain(run.rows, mu.rows, name)) for name in HIGHER},
            "copies": beats(nearer[0] - nearer[1]),
            "frechet": frechet_beats(run.latents, mu.latents, rest),
        }
    return {
        "captions": captions,
        "draws": draws,
        **scores("run"),
        "frechet_real": frechet(half, rest),
        "samples": {
            "generated": captions * draws,
            "real": len(rest),
            "real_half": len(half),
            "dims": dims,
        },
        "standard_error": {name: standard_error(per_caption(run.rows, name)) for name in HIGHER},
        "beats_mu": beats_mu,
        "controls": {
            "ceiling": scores("ceiling"),
            "shuffled": figures(shuffled),
            **{name: scores(name) if name in judged else None for name in ("mu", "z0")},
        },
        "by_caption": [
            {"caption": one.text, "named": row.named, "coverage": row.coverage}
            for one, row in zip(asked, run.rows, strict=True)
        ],
    }


def _flat(judged: Judged) -> np.ndarray:
    return judged.latents.reshape(-1, judged.latents.shape[-1])


def _gain(rows: Sequence[CaptionScores], over: Sequence[CaptionScores], figure: str) -> np.ndarray:
    """By how much each caption's figure is better than another model's."""
    gain = per_caption(rows, figure) - per_caption(over, figure)
    return gain if HIGHER[figure] else -gain
