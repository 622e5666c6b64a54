"""One optimisation step: positions -> batch -> losses -> update."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

from flowray.config.model import DiTVelocity, TokenRoute
from flowray.config.recipe import Recipe
from flowray.data.bucket_order import BucketOrder
from flowray.data.order import BatchSizes, EpochOrder
from flowray.flow.draws import Draws, null_partners, stream_seed
from flowray.flow.time import time_config, training_times
from flowray.losses.balance import Measured, gradient_metrics
from flowray.losses.gradients import gramian, loss_gradients, products
from flowray.losses.terms import Forward
from flowray.losses.total import Batch, active_terms, total_loss, weights_at
from flowray.model.latent import Moments
from flowray.model.layers import to_device
from flowray.model.prompts import PromptTokenizer
from flowray.model.routing import kept_places
from flowray.probes.field import cosines, nmse
from flowray.store.latents import LatentSet
from flowray.train.gradients import assign_gradients, forward_passes, head_weights, update_ratios
from flowray.train.group import Group
from flowray.train.optim import clip_gradients, lr_at, set_lr, step_unless
from flowray.train.state import TrainState

Scalars = dict[str, torch.Tensor]


class BatchMaker:
    """Makes this rank's batch of any step, a pure function of (recipe, sizes, step). Where the
    latents are in buckets a batch is of one, and so of one shape.

    prompts: a tokenizer that is to have kept the captions' token ids when the batch is trained on.
    sizes: of the batches; the recipe's alone unless a resume has changed it.
    """

    def __init__(
        self,
        recipe: Recipe,
        latents: LatentSet,
        group: Group,
        prompts: PromptTokenizer | None = None,
        sizes: BatchSizes | None = None,
    ):
        self.recipe, self.latents, self.group = recipe, latents, group
        self.sizes = sizes or BatchSizes.of(recipe.train.batch_size)
        self.prompts = prompts
        self.route = route_of(recipe)
        self.order = (
            EpochOrder(len(latents), recipe.seed)
            if latents.buckets is None
            else BucketOrder(latents.buckets, self.sizes, recipe.seed)
        )

    def indices(self, step: int) -> np.ndarray:
        """Sample indices of the whole global batch."""
        if isinstance(self.order, BucketOrder):
            return self.order(step)
        return self.order(np.arange(self.sizes.seen(step), self.sizes.seen(step + 1)))

    def __call__(self, step: int) -> Batch:
        recipe, size, device = self.recipe, self.sizes.at(step), self.group.device
        rows = self.group.rows(size)
        draws = Draws(recipe.seed, step, size, rows, device)
        indices = self.indices(step)
        height, width = self.latents.size(int(indices[0])) or recipe.model.latent.shape[1:]
        shape = recipe.model.latent.channels, height, width
        null, partner = null_partners(
            draws.uniform_batch("null"), recipe.flow.null_probability, indices.tolist()
        )
        z1 = self._latents(indices[rows], draws.normal("posterior", shape))
        # A null sample aims at another sample's latent, with that sample's own noise, wherever in
        # the global batch it lies.
        target, places = z1, null[rows].nonzero().flatten()
        if len(places):
            others = partner[rows][places]
            noise = Draws(recipe.seed, step, size, slice(None), device).normal("posterior", shape)
            borrowed = self._latents(indices[others.numpy()], noise[to_device(others, device)])
            target = z1.index_copy(0, to_device(places, device), borrowed)
        times = time_config(recipe.flow, step, recipe.train.steps)
        captions = self._captions(indices[rows], draws.uniform("caption"))
        if self.prompts is not None:
            self.prompts.rows(captions)
        return Batch(
            captions=captions,
            z1=z1,
            target=target,
            noise=draws.normal("source", shape),
            t=to_device(training_times(times, draws.uniform("time")), device),
            null=to_device(null[rows], device),
            kept=kept_tokens(self.route, draws, recipe.model.velocity.patch, (height, width)),
        )

    def _latents(self, indices: np.ndarray, noise: torch.Tensor) -> torch.Tensor:
        mean, logvar = self.latents.moments(indices)
        moments = Moments(to_device(mean, noise.device), to_device(logvar, noise.device))
        return self.latents.scale.sample(moments, noise)

    def _captions(self, indices: np.ndarray, u: torch.Tensor) -> list[str]:
        return self.latents.chosen_captions(indices, u.tolist())


def whole_batches(
    recipe: Recipe, latents: LatentSet, device: torch.device, sizes: BatchSizes | None = None
) -> BatchMaker:
    """Global batches on one device, whatever the number of ranks, with every token through every
    block as in sampling: what an examination of the training path looks at.
    """
    maker = BatchMaker(recipe, latents, Group(0, 1, device), sizes=sizes)
    maker.route = None
    return maker


def route_of(recipe: Recipe) -> TokenRoute | None:
    """The route of the velocity network's tokens, if it has one."""
    velocity = recipe.model.velocity
    return velocity.route if isinstance(velocity, DiTVelocity) else None


def kept_tokens(
    route: TokenRoute | None, draws: Draws, patch: int, size: tuple[int, int]
) -> torch.Tensor | None:
    """The tokens of latents of a size (height, width) that do not go past the route's blocks, (B,
    K); None without a route.
    """
    if route is None:
        return None
    tokens = (size[0] // patch) * (size[1] // patch)
    return kept_places(draws.normal("route", (tokens,)), route.kept(tokens))


def train_step(
    state: TrainState, objective: nn.Module, batch: Batch, recipe: Recipe, group: Group
) -> dict[str, torch.Tensor]:
    """Forward, backward, clip, update, EMA; advances `state.step`. Returns this step's scalars as
    tensors.

    A loss or gradient that is not finite leaves the weights as they are, and `state.tally` counts
    it; a gradient that overflowed under fp16 cuts the loss scale instead, until that is down to 1.
    The host waits for nothing.
    """
    weights = weights_at(recipe.loss, state.step, recipe.train.steps)
    rates = set_lr(
        state.optimizer, lr_at(state.schedule, recipe.optim.lr, state.step, recipe.train.steps)
    )
    state.optimizer.zero_grad(set_to_none=True)
    probing = recipe.train.grad_every > 0 and (state.step + 1) % recipe.train.grad_every == 0
    seed = stream_seed(recipe.seed, state.step, f"dropout/{group.rank}")
    with group.seeded(seed), products(recipe):
        losses, side, measured = _backward(
            state, objective, batch, recipe, group, weights, separate=probing
        )
    before = head_weights(state.optimizer) if probing else {}
    norm = _update(state, losses, recipe, group)
    row = {f"loss/{name}": loss for name, loss in losses.items()}
    row |= {f"weight/{name}": torch.tensor(weight) for name, weight in weights.items()}
    row |= {f"lr/{name}": torch.tensor(rate) for name, rate in rates.items()}
    row |= {"loss/total": total_loss(losses, _factors(state, weights)), "grad/total": norm}
    if state.balancer.active:
        row |= {f"balance/{name}": torch.tensor(state.balancer.multiplier(name)) for name in losses}
    if state.scaler.is_enabled():
        row |= {"amp/scale": _scale(state), "amp/backoffs": state.backoffs.clone()}
    return row | side | measured | update_ratios(state.optimizer, before)


def _backward(
    state: TrainState,
    objective: nn.Module,
    batch: Batch,
    recipe: Recipe,
    group: Group,
    weights: dict[str, float],
    *,
    separate: bool,
) -> tuple[Scalars, Scalars, Scalars]:
    """Leave the step's gradient, averaged over ranks, in the parameters. Returns (losses, side
    metrics, gradient metrics).

    An ordinary backward pass of the weighted sum; or, where the balancer or a probe wants each
    loss's gradient (`separate`), one pass per loss, whose gradients are averaged over ranks first
    and combined after, so that all ranks take the same direction.
    """
    separate = separate or state.balancer.due(state.step)
    parameters = list(state.parameters.values())
    losses: Scalars = {}
    side: Scalars = {}
    gradients: torch.Tensor | None = None
    idle = frozenset(name for name, weight in weights.items() if weight == 0)
    for parts, forward in forward_passes(objective, batch, idle, recipe, group, alone=separate):
        if separate:
            scaled = [state.scaler.scale(loss) for loss in parts.values()]
            gradients = loss_gradients(scaled, parameters, gradients)
            del scaled
        else:
            state.scaler.scale(total_loss(parts, _factors(state, weights))).backward()
        _add(losses, {name: loss.detach() for name, loss in parts.items()})
        _add(
            side,
            {
                name: value.detach() / recipe.train.accumulate
                for name, value in _side_metrics(forward).items()
            },
        )
        del parts, forward  # with the graph, before the next micro-batch makes one
    return (
        losses,
        side,
        {} if gradients is None else _combine(state, gradients, losses, weights, recipe, group),
    )


def _combine(
    state: TrainState,
    gradients: torch.Tensor,
    losses: Scalars,
    weights: dict[str, float],
    recipe: Recipe,
    group: Group,
) -> Scalars:
    """Balance the losses' gradients (L, parameters) and write their weighted sum into the
    parameters; returns gradient metrics.
    """
    group.mean_(gradients)
    unscale = state.scaler.get_scale() ** -2
    everything = gramian(gradients, state.parameters, "all") * unscale
    if state.balancer.due(state.step):
        means = group.mean(torch.stack(list(losses.values()))).tolist()
        state.balancer.update(
            Measured(
                gramian=everything
                if state.balancer.over == "all"
                else gramian(gradients, state.parameters, "source") * unscale,
                losses=dict(zip(losses, means, strict=True)),
                weights=weights,
                full={name: term.weight for name, term in active_terms(recipe.loss).items()},
                seed=stream_seed(recipe.seed, state.step, "balance"),
            )
        )
    factors = {name: _factors(state, weights)[name] for name in losses}
    assign_gradients(
        torch.tensor(list(factors.values()), device=gradients.device) @ gradients, state.parameters
    )
    return {
        name: torch.tensor(value) for name, value in gradient_metrics(everything, factors).items()
    }


def _factors(state: TrainState, weights: dict[str, float]) -> dict[str, float]:
    return {name: weight * state.balancer.multiplier(name) for name, weight in weights.items()}


def _update(state: TrainState, losses: Scalars, recipe: Recipe, group: Group) -> torch.Tensor:
    """Clip and apply the gradient, update the EMA, advance the step; returns the gradient's norm
    before clipping.
    """
    state.scaler.unscale_(state.optimizer)
    norm = clip_gradients(list(state.parameters.values()), recipe.optim.clip_grad)
    # the norm is of the ranks' mean, the losses are each rank's own
    sound = group.everywhere(torch.stack(list(losses.values())).isfinite().all())
    bad = ~(sound & norm.isfinite())
    skipped = bad
    if state.scaler.is_enabled():
        overflow = sound & ~norm.isfinite() & (_scale(state) > 1)
        state.backoffs += overflow
        skipped = bad & ~overflow
    state.before_update()
    step_unless(state.optimizer, bad)
    state.scaler.update()
    state.ema.update(state.step)
    state.model.semantic.advance()
    state.step += 1
    clipped = ~bad & (norm > recipe.optim.clip_grad)
    state.tally.note(state.step, skipped, clipped, norm, losses)
    return norm


def _scale(state: TrainState) -> torch.Tensor:
    """fp16's loss scale, () fp32 on the device; `get_scale` would have the host wait for it."""
    return state.scaler.scale(torch.ones((), device=state.backoffs.device))


def _add(into: Scalars, values: Scalars) -> None:
    for name, value in values.items():
        into[name] = into[name] + value if name in into else value


@torch.no_grad()
def _side_metrics(forward: Forward) -> dict[str, torch.Tensor]:
    posterior = forward.posterior
    return {
        **forward.side,
        "train/nmse": nmse(forward.v_pred, forward.path.v_target),
        "train/cos": cosines(forward.v_pred, forward.path.v_target).mean(),
        "mu/abs_mean": posterior.mu.abs().mean(),
        "std/mean": posterior.std.mean(),
    }
