"""`benchmarks step`: a training step on one CPU core, beside other loops on the same modules.

A round runs the arms one after the other, their order swapped every round, each in a process of
its own; ratios are taken within a round, and higher is better:

- `vs_plain`: steps a second over those of `step_arms`, a plain eager loop that decodes and encodes
  each step's pictures;
- `vs_before`: over those of an older commit of flowray's loop, on that commit's own code;
- `bf16_vs_before`: the same with `train.precision=bf16`, for processors that multiply it;
- `aa`: this loop over itself, the noise of the others.

Steps before which a probe ran are left out of the rates and say what a probe costs.
"""

from __future__ import annotations

import io
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.overhead import ratio
from benchmarks.record import machine
from benchmarks.times import intervals, losses, turns
from flowray.config.errors import InputError
from flowray.config.load import load_recipe
from flowray.store.run import RunDirectory

ROOT = Path(__file__).parents[1]
BEFORE = "674f44a"  # one process, no sharding, checkpoints written by the thread that trains
ARMS = ("flowray", "plain", "before", "bf16", "again")
GOALS = {"vs_before": 1.5, "bf16_vs_before": 1.5}
PROBES_SHARE = 0.03  # of the training time, at most
WARM = 5  # steps that are not counted
APART = 0.02  # relative difference that mean losses of the last quarter may have


@dataclass(frozen=True)
class Scale:
    """words: further recipe keys, `key=value`; probes: of a run; own_cache: the older commit
    encodes its latents for itself, as its caches may be of another form.
    """

    rounds: int = 9
    steps: int = 60
    probes: int = 3
    words: tuple[str, ...] = ()
    own_cache: bool = True


QUICK = Scale(
    rounds=1,
    steps=16,
    probes=2,
    words=(
        *("model.velocity.width=16", "model.velocity.depth=1", "train.batch_size=8"),
        *("probes.batch_size=8", "probes.shoot_steps=5"),
    ),
    own_cache=False,
)


@dataclass(frozen=True)
class Timed:
    """step_s: mean seconds of the steps that count; probe_s: median of the probes."""

    step_s: float
    probe_s: float
    losses: Sequence[float]


def run(scale: Scale, before: str, say: Callable[[str], None] = lambda _: None) -> dict[str, Any]:
    """The command's JSON object. before: the older commit; InputError where there is none."""
    found: dict[str, list[Timed]] = {arm: [] for arm in ARMS}
    with tempfile.TemporaryDirectory() as place:
        old = checked_out(before, Path(place) / "before")
        commands = {
            "flowray": (ROOT, (str(ROOT / "benchmarks" / "rank.py"),)),
            "plain": (ROOT, ("-m", "benchmarks.step_arms")),
            "before": (old, (str(ROOT / "benchmarks" / "rank.py"),)),
        }
        commands |= dict.fromkeys(("bf16", "again"), commands["flowray"])
        scales = dict.fromkeys(ARMS, scale)
        scales["bf16"] = replace(scale, words=(*scale.words, "train.precision=bf16"))
        for arm in ("flowray", "before"):  # what is encoded once
            say(f"preparing {arm}")
            timed(*commands[arm], replace(scale, steps=1, probes=0), Path(place))
        for number in range(scale.rounds):
            for arm in turns(list(ARMS), number):
                found[arm].append(timed(*commands[arm], scales[arm], Path(place)))
                say(f"round {number + 1}, {arm}: {found[arm][-1].step_s:.4f} s a step")
    return facts(scale, before, load_recipe("quickstart").recipe.train.probe_every, found)


def checked_out(commit: str, folder: Path) -> Path:
    """The tree of a commit in a new folder."""
    made = subprocess.run(["git", "-C", str(ROOT), "archive", commit], capture_output=True)
    if made.returncode:
        raise InputError(f"--before: got {commit!r}, which git does not have here: a commit")
    with tarfile.open(fileobj=io.BytesIO(made.stdout)) as tar:
        tar.extractall(folder, filter="data")
    return folder


def timed(tree: Path, command: Sequence[str], scale: Scale, place: Path) -> Timed:
    """Train quickstart with the code of a tree."""
    every = scale.steps // (scale.probes + 1) if scale.probes else 10**6
    run = RunDirectory(place / "run")
    words = (
        *("name=run", f"storage_path={place}", f"train.steps={scale.steps}", "train.device=cpu"),
        *("train.log_every=1", f"train.probe_every={every}", "train.sample_every=1000000"),
        *("train.checkpoint_every=1000000", "sample.steps=4"),
        *("resources.num_workers=1", "resources.cpus_per_worker=1", *scale.words),
    )
    environment = {**os.environ, "PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1"}
    if tree != ROOT and scale.own_cache:
        environment["FLOWRAY_CACHE"] = str(place / "cache")
    try:
        done = subprocess.run(
            [sys.executable, "-P", *command, "quickstart", *words],
            env=environment,
            cwd=place,
            capture_output=True,
            text=True,
        )
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)} with {tree}: {done.stderr[-2000:]}")
        return _read(run, every, scale.steps)
    finally:
        shutil.rmtree(run.path, ignore_errors=True)


def _read(run: RunDirectory, every: int, steps: int) -> Timed:
    told = losses(run)
    if steps <= WARM:
        return Timed(0.0, 0.0, told)
    seconds = dict(enumerate(intervals(run), start=1))  # after step 1, 2, ...
    counted = [s for step, s in seconds.items() if step >= WARM and step % every]
    probed = [s for step, s in seconds.items() if step % every == 0]
    step_s = float(np.mean(counted))
    return Timed(step_s, float(np.median(probed)) - step_s if probed else 0.0, told)


def facts(
    scale: Scale, before: str, probe_every: int, found: Mapping[str, Sequence[Timed]]
) -> dict[str, Any]:
    """What the measurements say, as JSON has it. probe_every: of the recipe as it comes."""
    step_s = {arm: [each.step_s for each in runs] for arm, runs in found.items()}
    names = {"vs_plain": "plain", "vs_before": "before", "aa": "again"}
    ratios = {name: ratio(step_s[arm], step_s["flowray"]) for name, arm in names.items()}
    ratios["bf16_vs_before"] = ratio(step_s["before"], step_s["bf16"])
    ours = [each for arm in ("flowray", "again") for each in found[arm]]
    shares = [each.probe_s / (each.probe_s + probe_every * each.step_s) for each in ours]
    share = float(np.median(shares))
    goals = {
        name: {"want": want, "reached": ratios[name]["median"] >= want}
        for name, want in GOALS.items()
    }
    return {
        "bench": "step",
        "machine": machine(),
        "ratios": ratios,
        "goals": {**goals, "probes_share": {"want": PROBES_SHARE, "reached": share < PROBES_SHARE}},
        "guards": {
            f"equal_losses_{arm}": all(map(_alike, found["flowray"], found[arm]))
            for arm in ARMS[1:]
        },
        "scale": vars(scale),
        "before": before,
        "probes_share": share,
        "seconds": {
            **{arm: float(np.median(each)) for arm, each in step_s.items()},
            "probe": float(np.median([each.probe_s for each in ours])),
        },
    }


def _alike(one: Timed, other: Timed) -> bool:
    """Whether two runs of equally many steps had the same losses but for rounding."""
    if len(one.losses) != len(other.losses):
        return False
    late = len(one.losses) * 3 // 4
    ends = [[x.losses[0], float(np.mean(x.losses[late:]))] for x in (one, other)]
    return bool(np.allclose(ends[0], ends[1], rtol=APART))
