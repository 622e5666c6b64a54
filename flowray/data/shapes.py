"""Procedural scenes at 64 px whose captions can be checked exactly.

A scene is one or two flat-coloured objects on a flat background. Every word of a caption is decided
by the scene and, but for a small jitter, the scene is decided by the caption: what a caption leaves
out has a fixed meaning (no background: white; no position: the centre). Two kinds of scene never
reach the training split:

- *held-out scenes*: a tenth of all full descriptions, their parts all seen (the `val` split);
- *unseen pairs*: the (colour, shape) pairs of `UNSEEN_PAIRS`, never seen together (the `unseen`
split).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import product
from typing import Any, Literal

import numpy as np

IMAGE_SIZE = 64
JITTER = 1  # px, uniform in each direction

RGB = {
    "red": (214, 48, 49),
    "green": (39, 160, 70),
    "blue": (41, 84, 200),
    "yellow": (250, 200, 40),
    "purple": (150, 60, 180),
    "cyan": (60, 200, 210),
    "white": (245, 245, 245),
    "black": (20, 20, 20),
    "gray": (128, 128, 128),
    "pink": (250, 190, 200),
}
COLOURS = ("red", "green", "blue", "yellow", "purple", "cyan")
SHAPES = ("circle", "square", "triangle", "cross")
SIZES = {"small": 8.0, "large": 13.0}  # radius of the enclosing circle, px
BACKGROUNDS = ("white", "black", "gray", "pink")
# (x, y), px
POSITIONS = {
    "center": (32, 32),
    "left": (18, 32),
    "right": (46, 32),
    "top": (32, 18),
    "bottom": (32, 46),
}
# (first, second) centres
RELATIONS = {"left of": ((16, 32), (48, 32)), "above": ((32, 16), (32, 48))}
UNSEEN_PAIRS = (("red", "triangle"), ("cyan", "square"), ("yellow", "cross"))
ATTRIBUTES = ("colour", "shape", "size", "position", "background")

Split = Literal["train", "val", "unseen"]

INVERSE = {"left of": "right of", "above": "below"}
SIDES = {"left of": ("left", "right"), "above": ("top", "bottom")}
SIZE_WORDS = {"small": ("small", "little"), "large": ("large", "big")}
PLACE_WORDS = {
    "center": ("in the center", "in the middle"),
    "left": ("on the left", "at the left"),
    "right": ("on the right", "at the right"),
    "top": ("at the top", "on the top"),
    "bottom": ("at the bottom", "on the bottom"),
}
BACKGROUND_TEMPLATES = (
    "{body} on a {background} background",
    "{body}, {background} background",
    "on a {background} background, {body}",
    "a {background} picture with {body}",
    "a {background} image showing {body}",
)


@dataclass(frozen=True)
class Thing:
    """One object; `position` is a key of POSITIONS for a lone object and "" where a relation
    places it.
    """

    colour: str
    shape: str
    size: str
    position: str = ""


@dataclass(frozen=True)
class Scene:
    """What a picture shows: one object, or two with `relation` (first RELATION second)."""

    background: str
    things: tuple[Thing, ...]
    relation: str = ""

    def as_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, row: dict[str, Any]) -> Scene:
        things = tuple(Thing(**thing) for thing in row["things"])
        return cls(background=row["background"], things=things, relation=row["relation"])

    @property
    def split(self) -> Split:
        """The one split a scene belongs to: a function of its description alone."""
        if any((t.colour, t.shape) in UNSEEN_PAIRS for t in self.things):
            return "unseen"
        digest = hashlib.sha256(repr(self).encode()).digest()
        return "val" if digest[0] < 256 // 10 else "train"


def single_scenes(split: Split) -> list[Scene]:
    """Every one-object scene of a split, in a fixed order."""
    every = (
        Scene(background, (Thing(colour, shape, size, position),))
        for colour, shape, size, position, background in product(
            COLOURS, SHAPES, SIZES, POSITIONS, BACKGROUNDS
        )
    )
    return [scene for scene in every if scene.split == split]


def draw_scene(rng: np.random.Generator, split: Split, *, two_objects: bool) -> Scene:
    """A random scene of the split."""

    def pick(options: Any) -> str:
        return str(rng.choice(list(options)))

    while True:
        background, relation = pick(BACKGROUNDS), pick(RELATIONS) if two_objects else ""
        position = "" if two_objects else pick(POSITIONS)
        things = tuple(
            Thing(pick(COLOURS), pick(SHAPES), pick(SIZES), position)
            for _ in range(2 if two_objects else 1)
        )
        scene = Scene(background, things, relation)
        if scene.split == split:
            return scene


def mask(shape: str, radius: float, centre: tuple[float, float]) -> np.ndarray:
    """Anti-aliased coverage (64, 64) in [0, 1] of one shape; `centre` is (x, y) in pixels."""
    y, x = np.mgrid[0:IMAGE_SIZE, 0:IMAGE_SIZE].astype(np.float32)
    x, y = x + 0.5 - centre[0], y + 0.5 - centre[1]
    # Signed distance in px, positive inside; exact for the circle, exact along the edges of the
    # rest.
    if shape == "circle":
        inside = radius - np.hypot(x, y)
    elif shape == "square":
        half = radius * 0.85
        inside = np.minimum(half - np.abs(x), half - np.abs(y))
    elif shape == "triangle":
        apothem = radius / 2
        down = apothem - y
        sides = apothem + y / 2 - np.abs(x) * np.sqrt(3) / 2
        inside = np.minimum(down, sides)
    elif shape == "cross":
        arm = radius / 3
        across = np.minimum(radius - np.abs(x), arm - np.abs(y))
        upright = np.minimum(arm - np.abs(x), radius - np.abs(y))
        inside = np.maximum(across, upright)
    else:
        raise ValueError(f"unknown shape {shape!r}; known: {', '.join(SHAPES)}")
    return np.clip(inside + 0.5, 0.0, 1.0)


def centres(scene: Scene) -> list[tuple[int, int]]:
    """Nominal centre (x, y) of every object, before jitter."""
    if scene.relation:
        return list(RELATIONS[scene.relation])
    return [POSITIONS[scene.things[0].position]]


def render(
    scene: Scene, rng: np.random.Generator | None = None, jitter: int = JITTER
) -> np.ndarray:
    """The picture, uint8 (64, 64, 3); where `rng` is given, each object up to `jitter` px off
    its place.
    """
    canvas = np.broadcast_to(
        np.array(RGB[scene.background], np.float32), (IMAGE_SIZE, IMAGE_SIZE, 3)
    ).copy()
    for thing, (cx, cy) in zip(scene.things, centres(scene), strict=True):
        dx, dy = rng.integers(-jitter, jitter + 1, size=2) if rng is not None else (0, 0)
        cover = mask(thing.shape, SIZES[thing.size], (cx + dx, cy + dy))[..., None]
        canvas = canvas * (1 - cover) + np.array(RGB[thing.colour], np.float32) * cover
    return np.round(canvas).astype(np.uint8)


def caption(scene: Scene, rng: np.random.Generator | None = None) -> str:
    """One caption; the plain canonical one without `rng`, else a random template and random
    synonyms.
    """

    def pick(options: tuple[str, ...]) -> str:
        return options[0] if rng is None else str(rng.choice(options))

    def noun(thing: Thing) -> str:
        return f"a {pick(SIZE_WORDS[thing.size])} {thing.colour} {thing.shape}"

    if scene.relation:
        first, second, relation = scene.things[0], scene.things[1], scene.relation
        if pick(("as it is", "inverted")) == "inverted":
            first, second, relation = second, first, INVERSE[relation]
        body = f"{noun(first)} {relation} {noun(second)}"
    else:
        thing = scene.things[0]
        body = f"{noun(thing)} {pick(PLACE_WORDS[thing.position])}"
        if rng is not None and thing.position == "center" and rng.random() < 0.25:
            body = noun(thing)
    if rng is not None and scene.background == "white" and rng.random() < 0.25:
        return body
    template = pick(BACKGROUND_TEMPLATES)
    return template.format(body=body, background=scene.background)


def samples(
    count: int, split: Split, seed: int, two_share: float = 0.5, jitter: int = JITTER
) -> Iterator[tuple[np.ndarray, list[str], Scene]]:
    """`count` (picture, three captions, scene) triples, a function of the arguments alone.

    two_share: share of two-object scenes, in [0, 1].
    """
    for index in range(count):
        rng = np.random.default_rng([seed, ("train", "val", "unseen").index(split), index])
        scene = draw_scene(rng, split, two_objects=bool(rng.random() < two_share))
        yield render(scene, rng, jitter), [caption(scene, rng) for _ in range(3)], scene
