"""Exact evaluation on shapes: pictures of held-out prompts are read back by template matching
and compared with the prompt.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
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

PAIRS = 128  # two-object prompts
BATCH = 64

Painter = Callable[[Sequence[str]], np.ndarray]  # prompts -> pictures uint8 (B, 64, 64, 3)
Say = Callable[[Scene, np.random.Generator], str]


def _captions(scenes: list[Scene], seed: int, say: Say) -> list[str]:
    return [say(scene, np.random.default_rng([seed, i])) for i, scene in enumerate(scenes)]


def _singles(scenes: list[Scene], read: list[Reading]) -> dict[str, Any]:
    """Scores of what one-object pictures show against the scenes they should show."""
    rows = [single_score(scene, *found) for scene, found in zip(scenes, read, strict=True)]
    by_attribute = {name: float(np.mean([row[name] for row in rows])) for name in ATTRIBUTES}
    return {
        "mean_attribute_accuracy": float(np.mean(list(by_attribute.values()))),
        "all_correct": float(np.mean([all(row.values()) for row in rows])),
        "by_attribute": by_attribute,
        "prompts": len(rows),
    }


def _pairs(scenes: list[Scene], read: list[Reading]) -> dict[str, Any]:
    """Scores of what two-object pictures show."""
    rows = [pair_score(scene, *found) for scene, found in zip(scenes, read, strict=True)]
    return {
        name: float(np.mean([row[name] for row in rows])) for name in ("relation", "binding", "all")
    } | {"prompts": len(rows)}


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
) -> dict[str, Any]:
    """The `shapes` object of `flowray.eval`: held-out single-object prompts, two objects, unseen
    pairs, and the controls.

    Controls: `ceiling`, real pictures of the same scenes through the autoencoder; `floor`, the same
    generated pictures judged against another scene's caption. say: a caption that names all of a
    scene, in the words of the set that the run has learnt.
    """
    with progress.task("drawing the checker's templates"):
        checker = ShapesChecker()
    held_out, unseen = single_scenes("val"), single_scenes("unseen")
    pairs = two_object_scenes("val", seed)
    painted = [paint(_captions(scenes, seed, say)) for scenes in (held_out, pairs, unseen)]
    real = [render(scene, np.random.default_rng([seed, i])) for i, scene in enumerate(held_out)]
    order = np.random.default_rng(seed).permutation(len(held_out))
    shuffled = [held_out[i] for i in np.roll(order, 1)[np.argsort(order)]]
    with progress.task("real pictures through the autoencoder"):
        rebuilt = round_trip(autoencoder, real, seed)
    shown = [*painted, rebuilt]
    with progress.task("judging pictures", sum(map(len, shown))) as advance:
        found, paired, never_seen, ceiling = (
            list(counted(checker.read(pictures), advance)) for pictures in shown
        )
    return {
        **_singles(held_out, found),
        "two_objects": _pairs(pairs, paired),
        "unseen": _singles(unseen, never_seen),
        "controls": {"ceiling": _singles(held_out, ceiling), "floor": _singles(shuffled, found)},
    }
