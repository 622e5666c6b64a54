"""Sources beside each other where a caption has many right pictures: a text source, a text source
whose caption the network reads too, and noise; equal training time, equal seeds, exact scores.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from textwrap import fill
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.gridspec import GridSpec

from benchmarks.answers_arms import ARMS
from benchmarks.record import machine
from benchmarks.trainings import Training, paces, say
from benchmarks.trainings import processes as fresh_processes
from flowray.cli.eval import evaluate
from flowray.config.progress import SILENT
from flowray.config.writing import write_whole
from flowray.model.autoencoder import load_autoencoder
from flowray.sample.evaluate_open import ask
from flowray.sample.generate import generate
from flowray.sample.restore import open_run
from flowray.store.found import find_checkpoint

SHOWN = 6  # captions in the picture, and draws of each


def run(
    folder: Path, minutes: float, seeds: Sequence[int], processes: int, arms: Sequence[str]
) -> list[Training]:
    """Train and score what `folder` lacks; a killed one goes on from its last checkpoint.

    minutes: of one core for each training. How many steps that makes is measured once for each arm,
    all in turn, and kept in the folder.
    """
    folder.mkdir(parents=True, exist_ok=True)
    pace = paces(folder, [_case(folder, arm, 0, 1) for arm in arms])
    cases = [
        _case(folder, arm, seed, round(60 * minutes / pace[arm])) for seed in seeds for arm in arms
    ]
    left = [case for case in cases if not _scores(case).exists()]
    with fresh_processes(processes) as pool:
        for case, seconds in zip(left, pool.map(_train_and_score, left), strict=True):
            say(f"{case.run.path.name}: {case.steps} steps, {seconds:.0f} s of training")
    return cases


def _case(folder: Path, arm: str, seed: int, steps: int) -> Training:
    base, overrides = ARMS[arm]
    return Training(folder, arm, base, (*overrides, "train.device=cpu"), seed, steps)


def _scores(case: Training) -> Path:
    return case.run.path / "eval.json"


def _train_and_score(case: Training) -> float:
    """Seconds that its steps took."""
    rows = case.train(f"train.probe_every={case.steps}", f"train.sample_every={case.steps}")
    evaluate(case.run.path, [], 0, SILENT)
    return sum(row["perf/step_s"] for row in rows) * case.recipe().train.log_every


def page(cases: Sequence[Training], minutes: float, place: Path) -> None:
    """The table of means and standard deviations over seeds, and, beside it, the picture."""
    lines = [
        "| source, condition | steps | named | sharp | coverage over the floor | copies "
        "| closed: mean | all right | binding |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for arm in dict.fromkeys(case.name for case in cases):
        told = [json.loads(_scores(case).read_text()) for case in cases if case.name == arm]
        steps = next(case.steps for case in cases if case.name == arm)
        closed = [one["shapes"] for one in told]
        cells = [
            *_open_cells([one["open"] for one in told]),
            _spread([one["mean_attribute_accuracy"] for one in closed]),
            _spread([one["all_correct"] for one in closed]),
            _spread([one["two_objects"]["binding"] for one in closed]),
        ]
        lines.append(f"| {arm} | {steps} | {' | '.join(cells)} |")
        if all(one["open"]["controls"]["mu"] for one in told):
            mu = _open_cells([one["open"]["controls"]["mu"] for one in told])
            lines.append(f"| its decode(mu) | | {' | '.join(mu)} | | | |")
    seeds = sorted({case.seed for case in cases})
    said = (
        f"{minutes:g} minutes of one core for each training (one process, one thread); seeds"
        f" {', '.join(map(str, seeds))}: mean and standard deviation. {machine()}."
    )
    write_whole(place, "\n".join([said, "", *lines, ""]))
    picture([case for case in cases if case.seed == seeds[0]], place.with_suffix(".png"))


def _open_cells(told: Sequence[Mapping[str, Any]]) -> list[str]:
    copies = _spread([one["copies"]["nearer"] for one in told])
    names = ("named", "sharp", "coverage_excess")
    return [*(_spread([one[name] for one in told]) for name in names), copies]


def _spread(values: Sequence[float]) -> str:
    mean = f"{statistics.mean(values):.2f}"
    return f"{mean} ± {statistics.stdev(values):.2f}" if len(values) > 1 else mean


def picture(cases: Sequence[Training], place: Path) -> None:
    """The first held-out captions, the first draws of each, of every case; none chosen."""
    captions = [one.text for one in ask(SHOWN, 0)]
    figure = Figure(figsize=(5.9 * len(cases) + 1.5, 0.98 * SHOWN))
    grid = GridSpec(1, len(cases) + 1, figure, width_ratios=[1.5, *[5.9] * len(cases)])
    words, *parts = [figure.add_subfigure(grid[i]) for i in range(len(cases) + 1)]
    for row, caption in enumerate(captions):
        height = 0.94 * (SHOWN - row - 0.5) / SHOWN
        words.text(0.97, height, fill(caption, 20), fontsize=8, ha="right", va="center")
    for part, case in zip(parts, cases, strict=True):
        part.suptitle(case.name.replace("_", ", "), fontsize=10, y=0.985)
        axes = part.subplots(SHOWN, SHOWN)
        part.subplots_adjust(0.01, 0.01, 0.97, 0.93, wspace=0.06, hspace=0.06)
        drawn = draws(case.run.path, captions, SHOWN)
        for row, column in np.ndindex(drawn.shape[:2]):
            axes[row, column].imshow(drawn[row, column])
            axes[row, column].set_xticks([])
            axes[row, column].set_yticks([])
    figure.savefig(place, dpi=90)


def draws(run: Path, captions: Sequence[str], count: int) -> np.ndarray:
    """Pictures uint8 (captions, count, H, W, 3) of a run, as `flowray.sample` paints them."""
    found = find_checkpoint(run, [])
    opened, model = open_run(found, torch.device("cpu")), found.recipe.model
    autoencoder = load_autoencoder(model.autoencoder, model.latent)
    prompts = [caption for caption in captions for _ in range(count)]
    made = generate(opened.model, autoencoder, prompts, found.recipe.sample, 0)
    return made.reshape(len(captions), count, *made.shape[1:])
