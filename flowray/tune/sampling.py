"""A trial of `task: sample`: pictures of a trained run, drawn with the trial's `sample.*` keys
and scored as flowray.eval does.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from flowray.config.load import dump_recipe
from flowray.config.recipe import Recipe
from flowray.config.train import LEFT_OPEN, OPEN_SCORES
from flowray.config.writing import write_whole
from flowray.data.shapes import caption
from flowray.model.autoencoder import load_autoencoder
from flowray.sample.evaluate import evaluate_shapes
from flowray.sample.evaluate_open import ask, closed_caption, score_open
from flowray.sample.generate import generate, save_strip
from flowray.sample.open_scores import CAPTIONS, DRAWS
from flowray.sample.restore import open_run
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
    autoencoder = load_autoencoder(opened.recipe.model.autoencoder, opened.recipe.model.latent).to(
        device
    )
    config, seed, drawn, seconds = opened.recipe.sample, repeat_of(run_dir), 0, 0.0

    def paint(prompts: Any) -> np.ndarray:
        nonlocal drawn, seconds
        start = time.perf_counter()
        pictures = generate(opened.model, autoencoder, prompts, config, seed)
        drawn, seconds = drawn + len(prompts), seconds + time.perf_counter() - start
        return pictures

    left_open = opened.recipe.data.shards == LEFT_OPEN
    say = closed_caption if left_open else caption
    scores = _flat(evaluate_shapes(paint, autoencoder, seed, say=say), "eval/")
    if left_open:
        told = score_open(opened, autoencoder, ask(CAPTIONS, seed), DRAWS, seed)
        scores |= {f"eval/{name}": float(told[name]) for name in OPEN_SCORES}
    prompts = opened.path / "samples" / "prompts.txt"
    if prompts.is_file():
        texts = prompts.read_text(encoding="utf-8").splitlines()
        save_strip(
            generate(opened.model, autoencoder, texts, config, recipe.probes.seed),
            run.samples / "step_000001.png",
        )
        (run.samples / "prompts.txt").write_text("\n".join(texts) + "\n", encoding="utf-8")
    row: ProbeRow = {"step": 1, "budget_steps": 1, **scores, "perf/images_per_s": drawn / seconds}
    writer = RowWriter(run.probes, 0)
    writer.write(row)
    writer.close()
    return row


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
