"""Reads a shapes picture back into a scene by matching every possible template: no learned judge.

The squared error of a template is sum(|p - background|^2) + sum over objects of mask * (|p -
colour|^2 - |p - background|^2), and the latter is linear in p, so all combinations of background,
colour, shape, size, place and jitter are one matrix product away, for many pictures at once.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import product

import numpy as np

from flowray.data.shapes import (
    BACKGROUNDS,
    COLOURS,
    JITTER,
    POSITIONS,
    RELATIONS,
    RGB,
    SHAPES,
    SIZES,
    Scene,
    Thing,
    mask,
)

BATCH = 64  # pictures read at once
REACH = JITTER + 1  # px searched around a nominal centre, in steps of one
SHIFTS = list(product(range(-REACH, REACH + 1), repeat=2))
# mean squared error per pixel and channel (0 to 255^2) above which a picture shows no scene at all
FLAT = 900.0

# the scene that explains a picture best, and its mean squared error
Reading = tuple[Scene, float]


class ShapesChecker:
    """Finds the scene that explains a picture best. Builds its masks once (about 30 MB)."""

    def __init__(self) -> None:
        places = sorted(
            {*POSITIONS.values(), *(centre for pair in RELATIONS.values() for centre in pair)}
        )
        # what can stand at a place
        self._objects = [Thing(*parts) for parts in product(COLOURS, SHAPES, SIZES)]
        covers = [
            mask(shape, SIZES[size], (x + dx, y + dy))
            for shape, size, (x, y), (dx, dy) in product(SHAPES, SIZES, places, SHIFTS)
        ]
        # (templates: shape, size, place and jitter, pixels)
        self._masks = np.stack(covers).reshape(len(covers), -1).astype(np.float32)
        self._areas = self._masks.sum(1)
        # relation, the lone object's position, and which of the places are taken
        self._layouts = [("", name, [places.index(place)]) for name, place in POSITIONS.items()]
        self._layouts += [
            (name, "", [places.index(place) for place in pair]) for name, pair in RELATIONS.items()
        ]

    def read(self, pictures: np.ndarray) -> Iterator[Reading]:
        """What each of the pictures uint8 (N, 64, 64, 3) shows; the error is infinite where no
        object gains.
        """
        for start in range(0, len(pictures), BATCH):
            yield from self._read(pictures[start : start + BATCH])

    def _read(self, pictures: np.ndarray) -> Iterator[Reading]:
        channels = pictures.reshape(len(pictures), -1, 3).transpose(0, 2, 1).astype(np.float32)
        # one product: each channel of each picture summed under each mask
        covered = channels.reshape(-1, channels.shape[-1]) @ self._masks.T
        covered = covered.reshape(len(pictures), 3, -1)
        found = [self._on(background, channels, covered) for background in BACKGROUNDS]
        errors = np.stack([errors for errors, _ in found], 1)  # (N, backgrounds, layouts)
        for i, own in enumerate(errors):
            ground, layout = np.unravel_index(int(own.argmin()), own.shape)
            relation, position, places = self._layouts[layout]
            best = found[ground][1][i]
            things = [replace(self._objects[best[place]], position=position) for place in places]
            scene = Scene(BACKGROUNDS[ground], tuple(things), relation)
            yield scene, float(own[ground, layout]) / channels[i].size

    def _on(
        self, background: str, channels: np.ndarray, covered: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """On this background: the squared error of every layout (N, layouts), and which object
        is best at every place (N, places).

        A layout counts where each of its objects explains something: a template on empty ground
        never gains.
        """
        ground = np.array(RGB[background], np.float32)
        colours = np.array([RGB[colour] for colour in COLOURS], np.float32)
        constant = np.square(colours).sum(1) - np.square(ground).sum()
        gain = constant[:, None] * self._areas - 2 * (colours - ground) @ covered
        gain = gain.reshape(len(gain), len(self._objects), -1, len(SHIFTS)).min(-1)
        least = gain.min(1).astype(np.float64)
        floor = np.square(channels - ground[:, None]).sum((1, 2)).astype(np.float64)
        errors = []
        for *_, places in self._layouts:
            own = least[:, places]
            errors.append(np.where((own < 0).all(1), floor + own.sum(1), np.inf))
        return np.stack(errors, 1), gain.argmin(1)


def single_score(wanted: Scene, found: Scene, error: float) -> dict[str, bool]:
    """Which attributes of a one-object scene came out right; none where the picture shows no
    scene.
    """
    want, got = wanted.things[0], found.things[0]
    shown = error < FLAT
    lone = shown and not found.relation
    return {
        "colour": shown and want.colour == got.colour,
        "shape": shown and want.shape == got.shape,
        "size": shown and want.size == got.size,
        "position": lone and want.position == got.position,
        "background": shown and wanted.background == found.background,
    }


def pair_score(wanted: Scene, found: Scene, error: float) -> dict[str, bool]:
    """A two-object scene: `relation` (layout), `binding` (each object's colour and shape at its
    own place), `all`.
    """
    shown = error < FLAT and wanted.relation == found.relation
    bound = shown and all(
        (a.colour, a.shape) == (b.colour, b.shape)
        for a, b in zip(wanted.things, found.things, strict=True)
    )
    return {"relation": shown, "binding": bound, "all": shown and wanted == found}
