"""Every sample of every epoch exactly once, in one order, whatever happens to a run: kills,
stops, other numbers of ranks after each, batches made ahead.

flowray has no loader processes; what other loaders call workers is here how many steps ahead
batches are made (`train/ahead.py`, `data.prefetch`); 0: a batch is made when it is asked for. A
kill loses the steps after the last checkpoint; the run that goes on trains them again, so what
counts is the history that survives.
"""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import random
import signal
import time
from contextlib import ExitStack
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support import tiny_latents

from flowray.config.load import override_recipe
from flowray.config.recipe import Recipe
from flowray.data.order import LISTED
from flowray.store.checkpoint import load_state, newest_checkpoint, save_checkpoint
from flowray.store.latents import load_latents
from flowray.train.ahead import BatchesAhead
from flowray.train.group import Group
from flowray.train.step import BatchMaker, whole_batches

CPU = torch.device("cpu")
WORLDS, DEPTHS = (1, 2, 3, 4, 8), (0, 1, 2, 3, 4)
SCHEDULES, AT_ONCE, LARGE_EVERY = 560, 80, 40


@dataclass(frozen=True)
class Life:
    """From a start to a kill or a stop, or to the end of training where that comes first.

    steps: trained in it; begun: ranks that had taken their part of one more step when it ended;
    stopped: with a checkpoint of the last step, as a signal ends a run, not killed.
    """

    world: int
    depth: int
    steps: int
    begun: int
    stopped: bool


@dataclass(frozen=True)
class Schedule:
    """A run and what happens to it; its last life comes to the end of training."""

    size: int
    seed: int
    batch: int
    steps: int
    checkpoint_every: int
    lives: tuple[Life, ...]


class Samples(list[None]):
    """What the order asks of a latent set: how many there are, and that they are of one size."""

    buckets = None

    def __init__(self, count: int):
        super().__init__([None] * count)


def schedule(number: int) -> Schedule:
    draw = random.Random(number)
    if number % LARGE_EVERY:
        size, batch = draw.randint(1, 60), draw.randint(2, 48)
    else:  # where the order is computed and not held
        size, batch = LISTED + draw.randint(1, 1000), 24 * draw.randint(600, 1000)
    steps = math.ceil(draw.uniform(1.5, 3.5) * max(1, size / batch)) + 1
    worlds = [world for world in WORLDS if batch % world == 0]
    lives = []
    for _ in range(draw.randint(1, 6)):
        world = draw.choice(worlds)
        trained, begun = draw.randint(0, max(2, steps // 2)), draw.randint(0, world)
        lives.append(Life(world, draw.choice(DEPTHS), trained, begun, draw.random() < 0.2))
    lives.append(replace(lives[-1], world=draw.choice(worlds), steps=steps, begun=0))
    return Schedule(size, draw.randint(0, 2**40), batch, steps, draw.randint(1, 5), tuple(lives))


def recipe_of(size: int, seed: int, batch: int) -> Recipe:
    return override_recipe(BASE, {"seed": seed, "train.batch_size": batch})


BASE = Recipe()


def history(told: Schedule) -> tuple[list[list[np.ndarray]], int]:
    """The parts that the ranks took at each step, as far as it survived; how many steps were
    trained in vain.
    """
    recipe = recipe_of(told.size, told.seed, told.batch)
    samples: Any = Samples(told.size)
    survived: list[list[np.ndarray]] = []
    kept = lost = 0
    for life in told.lives:
        lost += len(survived) - kept
        del survived[kept:]
        with ExitStack() as closing:
            ranks = []
            for rank in range(life.world):
                group = Group(rank, life.world, CPU)
                maker, rows = BatchMaker(recipe, samples, group), group.rows(told.batch)
                part = lambda step, maker=maker, rows=rows: maker.indices(step)[rows]  # noqa: E731
                ranks.append(closing.enter_context(BatchesAhead(part, told.steps, CPU, life.depth)))
            for step in range(kept, min(kept + life.steps, told.steps)):
                survived.append([rank(step) for rank in ranks])
                if (step + 1) % told.checkpoint_every == 0 or step + 1 == told.steps:
                    kept = step + 1
            if len(survived) < told.steps:
                for rank in ranks[: life.begun]:
                    rank(len(survived))
            if life.stopped:
                kept = len(survived)
    return survived, lost


@pytest.mark.parametrize("first", range(0, SCHEDULES, AT_ONCE))
def test_every_sample_of_every_epoch_once_in_one_order(first: int) -> None:
    for number in range(first, first + AT_ONCE):
        told = schedule(number)
        survived, _ = history(told)
        whole = whole_batches(
            recipe_of(told.size, told.seed, told.batch),
            Samples(told.size),  # type: ignore[arg-type]
            CPU,
        )
        case = f"schedule({number}): {told}"
        assert len(survived) == told.steps, case
        for step, parts in enumerate(survived):
            assert np.array_equal(np.concatenate(parts), whole.indices(step)), case
        stream = np.concatenate([part for parts in survived for part in parts])
        epochs = len(stream) // told.size
        assert epochs >= 1, case
        for epoch in np.split(stream[: epochs * told.size], epochs):
            assert (np.bincount(epoch, minlength=told.size) == 1).all(), case
        begun = stream[epochs * told.size :]
        assert len(np.unique(begun)) == len(begun), case


def test_the_schedules_have_everything_in_them() -> None:
    """Else the test before would be about less than it says."""
    drawn = [schedule(number) for number in range(SCHEDULES)]
    lives = [life for told in drawn for life in told.lives]
    assert {(life.world, life.depth) for life in lives} == {(w, d) for w in WORLDS for d in DEPTHS}
    changes = {(a.world, b.world) for told in drawn for a, b in pairwise(told.lives)}
    assert changes >= {(a, b) for a in WORLDS for b in WORLDS}
    assert sum(told.size > LISTED for told in drawn) == SCHEDULES // LARGE_EVERY
    assert sum(told.size % told.batch > 0 for told in drawn) > SCHEDULES // 2  # epochs straddled
    assert any(told.batch > 2 * told.size for told in drawn)
    small = [told for told in drawn if told.size <= LISTED]
    assert sum(history(told)[1] > 0 for told in small[:100]) > 20  # kills that lost steps


def consume(
    folder: Path,
    run: Path,
    recipe: Recipe,
    group: Group,
    depth: int,
    barrier: Any,
    life: int,
    pause: int,
) -> None:
    """One rank as a process: from the newest checkpoint to the end, its captions noted. After
    `pause` steps it waits, so that its kill comes in time on a slow machine too.
    """
    found = newest_checkpoint(run / "checkpoints")
    start = load_state(found)["step"] if found else 0
    maker, last = BatchMaker(recipe, load_latents(folder), group), recipe.train.steps
    name = run / f"{life}-{start}-{group.rank}.jsonl"
    with name.open("a") as log, BatchesAhead(maker, last, CPU, depth) as batches:
        for step in range(start, last):
            if step == start + pause:
                time.sleep(120)
            captions = list(batches(step).captions)
            log.write(json.dumps([step, captions]) + "\n")
            log.flush()
            barrier.wait(60)  # what the ranks' gradients do in training
            if group.lead and ((step + 1) % 3 == 0 or step + 1 == last):
                save_checkpoint(
                    run / "checkpoints",
                    step + 1,
                    {"model": {"w": torch.full((1,), float(step))}},
                    {"step": step + 1, "seed": recipe.seed},
                    keep=2,
                )
            barrier.wait(60)


@pytest.mark.parametrize("seed", [0, 1])
def test_real_processes_killed_while_they_read_tars(seed: int, tmp_path: Path) -> None:
    samples, batch, steps = 50, 12, 40
    folder, run = tiny_latents(tmp_path / "latents", samples), tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    spec = {f"model.latent.{side}": 4 for side in ("channels", "height", "width")}
    typed = {"seed": seed, "train.batch_size": batch, "train.steps": steps, **spec}
    recipe, draw = override_recipe(BASE, typed), random.Random(seed)
    context, lives = multiprocessing.get_context("forkserver"), [1, 2, 4, 3]
    draw.shuffle(lives)
    for life, world in enumerate(lives):
        barrier, depth, last = context.Barrier(world), draw.choice(DEPTHS), life == len(lives) - 1
        lines = draw.randint(3, 8) if life else 8  # of the first life two steps are lost for sure
        ranks = [
            context.Process(
                target=consume,
                daemon=True,
                args=(
                    *(folder, run, recipe, Group(rank, world, CPU), depth, barrier, life),
                    *(steps if last else 8,),
                ),
            )
            for rank in range(world)
        ]
        for rank in ranks:
            rank.start()
        if not last:
            _wait_for_lines(run, life, lines, ranks)
            time.sleep(draw.uniform(0, 0.02))
            for rank in ranks:
                os.kill(rank.pid or 0, signal.SIGKILL)
        for rank in ranks:
            rank.join(120)
            assert rank.exitcode == (0 if last else -signal.SIGKILL)

    survived, again = surviving(run, lives)
    maker = whole_batches(recipe, load_latents(folder), CPU)
    for step in range(steps):
        assert survived[step] == list(maker(step).captions), (seed, step)
    stream = [caption for step in range(steps) for caption in survived[step]]
    own = sorted(caption for i in range(samples) for caption in maker.latents.captions(i))
    for epoch in range(steps * batch // samples):
        assert sorted(stream[epoch * samples : (epoch + 1) * samples]) == own, (seed, epoch)
    assert again > 0  # else no kill lost a step, and nothing was tried


def _wait_for_lines(run: Path, life: int, lines: int, ranks: list[Any]) -> None:
    """Until the lead of a life has taken `lines` steps."""
    until = time.monotonic() + 120
    while time.monotonic() < until and all(rank.is_alive() for rank in ranks):
        for log in run.glob(f"{life}-*-0.jsonl"):
            if log.read_text().count("\n") >= lines:
                return
        time.sleep(0.001)
    raise AssertionError(f"life {life}: ended or hung before its kill")


def surviving(run: Path, lives: list[int]) -> tuple[dict[int, list[str]], int]:
    """step -> the captions of its ranks in turn, of the life that went on from behind it; how
    many steps were taken again.
    """
    starts = [
        int(next(run.glob(f"{life}-*-0.jsonl")).name.split("-")[1]) for life in range(len(lives))
    ]
    kept: dict[int, list[str]] = {}
    again = 0
    for life, world in enumerate(lives):
        end = starts[life + 1] if life + 1 < len(lives) else math.inf
        for rank in range(world):
            text = (run / f"{life}-{starts[life]}-{rank}.jsonl").read_text()
            for line in text[: text.rfind("\n") + 1].splitlines():
                step, captions = json.loads(line)
                if step < end:
                    kept.setdefault(step, []).extend(captions)
                else:
                    again += 1
    return kept, again
