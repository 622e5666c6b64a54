"""Questions to data whose answers are known: made copies, mixed-up captions, exchanged channels."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor

from flowray.data.order import BatchSizes
from flowray.data.pixels import from_pictures
from flowray.doctor import dataset
from flowray.doctor.dataset import batch_alike, small_pictures, spread, surveyed
from flowray.model.latent import LatentScale, Moments
from flowray.probes.interface import oddest, unusual
from flowray.probes.likeness import near_metrics
from flowray.probes.told import caption_metrics, told_metrics
from flowray.probes.words import COLOURS, colour_metrics, side_metrics


def noise(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("jitter", [0.0, 0.02, 0.05])
def test_near_copies_are_counted_and_new_pictures_are_not(jitter: float) -> None:
    z, sigma = noise(0, 300, 64), torch.full((300, 64), 0.1)
    alone = near_metrics(z, sigma)
    assert alone["data/near_share"] == 0
    assert alone["data/near_typical"] > 0.5
    copied = z[:100].repeat(3, 1) + jitter * noise(1, 300, 64)
    rows = near_metrics(copied, sigma)
    assert rows["data/near_share"] == pytest.approx(2 / 3)
    assert rows["data/near_typical"] < 0.1
    assert near_metrics(z, sigma, noise(2, 40, 64))["data/seen_share"] == 0
    assert near_metrics(z, sigma, z[5:45] + 0.5 * jitter)["data/seen_share"] == 1


def test_near_is_also_known_where_a_posterior_is_a_point() -> None:
    z, point = noise(0, 200, 64), torch.zeros(200, 64)
    assert near_metrics(z, point)["data/near_share"] == 0
    twice = torch.cat([z, z + 0.01 * noise(1, 200, 64)])
    assert near_metrics(twice, torch.zeros_like(twice))["data/near_share"] == pytest.approx(0.5)


def told(
    size: float, wrong: float, language: str = "a {} one", *, count: int = 600, loose: int = 0
) -> dict[str, float]:
    """Of samples with one of six words, which moves z by `size` along its own direction.

    loose: of how many words half of the samples show any of the six.
    """
    rng = np.random.default_rng(0)
    words = np.array(["red", "blue", "tall", "wide", "old", "new"])
    kinds = rng.integers(6, size=count)
    z = rng.normal(size=(count, 80))
    second = (kinds < loose) & (np.arange(count) % 2 == 1)
    z[np.arange(count), np.where(second, np.roll(kinds, 1), kinds)] += size
    mixed = rng.permutation(count)[: int(count * wrong)]
    kinds[mixed] = np.roll(kinds[mixed], 1)
    return told_metrics([language.format(word) for word in words[kinds]], z)


def test_the_share_of_wrong_captions_is_read_from_those_that_are_right() -> None:
    right, third, half = told(8.0, 0.0), told(8.0, 0.33), told(8.0, 0.5)
    assert right["data/captions_wrong_low"] < 0.01
    assert right["data/word_auc"] > 0.98
    # a sixth of those mixed up get their own word back
    assert third["data/captions_wrong"] == pytest.approx(0.33 * 5 / 6, abs=0.1)
    assert third["data/captions_wrong_low"] > 0.06
    assert half["data/captions_wrong_low"] > third["data/captions_wrong_low"]


@pytest.mark.parametrize("loose", [1, 2])
def test_words_of_two_meanings_are_not_wrong_captions(loose: int) -> None:
    assert told(8.0, 0.0, count=4000, loose=loose)["data/captions_wrong_low"] < 0.06
    assert told(8.0, 0.4, count=4000, loose=loose)["data/captions_wrong_low"] > 0.06


@pytest.mark.parametrize("size", [1.5, 2.0, 3.0, 4.0])
def test_a_word_that_tells_little_of_every_picture_is_not_a_wrong_caption(size: float) -> None:
    assert told(size, 0.0).get("data/captions_wrong_low", 0.0) < 0.06


def test_captions_alike_or_few_say_nothing_of_their_pictures() -> None:
    z = np.zeros((100, 8))
    assert told_metrics(["a photo"] * 100, z) == {}
    assert told_metrics(["red", "blue"] * 10, z[:20]) == {}


def test_odd_captions_are_counted() -> None:
    texts = [f"a {size} {kind}" for size in ("small", "large") for kind in ("circle", "square")]
    fine = caption_metrics(texts * 50)
    assert (fine["data/caption_same"], fine["data/caption_over_next"]) == (0.25, 1.0)
    assert fine["data/caption_broken"] == fine["data/caption_wordless"] == 0
    cut = caption_metrics([text[:11] for text in texts * 50])
    assert cut["data/caption_full"] == 1
    by_words = caption_metrics(["a cat on the", "a dog on a", "one bird of the"] * 20)
    assert by_words["data/caption_broken"] == by_words["data/caption_full"] == 1
    filler = caption_metrics([*texts * 20, *["a photo"] * 70, "-", "…"])
    assert filler["data/caption_over_next"] == 3.5
    assert filler["data/caption_wordless"] == pytest.approx(2 / 152)
    assert caption_metrics(["红色的圆", "…"])["data/caption_wordless"] == 0.5


@pytest.mark.parametrize(
    "texts",
    [
        ["a photo of a cat", "a photo of a car", "a photo of a carrot", "a carrot beside a car"],
        ["one red circle", "two red circles", "one red box", "two red boxes"],
        ["a red pine", "a pineapple"],
        ["the digit six", "the digit sixty", "six of the digits"],
    ],
)
def test_a_word_that_begins_another_is_not_cut(texts: list[str]) -> None:
    assert caption_metrics(texts * 30)["data/caption_broken"] < 0.1


@pytest.mark.parametrize("length", [18, 22, 26, 30])
def test_captions_cut_within_a_word_are_found(length: int) -> None:
    rng, nouns = np.random.default_rng(0), ["circle", "square", "triangle", "hexagon", "ellipse"]
    sizes, colours = ["small", "large", "enormous"], ["red", "green", "yellow", "purple"]
    texts = [
        " beside ".join(
            f"a {rng.choice(sizes)} {rng.choice(colours)} {rng.choice(nouns)}" for _ in range(2)
        )
        for _ in range(300)
    ]
    cut = caption_metrics([text[:length] for text in texts])
    assert cut["data/caption_broken"] > 0.1
    assert cut["data/caption_full"] > 0.3


def scenes(chinese: bool = False) -> tuple[list[str], Tensor]:
    """Pictures 3 x 16 x 16 of a blot of a colour on one of four sides, on any ground."""
    rng, captions, pictures = np.random.default_rng(0), [], []
    ways = {("left", "左"): (8, 3), ("right", "右"): (8, 12), ("top", "顶"): (3, 8)}
    for _ in range(240):
        words = list(COLOURS)[rng.integers(9)]
        side = list(ways)[rng.integers(3)]
        picture = np.ones((16, 16, 3)) * rng.uniform(0, 255)
        y, x = ways[side]
        picture[y - 3 : y + 3, x - 3 : x + 3] = COLOURS[words]
        captions.append(
            f"{side[1]}边有{words[-1]}色" if chinese else f"{words[0]} on the {side[0]}"
        )
        pictures.append(torch.from_numpy(picture).permute(2, 0, 1) / 127.5 - 1)
    return captions, torch.stack(pictures).float()


@pytest.mark.parametrize("chinese", [False, True])
def test_exchanged_channels_negatives_and_mirrored_pictures(chinese: bool) -> None:
    captions, pictures = scenes(chinese)

    def better(x: Tensor) -> float:
        rows = colour_metrics(captions, x)
        assert rows["data/colour_z"] > 4
        return rows["data/colour_other"] - rows["data/colour_told"]

    assert better(pictures) < -0.2
    assert better(pictures.flip(1)) > 0.2
    assert better(pictures[:, [1, 2, 0]]) > 0.2
    assert better(-pictures) > 0.2
    across = "data/side_across"
    assert side_metrics(captions, pictures)[across] == 1
    assert side_metrics(captions, pictures.flip(3))[f"{across}_high"] < 0.4
    half = torch.where(torch.arange(240)[:, None, None, None] % 2 == 0, pictures, pictures.flip(3))
    rows = side_metrics(captions, half)
    assert 0.25 < rows[f"{across}_low"] < rows[f"{across}_high"] < 0.75
    assert side_metrics(captions, pictures.flip(2))["data/side_down"] == 0
    grey = pictures.mean(1, keepdim=True).expand_as(pictures)
    assert colour_metrics(captions, grey)["data/colour_chroma"] < 0.01


def test_where_no_word_names_a_colour_or_a_side_nothing_is_said() -> None:
    _, pictures = scenes()
    captions = ["the digit three", "the digit four"] * 120
    assert colour_metrics(captions, pictures) == side_metrics(captions, pictures) == {}
    greys = ["a black and white photo", "a gray photo", "a white one"] * 80
    assert colour_metrics(greys, pictures) == {}
    both = ["a cat left of a dog", "to the right of it"] * 120
    assert side_metrics(both, pictures) == {}


@pytest.mark.parametrize("kind", ["noise", "zeros", "large"])
def test_broken_latents_are_among_the_oddest(kind: str) -> None:
    smooth = torch.nn.functional.interpolate(noise(0, 400, 4, 2, 2), size=8, mode="bilinear")
    bad = torch.arange(0, 400, 20)
    spoilt = {"noise": smooth.std() * noise(1, 20, 4, 8, 8), "large": 6 * smooth[bad]}
    smooth[bad] = spoilt.get(kind, torch.zeros(20, 4, 8, 8))
    state = torch.get_rng_state()
    found = oddest(unusual(smooth), smooth.flatten(1), 16)
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(7)
    assert torch.equal(oddest(unusual(smooth), smooth.flatten(1), 16), found)
    assert len(set(found.tolist()) & set(bad.tolist())) >= len(found) / 2


def test_batches_of_one_kind_are_told_from_shuffled_ones() -> None:
    kinds = np.random.default_rng(0).standard_normal((8, 12)) * 2
    z1 = np.repeat(kinds, 32, axis=0) + np.random.default_rng(1).standard_normal((256, 12))
    shuffled = np.random.default_rng(2).permutation(z1)
    assert batch_alike(shuffled, 32) == pytest.approx(1.0, abs=0.5)
    assert (batch_alike(z1, 32) or 0) > 10
    assert batch_alike(z1[:224], 32) is None  # too few to tell from chance


def test_few_batches_of_one_direction_do_not_look_alike_by_chance() -> None:
    values = np.random.default_rng(0).standard_normal((400, dataset.BATCHES * 8, 1))
    seen = [batch_alike(z1, 8) or 0.0 for z1 in values]
    assert np.mean([alike > 3 for alike in seen]) < 0.01


@pytest.mark.parametrize("count", [1, 100, 4096, 4097, 100_000])
def test_samples_are_looked_at_all_over_a_set_and_beside_each_other(count: int) -> None:
    chosen = spread(count, 4096)
    assert len(chosen) == len(set(chosen.tolist())) == min(count, 4096)
    assert (chosen[0], chosen[-1]) == (0, count - 1)
    assert np.diff(chosen).max(initial=1) <= max(1, 2 * count // 128)
    assert (np.diff(chosen) == 1).sum() >= 0.9 * (len(chosen) - 1)


class Stored:
    """Latents as a set has them, those from 5000 on broken; notes how many are read at a time."""

    scale = LatentScale(2.0, 0.0, deterministic=False)

    def __init__(self) -> None:
        self.most = 0

    def __len__(self) -> int:
        return 6000

    def moments(self, indices: np.ndarray) -> Moments:
        self.most = max(self.most, len(indices))
        places = torch.from_numpy(indices)[:, None, None, None]
        mean = (places // 2).float().expand(-1, 1, 4, 4).clone()
        mean[indices >= 5000, 0, 0, 0] = torch.nan
        return Moments(mean, torch.zeros_like(mean))


def test_the_survey_reads_the_whole_set_a_part_at_a_time() -> None:
    stored = Stored()
    seen = surveyed(stored)  # type: ignore[arg-type]
    assert stored.most <= dataset.CHUNK
    assert seen.bad == [i for i in seen.indices if i >= 5000] != []
    assert seen.duplicates == pytest.approx(0.5, abs=0.02)
    assert set(seen.suspects()) & set(seen.bad)


def test_of_a_batch_of_thousands_only_some_are_asked() -> None:
    def batch(step: int) -> SimpleNamespace:
        return SimpleNamespace(captions=["a"] * 4096, z1=torch.zeros(4096, 1, 2, 2))

    subject = SimpleNamespace(latents=Stored(), sizes=BatchSizes.of(4096), batches=batch)
    captions, z1 = dataset._pairs(subject)  # type: ignore[arg-type]
    assert len(captions) == len(z1) == dataset.AGREEMENT


def test_large_pictures_are_made_small_a_few_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    captions, pictures = scenes()
    large = from_pictures(pictures.repeat_interleave(16, 2).repeat_interleave(16, 3)[:48])
    asked: list[int] = []

    def decoded(_: object, indices: np.ndarray, __: object) -> Tensor:
        asked.append(len(indices))
        return torch.from_numpy(large[indices]).permute(0, 3, 1, 2).float() / 127.5 - 1

    monkeypatch.setattr(dataset, "_pictures", decoded)
    small = small_pictures(Stored(), np.arange(48), None)  # type: ignore[arg-type]
    assert max(asked) <= dataset.DECODED
    assert small.shape == (48, 3, 64, 64)
    assert side_metrics(captions[:48], small)["data/side_across"] == 1
