"""The same training through flowray's own command path under Ray Train, through torchrun without
Ray, and through a minimal stock TorchTrainer: what `benchmarks train` times.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ray.train
import torch
from ray.train.torch import TorchTrainer
from safetensors.torch import save_file

from flowray.config.load import dump_recipe
from flowray.config.recipe import Recipe
from flowray.data.folders import sync
from flowray.rayrun.trainer import fit
from flowray.store.checkpoint import newest_checkpoint
from flowray.store.latents import ensure_latents, load_training
from flowray.store.rows import RowWriter
from flowray.store.run import RunDirectory
from flowray.train.group import Group
from flowray.train.state import TrainState, fresh_state
from flowray.train.step import BatchMaker, train_step

Arm = Callable[[Recipe], RunDirectory]  # trains the recipe to its end
WEIGHTS = "state.pt"


def run_of(recipe: Recipe) -> RunDirectory:
    """The recipe's run directory."""
    return RunDirectory(Path(recipe.storage_path) / recipe.name)


def under_ray(recipe: Recipe) -> RunDirectory:
    """As flowray.train trains it. Needs Ray to be started."""
    run = run_of(recipe)
    fit(recipe, run.path, name="train", ray_storage=run.path / ".ray")
    return run


def under_torchrun(recipe: Recipe) -> RunDirectory:
    """The same loop in processes of torchrun, gloo between them."""
    run = run_of(recipe)
    run.create()
    asked = run.path / "asked.yaml"
    asked.write_text(dump_recipe(recipe), encoding="utf-8")
    ranks = f"--nproc-per-node={recipe.resources.num_workers}"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", ranks]
    environment = {**os.environ, "OMP_NUM_THREADS": str(recipe.resources.cpus_per_worker)}
    done = subprocess.run(
        [*command, "-m", "benchmarks.rank", str(asked)],
        env=environment,
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise RuntimeError(f"torchrun: {done.stderr[-2000:]}")
    return run


def under_stock(recipe: Recipe) -> RunDirectory:
    """flowray's model and step in a loop as Ray Train's guide has it: every checkpoint saved by
    torch and handed to `ray.train.report`. Needs Ray to be started.
    """
    run = run_of(recipe)
    run.create()
    resources = recipe.resources
    TorchTrainer(
        stock_loop,
        train_loop_config={"recipe": recipe.model_dump(mode="json")},
        scaling_config=ray.train.ScalingConfig(
            num_workers=resources.num_workers,
            resources_per_worker={"CPU": float(resources.cpus_per_worker)},
        ),
        run_config=ray.train.RunConfig(
            name="stock",
            storage_path=str((run.path / ".ray").absolute()),
            failure_config=ray.train.FailureConfig(max_failures=resources.max_failures),
        ),
    ).fit()
    return run


def stock_loop(config: dict[str, Any]) -> None:
    """A worker of `under_stock`; the lead writes metrics.jsonl and its pid as flowray's does."""
    recipe = Recipe.model_validate(config["recipe"])
    torch.set_num_threads(recipe.resources.cpus_per_worker)
    group, run = Group.current(recipe.train.device), run_of(recipe)
    folders = ensure_latents(recipe.data, recipe.model.autoencoder, recipe.model.latent)
    make_batch = BatchMaker(recipe, load_training(folders["train"], recipe), group)
    state = fresh_state(recipe, group.device)
    if checkpoint := ray.train.get_checkpoint():
        with checkpoint.as_directory() as folder:
            _restore(state, Path(folder) / WEIGHTS)
    objective = group.wrap(state.objective)
    rows = RowWriter(run.metrics, state.step) if group.lead else None
    if rows:
        run.lock.write_text(json.dumps({"pid": os.getpid()}))
    while state.step < recipe.train.steps:
        row = train_step(state, objective, make_batch(state.step), recipe, group)
        if rows:
            rows.write({"step": state.step, "loss/total": float(row["loss/total"])})
        if state.step % recipe.train.checkpoint_every and state.step < recipe.train.steps:
            continue
        with tempfile.TemporaryDirectory() as new:
            if group.lead:
                _save(state, Path(new) / WEIGHTS)
            kept = ray.train.Checkpoint.from_directory(new) if group.lead else None
            ray.train.report({"step": state.step}, checkpoint=kept)


def _save(state: TrainState, file: Path) -> None:
    kept = {"model": state.parameters, "ema": state.ema.average, "step": state.step}
    torch.save({**kept, "optimiser": state.optimizer.state_dict()}, file)


def _restore(state: TrainState, file: Path) -> None:
    kept = torch.load(file, weights_only=True)
    with torch.no_grad():
        for name, parameter in state.parameters.items():
            parameter.copy_(kept["model"][name])
            state.ema.average[name].copy_(kept["ema"][name])
    state.optimizer.load_state_dict(kept["optimiser"])
    state.step = kept["step"]


def reached(run: RunDirectory) -> int:
    """The last step that metrics.jsonl has, 0 without one."""
    try:
        return int(json.loads(run.metrics.read_bytes().splitlines()[-1])["step"])
    except (OSError, IndexError, ValueError):  # a line that is being written
        return 0


def saved_and_synced(run: RunDirectory) -> tuple[int, float]:
    """(bytes, seconds) of one file of the size of the newest checkpoint, saved and on disk."""
    checkpoint = newest_checkpoint(run.checkpoints)
    assert checkpoint is not None
    size = sum(file.stat().st_size for file in checkpoint.rglob("*") if file.is_file())
    tensors = {str(i): torch.randn(2**18) for i in range(max(1, size // 2**20))}
    file = run.path / "plain.safetensors"
    started = time.perf_counter()
    save_file(tensors, file)
    sync(file)
    seconds = time.perf_counter() - started
    file.unlink()
    return size, seconds
