"""New faults that the doctor's rules were not made for: the half that may be looked at while they
are made better.

Which half a new fault is in was settled by its name, before anything was measured: `is_seen`. The
other half (faults_aside.py) is looked at once, at the end; whoever writes rules does not open it.
"""

from __future__ import annotations

import hashlib
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from faults import NOISE, OPEN, Fault, replacing
from planting import (
    CLOSED_NOISE,
    GUIDED,
    WIDE,
    Sample,
    batches,
    everywhere,
    not_loaded,
    rewritten,
    sampled,
    training_moments,
)
from torch import Tensor

from flowray.data.order import EpochOrder
from flowray.flow import path as flow_path
from flowray.flow.guidance import conditional
from flowray.flow.path import time_code
from flowray.losses import terms
from flowray.model import dit
from flowray.model.assemble import FlowModel
from flowray.model.condition import PooledCaption
from flowray.model.dit import DiT
from flowray.model.latent import Moments
from flowray.model.text import CausalQueries, TextTokens
from flowray.sample import generate as generate_module
from flowray.train import optim, step
from flowray.train.optim import Ema


def is_seen(name: str) -> bool:
    """Whether a fault of this name may be looked at while rules are made."""
    return hashlib.sha256(name.encode()).digest()[0] % 2 == 0


def _mu_alone(original: Any) -> Any:
    def posterior(self: FlowModel, tokens: Any) -> Any:
        made = original(self, tokens)
        return replace(made, mu=made.mu.detach())

    return posterior


def _divided_again(original: Any) -> Any:
    def passes(*args: Any, **keywords: Any) -> Any:
        for losses, forward in original(*args, **keywords):
            yield {name: loss / 4 for name, loss in losses.items()}, forward

    return passes


def _no_prompt(original: Any) -> Any:
    def positions(self: CausalQueries, mask: Tensor) -> tuple[Tensor, Tensor]:
        whole, places = original(self, mask)
        return torch.cat([torch.zeros_like(mask), whole[:, mask.shape[1] :]], dim=1), places

    return positions


def _neighbour_read(original: Any) -> Any:
    def forward(self: PooledCaption, text: TextTokens, null: Tensor) -> Tensor:
        values, mask = (x.roll(1, 0) if self.training else x for x in text)
        return original(self, TextTokens(values, mask), null)

    return forward


def _louder_in_training(original: Any) -> Any:
    def posterior(self: FlowModel, tokens: Any) -> Any:
        made = original(self, tokens)
        return replace(made, amplitude=3.0) if self.training else made

    return posterior


def _shuffled_places(original: Any) -> Any:
    def levels(self: DiT, *args: Any) -> Any:
        places = self.positions
        if not self.training:
            order = torch.randperm(len(places), generator=torch.Generator().manual_seed(0))
            self.positions = places[order]
        try:
            return original(self, *args)
        finally:
            self.positions = places

    return levels


def _transposed(original: Any) -> Any:
    def levels(self: DiT, x: Tensor, *args: Any) -> Any:
        return original(self, x.transpose(-1, -2) if self.training else x, *args)

    return levels


def _left_half(original: Any) -> Any:
    def mse(v_pred: Tensor, v_target: Tensor) -> Tensor:
        half = v_target.shape[-1] // 2
        return original(v_pred[..., :half], v_target[..., :half])

    return mse


def _flipped(samples: list[Sample]) -> list[Sample]:
    """Every second picture mirrored; its captions go on saying left and right."""
    return [
        {**sample, "picture": sample["picture"][:, ::-1]} if i % 2 else sample
        for i, sample in enumerate(samples)
    ]


def _corrupted(made: Moments, indices: np.ndarray) -> Moments:
    """Every twentieth latent is loud noise."""
    for row in (indices % 20 == 0).nonzero()[0].tolist():
        generator = torch.Generator().manual_seed(int(indices[row]))
        made.mean[row] = (
            5 * made.mean.std() * torch.randn(made.mean[row].shape, generator=generator)
        )
    return made


def _sorted(samples: list[Sample]) -> list[Sample]:
    return sorted(samples, key=lambda s: (s["scene"]["background"], str(s["scene"]["things"])))


def _one_step_late(original: Any) -> Any:
    def update(self: Any, step: int) -> None:
        live = self._parameters
        now = {name: p.detach().clone() for name, p in live.items()}
        self._parameters = getattr(self, "before", now)
        original(self, step)
        self._parameters, self.before = live, now

    return update


def _reversed_code(original: Any) -> Any:
    return lambda network: lambda x, t, null: network(x, -time_code(t), null)


def _stops_early(original: Any) -> Any:
    def integrate(config: Any, velocity_fn: Any, *rest: Any) -> Tensor:
        return original(
            config, lambda x, t: velocity_fn(x, t) * (t < 0.75).float()[:, None, None, None], *rest
        )

    return integrate


def _scaled_again(original: Any) -> Any:
    def batches(*args: Any, **how: Any) -> Any:
        for z in original(*args, **how):
            yield 2 * z

    return batches


SEEN: tuple[Fault, ...] = (
    Fault(
        "mu_detached",
        ("mu_idle",),
        bug=replacing(FlowModel, "posterior", _mu_alone),
        kind="gradient",
        about=("mu", "head", "gradient"),
    ),
    Fault(
        "accumulation_divided_twice",
        ("flow_loss_wrong", "step_differs"),
        {"train.accumulate": 4},
        bug=replacing(step, "forward_passes", _divided_again),
        harms=False,
        kind="gradient",
        about=("loss", "accumulate", "scale"),
    ),
    Fault(
        "betas_swapped",
        ("momentum_stale",),
        {"optim.betas": [0.999, 0.9]},
        kind="optimiser",
        about=("betas", "momentum"),
    ),
    Fault(
        "schedule_steps_twice",
        ("schedule_spent", "lr_not_applied"),
        bug=everywhere(
            optim, "lr_at", lambda f: lambda config, lr, step, total: f(config, lr, 2 * step, total)
        ),
        kind="optimiser",
        about=("schedule", "lr is 0 for half of the run"),
    ),
    Fault(
        "prompts_reversed_at_sampling",
        ("seam_captions", "seam_tokens", "seam_text"),
        bug=sampled(lambda prompts, noise: ([" ".join(p.split()[::-1]) for p in prompts], noise)),
        late=True,
        kind="text",
        about=("training against sampling", "tokens", "prompts"),
    ),
    Fault(
        "prompt_masked_out",
        ("caption_unused", "condition_ignored"),
        bug=replacing(CausalQueries, "_positions", _no_prompt),
        kind="text",
        about=("caption", "tokens alike", "not used"),
    ),
    Fault(
        "adaln_reads_the_neighbour",
        ("caption_unused", "condition_ignored", "seam_velocity", "seam_captions"),
        CLOSED_NOISE,
        bug=replacing(PooledCaption, "forward", _neighbour_read),
        kind="condition",
        about=("caption", "not used", "adaln", "training against sampling"),
    ),
    Fault(
        "noise_shared_in_batch",
        ("noise_shared", "seam_draws_trained"),
        {**OPEN, **NOISE},
        bug=batches(lambda b: replace(b, noise=b.noise[:1].expand_as(b.noise).contiguous())),
        pictures="open",
        kind="source",
        about=("noise", "the same in a batch", "z0 over draws"),
    ),
    Fault(
        "sigma_lost_at_sampling",
        ("seam_draws_sampled", "seam_z0"),
        bug=sampled(lambda prompts, noise: (prompts, noise * 0)),
        kind="source",
        about=("training against sampling", "z0", "noise", "sigma"),
        **WIDE,
    ),
    Fault(
        "noise_halved_at_sampling",
        ("seam_draws_sampled", "seam_z0"),
        {**OPEN, **NOISE},
        bug=sampled(lambda prompts, noise: (prompts, noise / 2)),
        late=True,
        healthy="healthy_open_noise",
        pictures="open",
        kind="source",
        about=("training against sampling", "z0", "noise", "width"),
    ),
    Fault(
        "amplitude_in_training_only",
        ("seam_mu", "seam_z0"),
        bug=replacing(FlowModel, "posterior", _louder_in_training),
        kind="source",
        about=("training against sampling", "z0", "amplitude", "mu"),
    ),
    Fault(
        "one_time_per_batch",
        ("time_frozen",),
        bug=batches(lambda b: replace(b, t=b.t[:1].expand_as(b.t).contiguous())),
        harms=False,
        kind="time",
        about=("time", "the same in a batch"),
    ),
    Fault(
        "times_on_two_levels",
        ("time_untrained", "time_misdrawn"),
        bug=batches(lambda b: replace(b, t=((2 * b.t).floor().clamp_max(1) + 0.5) / 2)),
        kind="time",
        about=("times", "coverage", "untrained"),
    ),
    Fault(
        "time_code_reversed_at_sampling",
        ("seam_time_code",),
        bug=replacing(generate_module, "with_time_code", _reversed_code),
        late=True,
        kind="time",
        about=("training against sampling", "time code"),
    ),
    Fault(
        "positions_shuffled_outside_training",
        ("seam_velocity",),
        bug=replacing(DiT, "levels", _shuffled_places),
        kind="network",
        about=("training against sampling", "velocity", "positions"),
    ),
    Fault(
        "rows_and_columns_swapped_in_training",
        ("seam_velocity",),
        bug=replacing(DiT, "levels", _transposed),
        kind="network",
        about=("training against sampling", "velocity", "patches"),
    ),
    Fault(
        "attention_sees_four_tokens",
        ("patches_unheard",),
        CLOSED_NOISE,
        bug=replacing(
            dit, "attention", lambda f: lambda q, k, v, heads: f(q, k[:, :4], v[:, :4], heads)
        ),
        kind="network",
        about=("attention", "tokens", "mask", "do not take part"),
    ),
    Fault(
        "kl_summed_over_dims",
        ("kl_wrong", "kl_crushing"),
        bug=everywhere(
            terms, "kl_per_dim", lambda f: lambda mu, *rest: f(mu, *rest) * mu[0].numel()
        ),
        kind="loss",
        about=("KL", "too strong", "sum"),
    ),
    Fault(
        "target_reversed",
        ("path_wrong", "seam_target"),
        bug=everywhere(flow_path, "velocity_target", lambda f: lambda x0, x1, rho: -f(x0, x1, rho)),
        kind="loss",
        about=("velocity", "target", "sign"),
    ),
    Fault(
        "loss_on_half_the_picture",
        ("flow_loss_wrong", "seam_loss"),
        bug=replacing(terms, "flow_mse", _left_half),
        kind="loss",
        about=("flow loss", "half of the picture", "training against sampling"),
    ),
    Fault(
        "flipped_under_captions",
        ("pictures_mirrored",),
        data=rewritten(_flipped),
        kind="data",
        about=("captions", "left and right", "orientation"),
    ),
    Fault(
        "latents_partly_corrupted",
        ("cache_stale", "seam_latents"),
        bug=training_moments(_corrupted),
        kind="data",
        about=("latents", "outliers"),
    ),
    Fault(
        "shuffle_forgotten",
        ("batches_alike",),
        bug=replacing(EpochOrder, "epoch", lambda _: lambda self, epoch: np.arange(self.size)),
        data=rewritten(_sorted),
        kind="data",
        about=("order", "batches of one kind", "shuffle"),
    ),
    Fault(
        "ema_before_the_step",
        ("step_differs",),
        bug=replacing(Ema, "update", _one_step_late),
        harms=False,
        kind="ema",
        about=("EMA", "a step late"),
    ),
    Fault(
        "null_flag_lost",
        ("seam_null", "seam_guidance", "null_unused"),
        bug=replacing(
            generate_module, "guided", lambda _: lambda velocity, *how: conditional(velocity)
        ),
        harms=False,
        kind="guidance",
        about=("guidance", "null", "training against sampling"),
        **GUIDED,
    ),
    Fault(
        "last_steps_missing",
        ("seam_steps",),
        bug=replacing(generate_module, "integrate", _stops_early),
        late=True,
        kind="sampling",
        about=("sampler", "steps", "does not reach the end"),
    ),
    Fault(
        "two_steps_only",
        ("too_few_steps",),
        {**OPEN, **NOISE, "sample.steps": 2},
        pictures="open",
        kind="sampling",
        about=("sampler", "sample.steps", "too few"),
    ),
    Fault(
        "latents_scaled_twice",
        ("seam_pixels",),
        bug=replacing(generate_module, "latent_batches", _scaled_again),
        late=True,
        kind="sampling",
        about=("sampler", "decoded", "scale"),
    ),
    Fault(
        "head_not_loaded",
        ("seam_weights",),
        bug=not_loaded("head."),
        late=True,
        kind="checkpoint",
        about=("weights", "head", "not those that were trained", "not loaded"),
    ),
)
