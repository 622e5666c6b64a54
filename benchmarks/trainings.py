"""Trainings beside each other on one machine: each in a fresh process, at a measured pace."""

from __future__ import annotations

import json
import multiprocessing
import os
import statistics
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from flowray.config.load import load_recipe
from flowray.config.recipe import Recipe
from flowray.config.writing import write_whole
from flowray.store.latents import ensure_latents
from flowray.store.rows import read_rows
from flowray.store.run import RunDirectory
from flowray.train.group import Group
from flowray.train.loop import train

PACE_STEPS, PACE_ROUNDS = 60, 2


@dataclass(frozen=True)
class Training:
    """A recipe and what is typed behind it, with a name, a seed and a length."""

    folder: Path
    name: str
    base: str
    typed: tuple[str, ...]
    seed: int
    steps: int

    @property
    def run(self) -> RunDirectory:
        return RunDirectory(self.folder / f"{self.name}-{self.steps}-{self.seed}")

    def recipe(self, *more: str) -> Recipe:
        """For one core, or one GPU: as many trainings as there are run beside each other."""
        place = [f"name={self.run.path.name}", f"storage_path={self.folder}"]
        own = [*place, f"seed={self.seed}", f"train.steps={self.steps}", "resources.num_workers=1"]
        return load_recipe(self.base, [*self.typed, *own, *more]).recipe

    def train(self, *more: str) -> list[dict[str, Any]]:
        """Its metric rows; a killed one goes on from its last checkpoint."""
        torch.set_num_threads(1)
        recipe = self.recipe(*more)
        train(recipe, self.run, Group.current(recipe.train.device), lambda row: None)
        return read_rows(self.run.metrics)


@contextmanager
def processes(count: int) -> Iterator[ProcessPoolExecutor]:
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


def paces(folder: Path, trainings: Sequence[Training]) -> dict[str, float]:
    """Seconds a step of each, by name, the median of rounds in turn; measured are those that
    `folder`/pace.json has none of.
    """
    file = folder / "pace.json"
    pace = json.loads(file.read_text()) if file.exists() else {}
    if new := [one for one in trainings if one.name not in pace]:
        recipe = new[0].recipe()
        ensure_latents(recipe.data, recipe.model.autoencoder, recipe.model.latent)
        with processes(1) as pool:
            rounds = [list(pool.map(_step_seconds, new)) for _ in range(PACE_ROUNDS)]
        medians = map(statistics.median, zip(*rounds, strict=True))
        pace |= {one.name: seconds for one, seconds in zip(new, medians, strict=True)}
        write_whole(file, json.dumps(pace, indent=1))
    say(", ".join(f"{one.name}: {pace[one.name]:.3f} s a step" for one in trainings))
    return pace


def _step_seconds(training: Training) -> float:
    # a folder of its own each time: a run that is done would train nothing
    with tempfile.TemporaryDirectory(dir=training.folder) as fresh:
        short = replace(training, folder=Path(fresh), steps=PACE_STEPS)
        rows = short.train("train.probe_every=100000", "train.sample_every=100000")
    return statistics.median(row["perf/step_s"] for row in rows[1:])


def say(text: str) -> None:
    """A line of progress, on stderr."""
    print(text, file=sys.stderr, flush=True)
