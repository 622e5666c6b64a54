"""Scores of captions that leave things open, with theory as the oracle: draws of the data
itself, pictures that never change, gaussians in closed form, planted copies.
"""

from __future__ import annotations

import io
import json
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from support import Heard, assert_refused, saved_run

from flowray.cli.eval import evaluate, main, show_open
from flowray.config.errors import InputError
from flowray.config.load import load_recipe, override_recipe
from flowray.config.progress import SILENT
from flowray.config.train import FRECHET, OPEN_SCORES
from flowray.data import make
from flowray.data.make import ShapesSet
from flowray.data.open_shapes import Description, Named, distribution, samples, whole
from flowray.data.shapes import ATTRIBUTES, Scene, Thing, render, single_scenes
from flowray.model.autoencoder import load_autoencoder
from flowray.sample import evaluate as evaluation
from flowray.sample.checker import SHARP, Reading, ShapesChecker
from flowray.sample.distances import beats, copies, frechet, frechet_beats, nearest
from flowray.sample.evaluate import encode
from flowray.sample.evaluate_open import Asked, RealLatents, ask, evaluate_open
from flowray.sample.neighbours import Choices
from flowray.sample.open_scores import (
    CaptionScores,
    entropy,
    expected_entropy,
    expected_variation,
    figures,
    is_named,
    judge,
    total_variation,
)
from flowray.store.found import find_checkpoint
from flowray.tune import sampling

DRAWS = 12
SEED = 3
RED = Description((Named("red"),))
FITTING = [scene for scene in single_scenes("train") if RED.fits(scene)]
TRUTHS = {name: distribution(RED, name) for name in RED.left_open}
PAIR = Scene("white", (Thing("red", "circle", "small"), Thing("red", "square", "large")), "above")


def judged(readings: list[Reading]) -> CaptionScores:
    return judge(RED, TRUTHS, readings)


def test_expectations_are_those_of_all_draws_there_are() -> None:
    truth = {"a": 0.5, "b": 0.3, "c": 0.2}
    drawn = [
        (values, float(np.prod([truth[value] for value in values])))
        for values in product(truth, repeat=4)
    ]
    assert expected_entropy(truth, 4) == pytest.approx(sum(p * entropy(v) for v, p in drawn))
    assert expected_variation(truth, 4) == pytest.approx(
        sum(p * total_variation(v, truth) for v, p in drawn)
    )


def test_draws_of_the_data_have_no_excess_and_its_entropy() -> None:
    rng = np.random.default_rng(0)
    rows = [
        judged([(FITTING[rng.integers(len(FITTING))], 0.0) for _ in range(DRAWS)])
        for _ in range(1500)
    ]
    found = figures(rows)
    assert found["named"] == found["sharp"] == 1
    assert found["coverage_floor"] > 0.1  # so few draws are never spread as the data are
    assert found["coverage_excess"] == pytest.approx(0, abs=0.005)
    by_attribute = found["entropy_by_attribute"]
    assert by_attribute.pop("colour") is None  # it is named
    assert list(by_attribute) == list(ATTRIBUTES[1:])
    assert [found["entropy"], *by_attribute.values()] == pytest.approx([1] * 5, abs=0.02)


def test_a_picture_that_never_changes_has_no_entropy_and_known_variation() -> None:
    scene = FITTING[0]
    row = judged([(scene, 10.0)] * DRAWS)
    assert (row.named, row.sharp, row.entropy) == (1, 1, 0)
    likely = [
        TRUTHS[name][getattr(scene.things[0], name)] for name in ("shape", "size", "position")
    ]
    likely.append(TRUTHS["background"][scene.background])
    assert row.coverage == pytest.approx(1 - np.mean(likely))


@pytest.mark.parametrize("reading", [(FITTING[0], 900.0), (FITTING[0], np.inf), (PAIR, 0.0)])
def test_what_shows_no_scene_of_one_object_covers_nothing(reading: Reading) -> None:
    row = judged([reading] * DRAWS)
    assert (row.named, row.coverage, row.entropy) == (0, 1, 0)
    # it takes no part beside one that does
    mixed = judged([reading, (FITTING[0], 10.0)])
    assert mixed.named == 0.5
    assert mixed.coverage == judged([(FITTING[0], 10.0)]).coverage


def test_rendered_scenes_are_named_where_they_fit_and_noise_is_not_sharp() -> None:
    checker = ShapesChecker()
    scenes = [scene for split in ("train", "val") for scene in single_scenes(split)][::61]
    rng = np.random.default_rng(0)
    clean = np.stack([render(scene, rng) for scene in scenes])
    noisy = np.clip(clean + 25 * rng.standard_normal(clean.shape), 0, 255).astype(np.uint8)
    said = [RED, Description((Named(size="small"),), "", "pink"), *map(whole, scenes)]
    for i, (found, rough) in enumerate(zip(checker.read(clean), checker.read(noisy), strict=True)):
        assert [is_named(one, found) for one in said] == [one.fits(scenes[i]) for one in said]
        assert found[1] < SHARP < rough[1]
        assert is_named(whole(scenes[i]), rough)
        assert judge(RED, TRUTHS, [found, rough, rough, found]).sharp == 0.5
    assert not is_named(RED, next(checker.read(render(PAIR)[None])))


def normal(count: int, dims: int, seed: int) -> np.ndarray:
    """A sample whose mean is 0 and whose covariance is the identity, both exactly."""
    drawn = np.random.default_rng(seed).standard_normal((count, dims))
    drawn -= drawn.mean(0)
    return np.linalg.svd(drawn, full_matrices=False)[0] * np.sqrt(count - 1)


def test_frechet_distance_of_gaussians_in_closed_form() -> None:
    first, shift, dims = normal(200, 16, 0), np.linspace(-1, 2, 16), 16
    second = shift + 3 * normal(300, 16, 1)
    truth = np.square(shift).sum() + dims * (1 - 3) ** 2
    assert frechet(first, second) == pytest.approx(truth, rel=1e-9)
    assert frechet(second, first) == pytest.approx(truth, rel=1e-9)
    assert frechet(second, second) == pytest.approx(0, abs=1e-9)
    assert frechet(first[:2], first[:1]) > 0  # one picture is a point


@pytest.mark.parametrize("count", [60, 7])  # more than dims, and so few that both are singular
def test_frechet_distance_is_that_of_the_covariances(count: int) -> None:
    rng = np.random.default_rng(count)
    mix = rng.standard_normal((12, 12))
    first, second = rng.standard_normal((count, 12)) @ mix, rng.standard_normal((count + 9, 12))

    def root(matrix: np.ndarray) -> np.ndarray:
        values, vectors = np.linalg.eigh(matrix)
        return (vectors * np.sqrt(values.clip(0))) @ vectors.T

    a, b = np.cov(first.T), np.cov(second.T)
    gap = np.square(first.mean(0) - second.mean(0)).sum()
    truth = gap + np.trace(a + b) - 2 * np.trace(root(root(a) @ b @ root(a)))
    assert frechet(first, second) == pytest.approx(truth, rel=1e-5)


def test_copies_of_training_latents_are_found() -> None:
    rng = np.random.default_rng(0)
    training, held_out, fresh = (rng.standard_normal((n, 32)) for n in (600, 400, 500))
    near_real = nearest(held_out, training)
    by_hand = np.sqrt(np.square(held_out[7] - training).mean(1).min())
    assert near_real[7] == pytest.approx(by_hand)
    honest = copies(nearest(fresh, training), near_real)
    assert honest["median_ratio"] == pytest.approx(1, abs=0.02)
    assert honest["nearer"] < 0.03
    planted = fresh.copy()
    planted[:200] = training[:200] + 0.01 * rng.standard_normal((200, 32))
    assert copies(nearest(planted, training), near_real)["nearer"] == pytest.approx(0.4, abs=0.02)
    exact = copies(nearest(training[:9], training), near_real)
    assert (exact["nearer"], exact["median_ratio"]) == (1, pytest.approx(0, abs=1e-6))


def test_better_than_the_mean_picture_is_by_more_than_the_standard_error() -> None:
    assert beats(np.array([0.1, 0.2, 0.0, np.nan]))
    assert not beats(np.array([0.5, -0.4, 0.1]))
    assert not beats(np.zeros(5))
    assert not beats(np.array([np.nan]))
    rng = np.random.default_rng(0)
    real, near = (rng.standard_normal((6, 20, 8)) for _ in range(2))
    assert frechet_beats(near, near + 1, real.reshape(-1, 8))
    assert not frechet_beats(near + 1, near, real.reshape(-1, 8))
    assert not frechet_beats(near, near, real.reshape(-1, 8))


class Truth:
    """Latents of real pictures that fit, through the shipped autoencoder; its source has their
    mean, and that with noise.
    """

    def __init__(self, asked: list[Asked]) -> None:
        recipe = load_recipe("quickstart").recipe
        self.autoencoder = load_autoencoder(recipe.model.autoencoder, recipe.model.latent)
        scenes = single_scenes("train")
        self.fit = {
            one.text: [scene for scene in scenes if one.description.fits(scene)] for one in asked
        }

    def latents(self, prompts: Any, seed: int = 1) -> torch.Tensor:
        rng, pictures = np.random.default_rng(seed), []
        for text in prompts:
            fit = self.fit[text]
            pictures.append(render(fit[rng.integers(len(fit))], rng))
        return encode(self.autoencoder, pictures, seed)

    def source(self, prompts: Any) -> tuple[torch.Tensor, torch.Tensor]:
        mean = self.latents(prompts, 2).mean(0, keepdim=True).expand(len(prompts), -1, -1, -1)
        noise = torch.randn(mean.shape, generator=torch.Generator().manual_seed(0))
        return mean, mean + 0.1 * noise


def test_a_flow_of_the_truth_reaches_the_ceiling_and_beats_the_mean_picture() -> None:
    asked = ask(6, seed=0)
    truth = Truth(asked)
    real = [
        truth.latents([one.text for one in asked] * 20, seed).flatten(1).numpy() for seed in (3, 4)
    ]
    judged = truth.autoencoder, RealLatents(*real), asked, 8
    heard = Heard()
    found = evaluate_open(truth.latents, truth.source, *judged, seed=0, progress=heard)
    # what takes seconds is told while it lasts: run, ceiling, z0, and mu once for a caption
    assert heard.tasks["decoding pictures"] == heard.tasks["judging pictures"] == 3 * 48 + 6
    controls = found["controls"]
    for column in (found, controls["ceiling"]):
        assert column["named"] > 0.95
        assert column["sharp"] == 1
        assert abs(column["coverage_excess"]) < 0.12
        assert column["entropy"] == pytest.approx(1, abs=0.25)
        assert 0.7 < column["copies"]["median_ratio"] < 1.3
        assert column["frechet"] < 3 * found["frechet_real"]
    assert controls["shuffled"]["named"] < 0.2
    assert controls["mu"]["named"] == controls["mu"]["entropy"] == 0
    assert set(controls["z0"]) == set(controls["mu"]) == set(controls["ceiling"])
    beaten = found["beats_mu"]
    assert [name for name, does in beaten.items() if not does] in ([], ["copies"])
    assert found["samples"] == {"generated": 48, "real": 72, "real_half": 48, "dims": 256}
    assert [row["caption"] for row in found["by_caption"]] == [one.text for one in asked]
    json.dumps(found, allow_nan=False)
    # the mean picture in the flow's place beats itself in nothing, and a source may be none
    mean = evaluate_open(lambda prompts: truth.source(prompts)[0], truth.source, *judged, seed=0)
    assert not any(mean["beats_mu"].values())
    alone = evaluate_open(truth.latents, None, *judged, seed=0)
    assert alone["beats_mu"] is alone["controls"]["mu"] is alone["controls"]["z0"] is None
    assert alone["controls"]["ceiling"] == controls["ceiling"]
    assert alone["named"] == found["named"]


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Path]:
    """Runs that have not learnt yet, on a set of few pictures; set -> run directory."""
    few = ShapesSet(train=8, val=30, unseen=1, seed=SEED)
    assert len(next(samples(1, "train", SEED, few.two_share))[2].things) == 2  # data.limit's only
    monkeypatch.setitem(make._DEFAULTS, "shapes", few)
    monkeypatch.setitem(make._DEFAULTS, "shapes_closed", replace(few, closed=True))
    monkeypatch.setattr(evaluation, "PAIRS", 8)
    small = {
        "storage_path": str(tmp_path),
        "data.cache": str(tmp_path / "cache"),
        "model.velocity.width": 16,
        "model.velocity.depth": 1,
        "model.velocity.heads": 2,
        "data.limit": 1,
        "sample.steps": 1,
        "sample.guidance_scale": 1.0,
        "train.device": "cpu",
    }
    return {
        name: saved_run(
            override_recipe(
                load_recipe("quickstart").recipe, {**small, "data.shards": name, "name": name}
            )
        ).path
        for name in ("shapes", "shapes_closed")
    }


def test_a_sweep_scores_a_run_as_the_command_does(
    runs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sampling, "CAPTIONS", 3)
    monkeypatch.setattr(sampling, "DRAWS", 4)
    few = Choices(captions=3, draws=4)
    for name, run in runs.items():
        row = sampling.score_pictures(
            find_checkpoint(run).recipe, run, tmp_path / f"{name}-sweep" / "0"
        )
        told = evaluate(run, [], 0, SILENT, choices=few)
        assert row["eval/all_correct"] == told["shapes"]["all_correct"]
        names = (*OPEN_SCORES, FRECHET)
        scores = {f"eval/{key}": row[f"eval/{key}"] for key in names if f"eval/{key}" in row}
        wanted = {f"eval/{key}": told["open"][key] for key in names} if "open" in told else {}
        assert scores == wanted
        assert bool(scores) == (name == "shapes")


def test_the_command_scores_a_run_on_captions_that_leave_things_open(
    runs: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    run = runs["shapes"]
    assert main([str(run), "--captions", "3", "--draws", "4"]) == 0
    told = json.loads((run / "eval.json").read_text())
    found = told["open"]
    assert (found["captions"], found["draws"]) == (3, 4)
    assert found["named"] < 0.5
    lone = sum(len(scene.things) == 1 for *_, scene in samples(30, "val", SEED, 0.2))
    assert found["samples"]["real"] + found["samples"]["real_half"] == lone < 30
    assert found["controls"]["ceiling"]["named"] > 0.9
    # the velocity of a fresh network is 0: all of a flow is its source
    assert found["controls"]["z0"]["copies"] == found["copies"]
    assert set(told["shapes"]) == {
        "mean_attribute_accuracy",
        "all_correct",
        "by_attribute",
        "prompts",
        "two_objects",
        "unseen",
        "interval",
        "controls",
    }
    near = told["neighbours"]
    assert (near["captions"], near["draws"], near["features"]["of"]) == (3, 4, "latents")
    assert set(near["controls"]) == {"ceiling", "real", "mu", "z0", "shuffled"}
    assert told["shapes"]["controls"]["ceiling"]["all_correct"] > 0.9
    lines = capsys.readouterr().out.splitlines()
    assert any("all correct" in line for line in lines)
    found["beats_mu"] |= {"named": True, "coverage": True, "copies": True}
    console = Console(file=io.StringIO(), width=100)
    show_open(console, run, told)
    cells = [line.split("│")[1:-1] for line in console.file.getvalue().splitlines()]
    shown = {row[0].strip(): [cell.strip() for cell in row[1:]] for row in cells if row}
    for figure, does in found["beats_mu"].items():
        own, *others = shown["frechet distance" if figure == "frechet" else figure]
        assert own.endswith(" *") != does
        assert not any("*" in other for other in others)
        if figure != "copies":
            columns = found, found["controls"]["mu"]
            assert [own.rstrip(" *"), others[2]] == [f"{column[figure]:.3f}" for column in columns]
    before = (run / "eval.json").stat().st_mtime_ns
    assert_refused(lambda: main([str(run), "--captions", "900"]), InputError, "captions: want at")
    assert (run / "eval.json").stat().st_mtime_ns == before


def test_a_limit_is_one_of_every_kind(runs: dict[str, Path], tmp_path: Path) -> None:
    told = evaluate(runs["shapes"], [], 0, SILENT, tmp_path / "few.json", Choices(draws=2, limit=4))
    shapes = told["shapes"]
    assert [shapes["prompts"]] * 2 == [
        shapes[name]["prompts"] for name in ("two_objects", "unseen")
    ]
    assert told["open"]["captions"] == told["neighbours"]["captions"] == shapes["prompts"] == 4
