"""Reads a shapes picture back into a scene by matching every possible template: no learned judge.

The squared error of a template is sum(|p - background|^2) + sum over objects of mask * (|p -
colour|^2 - |p - background|^2), and the latter is linear in p, so all combinations of background,
colour, shape, size, place and jitter are one matrix product away.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product

import numpy as np

from flowray.data.shapes import (
    BACKGROUNDS,
    COLOURS,
    IMAGE_SIZE,
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

REACH = JITTER + 1  # px searched around a nominal centre, in steps of one
# mean squared error per pixel and channel (0 to 255^2) above which a picture shows no scene at all
FLAT = 900.0


@dataclass(frozen=True)
class Template:
    """One object at one place, without its colour."""

    shape: str
    size: str
    place: tuple[int, int]


class ShapesChecker:
    """Finds the scene that explains a picture best. Builds its masks once (about 60 MB)."""

    def __init__(self) -> None:
        places = sorted(
            {*POSITIONS.values(), *(centre for pair in RELATIONS.values() for centre in pair)}
        )
        self.templates = [Template(*key) for key in product(SHAPES, SIZES, places)]
        shifts = [(dx, dy) for dx in range(-REACH, REACH + 1) for dy in range(-REACH, REACH + 1)]
        self._jitters = len(shifts)
        covers = [
            mask(t.shape, SIZES[t.size], (t.place[0] + dx, t.place[1] + dy))
            for t in self.templates
            for dx, dy in shifts
        ]
        self._masks = (
            np.stack(covers).reshape(len(covers), IMAGE_SIZE * IMAGE_SIZE).astype(np.float32)
        )
        self._areas = self._masks.sum(1)
        self._rows = {
            place: [i for i, t in enumerate(self.templates) if t.place == place] for place in places
        }

    def read(self, picture: np.ndarray) -> tuple[Scene, float]:
        """(the best scene, its mean squared error) of a picture uint8 (64, 64, 3); the error is
        infinite where no object gains.
        """
        flat = picture.reshape(-1, 3).astype(np.float32)
        # (3, templates * jitters): each channel summed under each mask
        covered = flat.T @ self._masks.T
        found: list[tuple[float, Scene]] = []
        for background in BACKGROUNDS:
            ground = np.array(RGB[background], np.float32)
            floor = float(np.square(flat - ground).sum())
            colours = np.array([RGB[colour] for colour in COLOURS], np.float32)
            constant = np.square(colours).sum(1) - np.square(ground).sum()
            gain = constant[:, None] * self._areas - 2 * (colours - ground) @ covered
            found += self._scenes(
                background,
                floor,
                gain.reshape(len(COLOURS), len(self.templates), self._jitters).min(-1),
            )
        if not found:
            return Scene(
                BACKGROUNDS[0],
                (Thing(COLOURS[0], SHAPES[0], next(iter(SIZES)), next(iter(POSITIONS))),),
            ), float("inf")
        error, scene = min(found, key=lambda pair: pair[0])
        return scene, error / flat.size

    def _best_at(self, gain: np.ndarray, place: tuple[int, int]) -> tuple[float, Thing]:
        rows = self._rows[place]
        colour, row = np.unravel_index(int(gain[:, rows].argmin()), (len(COLOURS), len(rows)))
        template = self.templates[rows[row]]
        return float(gain[colour, rows[row]]), Thing(COLOURS[colour], template.shape, template.size)

    def _scenes(self, background: str, floor: float, gain: np.ndarray) -> list[tuple[float, Scene]]:
        """(squared error, scene) of every layout whose objects each explain something: a
        template on empty ground never gains.
        """
        found = []
        for position, place in POSITIONS.items():
            error, thing = self._best_at(gain, place)
            if error < 0:
                found.append(
                    (
                        floor + error,
                        Scene(
                            background, (Thing(thing.colour, thing.shape, thing.size, position),)
                        ),
                    )
                )
        for relation, pair in RELATIONS.items():
            (first_error, first), (second_error, second) = (
                self._best_at(gain, place) for place in pair
            )
            if first_error < 0 and second_error < 0:
                found.append(
                    (
                        floor + first_error + second_error,
                        Scene(background, (first, second), relation),
                    )
                )
        return found


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
