"""One optimisation step: positions -> batch -> losses -> update."""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext

import numpy as np
import torch
from torch import nn

from flowray.config.recipe import Recipe
from flowray.data.order import EpochOrder
from flowray.flow.draws import Draws, null_partners
from flowray.flow.time import training_times
from flowray.losses.terms import Forward
from flowray.losses.total import Batch, total_loss, weights_at
from flowray.model.latent import Moments
from flowray.probes.field import nmse
from flowray.store.latents import LatentSet
from flowray.train.group import Group
from flowray.train.optim import lr_at, set_lr
from flowray.train.state import Halted, TrainState


class BatchMaker:
    """Makes this rank's batch of any step, a pure function of (recipe, step)."""

    def __init__(self, recipe: Recipe, latents: LatentSet, group: Group):
        self.recipe, self.latents, self.group = recipe, latents, group
        self.order = EpochOrder(len(latents), recipe.seed)

    def indices(self, step: int) -> np.ndarray:
        """Sample indices of the whole global batch."""
        size = self.recipe.train.batch_size
        return self.order(np.arange(step * size, (step + 1) * size))

    def __call__(self, step: int) -> Batch:
        recipe, size, device = self.recipe, self.recipe.train.batch_size, self.group.device
        rows = self.group.rows(size)
        draws = Draws(recipe.seed, step, size, rows, device)
        shape = recipe.model.latent.shape
        null, partner = null_partners(draws.uniform_batch("null"), recipe.flow.null_probability)
        indices = self.indices(step)
        z1 = self._latents(indices[rows], draws.normal("posterior", shape))
        # A null sample aims at another sample's latent, with that sample's own noise, wherever in the global batch it lies.
        noise = Draws(recipe.seed, step, size, slice(None), device).normal("posterior", shape)[partner[rows]]
        target = torch.where(null[rows].view(-1, 1, 1, 1), self._latents(indices[partner[rows].cpu().numpy()], noise), z1)
        return Batch(
            captions=self._captions(indices[rows], draws.uniform("caption")),
            z1=z1,
            target=target,
            noise=draws.normal("source", shape),
            t=training_times(recipe.flow.time, draws.uniform("time")),
            null=null[rows],
        )

    def _latents(self, indices: np.ndarray, noise: torch.Tensor) -> torch.Tensor:
        mean, logvar = self.latents.moments(indices)
        return self.latents.scale.sample(Moments(mean.to(noise.device), logvar.to(noise.device)), noise)

    def _captions(self, indices: np.ndarray, u: torch.Tensor) -> list[str]:
        options = [self.latents.captions(int(i)) for i in indices]
        return [texts[int(x * len(texts))] for texts, x in zip(options, u.tolist(), strict=True)]


def autocast(recipe: Recipe, device: torch.device) -> AbstractContextManager[object]:
    """bf16 autocast where the recipe asks for it; the path, the losses and the solver state stay fp32."""
    return torch.autocast(device.type, torch.bfloat16) if recipe.train.precision == "bf16" else nullcontext()


def train_step(state: TrainState, objective: nn.Module, batch: Batch, recipe: Recipe, group: Group) -> dict[str, torch.Tensor]:
    """Forward, backward, clip, update, EMA; advances `state.step`. Returns this step's scalars as tensors.

    A loss or gradient that is not finite raises Halted before it reaches the weights.
    """
    weights = weights_at(recipe.loss, state.step, recipe.train.steps)
    rates = set_lr(state.optimizer, lr_at(recipe.optim.schedule, recipe.optim.lr, state.step, recipe.train.steps))
    state.optimizer.zero_grad(set_to_none=True)
    with autocast(recipe, group.device):
        losses, forward = objective(batch)
    total = total_loss(losses, weights)
    total.backward()
    norm = nn.utils.clip_grad_norm_(list(state.parameters.values()), recipe.optim.clip_grad)
    if not math.isfinite(float(norm)):
        raise Halted(_blame(losses, state.step + 1, norm))
    state.optimizer.step()
    state.ema.update(state.step)
    state.step += 1
    row = {f"loss/{name}": loss.detach() for name, loss in losses.items()}
    row |= {f"weight/{name}": torch.tensor(weight) for name, weight in weights.items()}
    row |= {f"lr/{name}": torch.tensor(rate) for name, rate in rates.items()}
    row |= {"loss/total": total.detach(), "grad/total": norm.detach(), "grad/clip_frac": (norm > recipe.optim.clip_grad).float()}
    return row | _watch(forward)


@torch.no_grad()
def _watch(forward: Forward) -> dict[str, torch.Tensor]:
    posterior = forward.posterior
    return {
        "loss/kl_raw": 0.5 * (posterior.mu.square() + posterior.logvar.exp() - 1 - posterior.logvar).flatten(1).sum(1).mean(),
        "train/nmse": nmse(forward.v_pred, forward.path.v_target),
        "mu/abs_mean": posterior.mu.abs().mean(),
        "std/mean": posterior.std.mean(),
    }


def _blame(losses: dict[str, torch.Tensor], step: int, norm: torch.Tensor) -> str:
    bad = [name for name, loss in losses.items() if not math.isfinite(float(loss.detach()))]
    what = f"loss/{bad[0]}" if bad else f"the gradient (norm {float(norm)}) with every loss finite"
    return f"step {step}: {what} is not finite; it did not reach the weights; try a lower optim.lr"
