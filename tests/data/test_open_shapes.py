"""Captions that leave things open: what they say, what fits them, and what training never says."""

from collections import Counter

import numpy as np
import pytest

from flowray.cli.data import main
from flowray.data.make import ShapesSet
from flowray.data.open_shapes import (
    CAPTIONS,
    Description,
    Named,
    caption,
    describe,
    distribution,
    facts,
    lone_descriptions,
    samples,
    whole,
)
from flowray.data.reader import ShardReader
from flowray.data.shapes import (
    BACKGROUNDS,
    COLOURS,
    SHAPES,
    SIZES,
    UNSEEN_PAIRS,
    Scene,
    Thing,
    draw_scene,
)
from flowray.data.shards import find_shards

RED = Scene("white", (Thing("red", "circle", "small", "top"),))
PAIR = Scene("pink", (Thing("red", "circle", "small"), Thing("blue", "square", "large")), "above")


@pytest.mark.parametrize(
    ("said", "text"),
    [
        (Description((Named("red", "", "", "top"),)), "a red thing at the top"),
        (Description((Named("", "circle"),)), "a circle"),
        (Description((Named(size="small"),), "", "white"), "a small thing on a white background"),
        (Description((Named(),), "", "black"), "something on a black background"),
        (whole(RED), "a small red circle at the top on a white background"),
        (Description((Named("red"), Named("", "square"))), "a red thing and a square"),
        (whole(PAIR), "a small red circle above a large blue square on a pink background"),
    ],
)
def test_a_caption_says_what_is_named_and_nothing_else(said, text):
    assert caption(said) == text


def test_a_description_fits_the_scenes_that_agree_with_it():
    assert Description((Named("red", "", "", "top"),)).fits(RED)
    assert not Description((Named("red", "", "", "left"),)).fits(RED)
    assert not Description((Named("red"),), "", "black").fits(RED)
    assert not Description((Named("red"),)).fits(PAIR)
    blue_and_red = (Named("blue"), Named("red"))
    assert Description(blue_and_red).fits(PAIR)  # in either order, as no relation is named
    assert not Description(blue_and_red, "above").fits(PAIR)
    assert not Description((Named("red", "square"), Named("blue"))).fits(PAIR)


def test_what_is_drawn_fits_and_leaves_each_thing_open_as_often_as_said():
    rng, whole_ones, named = np.random.default_rng(0), 0, Counter()
    for i in range(2000):
        scene = draw_scene(rng, "train", two_objects=i % 2 == 1)
        said = describe(scene, rng)
        assert said.fits(scene)
        assert said.count
        whole_ones += said == whole(scene)
        named["background"] += bool(said.background)
        named["colour"] += bool(said.things[0].colour)
    # a quarter names all, the rest half
    assert whole_ones / 2000 == pytest.approx(0.25 + 0.75 / 2**5 / 2, abs=0.03)
    for count in named.values():
        assert count / 2000 == pytest.approx(0.25 + 0.75 / 2, abs=0.04)


def test_words_of_a_caption_name_its_facts_alone():
    """Every synonym and template, read back by its words."""
    words = {
        **{colour: ("colour", colour) for colour in COLOURS},
        **{shape: ("shape", shape) for shape in SHAPES},
        **dict.fromkeys(("small", "little"), ("size", "small")),
        **dict.fromkeys(("large", "big"), ("size", "large")),
        **dict.fromkeys(("center", "middle"), ("position", "center")),
        **{place: ("position", place) for place in ("left", "right", "top", "bottom")},
        **{ground: ("background", ground) for ground in BACKGROUNDS},
    }
    rng = np.random.default_rng(1)
    for said in lone_descriptions(300, 0, held_out=False):
        told = caption(said, rng)
        found = {words[w] for w in told.replace(",", "").split() if w in words}
        facts = {**vars(said.things[0]), "background": said.background}
        assert found == {(key, value) for key, value in facts.items() if value}, told


@pytest.mark.parametrize(
    ("said", "told"),
    [
        (Description((Named("red"),)), {"alone", "isred"}),
        (
            Description((Named("", "circle", "small", "left"),), "", "white"),
            {"alone", "iscircle", "issmall", "atleft", "onwhite"},
        ),
        (
            Description((Named("red", "circle"), Named("", "cross", "large")), "left of", "pink"),
            {"both", "leftred", "leftcircle", "rightcross", "rightlarge", "onpink"},
        ),
        (
            Description((Named("red", "circle"), Named("", "cross", "large"))),
            {"both", "oneredcircle", "onecrosslarge"},
        ),
        (
            Description((Named("red", "circle", "small"), Named())),
            {"both", "oneredcircle", "onesmall"},
        ),
    ],
)
def test_facts_are_what_is_said_and_tell_which_belong_together(said, told):
    assert set(facts(said)) == told


def test_training_never_says_what_is_held_out():
    held_out = lone_descriptions(150, 3, held_out=True)
    assert all(said.held_out and said.count >= 3 for said in held_out)
    never = {caption(said, np.random.default_rng(i)) for said in held_out for i in range(12)}
    texts = {text for _, told, _ in samples(1500, "train", 0, 0.2) for text in told}
    assert not texts & never
    others = lone_descriptions(400, 3, held_out=False)
    said = {caption(each, np.random.default_rng(i)) for each in others for i in range(12)}
    assert len(texts & said) > 100  # the test would see them


def test_two_objects_in_either_order_are_held_out_alike():
    """Without a relation a caption may name either first, so that both say the same."""
    red, blue = Named("red", "circle"), Named("blue", "square", "small")
    grounds = ("", *BACKGROUNDS)
    both = [
        [Description(things, "", ground).held_out for ground in grounds for things in pairs]
        for pairs in ([(red, blue)], [(blue, red)])
    ]
    assert both[0] == both[1]
    rng, never, told = np.random.default_rng(2), set(), set()
    for _ in range(1500):
        said = describe(draw_scene(rng, "train", two_objects=True), rng)
        (never if said.held_out else told).add(caption(said, rng))
    assert len(never) > 50
    assert not never & told


def test_one_picture_has_several_captions_and_one_caption_many_pictures():
    texts = Counter()
    for picture, told, scene in samples(400, "train", 0, 0.2):
        assert picture.shape == (64, 64, 3)
        assert len(told) == CAPTIONS
        assert scene.split == "train"
        texts.update(set(told))
    assert max(texts.values()) > 5
    again = [told for _, told, _ in samples(5, "train", 0, 0.2)]
    assert again == [told for _, told, _ in samples(400, "train", 0, 0.2)][:5]


def test_the_datas_own_distribution_of_what_is_left_open():
    """By Bayes on the training scenes: each colour as often as its scenes are there."""
    said = Description((Named("", "triangle", "", "top"),), "", "white")
    colours = distribution(said, "colour")
    assert sum(colours.values()) == pytest.approx(1)
    assert "red" not in colours  # (red, triangle) is never seen
    assert ("red", "triangle") in UNSEEN_PAIRS
    assert set(colours) <= set(COLOURS)
    sizes = distribution(Description((Named("blue", "circle"),)), "size")
    assert set(sizes) == set(SIZES)
    assert sizes["small"] == pytest.approx(0.5, abs=0.08)


def test_the_set_is_one_of_its_own(tmp_path):
    closed, left_open = ShapesSet(train=3, closed=True), ShapesSet(train=3)
    assert (closed.name, left_open.name) == ("shapes_closed", "shapes")
    rows = list(left_open.samples("train"))
    assert [row["__key__"] for row in rows] == ["train-000000", "train-000001", "train-000002"]
    assert main(["make", "shapes", "--samples", "3", "--out", str(tmp_path / "set")]) == 0
    reader = ShardReader(find_shards(str(tmp_path / "set" / "train")))
    assert len(reader.captions(0)) == CAPTIONS
