"""How long a recipe's work takes on this machine: a few training steps and a forward pass, on
latents made up for it.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice

import torch

from flowray.config.recipe import Recipe
from flowray.data.make import ShapesSet
from flowray.data.shards import EMBEDDED
from flowray.flow.draws import Draws
from flowray.flow.path import time_code
from flowray.flow.time import training_times
from flowray.losses.total import Batch
from flowray.model.autoencoder import load_autoencoder
from flowray.model.layers import to_device
from flowray.model.text import TextTokens
from flowray.train.group import Group
from flowray.train.state import TrainState, fresh_state
from flowray.train.step import kept_tokens, route_of, train_step

PICTURES = 8  # encoded at a time
STEPS = 3  # timed after one that warms up
LONG_S = 5.0  # a step of two samples that takes longer stands for a whole one
WORDS = ("a", "small", "large", "red", "blue", "circle", "left", "of", "square", "on", "white")


class NotTimed(Exception):
    """Why nothing can be timed here."""


@dataclass(frozen=True)
class Timing:
    """Seconds of a training step of one worker, and of the velocity network's pass, without
    gradient, per sample.
    """

    step_s: float
    forward_s: float


def measure(recipe: Recipe) -> Timing:
    """Train the recipe's own model for a few steps of a worker's share of the batch, and forget it.

    Needs the weights that the recipe names, and memory for one worker: NotTimed where the GPU has
    less.
    """
    train, threads = recipe.train, torch.get_num_threads()
    share = max(2, train.batch_size // recipe.resources.num_workers // train.accumulate)
    group = Group.current(train.device)
    torch.set_num_threads(recipe.resources.cpus_per_worker)
    try:
        state = fresh_state(recipe, group.device)
        first = _seconds(lambda: _step(state, recipe, 2, group), group.device)
        step_s = first * share / 2
        if first < LONG_S:
            _seconds(lambda: _step(state, recipe, share, group), group.device)  # allocates
            took = [
                _seconds(lambda: _step(state, recipe, share, group), group.device)
                for _ in range(STEPS)
            ]
            step_s = min(took)
        forward_s = _seconds(lambda: _forward(state, share, group.device), group.device) / share
    except torch.OutOfMemoryError:
        raise NotTimed("a step takes more memory than the GPU here has free") from None
    finally:
        torch.set_num_threads(threads)
    return Timing(step_s * train.accumulate, forward_s)


@torch.no_grad()
def encode_seconds(recipe: Recipe) -> float:
    """Seconds that a picture takes to be encoded, and to be drawn where it belongs to an embedded
    set.

    NotTimed where the GPU has too little memory.
    """
    device = Group.current(recipe.train.device).device
    try:
        autoencoder = load_autoencoder(recipe.model.autoencoder, recipe.model.latent).to(device)
        pictures = autoencoder.decode(
            torch.zeros(PICTURES, *recipe.model.latent.shape, device=device)
        )
        took = min(_seconds(lambda: autoencoder.encode_moments(pictures), device) for _ in range(2))
    except torch.OutOfMemoryError:
        raise NotTimed("encoding takes more memory than the GPU here has free") from None
    if recipe.data.shards in EMBEDDED:
        took += _seconds(lambda: list(islice(ShapesSet().samples("train"), PICTURES)), device)
    return took / PICTURES


def _seconds(work: Callable[[], object], device: torch.device) -> float:
    started = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - started


def _step(state: TrainState, recipe: Recipe, size: int, group: Group) -> None:
    """One step on a batch of noise, whose captions differ from step to step, as a cache of texts
    would help otherwise.
    """
    draws = Draws(recipe.seed, state.step, size, slice(None), group.device)
    shape = recipe.model.latent.shape
    turned = [
        WORDS[i % 11 :] + WORDS[: i % 11] for i in range(state.step * size, (state.step + 1) * size)
    ]
    batch = Batch(
        captions=[" ".join(words) for words in turned],
        z1=draws.normal("posterior", shape),
        target=draws.normal("target", shape),
        noise=draws.normal("source", shape),
        t=to_device(training_times(recipe.flow.time, draws.uniform("time")), group.device),
        null=torch.zeros(size, dtype=torch.bool, device=group.device),
        kept=kept_tokens(
            route_of(recipe), draws, recipe.model.velocity.patch, (shape[1], shape[2])
        ),
    )
    train = recipe.train.model_copy(update={"batch_size": size, "accumulate": 1, "grad_every": 0})
    train_step(state, state.objective, batch, recipe.model_copy(update={"train": train}), group)


@torch.no_grad()
def _forward(state: TrainState, size: int, device: torch.device) -> None:
    model, text = state.model, None
    x = torch.zeros(size, *model.config.latent.shape, device=device)
    null = torch.zeros(size, dtype=torch.bool, device=device)
    if model.velocity.conditioned:
        shape = size, model.config.text.tokens, model.text.width
        mask = torch.ones(shape[:2], dtype=torch.bool, device=device)
        text = TextTokens(torch.zeros(shape, device=device), mask)
    model.velocity(x, time_code(torch.zeros(size, device=device)), null, text)
