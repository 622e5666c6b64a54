"""Shapes scenes under captions that leave things open, so that a caption has many right pictures.

A caption names a part of its scene: a quarter of the captions all of it, the others each attribute
of each object, the background and the relation with probability 1/2. What it does not name may be
anything; no word means something by its absence, but that a caption of one object is one of a
picture of one. Scenes are those of `flowray.data.shapes`, with its splits, and a tenth of the
descriptions that name three things or more never reach the training split.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

from flowray.data.shapes import (
    ATTRIBUTES,
    BACKGROUND_TEMPLATES,
    INVERSE,
    JITTER,
    PLACE_WORDS,
    SIDES,
    SIZE_WORDS,
    Scene,
    Split,
    Thing,
    draw_scene,
    render,
    single_scenes,
)

WHOLE = 0.25  # share of the captions that name everything
NAMED = 0.5  # probability of each attribute in the others
CAPTIONS = 4  # of each picture
HELD_OUT_FROM = 3  # named attributes: what names fewer fits too many pictures to be held out

_NOUNS = ("thing", "object")


@dataclass(frozen=True)
class Named:
    """What a caption says of one object, in the words of `Thing`; "" is left open."""

    colour: str = ""
    shape: str = ""
    size: str = ""
    position: str = ""

    def fits(self, thing: Thing) -> bool:
        """Whether the object is as it says."""
        return all(value in ("", getattr(thing, key)) for key, value in vars(self).items())


@dataclass(frozen=True)
class Description:
    """What a caption says of a scene; "" is left open. Two objects stand in the order of
    `relation` where that is named, else in either.
    """

    things: tuple[Named, ...]
    relation: str = ""
    background: str = ""

    def fits(self, scene: Scene) -> bool:
        """Whether a picture of the scene is a right answer."""
        if len(scene.things) != len(self.things) or self.relation not in ("", scene.relation):
            return False
        ways = [scene.things] if self.relation else [scene.things, scene.things[::-1]]
        fitting = any(
            all(said.fits(thing) for said, thing in zip(self.things, way, strict=True))
            for way in ways
        )
        return fitting and self.background in ("", scene.background)

    @property
    def count(self) -> int:
        """How many attributes it names, background and relation among them."""
        said = [value for thing in self.things for value in vars(thing).values()]
        return sum(map(bool, [*said, self.relation, self.background]))

    @property
    def left_open(self) -> tuple[str, ...]:
        """Of a lone object's ATTRIBUTES those that it does not name."""
        said = {**vars(self.things[0]), "background": self.background}
        return tuple(name for name in ATTRIBUTES if not said[name])

    @property
    def held_out(self) -> bool:
        """Whether no training picture has a caption that says this: a function of what is said,
        which of two objects without a relation is the same in either order.
        """
        things = self.things if self.relation else tuple(sorted(self.things, key=repr))
        digest = hashlib.sha256(repr(replace(self, things=things)).encode()).digest()
        return self.count >= HELD_OUT_FROM and digest[0] < 256 // 10


def whole(scene: Scene) -> Description:
    """The description that names everything."""
    things = tuple(Named(t.colour, t.shape, t.size, t.position) for t in scene.things)
    return Description(things, scene.relation, scene.background)


def describe(scene: Scene, rng: np.random.Generator) -> Description:
    """A random description that fits the scene; it names something."""

    def kept(value: str) -> str:
        return value if rng.random() < NAMED else ""

    full = whole(scene)
    if rng.random() < WHOLE:
        return full
    while True:
        things = tuple(
            replace(said, **{key: kept(value) for key, value in vars(said).items()})
            for said in full.things
        )
        made = Description(things, kept(full.relation), kept(full.background))
        if made.count:
            return made


def caption(description: Description, rng: np.random.Generator | None = None) -> str:
    """One caption that says it; the plain canonical one without `rng`."""

    def pick(options: tuple[str, ...]) -> str:
        return options[0] if rng is None else str(rng.choice(options))

    def noun(said: Named) -> str:
        size = pick(SIZE_WORDS[said.size]) if said.size else ""
        words = [word for word in (size, said.colour) if word]
        if not said.shape and (not words or pick(("noun", "something")) == "something"):
            return " ".join(["something", *words])
        return " ".join(["a", *words, said.shape or pick(_NOUNS)])

    things = [noun(said) for said in description.things]
    first = description.things[0]
    if len(things) == 1:
        place = pick(PLACE_WORDS[first.position]) if first.position else ""
        body = " ".join(word for word in (things[0], place) if word)
    elif description.relation:
        relation = description.relation
        if pick(("as it is", "inverted")) == "inverted":
            things, relation = things[::-1], INVERSE[relation]
        body = f" {relation} ".join(things)
    else:
        body = " and ".join(things if pick(("as it is", "turned")) == "as it is" else things[::-1])
    if not description.background:
        return body
    return pick(BACKGROUND_TEMPLATES).format(body=body, background=description.background)


def samples(
    count: int, split: Split, seed: int, two_share: float, jitter: int = JITTER
) -> Iterator[tuple[np.ndarray, list[str], Scene]]:
    """`count` (picture, CAPTIONS captions, scene) triples, a function of the arguments alone.

    two_share: share of two-object scenes, in [0, 1]. Captions of the training split never say
    what is held out.
    """
    for index in range(count):
        rng = np.random.default_rng([seed, ("train", "val", "unseen").index(split), index])
        scene = draw_scene(rng, split, two_objects=bool(rng.random() < two_share))
        picture = render(scene, rng, jitter)
        yield picture, [text for _, text in captions_of(scene, split, rng)], scene


def captions_of(
    scene: Scene, split: Split, rng: np.random.Generator
) -> list[tuple[Description, str]]:
    """CAPTIONS random descriptions of a scene, each with a caption that says it."""
    found: list[tuple[Description, str]] = []
    while len(found) < CAPTIONS:
        said = describe(scene, rng)
        if split != "train" or not said.held_out:
            found.append((said, caption(said, rng)))
    return found


def facts(description: Description) -> list[str]:
    """What a description says, one word each: how many objects ("alone", "both"), what each of them
    is ("isred"), the place of a lone one ("atleft"), the background ("onwhite").

    Of two objects the words tell which belong together: joined to its place where the relation is
    named ("leftred"), else colour and shape, or what is named of them, as one ("redcircle").
    """
    things, count = description.things, len(description.things)
    words = ["alone" if count == 1 else "both"]
    for place, thing in zip(SIDES.get(description.relation, ("",) * count), things, strict=True):
        said = [value for value in (thing.colour, thing.shape, thing.size) if value]
        if count == 1:
            words += [f"is{value}" for value in said]
        elif place:
            words += [place + value for value in said]
        elif said:
            words += [f"one{''.join(said[:2])}", *(f"one{value}" for value in said[2:])]
        words += [f"at{thing.position}"] if thing.position else []
    words += [f"on{description.background}"] if description.background else []
    return list(dict.fromkeys(words))


class TooMany(ValueError):
    """More descriptions were asked for than there are. most: how many there are."""

    def __init__(self, count: int, most: int):
        super().__init__(f"count: want at most {most} descriptions, got {count}")
        self.most = most


def lone_descriptions(count: int, seed: int, *, held_out: bool) -> list[Description]:
    """`count` different descriptions of one object that leave something open, drawn as captions
    are: held-out ones, or such as training captions say.

    TooMany where there are not that many (some 180 are held out).
    """
    rng, scenes = np.random.default_rng([seed, held_out]), single_scenes("train")
    found: dict[Description, None] = {}
    for _ in range(500 * count):
        said = describe(scenes[rng.integers(len(scenes))], rng)
        if said.left_open and said.held_out == held_out:
            found[said] = None
        if len(found) == count:
            return list(found)
    raise TooMany(count, len(found))


def distribution(description: Description, attribute: str) -> dict[str, float]:
    """value -> probability of a lone object's attribute among training scenes that fit.

    Training draws its one-object scenes evenly, so that each that fits counts alike.
    """
    counts = Counter(
        value_of(scene, attribute) for scene in single_scenes("train") if description.fits(scene)
    )
    return {value: n / counts.total() for value, n in sorted(counts.items())}


def value_of(scene: Scene, attribute: str) -> str:
    """One of ATTRIBUTES of a one-object scene."""
    return {**vars(scene.things[0]), "background": scene.background}[attribute]
