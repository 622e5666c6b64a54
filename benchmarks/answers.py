"""Sources beside each other where a caption has many right pictures: a text source, a text source
whose caption the network reads too, and noise; equal training time, equal seeds, exact scores.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import statistics
import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from textwrap import fill
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.gridspec import GridSpec

from benchmarks.answers_arms import ARMS
from benchmarks.record import machine
from flowray.cli.eval import evaluate
from flowray.config.load import load_recipe
from flowray.config.progress import SILENT
from flowray.config.recipe import Recipe
from flowray.config.writing import write_whole
from flowray.model.autoencoder import load_autoencoder
from flowray.sample.evaluate_open import ask
from flowray.sample.generate import generate
from flowray.sample.restore import open_run
from flowray.store.found import find_checkpoint
from flowray.store.latents import ensure_latents
from flowray.store.rows import read_rows
from flowray.store.run import RunDirectory
from flowray.train.group import Group
from flowray.train.loop import train

PACE_STEPS, PACE_ROUNDS = 60, 2
SHOWN = 6  # captions in the picture, and draws of each


@dataclass(frozen=True)
class Case:
    """One training: an arm's place in ARMS, its seed, its length."""

    folder: Path
    arm: str
    seed: int
    steps: int

    @property
    def run(self) -> RunDirectory:
        return RunDirectory(self.folder / f"{self.arm}-{self.steps}-{self.seed}")

    @property
    def scores(self) -> Path:
        return self.run.path / "eval.json"

    def recipe(self, *more: str) -> Recipe:
        """For one core: as many trainings as there are cores run beside each other."""
        base, overrides = ARMS[self.arm]
        place = [f"name={self.run.path.name}", f"storage_path={self.folder}"]
        own = [*place, f"seed={self.seed}", f"train.steps={self.steps}", "resources.num_workers=1"]
        return load_recipe(base, [*overrides, *own, *more]).recipe


def run(
    folder: Path, minutes: float, seeds: Sequence[int], processes: int, arms: Sequence[str]
) -> list[Case]:
    """Train and score what `folder` lacks; a killed one goes on from its last checkpoint.

    minutes: of one core for each training. How many steps that makes is measured once for each arm,
    all in turn, and kept in the folder.
    """
    folder.mkdir(parents=True, exist_ok=True)
    pace = _pace(folder, arms)
    cases = [
        Case(folder, arm, seed, round(60 * minutes / pace[arm])) for seed in seeds for arm in arms
    ]
    left = [case for case in cases if not case.scores.exists()]
    with _processes(processes) as pool:
        for case, seconds in zip(left, pool.map(_train_and_score, left), strict=True):
            _say(f"{case.run.path.name}: {case.steps} steps, {seconds:.0f} s of training")
    return cases


@contextmanager
def _processes(count: int) -> Iterator[ProcessPoolExecutor]:
    """A fresh process for every training. Ctrl-C, a signal or a failed training ends the others at
    once; the same command goes on from what they saved.
    """
    pool = ProcessPoolExecutor(
        count,
        mp_context=multiprocessing.get_context("spawn"),
        initializer=_end_with_parent,
        max_tasks_per_child=1,
    )
    try:
        yield pool
    except BaseException:
        pool.shutdown(wait=False, cancel_futures=True)
        for child in multiprocessing.active_children():
            child.kill()
        raise
    pool.shutdown()


def _end_with_parent() -> None:
    def wait() -> None:
        if parent := multiprocessing.parent_process():
            parent.join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def _pace(folder: Path, arms: Sequence[str]) -> dict[str, float]:
    """Seconds a step of each arm, the median of its rounds; measured are those that the folder has
    none of.
    """
    file = folder / "pace.json"
    pace = json.loads(file.read_text()) if file.exists() else {}
    if new := [arm for arm in arms if arm not in pace]:
        recipe = Case(folder, new[0], 0, PACE_STEPS).recipe()
        ensure_latents(recipe.data, recipe.model.autoencoder, recipe.model.latent)
        with _processes(1) as pool:
            rounds = [
                list(pool.map(_step_seconds, [folder] * len(new), new)) for _ in range(PACE_ROUNDS)
            ]
        pace |= dict(zip(new, map(statistics.median, zip(*rounds, strict=True)), strict=True))
        write_whole(file, json.dumps(pace, indent=1))
    _say(", ".join(f"{arm}: {pace[arm]:.3f} s a step" for arm in arms))
    return pace


def _step_seconds(folder: Path, arm: str) -> float:
    # a folder of its own each time: a run that is done would train nothing
    with tempfile.TemporaryDirectory(dir=folder) as fresh:
        case = Case(Path(fresh), arm, 0, PACE_STEPS)
        rows = _train(case, "train.probe_every=100000", "train.sample_every=100000")
    return statistics.median(row["perf/step_s"] for row in rows[1:])


def _train(case: Case, *more: str) -> list[dict[str, Any]]:
    torch.set_num_threads(1)
    train(case.recipe(*more), case.run, Group(0, 1, torch.device("cpu")), lambda row: None)
    return read_rows(case.run.metrics)


def _train_and_score(case: Case) -> float:
    """Seconds that its steps took."""
    rows = _train(case, f"train.probe_every={case.steps}", f"train.sample_every={case.steps}")
    evaluate(case.run.path, [], 0, SILENT)
    return sum(row["perf/step_s"] for row in rows) * case.recipe().train.log_every


def page(cases: Sequence[Case], minutes: float, place: Path) -> None:
    """The table of means and standard deviations over seeds, and, beside it, the picture."""
    lines = [
        "| source, condition | steps | named | sharp | coverage over the floor | copies "
        "| closed: mean | all right | binding |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for arm in dict.fromkeys(case.arm for case in cases):
        told = [json.loads(case.scores.read_text()) for case in cases if case.arm == arm]
        steps = next(case.steps for case in cases if case.arm == arm)
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


def picture(cases: Sequence[Case], place: Path) -> None:
    """The first held-out captions, the first draws of each, of every case; none chosen."""
    captions = [one.text for one in ask(SHOWN, 0)]
    figure = Figure(figsize=(5.9 * len(cases) + 1.5, 0.98 * SHOWN))
    grid = GridSpec(1, len(cases) + 1, figure, width_ratios=[1.5, *[5.9] * len(cases)])
    words, *parts = [figure.add_subfigure(grid[i]) for i in range(len(cases) + 1)]
    for row, caption in enumerate(captions):
        height = 0.94 * (SHOWN - row - 0.5) / SHOWN
        words.text(0.97, height, fill(caption, 20), fontsize=8, ha="right", va="center")
    for part, case in zip(parts, cases, strict=True):
        part.suptitle(case.arm.replace("_", ", "), fontsize=10, y=0.985)
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


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
