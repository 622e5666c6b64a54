"""Recording a pool: every configuration trained to its full budget and its pictures judged, one
line for each that has ended.

Any number of processes may record into one folder. A configuration belongs to whoever holds its
claim, a file lock, which the system releases when its owner dies; the next owner continues from the
run's checkpoint.
"""

from __future__ import annotations

import fcntl
import json
import math
import multiprocessing
import os
import platform
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.pool import Pool, read_pool
from flowray.config.card import git_commit
from flowray.config.errors import InputError
from flowray.config.load import override_recipe
from flowray.config.progress import SILENT
from flowray.config.recipe import Recipe
from flowray.config.rows import Row
from flowray.config.train import OPEN_SCORES
from flowray.data.folders import locked
from flowray.store.latents import ensure_latents
from flowray.store.rows import read_rows
from flowray.store.run import RunDirectory
from flowray.sweepconfig.check import base_recipe
from flowray.sweepconfig.file import dump_sweep
from flowray.sweepconfig.sweep import Sweep
from flowray.train.group import Group
from flowray.train.loop import train
from flowray.train.state import Halted
from flowray.tune.space import Params
from flowray.tune.study import SweepStudy

# a trained run directory -> its picture scores; a module's function: it goes to processes
Score = Callable[[Path], Mapping[str, float]]
PROBES = 10  # of a full budget; the sweep's own cadence should be a multiple of this one
LOGS = 5


@dataclass(frozen=True)
class Job:
    """What a recording process needs to know."""

    folder: Path
    recipe: Recipe
    configurations: tuple[Params, ...]
    score: Score

    @property
    def file(self) -> Path:
        return self.folder / "pool.jsonl"


def record(folder: Path, sweep: Sweep, count: int, score: Score, *, processes: int = 1) -> Pool:
    """Train and judge what `<folder>/pool.jsonl` lacks of `count` configurations, drawn at random
    from the sweep's space with its seed.

    Run again after whatever ended it, it goes on where it stopped. InputError: the folder holds a
    record of another sweep.
    """
    folder.mkdir(parents=True, exist_ok=True)
    recipe = recording_recipe(sweep)
    job = Job(folder.absolute(), recipe, tuple(draw(sweep, count)), score)
    _open(job, sweep)
    # once, before the processes all want them
    ensure_latents(recipe.data, recipe.model.autoencoder, recipe.model.latent)
    if processes == 1:
        work(job)
    else:
        spawn = multiprocessing.get_context("spawn")
        workers = [spawn.Process(target=work, args=(job,), daemon=True) for _ in range(processes)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
    return read_pool(job.file)


def picture_score(run: Path) -> dict[str, float]:
    """What `flowray.eval` says of a run's pictures of held-out prompts. Not in the command's own
    module, which a spawned process does not import.
    """
    from flowray.cli.eval import evaluate

    scores = evaluate(run, [], 0, SILENT)
    shapes = scores["shapes"]
    left_open = {name: scores["open"][name] for name in OPEN_SCORES} if "open" in scores else {}
    return {
        **left_open,
        "mean_attribute_accuracy": shapes["mean_attribute_accuracy"],
        "all_correct": shapes["all_correct"],
        **shapes["by_attribute"],
    }


def recording_recipe(sweep: Sweep) -> Recipe:
    """The sweep's base recipe with PROBES probes to its budget and the losses logged LOGS times
    from one to the next; no pictures on the way. What the sweep sets itself stays.
    """
    base = base_recipe(sweep)
    probe_every = int(sweep.set.get("train.probe_every", max(1, base.train.steps // PROBES)))
    cadence = {
        "train.probe_every": probe_every,
        "train.log_every": max(1, probe_every // LOGS),
        "train.sample_every": base.train.steps,
    }
    return override_recipe(
        base, {key: value for key, value in cadence.items() if key not in sweep.set}
    )


def draw(sweep: Sweep, count: int) -> list[Params]:
    """`count` random points of the sweep's space, without its guesses; the first ones do not
    depend on how many there are.
    """
    space = {
        key: parameter.model_copy(update={"prior": None})
        for key, parameter in sweep.parameters.items()
    }
    plain = {
        "method": "random",
        "search": None,
        "parameters": space,
        "points": (),
        "warm_start": (),
        "seeds": 1,
    }
    with tempfile.TemporaryDirectory() as folder:
        study = SweepStudy(sweep.model_copy(update=plain), Path(folder) / "study.journal")
        return [study.ask()[1] for _ in range(count)]


def work(job: Job) -> None:
    """Record every configuration that nobody else has or is at; one thread, so that two
    processes do not fight over two cores.
    """
    torch.set_num_threads(1)
    for number, params in enumerate(job.configurations):
        with _claim(job.folder / "claims" / str(number)) as mine:
            done = {row["number"] for row in read_rows(job.file)[1:]}
            if mine and number not in done:
                line = _one(job, number, params)
                _append(job.file, line)
                shutil.rmtree(job.folder / "runs" / str(number) / "checkpoints", ignore_errors=True)
                _say(
                    f"{len(done) + 1} of {len(job.configurations)}: configuration {number},"
                    f" {line['error'] or line['score']}"
                )


def _one(job: Job, number: int, params: Params) -> Row:
    """The line of one configuration, trained now or to the end of what a killed process began."""
    began = time.monotonic()
    place = {"name": str(number), "storage_path": str(job.folder / "runs")}
    recipe = override_recipe(job.recipe, {**params, **place})
    run = RunDirectory(job.folder / "runs" / str(number))
    error, score = None, None
    try:
        train(recipe, run, Group.current(recipe.train.device), _leave_with_parent)
        score = dict(job.score(run.path))
    except Halted as halt:
        if isinstance(halt.__cause__, OSError):  # a full disk is not the configuration's fault
            raise InputError(f"{run.path}: {halt}") from halt
        error = str(halt)
    seconds = round(time.monotonic() - began, 1)
    return {
        "number": number,
        "params": params,
        "score": score,
        "error": error,
        "seconds": seconds,
        "rows": rows_of(run),
    }


def rows_of(run: RunDirectory) -> list[Row]:
    """The run's probe rows, each with the losses' means over the rows logged since the probe
    before; six digits of everything.
    """
    metrics, out, before = read_rows(run.metrics), [], 0
    for probe in read_rows(run.probes):
        since = [row for row in metrics if before < row["step"] <= probe["step"]]
        before = probe["step"]
        row = {key: value for key, value in probe.items() if "/" in key and "trivial/" not in key}
        for key in {key for logged in since for key in logged if key.startswith("loss/")}:
            values = [value for logged in since if (value := logged.get(key)) is not None]
            row[key] = math.fsum(values) / len(values) if len(values) == len(since) else None
        out.append(
            {
                "step": before,
                **{
                    key: None if row[key] is None else float(f"{row[key]:.6g}")
                    for key in sorted(row)
                },
            }
        )
    return out


def _leave_with_parent(_: Row) -> None:
    """Heard at every probe: a process whose parent was killed goes too, or it would record on
    beside the next ones.
    """
    parent = multiprocessing.parent_process()
    if parent is not None and not parent.is_alive():
        raise SystemExit(1)


def _open(job: Job, sweep: Sweep) -> None:
    """Write the header, or check that the record there is of this sweep and that its
    configurations are those that are drawn now.
    """
    head = {
        "sweep": dump_sweep(sweep),
        "budget_steps": job.recipe.train.steps,
        "drawn": len(job.configurations),
        "facts": {
            "commit": git_commit(),
            "machine": machine(),
            "recipe": job.recipe.model_dump(mode="json"),
        },
    }
    (job.folder / "claims").mkdir(exist_ok=True)
    with (job.folder / "claims" / "pool").open("w") as lock:
        locked(lock)
        if not job.file.exists():  # it appears whole
            part = job.file.with_suffix(".part")
            part.write_text(json.dumps({"pool": head}) + "\n", encoding="utf-8")
            part.replace(job.file)
    pool = read_pool(job.file)
    ours = all(
        e.number < pool.drawn == len(job.configurations)
        and e.params == job.configurations[e.number]
        for e in pool.entries
    )
    same = all(
        getattr(pool.sweep, name) == getattr(sweep, name)
        for name in ("base", "set", "parameters", "seed")
    )
    if not (
        ours
        and same
        and pool.drawn == len(job.configurations)
        and pool.budget_steps == job.recipe.train.steps
    ):
        raise InputError(
            f"{job.file}: a record of another sweep or count; take the same ones, or another folder"
        )


@contextmanager
def _claim(path: Path) -> Iterator[bool]:
    """Whether the claim is this process's for the block."""
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            yield True


def _append(path: Path, row: Row) -> None:
    """Add one line, whole; what a killed writer left of its own is cut off."""
    with path.open("r+b") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.truncate(file.read().rfind(b"\n") + 1)
        file.seek(0, os.SEEK_END)
        file.write(json.dumps(row, allow_nan=False).encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())


def machine() -> str:
    """This machine in words."""
    return f"{os.cpu_count()} CPU cores, {platform.machine()}, torch {torch.__version__}"


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
