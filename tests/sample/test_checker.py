"""The checker reads scenes back exactly, sees nothing where there is nothing, and the
evaluation's ends are 1 and chance.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support import SPEC, tiny_autoencoder

from flowray.config.model import KLAutoencoder
from flowray.data.shapes import (
    ATTRIBUTES,
    BACKGROUNDS,
    RGB,
    Scene,
    Thing,
    caption,
    draw_scene,
    render,
    single_scenes,
)
from flowray.model.autoencoder import load_autoencoder
from flowray.sample import evaluate
from flowray.sample.checker import FLAT, Reading, ShapesChecker, pair_score, single_score
from flowray.sample.evaluate import evaluate_shapes, two_object_scenes

EVERY = [scene for split in ("train", "val", "unseen") for scene in single_scenes(split)]
PAIRS = [draw_scene(np.random.default_rng([0, i]), "train", two_objects=True) for i in range(60)]


@pytest.fixture(scope="module")
def checker() -> ShapesChecker:
    return ShapesChecker()


def read(checker: ShapesChecker, picture: np.ndarray) -> Reading:
    """One picture's reading."""
    return next(checker.read(picture[None]))


def noisy(scene: Scene, seed: int, sigma: float = 10.0) -> np.ndarray:
    """The scene with jitter and pixel noise."""
    rng = np.random.default_rng([1, seed])
    return (
        np.clip(render(scene, rng) + sigma * rng.standard_normal((64, 64, 3)), 0, 255)
        .round()
        .astype(np.uint8)
    )


def test_every_single_scene_with_jitter_and_noise(checker: ShapesChecker) -> None:
    assert len(set(EVERY)) == 6 * 4 * 2 * 5 * 4
    found = list(checker.read(np.stack([noisy(scene, i) for i, scene in enumerate(EVERY)])))
    assert [scene for scene, _ in found] == EVERY
    assert max(error for _, error in found) < 250  # sigma^2 = 100, and up to 60 from soft edges


def test_two_objects_with_jitter_and_noise(checker: ShapesChecker) -> None:
    pictures = np.stack([noisy(scene, i) for i, scene in enumerate(PAIRS)])
    assert [scene for scene, _ in checker.read(pictures)] == PAIRS


@pytest.mark.parametrize("scene", [*EVERY[::97], *PAIRS[:5]], ids=caption)
def test_clean_pictures_have_little_error(checker: ShapesChecker, scene: Scene) -> None:
    found, error = read(checker, render(scene))
    assert found == scene
    assert error < 80  # soft edges: a half-covered pixel is near neither colour
    score = (
        single_score(scene, found, error) if not scene.relation else pair_score(scene, found, error)
    )
    assert all(score.values())


def nothing(kind: str) -> np.ndarray:
    rng = np.random.default_rng(0)
    if kind == "noise":
        return rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)
    if kind == "gradient":
        return np.broadcast_to(np.linspace(0, 255, 64).astype(np.uint8)[:, None, None], (64, 64, 3))
    return np.broadcast_to(np.array(RGB[kind], np.uint8), (64, 64, 3))


@pytest.mark.parametrize("kind", ["noise", "gradient", *BACKGROUNDS, "red", "purple"])
def test_a_picture_without_a_scene_scores_nothing(checker: ShapesChecker, kind: str) -> None:
    found, error = read(checker, nothing(kind))
    assert error >= FLAT
    for scene in EVERY[::50]:
        assert not any(single_score(scene, found, error).values())
    assert not any(pair_score(PAIRS[0], found, error).values())


def test_scores_name_what_is_wrong(checker: ShapesChecker) -> None:
    wanted = Scene("white", (Thing("red", "circle", "small", "left"),))
    for name, other in {
        "colour": Scene("white", (Thing("blue", "circle", "small", "left"),)),
        "shape": Scene("white", (Thing("red", "cross", "small", "left"),)),
        "size": Scene("white", (Thing("red", "circle", "large", "left"),)),
        "position": Scene("white", (Thing("red", "circle", "small", "top"),)),
        "background": Scene("gray", (Thing("red", "circle", "small", "left"),)),
    }.items():
        score = single_score(wanted, *read(checker, render(other)))
        assert [key for key, right in score.items() if not right] == [name]
    two = Scene(
        "white", (Thing("red", "circle", "small"), Thing("blue", "square", "large")), "left of"
    )
    assert not single_score(wanted, *read(checker, render(two)))["position"]
    swapped = Scene("white", two.things[::-1], "left of")
    assert pair_score(two, *read(checker, render(swapped))) == {
        "relation": True,
        "binding": False,
        "all": False,
    }
    sizes = Scene("white", (Thing("red", "circle", "large"), two.things[1]), "left of")
    assert pair_score(two, *read(checker, render(sizes))) == {
        "relation": True,
        "binding": True,
        "all": False,
    }
    stacked = Scene("white", two.things, "above")
    assert not any(pair_score(two, *read(checker, render(stacked))).values())


_THING = re.compile(r"a (small|little|large|big) (\w+) (circle|square|triangle|cross)")
_GROUND = re.compile(r"(white|black|gray|pink)(?: background| picture| image)")
_INVERSE = {"right of": "left of", "below": "above"}


def parse(text: str) -> Scene:
    """A caption read by rules of its own, independent of the generator."""
    found = _THING.findall(text)
    ground = _GROUND.search(text)
    background = ground[1] if ground else "white"
    sizes = {"little": "small", "big": "large"}
    relation = re.search(r"left of|right of|above|below", text)
    if relation is None:
        place = re.search(r"(?:in|on|at) the (center|middle|left|right|top|bottom)", text)
        position = {"middle": "center"}.get(place[1], place[1]) if place else "center"
        size, colour, shape = found[0]
        return Scene(background, (Thing(colour, shape, sizes.get(size, size), position),))
    things = [Thing(colour, shape, sizes.get(size, size)) for size, colour, shape in found]
    if relation[0] in _INVERSE:
        things.reverse()
    return Scene(background, tuple(things), _INVERSE.get(relation[0], relation[0]))


class Painter:
    """Renders what the prompts say, or what other prompts of the batch say."""

    def __init__(self, shuffle: bool) -> None:
        self.shuffle = shuffle
        self.asked: list[Sequence[str]] = []

    def __call__(self, prompts: Sequence[str]) -> np.ndarray:
        self.asked.append(prompts)
        order = (
            np.random.default_rng(3).permutation(len(prompts))
            if self.shuffle
            else np.arange(len(prompts))
        )
        return np.stack(
            [render(parse(prompts[j]), np.random.default_rng([9, i])) for i, j in enumerate(order)]
        )


def scores(painter: Painter, tmp_path: Path) -> dict[str, Any]:
    autoencoder = load_autoencoder(
        KLAutoencoder(path=str(tiny_autoencoder(tmp_path))),
        SPEC.model_copy(update={"height": 32, "width": 32}),
    )
    return evaluate_shapes(painter, autoencoder, seed=0)


def test_a_painter_of_the_truth_scores_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluate, "PAIRS", 24)
    painter = Painter(shuffle=False)
    rows = scores(painter, tmp_path)
    assert rows["mean_attribute_accuracy"] == rows["all_correct"] == 1.0
    assert rows["by_attribute"] == dict.fromkeys(ATTRIBUTES, 1.0)
    assert rows["prompts"] == len(single_scenes("val"))
    assert rows["two_objects"] == {"relation": 1.0, "binding": 1.0, "all": 1.0, "prompts": 24}
    assert rows["unseen"]["all_correct"] == 1.0
    assert rows["unseen"]["prompts"] == len(single_scenes("unseen"))
    floor = rows["controls"]["floor"]
    assert floor["all_correct"] < 0.1  # right pictures for another's caption
    assert 0.15 < floor["mean_attribute_accuracy"] < 0.5
    # this autoencoder is random: the control says so
    assert rows["controls"]["ceiling"]["all_correct"] < 0.1
    for name, figure in (("two_objects", "all"), ("unseen", "all_correct")):
        controls = rows["controls"][name]
        assert controls["ceiling"][figure] < 0.1
        assert controls["floor"][figure] < 0.1
        assert rows["interval"][name][figure] == (1, 1)
    assert [len(prompts) for prompts in painter.asked] == [
        rows["prompts"],
        24,
        rows["unseen"]["prompts"],
    ]
    train = {caption(scene) for scene in single_scenes("train")}
    assert not train & {caption(parse(text)) for text in painter.asked[0]}


def test_a_painter_of_other_prompts_scores_at_the_floor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evaluate, "PAIRS", 24)
    # half the time
    monkeypatch.setattr(evaluate, "single_scenes", lambda split: single_scenes(split)[::2])
    rows = scores(Painter(shuffle=True), tmp_path)
    assert rows["all_correct"] < 0.1
    assert rows["mean_attribute_accuracy"] == pytest.approx(
        rows["controls"]["floor"]["mean_attribute_accuracy"], abs=0.12
    )
    assert rows["two_objects"]["all"] < 0.2
    value, count = rows["by_attribute"]["colour"], rows["prompts"]
    low, high = rows["interval"]["colour"]
    # of a share, by its binomial
    wide = 2 * 1.96 * (value * (1 - value) / count) ** 0.5
    assert low < value < high
    assert high - low == pytest.approx(wide, rel=0.2)


def test_captions_say_their_scene() -> None:
    """The oracle above and the generator agree, on singles and pairs, whatever the template."""
    for i, scene in enumerate([*EVERY[::7], *PAIRS, *two_object_scenes("val", 0)[:20]]):
        assert parse(caption(scene)) == scene
        assert parse(caption(scene, np.random.default_rng(i))) == scene
    assert torch.get_num_threads() == 1
