"""A 0.6B DiT with random weights and latents made up for it: what one training step costs."""

from __future__ import annotations

import io
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from flowray.config.load import load_recipe
from flowray.config.recipe import Recipe
from flowray.data.shards import write_shards
from flowray.flow.path import time_code
from flowray.losses.gradients import autocast
from flowray.losses.total import Batch
from flowray.model.flops import velocity_flops
from flowray.store.latents import LatentSet, load_latents
from flowray.train.group import Group
from flowray.train.state import TrainState, fresh_state
from flowray.train.step import BatchMaker, train_step

SAMPLES = 2048
WORDS = ("a", "small", "large", "red", "green", "blue", "circle", "square", "ring", "left", "right")
SIZES = {  # DiT-XL/2 of arXiv 2212.09748 at 256 px, and one that a CPU can try
    "xl": "{width: 1152, depth: 28, heads: 16, patch: 2, kind: dit}",
    "tiny": "{width: 64, depth: 2, heads: 4, patch: 2, kind: dit}",
}


def trunk_recipe(size: str, batch: int, *overrides: str) -> Recipe:
    """quickstart_closed around a large trunk on (4, 32, 32) latents."""
    sized = [
        f"model.velocity={SIZES[size]}",
        "model.latent={channels: 4, height: 32, width: 32}",
        f"train.batch_size={batch}",
        "train.precision=bf16",
        "optim.lr=1e-4",
    ]
    return load_recipe("quickstart_closed", [*sized, *overrides]).recipe


def made_up_latents(folder: Path, shape: tuple[int, int, int]) -> LatentSet:
    """Latent shards of random moments and captions, as the encoder would have written them."""
    rng = np.random.default_rng(0)
    channels, height, width = shape

    def samples() -> Iterator[dict[str, Any]]:
        for i in range(SAMPLES):
            mean = rng.standard_normal((channels, height, width))
            moments = np.concatenate([mean, np.full_like(mean, -6.0)]).astype(np.float16)
            buffer = io.BytesIO()
            np.save(buffer, moments)
            caption = " ".join(rng.choice(WORDS, 8))
            yield {"__key__": f"{i:06d}", "moments.npy": buffer.getvalue(), "txt": caption.encode()}

    meta = {"scale": 1.0, "shift": 0.0, "deterministic": False, "pictures": []}
    write_shards(folder, samples(), meta=meta | {"mean": 0.0, "variance": 1.0})
    return load_latents(folder)


@dataclass
class Bench:
    """A state in training, its data, and the step as it is timed."""

    recipe: Recipe
    group: Group
    state: TrainState
    make_batch: BatchMaker

    @classmethod
    def of(cls, recipe: Recipe, latents: LatentSet, device: torch.device) -> Bench:
        group = Group(0, 1, device)
        state = fresh_state(recipe, device)
        return cls(recipe, group, state, BatchMaker(recipe, latents, group))

    def batch(self) -> Batch:
        """The batch of the state's next step."""
        return self.make_batch(self.state.step)

    def step(self, batch: Batch | None = None) -> dict[str, torch.Tensor]:
        """One whole step; `batch` in place of the step's own leaves out what data cost."""
        batch = batch or self.batch()
        return train_step(self.state, self.state.objective, batch, self.recipe, self.group)


def seconds(work: Callable[[], object], count: int, device: torch.device) -> float:
    """Seconds of one call, the mean of `count` between two synchronisations."""
    _wait(device)
    began = time.perf_counter()
    for _ in range(count):
        work()
    _wait(device)
    return (time.perf_counter() - began) / count


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def trunk_flops(bench: Bench) -> float:
    """Of a training step in the trunk, whose caption is in x_t alone: the backward pass twice the
    forward one.
    """
    model, batch = bench.state.model, bench.recipe.train.batch_size
    passed = velocity_flops(model.velocity, model.config.latent.shape[1:], 0)
    if passed is None:
        raise TypeError(f"no formula for {type(model.velocity)}")
    return 3.0 * batch * passed[0]


def counted_flops(bench: Bench, batch: Batch) -> dict[str, float]:
    """What torch counts in one whole step, and in the trunk alone, forward and backward."""
    with FlopCounterMode(display=False) as step:
        bench.step(batch)
    with FlopCounterMode(display=False) as trunk, autocast(bench.recipe, bench.group.device):
        code = time_code(batch.t)
        given = batch.z1.requires_grad_(), code, batch.null, None, batch.kept
        velocity = bench.state.model.velocity.levels(*given)[-1]
        velocity.float().square().mean().backward()
    bench.state.optimizer.zero_grad()
    return {"step": float(step.get_total_flops()), "trunk": float(trunk.get_total_flops())}


def host_syncs(work: Callable[[], object]) -> dict[str, int]:
    """Where one call waits for the GPU: file:line -> how often."""
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            work()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    places = [w for w in seen if "synchroniz" in str(w.message)]
    return dict(Counter(f"{'/'.join(w.filename.split('/')[-3:])}:{w.lineno}" for w in places))


def kernels(work: Callable[[], object], top: int = 14) -> list[dict[str, Any]]:
    """The kernels that take most of the GPU's time in one call."""
    with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as seen:
        work()
        torch.cuda.synchronize()
    rows = [row for row in seen.key_averages() if row.device_type.name == "CUDA"]
    rows.sort(key=lambda row: -row.self_device_time_total)
    whole = sum(row.self_device_time_total for row in rows)
    table = [
        {"kernel": row.key[:90], "ms": row.self_device_time_total / 1e3, "calls": row.count}
        for row in rows[:top]
    ]
    return [{"kernel": "all", "ms": whole / 1e3, "calls": sum(r.count for r in rows)}, *table]


class PlainLoop:
    """What a hand-written eager loop does with the same modules: pictures through the
    autoencoder at every step, AdamW without fusion, an EMA by a Python loop, a loss read at once.
    """

    def __init__(self, bench: Bench, autoencoder: Any, pixels: int):
        self.bench, self.autoencoder = bench, autoencoder
        parameters = bench.state.parameters
        self.optimizer = torch.optim.AdamW(parameters.values(), lr=1e-4, foreach=False)
        self.average = {name: p.detach().clone() for name, p in parameters.items()}
        size = bench.recipe.train.batch_size
        self.pictures = torch.randint(0, 256, (size, 3, pixels, pixels), dtype=torch.uint8)

    def step(self, batch: Batch) -> float:
        device, state = self.bench.group.device, self.bench.state
        with torch.autocast(device.type, torch.bfloat16):
            with torch.no_grad():
                pixels = self.pictures.to(device).float() / 127.5 - 1
                z1 = self.autoencoder.encode(pixels).latent_dist.sample().float()
            losses, _ = state.objective(
                Batch(batch.captions, z1, z1, batch.noise, batch.t, batch.null)
            )
            loss = losses["flow"] + 4 * losses["anchor"] + 0.03 * losses["kl"]
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(state.parameters.values(), 1.0)
        self.optimizer.step()
        with torch.no_grad():
            for name, p in state.parameters.items():
                self.average[name].lerp_(p.detach(), 1e-3)
        return float(loss.detach())
