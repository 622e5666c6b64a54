"""A sweep over the sampling of one run: names of its scores, and the whole of it under Ray."""

import io
import json

import numpy as np
import pytest
import torch

from flowray.config.keys import describe
from flowray.config.load import dump_recipe, load_recipe, override_recipe
from flowray.config.progress import SILENT
from flowray.config.train import CHECKED_SCORES
from flowray.model.autoencoder import load_autoencoder
from flowray.sample.evaluate import evaluate_shapes
from flowray.store.run import RunDirectory
from flowray.sweepconfig.check import base_recipe, check_trials
from flowray.sweepconfig.file import load_sweep
from flowray.train.state import fresh_state, save_state
from flowray.tune.sampling import _flat, score_pictures


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A run of shapes with a small velocity network, at its first checkpoint."""
    place = tmp_path_factory.mktemp("runs")
    small = {
        "model.velocity.width": 16,
        "model.velocity.depth": 1,
        "model.velocity.heads": 2,
        "train.device": "cpu",
    }
    recipe = override_recipe(
        load_recipe("quickstart").recipe, {**small, "storage_path": str(place), "name": "source"}
    )
    run = RunDirectory(place / "source")
    run.create()
    run.config.write_text(dump_recipe(recipe))
    (run.samples / "prompts.txt").write_text("a red circle\na blue square\n")
    save_state(fresh_state(recipe, torch.device("cpu")), recipe, run)
    return run.path


def test_a_sweep_may_rank_by_the_scores_that_trials_on_shapes_write(source):
    config = load_recipe(str(source / "config.yaml")).recipe.model
    autoencoder = load_autoencoder(config.autoencoder, config.latent)

    def paint(prompts):
        return np.full((len(prompts), 64, 64, 3), 255, np.uint8)

    scores = _flat(evaluate_shapes(paint, autoencoder, 0, limit=2), "eval/")
    assert sorted(scores) == sorted(f"eval/{name}" for name in CHECKED_SCORES)


WORDS = ["sample.guidance_scale=3", "sample.steps=2", "sample.solver.kind=heun"]


@pytest.mark.slow
def test_a_sweep_over_guidance_scores_one_run_as_eval_does_and_trains_nothing(source, tmp_path):
    from flowray.cli.eval import evaluate
    from flowray.rayrun.tuner import run_sweep

    scales = "parameters.sample.guidance_scale={values: [1, 3]}"
    words = [
        f"base={source}",
        f"storage_path={tmp_path}",
        scales,
        "parameters.sample.steps={value: 2}",
        "parameters.sample.solver.kind={value: heun}",
        "parameters.sample.grid={value: uniform}",
    ]
    sweep = load_sweep("cfg", words)
    base = base_recipe(sweep)
    check_trials(sweep, base)
    result = run_sweep(sweep, base, resume=False, stream=io.StringIO())
    assert [(t.status, t.params["sample.guidance_scale"]) for t in result.trials] == [
        ("finished", 1.0),
        ("finished", 3.0),
    ]
    by_hand = evaluate(source, WORDS, 0, SILENT)["shapes"]
    scored = result.trials[1].metrics
    for name in ("mean_attribute_accuracy", "all_correct"):
        assert scored[f"eval/{name}"] == by_hand[name]
    assert scored["eval/two_objects/all"] == by_hand["two_objects"]["all"]
    assert scored["eval/size"] == by_hand["by_attribute"]["size"]
    assert all(describe(name) for name in scored)
    assert [t.metrics["perf/network_calls"] for t in result.trials] == [4, 8]
    assert result.trials[0].metrics != scored
    assert (tmp_path / "cfg" / "1" / "samples" / "step_000001.png").is_file()
    best = load_recipe(str(tmp_path / "cfg" / "best.yaml")).recipe
    assert best.sample.guidance_scale == result.best.params["sample.guidance_scale"]
    row = json.loads((tmp_path / "cfg" / "1" / "probes.jsonl").read_text())
    # what is scored is not scored again
    assert score_pictures(base, source, tmp_path / "cfg" / "1") == row
