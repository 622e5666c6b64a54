"""Trainings that are killed at random instants, and what is left of them: what the tests of kills
share, with Ray or without.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from flowray.config.recipe import Recipe
from flowray.store.rows import read_rows
from flowray.store.run import RunDirectory
from flowray.train.state import TrainState, fresh_state, restore_state

LONG_S = 600.0  # for what takes seconds where nothing else runs
LOOK_S = 0.0005  # between two looks at a folder: a tiny checkpoint is written within 10 ms
PARTIAL = ".partial_*"  # a checkpoint that is being written


@dataclass(frozen=True)
class Instant:
    """When to kill: once metrics.jsonl has the step, `wait_s` after that, or after the writing of
    a checkpoint has begun, or (`starting`) so long after the process was started.
    """

    step: int
    when: Literal["starting", "training", "writing"]
    wait_s: float


def instants(seed: int, count: int, steps: int, starting: int = 0) -> list[Instant]:
    """Of `count` kills over a run of so many steps half are of a checkpoint's writing and
    `starting` of a start.
    """
    rng = random.Random(seed)
    whens = ["writing"] * (count // 2) + ["starting"] * starting
    whens += ["training"] * (count - len(whens))
    rng.shuffle(whens)
    places = sorted(rng.sample(range(1, steps * 9 // 10), count))
    waits = {"starting": 0.4, "training": 0.05, "writing": 0.006}
    return [
        Instant(place, when, rng.uniform(0, waits[when]))
        for place, when in zip(places, whens, strict=True)
    ]


def came(instant: Instant, run: RunDirectory, lives: Callable[[], bool]) -> bool:
    """Wait for the instant; False where the process that trains ended before it."""
    started, deadline = time.time(), time.monotonic() + LONG_S
    conditions: list[Callable[[], bool]] = []
    if instant.when != "starting":
        conditions.append(lambda: logged(run) >= instant.step)
    if instant.when == "writing":
        conditions.append(lambda: bool(list(writing(run, started))))
    for holds in conditions:
        while not holds():
            if not lives():
                return False
            assert time.monotonic() < deadline, f"waited in vain for {instant}"
            time.sleep(LOOK_S)
    time.sleep(instant.wait_s)
    return lives()


def logged(run: RunDirectory) -> int:
    """Rows of metrics.jsonl, those among them that a resume will write again."""
    return run.metrics.read_bytes().count(b"\n") if run.metrics.exists() else 0


def writing(run: RunDirectory, since: float = 0.0) -> Iterator[Path]:
    """Unfinished checkpoints that were touched after a time of the clock."""
    for path in run.checkpoints.glob(PARTIAL):
        try:
            if path.stat().st_mtime > since:
                yield path
        except FileNotFoundError:  # it has just become whole
            yield path


def digest(recipe: Recipe, run: RunDirectory) -> str:
    """sha256 of all that a resume of the run goes on from: weights, EMA, optimiser, cursor, and
    what losses and balancing keep.
    """
    state = fresh_state(recipe, torch.device("cpu"))
    restore_state(state, recipe, run)
    sha = hashlib.sha256()
    for name, tensor in sorted(_tensors(state).items()):
        sha.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        sha.update(tensor.detach().contiguous().numpy().tobytes())
    facts = [recipe.seed, state.step, int(state.backoffs), state.restart]
    facts += [state.balancer.kept(), state.scaler.state_dict(), state.batch_sizes.changes]
    sha.update(json.dumps(facts, sort_keys=True).encode())
    return sha.hexdigest()


def _tensors(state: TrainState) -> dict[str, Tensor]:
    slots = {
        f"optimiser/{name}/{slot}": value
        for name, parameter in state.parameters.items()
        for slot, value in state.optimizer.state[parameter].items()
    }
    assert len(slots) >= 3 * len(state.parameters)  # Adam's two moments and its step of each
    return {
        **{f"weights/{name}": p for name, p in state.parameters.items()},
        **{f"EMA/{name}": tensor for name, tensor in state.ema.average.items()},
        **{f"moving/{name}": tensor for name, tensor in state.model.semantic.moving().items()},
        **slots,
    }


def assert_as_if_untouched(run: RunDirectory, whole: RunDirectory, recipe: Recipe) -> None:
    """The killed run has come to the very state of the whole one, without gap or duplicate in what
    it wrote, and nothing lies about.
    """
    train = recipe.train
    for file, every in (("metrics", train.log_every), ("probes", train.probe_every)):
        here, there = getattr(run, file), getattr(whole, file)
        lines = [json.loads(line) for line in here.read_text().splitlines()]
        due = [s for s in range(1, train.steps + 1) if s % every == 0 or s == train.steps]
        assert [row["step"] for row in lines] == due, file
        assert told(here) == told(there), file
    assert digest(recipe, run) == digest(recipe, whole)
    assert not list(writing(run))
    assert not run.lock.exists()


def told(path: Path) -> list[dict[str, Any]]:
    """Rows without the clock's numbers."""
    return [
        {key: value for key, value in row.items() if not key.startswith("perf/")}
        for row in read_rows(path)
    ]


def owner(run: RunDirectory) -> int | None:
    """The live process that trains in the run; None where none does."""
    try:
        pid = int(json.loads(run.lock.read_text())["pid"])
        return pid if Path(f"/proc/{pid}/cmdline").read_bytes() else None  # a zombie has none
    except (OSError, ValueError, KeyError):
        return None


def marked(mark: str) -> list[int]:
    """Live processes with the variable `NAME=value` in their environment."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            dead = (folder / "stat").read_text().rpartition(")")[2].split()[0] == "Z"
            held = (folder / "environ").read_bytes().split(b"\0")
        except OSError:
            continue
        if not dead and mark.encode() in held and int(folder.name) != os.getpid():
            found.append(int(folder.name))
    return found
