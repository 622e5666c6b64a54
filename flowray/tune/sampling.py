"""A trial of `task: sample`: pictures of a trained run, drawn with the trial's `sample.*` keys
and scored as flowray.eval does.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from flowray.config.load import dump_recipe
from flowray.config.recipe import Recipe
from flowray.config.train import CHECKED, FRECHET, LEFT_OPEN, OPEN_SCORES, OTHER_SCORES
from flowray.config.writing import write_whole
from flowray.data.shapes import caption
from flowray.model.autoencoder import Autoencoder, load_autoencoder
from flowray.sample.asked import prepare
from flowray.sample.evaluate import evaluate_shapes
from flowray.sample.evaluate_neighbours import score_neighbours
from flowray.sample.evaluate_open import ask, closed_caption, score_open
from flowray.sample.generate import generate, network_calls, save_strip
from flowray.sample.neighbours import Choices
from flowray.sample.open_scores import CAPTIONS, DRAWS
from flowray.sample.restore import OpenedRun, open_run
from flowray.store.found import find_checkpoint
from flowray.store.rows import RowWriter, read_rows
from flowray.store.run import RunDirectory
from flowray.tune.ledger import ProbeRow
from flowray.tune.records import repeat_of


def score_pictures(recipe: Recipe, source: Path, run_dir: Path) -> ProbeRow:
    """Score the newest checkpoint of the run `source` with `recipe.sample`; writes config.yaml,
    probes.jsonl (one row) and a strip.

    The noise is that of the trial's seed, so that all configurations start from equal draws. A
    trial that has its row returns it.
    """
    run = RunDirectory(run_dir)
    run.create()
    if rows := read_rows(run.probes):
        return rows[-1]
    write_whole(run.config, dump_recipe(recipe))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    sample = json.dumps(recipe.sample.model_dump(mode="json"))
    opened = open_run(find_checkpoint(source, [f"sample={sample}"]), device)
    made_of, seed = opened.recipe.model, repeat_of(run_dir)
    autoencoder = load_autoencoder(made_of.autoencoder, made_of.latent).to(device)
    scored = _shapes if opened.recipe.data.shards in CHECKED else _others
    row: ProbeRow = {
        "step": 1,
        "budget_steps": 1,
        **scored(opened, autoencoder, seed),
        **_cost(opened, autoencoder, recipe.probes.seed, run),
    }
    writer = RowWriter(run.probes, 0)
    writer.write(row)
    writer.close()
    return row


def _shapes(opened: OpenedRun, autoencoder: Autoencoder, seed: int) -> dict[str, float]:
    """By the exact checker."""
    config, left_open = opened.recipe.sample, opened.recipe.data.shards == LEFT_OPEN

    def paint(prompts: Sequence[str]) -> np.ndarray:
        return generate(opened.model, autoencoder, prompts, config, seed)

    say = closed_caption if left_open else caption
    scores = _flat(evaluate_shapes(paint, autoencoder, seed, say=say), "eval/")
    if left_open:
        told = score_open(opened, autoencoder, ask(CAPTIONS, seed), DRAWS, seed)
        scores |= {f"eval/{name}": float(told[name]) for name in (*OPEN_SCORES, FRECHET)}
    return scores


def _others(opened: OpenedRun, autoencoder: Autoencoder, seed: int) -> dict[str, float]:
    """By the nearest real pictures; InputError where the samples' JSON does not serve."""
    prepared = prepare(opened.recipe, Choices(), seed)
    told, _ = score_neighbours(prepared, opened, autoencoder, seed)
    names = [*OTHER_SCORES, *(name for name in told if name.endswith("_accuracy"))]
    return {f"eval/{name}": float(told[name]) for name in names if told[name] is not None}


def _cost(
    opened: OpenedRun, autoencoder: Autoencoder, seed: int, run: RunDirectory
) -> dict[str, float]:
    """What a picture costs, as the run's own prompts are drawn into a strip."""
    prompts, config = opened.path / "samples" / "prompts.txt", opened.recipe.sample
    texts = ["a picture"]
    if prompts.is_file():
        texts = prompts.read_text(encoding="utf-8").splitlines()
        (run.samples / "prompts.txt").write_text("\n".join(texts) + "\n", encoding="utf-8")
    start = time.perf_counter()
    pictures = generate(opened.model, autoencoder, texts, config, seed)
    drawn = math.ceil(len(texts) / config.batch_size) * config.batch_size
    speed = drawn / (time.perf_counter() - start)
    if prompts.is_file():
        save_strip(pictures, run.samples / "step_000001.png")
    calls = network_calls(opened.model, texts[:1], config, seed)
    return {"perf/images_per_s": speed, "perf/network_calls": calls}


def _flat(scores: Mapping[str, Any], prefix: str) -> dict[str, float]:
    """eval/all_correct, eval/size, eval/two_objects/all, ...; counts of prompts and the controls
    are left out.
    """
    out: dict[str, float] = {}
    for name, value in scores.items():
        if name in ("prompts", "interval", "controls"):
            continue
        if isinstance(value, Mapping):
            out |= _flat(value, prefix if name == "by_attribute" else f"{prefix}{name}/")
        else:
            out[prefix + name] = float(value)
    return out
