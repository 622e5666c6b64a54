"""Exact evaluation on shapes: pictures of held-out prompts are read back by template matching
and compared with the prompt.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flowray.config.progress import SILENT, Advance, Progress, counted
from flowray.data.pixels import from_pictures, to_pictures
from flowray.data.shapes import ATTRIBUTES, Scene, Split, caption, draw_scene, render, single_scenes
from flowray.flow.draws import Draws
from flowray.model.autoencoder import Autoencoder
from flowray.sample.checker import Reading, ShapesChecker, pair_score, single_score
from flowray.sample.distances import bootstrap
from flowray.store.latents import others

PAIRS = 128  # two-object prompts
BATCH = 64

Painter = Callable[[Sequence[str]], np.ndarray]  # prompts -> pictures uint8 (B, 64, 64, 3)
Say = Callable[[Scene, np.random.Generator], str]


def _captions(scenes: list[Scene], seed: int, say: Say) -> list[str]:
    return [say(scene, np.random.default_rng([seed, i])) for i, scene in enumerate(scenes)]


Rows = list[dict[str, bool]]  # of each picture, what came out right


def _single_rows(scenes: list[Scene], read: list[Reading]) -> Rows:
    return [single_score(scene, *found) for scene, found in zip(scenes, read, strict=True)]


def _pair_rows(scenes: list[Scene], read: list[Reading]) -> Rows:
    return [pair_score(scene, *found) for scene, found in zip(scenes, read, strict=True)]


def _columns(rows: Rows) -> dict[str, np.ndarray]:
    """Figure -> what it is of each picture (N,)."""
    columns = {name: np.array([row[name] for row in rows], dtype=np.float64) for name in rows[0]}
    if "relation" in columns:
        return columns
    every = np.stack(list(columns.values()))
    return {"mean_attribute_accuracy": every.mean(0), "all_correct": every.min(0)} | columns


def _scores(rows: Rows) -> dict[str, Any]:
    """Means over pictures: of one object also by attribute."""
    told: dict[str, Any] = {name: float(each.mean()) for name, each in _columns(rows).items()}
    if "relation" not in told:
        told["by_attribute"] = {name: told.pop(name) for name in ATTRIBUTES}
    return told | {"prompts": len(rows)}


def _intervals(rows: Rows, seed: int) -> dict[str, tuple[float, float]]:
    """The 95 % confidence interval of each score, over prompts."""
    columns = _columns(rows)
    return {
        name: bootstrap(partial(_mean_of, each), len(rows), seed).interval
        for name, each in columns.items()
    }


def _mean_of(values: np.ndarray, kept: np.ndarray) -> float:
    return float(values[kept].mean())


def two_object_scenes(split: Split, seed: int) -> list[Scene]:
    """PAIRS random two-object scenes of a split."""
    return [
        draw_scene(np.random.default_rng([seed, i]), split, two_objects=True) for i in range(PAIRS)
    ]


def encode(autoencoder: Autoencoder, images: list[np.ndarray], seed: int) -> Tensor:
    """Drawn latents (B, C, H, W) of real pictures."""
    device, latents = next(autoencoder.parameters()).device, []
    for start in range(0, len(images), BATCH):
        moments = autoencoder.encode_moments(to_pictures(images[start : start + BATCH]).to(device))
        noise = Draws(seed, start, len(moments.mean), slice(None), device).normal(
            "posterior", tuple(moments.mean.shape[1:])
        )
        latents.append(autoencoder.sample(moments, noise))
    return torch.cat(latents)


def decode(autoencoder: Autoencoder, latents: Tensor, advance: Advance | None = None) -> np.ndarray:
    """Pictures uint8 (B, H, W, 3) of scaled latents. advance: told of every batch."""
    pictures = []
    for part in latents.split(BATCH):
        pictures.append(from_pictures(autoencoder.decode(part)))
        if advance:
            advance(len(part))
    return np.concatenate(pictures)


def round_trip(autoencoder: Autoencoder, images: list[np.ndarray], seed: int) -> np.ndarray:
    """Real pictures through encode, sample and decode: what a perfect model could reach."""
    return decode(autoencoder, encode(autoencoder, images, seed))


def evaluate_shapes(
    paint: Painter,
    autoencoder: Autoencoder,
    seed: int,
    progress: Progress = SILENT,
    say: Say = caption,
    limit: int | None = None,
) -> dict[str, Any]:
    """The `shapes` object of `flowray.eval`: held-out single-object prompts, two objects, unseen
    pairs, their 95 % confidence intervals over prompts, and the controls.

    Controls of each: `ceiling`, real pictures of the same scenes through the autoencoder; `floor`,
    the same generated pictures judged against another scene's caption. say: a caption that names
    all of a scene, in the words of the set that the run has learnt. limit: scenes of each kind.
    """
    with progress.task("drawing the checker's templates"):
        checker = ShapesChecker()
    asked = {
        "held_out": evenly(single_scenes("val"), limit),
        "two_objects": two_object_scenes("val", seed)[:limit],
        "unseen": evenly(single_scenes("unseen"), limit),
    }
    shown = {name: paint(_captions(scenes, seed, say)) for name, scenes in asked.items()}
    with progress.task("real pictures through the autoencoder"):
        for name, scenes in asked.items():
            real = [render(one, np.random.default_rng([seed, i])) for i, one in enumerate(scenes)]
            shown[f"real {name}"] = round_trip(autoencoder, real, seed)
    with progress.task("judging pictures", sum(map(len, shown.values()))) as advance:
        read = {name: list(counted(checker.read(x), advance)) for name, x in shown.items()}
    scores: dict[str, Any] = {}
    intervals: dict[str, Any] = {}
    controls: dict[str, Any] = {}
    for name, scenes in asked.items():
        rows = _pair_rows if name == "two_objects" else _single_rows
        another = [scenes[i] for i in others(len(scenes), seed)]
        scores[name] = _scores(rows(scenes, read[name]))
        intervals[name] = _intervals(rows(scenes, read[name]), seed)
        controls[name] = {
            "ceiling": _scores(rows(scenes, read[f"real {name}"])),
            "floor": _scores(rows(another, read[name])),
        }
    return {
        **scores.pop("held_out"),
        **scores,
        "interval": intervals.pop("held_out") | intervals,
        "controls": controls.pop("held_out") | controls,
    }


def evenly(scenes: list[Scene], limit: int | None) -> list[Scene]:
    """At most `limit` of the scenes, evenly spread over their order."""
    count = min(limit or len(scenes), len(scenes))
    return [scenes[i * len(scenes) // count] for i in range(count)]
