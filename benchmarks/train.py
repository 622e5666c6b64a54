"""`benchmarks train`: what Ray, checkpoints and kills cost a training.

Every ratio is paired: a round runs its arms one after the other, their order swapped every round,
and divides within the round. Higher is better.

- `throughput_vs_torchrun_N`: steps a second of N workers under Ray over those under torchrun, the
  same loop on the same recipe; `throughput_aa_N`: torchrun over torchrun, the noise of that;
- `stall`: saving and syncing one file of a checkpoint's size, over the seconds that the step after
  a checkpoint is late; a checkpoint that delays nothing counts as one that takes a clock's tick;
- `p99_step`, `mean_step`: the 99th percentile, or the mean, of a step's seconds without checkpoints
  over that with them, whatever writes beside the step; `p99_aa`: without over without;
- `recovery`: from the SIGKILL of a worker to the first step that was not trained before, stock Ray
  Train's seconds over flowray's; both save the same state equally often;
- `goodput`: steps a second from the first kill on, with one kill each 20 recovery times, over
  those before it.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import tempfile
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.overhead import ratio
from benchmarks.record import machine
from benchmarks.times import intervals, losses, turns
from benchmarks.train_arms import (
    Arm,
    reached,
    run_of,
    saved_and_synced,
    under_ray,
    under_stock,
    under_torchrun,
)
from flowray.cluster.session import started
from flowray.config.load import load_recipe, override_recipe
from flowray.config.recipe import Recipe
from flowray.store.latents import ensure_latents
from flowray.store.run import RunDirectory

Say = Callable[[str], None]
Facts = dict[str, Any]
# the least that counts as reached
GOALS = {
    "throughput_vs_torchrun_1": 0.99,
    "throughput_vs_torchrun_2": 0.99,
    "stall": 50.0,
    "p99_step": 1 / 1.05,
    "goodput": 0.95,
}
PARTS = ("throughput", "checkpoints", "recovery", "goodput")
NEVER = 10**6  # steps
TICK_S = 1e-3
WARM = 3
KILL_EVERY = 20  # recovery times
WAIT_S = 600.0
PLAIN = {
    "train.device": "cpu",
    "train.log_every": 1,
    "train.probe_every": NEVER,
    "train.sample_every": NEVER,
    "train.checkpoint_every": NEVER,
    "optim.schedule.warmup": 1,
    "probes.batch_size": 8,
    "probes.shoot_steps": 5,
    "sample.steps": 4,
    "resources.cpus_per_worker": 1,
    "resources.gpus_per_worker": 0,
    "resources.max_failures": 100,
}


@dataclass(frozen=True)
class Scale:
    """steps: of a run of the throughput and of the checkpoints; heavy: recipe keys of the run whose
    checkpoints are timed, by default a state of 300 MB; every: steps from one checkpoint to the
    next; kills: of the run of each side and round that is timed for recovery; goodput_kills: 0
    leaves goodput out.
    """

    rounds: int = 9
    workers: tuple[int, ...] = (1, 2)
    base: tuple[tuple[str, Any], ...] = ()
    steps: int = 60
    heavy: tuple[tuple[str, Any], ...] = (
        ("model.velocity.width", 512),
        ("model.velocity.depth", 4),
        ("train.batch_size", 8),
    )
    heavy_steps: int = 90
    every: int = 15
    kills: int = 1
    goodput_kills: int = 3


QUICK = Scale(
    rounds=1,
    workers=(1,),
    base=(("model.velocity.width", 16), ("model.velocity.depth", 1), ("train.batch_size", 8)),
    steps=12,
    heavy=(("model.velocity.width", 32), ("model.velocity.depth", 1), ("train.batch_size", 8)),
    heavy_steps=12,
    every=4,
    goodput_kills=0,
)


def run(scale: Scale, say: Say = lambda _: None, parts: Collection[str] = PARTS) -> dict[str, Any]:
    """The command's JSON object. parts: of PARTS, those to measure; goodput brings recovery."""
    recipe = override_recipe(load_recipe("quickstart").recipe, {**PLAIN, **dict(scale.base)})
    ensure_latents(recipe.data, recipe.model.autoencoder, recipe.model.latent)
    told: list[Facts] = [{"seconds": {}, "ratios": {}, "guards": {}}]
    with tempfile.TemporaryDirectory() as place, started(max(scale.workers)):
        bench = Bench(recipe, Path(place), scale, say)
        if "throughput" in parts:
            told.append(rate_facts(*bench.throughput()))
        if "checkpoints" in parts:
            told.append(checkpoint_facts(*bench.checkpoints()))
        if "recovery" in parts or "goodput" in parts:
            found, equal = bench.recovery()
            told.append(recovery_facts(found, equal))
            if "goodput" in parts and scale.goodput_kills:
                told.append(goodput_facts(bench.goodput(float(np.median(found["flowray"])))))
    return facts(scale, told)


class Bench:
    """The measurements, each run in a folder of its own that goes when it has been read."""

    def __init__(self, recipe: Recipe, place: Path, scale: Scale, say: Say):
        self.recipe, self.place, self.scale, self.say = recipe, place, scale, say
        self._runs = 0

    def _recipe(self, steps: int, workers: int = 1, **keys: Any) -> Recipe:
        self._runs += 1
        own = {"name": f"run-{self._runs}", "storage_path": str(self.place)}
        return override_recipe(
            self.recipe, {**own, "train.steps": steps, "resources.num_workers": workers, **keys}
        )

    def throughput(self) -> tuple[dict[int, dict[str, list[float]]], bool]:
        """Steps a second by workers and arm, and whether all arms had the same losses."""
        arms: Mapping[str, Arm] = {
            "ray": under_ray,
            "torchrun": under_torchrun,
            "again": under_torchrun,
        }
        rates = {workers: {arm: list[float]() for arm in arms} for workers in self.scale.workers}
        equal = True
        for number in range(self.scale.rounds):
            for workers, found in rates.items():
                told = []
                for name in turns(list(arms), number):
                    done = arms[name](self._recipe(self.scale.steps, workers))
                    found[name].append(1 / float(np.mean(intervals(done))))
                    told.append(losses(done))
                    shutil.rmtree(done.path)
                    self.say(
                        f"round {number + 1}, {workers} workers, {name}: {found[name][-1]:.2f}"
                        " steps/s"
                    )
                equal &= all(each == told[0] for each in told)
        return rates, equal

    def checkpoints(self) -> tuple[dict[str, list[Steps]], list[float], int]:
        """Step times by arm, seconds of save and sync of each round, bytes of a checkpoint."""
        cadence = {"with": self.scale.every, "without": NEVER, "again": NEVER}
        steps: dict[str, list[Steps]] = {arm: [] for arm in cadence}
        saves, size = [], 0
        for number in range(self.scale.rounds):
            for name in turns(list(cadence), number):
                keys = {**dict(self.scale.heavy), "train.checkpoint_every": cadence[name]}
                done = under_torchrun(self._recipe(self.scale.heavy_steps, **keys))
                steps[name].append(Steps(intervals(done), cadence[name]))
                if name == "with":
                    size, seconds = saved_and_synced(done)
                    saves.append(seconds)
                shutil.rmtree(done.path)
                self.say(
                    f"round {number + 1}, checkpoints {name}: p99 {steps[name][-1].p99:.3f} s,"
                    f" stall {steps[name][-1].stall:.4f} s, save and sync {saves[-1:]}"
                )
        return steps, saves, size

    def recovery(self) -> tuple[dict[str, list[float]], bool]:
        """Seconds of every recovery by side, and whether all runs came to the same losses."""
        sides: Mapping[str, Arm] = {"flowray": under_ray, "stock": under_stock}
        found = {side: list[float]() for side in sides}
        told: list[list[float]] = []
        for number in range(self.scale.rounds):
            for name in turns(list(sides), number):
                steps = self.scale.steps * self.scale.kills
                recipe = self._recipe(steps, **{"train.checkpoint_every": self.scale.every})
                with Training(sides[name], recipe) as training:
                    for kill in range(self.scale.kills):
                        training.wait(self.scale.steps * kill + self.scale.steps // 2)
                        found[name].append(training.recovered())
                        self.say(f"round {number + 1}, {name}: back in {found[name][-1]:.1f} s")
                told.append(losses(training.run))
                shutil.rmtree(training.run.path)
        return found, all(each == told[0] for each in told)

    def goodput(self, recovery_s: float) -> float:
        """Steps a second under kills over those without; see the module."""
        recipe = self._recipe(NEVER, **{"train.checkpoint_every": self.scale.every})
        with Training(under_ray, recipe) as training:
            training.wait(self.scale.every)
            marks = [(time.monotonic(), reached(training.run))]
            for kill in range(self.scale.goodput_kills + 1):
                due = marks[0][0] + (kill + 1) * KILL_EVERY * recovery_s
                time.sleep(max(0.0, due - time.monotonic()))
                marks.append((time.monotonic(), reached(training.run)))
                if kill < self.scale.goodput_kills:
                    training.kill()
                    self.say(f"goodput: kill {kill + 1} at step {marks[-1][1]}")
            training.run.stop_request.touch()
        rates = [
            (late[1] - early[1]) / (late[0] - early[0])
            for early, late in ((marks[0], marks[1]), (marks[1], marks[-1]))
        ]
        return rates[1] / rates[0]


class Training:
    """An arm's training in a thread for the block, whose worker can be killed."""

    def __init__(self, arm: Arm, recipe: Recipe):
        self.run, self._arm, self._recipe = run_of(recipe), arm, recipe
        self._pool = ThreadPoolExecutor(1)
        self._done: Future[RunDirectory]

    def __enter__(self) -> Training:
        self._done = self._pool.submit(self._arm, self._recipe)
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind:
            self.run.stop_request.touch()
        self._done.result()
        self._pool.shutdown()

    def wait(self, step: int) -> None:
        """Until that step has been trained; what the training raised is raised here."""
        deadline = time.monotonic() + WAIT_S
        while reached(self.run) < step:
            if self._done.done():
                self._done.result()
            if self._done.done() or time.monotonic() > deadline:
                raise RuntimeError(f"{self.run.path}: no step {step}")
            time.sleep(0.02)

    def kill(self) -> int:
        """SIGKILL to the worker that leads; the step that it had reached."""
        os.kill(int(json.loads(self.run.lock.read_text())["pid"]), signal.SIGKILL)
        return reached(self.run)

    def recovered(self) -> float:
        """Kill; seconds until a step is trained that was not before."""
        began, step = time.monotonic(), self.kill()
        self.wait(step + 1)
        return time.monotonic() - began


@dataclass(frozen=True)
class Steps:
    """seconds: from step 1 to 2, from 2 to 3 and so on; every: steps between checkpoints. The first
    steps, which are slower in every run, do not count.
    """

    seconds: Sequence[float]
    every: int

    @property
    def mean(self) -> float:
        """The mean."""
        return float(np.mean(self.seconds[WARM:]))

    @property
    def p99(self) -> float:
        """The 99th percentile."""
        return float(np.percentile(self.seconds[WARM:], 99))

    @property
    def stall(self) -> float:
        """By how much the median step after a checkpoint is longer than the others' median; 0
        without checkpoints.
        """
        counted = list(enumerate(self.seconds, start=1))[WARM:]
        after = [s for step, s in counted if step % self.every == 0]
        others = [s for step, s in counted if step % self.every]
        return float(np.median(after)) - float(np.median(others)) if after else 0.0


def rate_facts(rates: Mapping[int, Mapping[str, Sequence[float]]], equal: bool) -> Facts:
    """Of `Bench.throughput`."""
    ratios = {}
    for workers, arms in rates.items():
        ratios[f"throughput_vs_torchrun_{workers}"] = ratio(arms["ray"], arms["torchrun"])
        ratios[f"throughput_aa_{workers}"] = ratio(arms["again"], arms["torchrun"])
    medians = {
        str(workers): {arm: float(np.median(each)) for arm, each in arms.items()}
        for workers, arms in rates.items()
    }
    return {"ratios": ratios, "steps_per_s": medians, "guards": {"equal_losses": equal}}


def checkpoint_facts(
    steps: Mapping[str, Sequence[Steps]], saves: Sequence[float], size: int
) -> Facts:
    """Of `Bench.checkpoints`."""
    p99 = {arm: [each.p99 for each in found] for arm, found in steps.items()}
    mean = {arm: [each.mean for each in found] for arm, found in steps.items()}
    stalls = [each.stall for each in steps["with"]]
    ratios = {
        "stall": ratio(saves, [max(stall, TICK_S) for stall in stalls]),
        "p99_step": ratio(p99["without"], p99["with"]),
        "mean_step": ratio(mean["without"], mean["with"]),
        "p99_aa": ratio(p99["without"], p99["again"]),
    }
    seconds = {
        "stall": float(np.median(stalls)),
        "save_and_sync": float(np.median(saves)),
        "step": float(np.median([s for each in steps["without"] for s in each.seconds])),
        "p99_with": float(np.median(p99["with"])),
        "p99_without": float(np.median(p99["without"])),
    }
    return {"ratios": ratios, "seconds": seconds, "checkpoint_bytes": size}


def recovery_facts(found: Mapping[str, Sequence[float]], equal: bool) -> Facts:
    """Of `Bench.recovery`."""
    return {
        "ratios": {"recovery": ratio(found["stock"], found["flowray"])},
        "seconds": {f"recovery_{side}": float(np.median(each)) for side, each in found.items()},
        "guards": {"equal_losses_after_kills": equal},
    }


def goodput_facts(goodput: float) -> Facts:
    """Of `Bench.goodput`."""
    return {"ratios": {"goodput": ratio([goodput], [1.0])}}


def facts(scale: Scale, told: Iterable[Facts]) -> Facts:
    """What the parts say, as JSON has it."""
    whole: Facts = {"bench": "train", "machine": machine(), "scale": vars(scale)}
    for part in told:
        for key, value in part.items():
            whole[key] = {**whole.get(key, {}), **value} if isinstance(value, dict) else value
    ratios = whole["ratios"]
    whole["goals"] = {
        name: {"want": want, "reached": ratios[name]["median"] >= want}
        for name, want in GOALS.items()
        if name in ratios
    }
    return whole
