"""`benchmarks sample`: a batch of pictures on one CPU core, or on the GPU there is, beside the same
loop on diffusers' FlowMatchEulerDiscreteScheduler.

All arms integrate the same field of one network from the same noise, guided, with the velocity read
at the left edge of each step, as the scheduler has it. They take turns in one process, their order
swapped every round; ratios are taken within a round, and higher is better:

- `vs_diffusers`: the scheduler's seconds over ours;
- `compiled`: ours over ours with the network's blocks compiled;
- `aa`: ours over ours, the noise of the others.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import Tensor

from benchmarks.overhead import ratio
from benchmarks.record import machine
from benchmarks.times import turns
from flowray.config.flow import EulerSolver, SampleConfig
from flowray.config.load import load_recipe
from flowray.config.losses import LossConfig
from flowray.flow.path import time_code
from flowray.model.assemble import FlowModel, build_model
from flowray.model.autoencoder import load_autoencoder
from flowray.sample.generate import Field, decoded, integrated, source_noise

ALIKE = 1  # of 255, that a picture may be off by
OTHERS = {"vs_diffusers": "diffusers", "compiled": "compiled", "aa": "again"}
PROMPT = "a small red circle in the center on a black background"


@dataclass(frozen=True)
class Scale:
    """words: further recipe keys, `key=value`; compiled: with that arm, whose graphs take a minute
    or more to make.
    """

    rounds: int = 15
    steps: int = 20
    batch: int = 16
    words: tuple[str, ...] = ()
    compiled: bool = True


QUICK = Scale(
    rounds=2,
    steps=3,
    batch=2,
    words=("model.velocity.width=16", "model.velocity.depth=1", "model.velocity.heads=2"),
    compiled=False,
)


def run(scale: Scale, say: Callable[[str], None] = lambda _: None) -> dict[str, Any]:
    """The command's JSON object."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu":
        torch.set_num_threads(1)
    recipe = load_recipe("quickstart", list(scale.words)).recipe
    model = build_model(recipe.model, LossConfig(), recipe.seed).to(device).eval()
    _moved(model)
    config = recipe.sample.model_copy(
        update={"steps": scale.steps, "solver": EulerSolver(nodes="left")}
    )
    with torch.no_grad():
        noise = source_noise(model, [PROMPT] * scale.batch, 0, device)
        source = model.source([PROMPT] * scale.batch, noise)
        arms = _arms(model, model.field(source), source.z0, config, compiled=scale.compiled)
        ends = {name: arm() for name, arm in arms.items()}  # what is made once
        say("all arms have drawn once")
        seconds: dict[str, list[float]] = {name: [] for name in arms}
        for number in range(scale.rounds):
            for name in turns(list(arms), number):
                seconds[name].append(_timed(arms[name], device))
            say(f"round {number + 1}: " + ", ".join(f"{k} {v[-1]:.4f}" for k, v in seconds.items()))
        autoencoder = load_autoencoder(recipe.model.autoencoder, recipe.model.latent).to(device)
        pictures = {name: decoded(autoencoder, end, scale.batch) for name, end in ends.items()}
    return facts(scale, seconds, pictures) | {"device": device.type}


def _arms(
    model: FlowModel, field: Field, z0: Tensor, config: SampleConfig, *, compiled: bool
) -> dict[str, Callable[[], Tensor]]:
    """What each arm draws from z0, (B, C, H, W)."""

    def ours() -> Tensor:
        return integrated(config, field, z0)

    def with_graphs() -> Tensor:
        with model.velocity.compiled():
            return integrated(config, field, z0)

    more = {"compiled": with_graphs} if compiled else {}
    theirs = {"diffusers": lambda: through_diffusers(config, field, z0)}
    return {"flowray": ours, **theirs, **more, "again": ours}


def through_diffusers(config: SampleConfig, field: Field, z0: Tensor) -> Tensor:
    """The loop of a diffusers pipeline: both halves of guidance in one batch, the scheduler steps.

    Its sigma is 1 - t, and falls.
    """
    scheduler: Any = FlowMatchEulerDiscreteScheduler()
    sigmas = np.linspace(1.0, 1 / config.steps, config.steps)
    scheduler.set_timesteps(sigmas=sigmas.tolist(), device=z0.device)
    x = z0
    null = torch.arange(2 * len(z0), device=z0.device) >= len(z0)
    for timestep in scheduler.timesteps:
        t = 1 - timestep / scheduler.config.num_train_timesteps
        plain, free = field(torch.cat([x] * 2), time_code(t.expand(2 * len(x))), null).chunk(2)
        velocity = free + config.guidance_scale * (plain - free)
        x = scheduler.step(-velocity, timestep, x, return_dict=False)[0]
    return x


def _moved(model: FlowModel) -> None:
    """Move all weights a little: the velocity of a fresh network is 0."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in model.trainable().values():
            weight.add_(0.02 * torch.randn(weight.shape, generator=generator).to(weight))


def _timed(arm: Callable[[], Tensor], device: torch.device) -> float:
    start = time.perf_counter()
    arm()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def facts(
    scale: Scale, seconds: Mapping[str, Sequence[float]], pictures: Mapping[str, np.ndarray]
) -> dict[str, Any]:
    """What the measurements say, as JSON has it. pictures: of each arm uint8 (B, H, W, 3)."""
    ours = seconds["flowray"]
    others = {name: arm for name, arm in OTHERS.items() if arm in seconds}
    off = {
        arm: int(np.abs(pictures[arm].astype(int) - pictures["flowray"]).max())
        for arm in others.values()
    }
    ratios = {name: ratio(seconds[arm], ours) for name, arm in others.items()}
    if "compiled" in seconds:  # how much faster the graphs are, not how much slower we are
        ratios["compiled"] = ratio(ours, seconds["compiled"])
    return {
        "bench": "sample",
        "machine": machine(),
        "ratios": ratios,
        "guards": {f"equal_pictures_{arm}": apart <= ALIKE for arm, apart in off.items()},
        "pictures_off": off,
        "scale": vars(scale),
        "seconds": {arm: float(np.median(each)) for arm, each in seconds.items()},
    }
