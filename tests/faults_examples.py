"""Faults that were met in use and that the doctor did not name then, planted as those of faults.py
are.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from faults import ANCHORED, OPEN, Fault, replacing
from planting import Sample, everywhere, rewritten
from torch import Tensor

from flowray.losses import terms
from flowray.model.assemble import FlowModel
from flowray.model.levels import TimeEmbedding
from flowray.model.text import CausalQueries, TextTokens
from flowray.train import optim, state


def _without_gradient(original: Any) -> Any:
    def forward(self: CausalQueries, prompts: Any) -> TextTokens:
        with torch.no_grad():
            return original(self, prompts)

    return forward


def _near_copies(samples: list[Sample]) -> list[Sample]:
    """Each third picture three times over, the copies two grey levels off."""
    rng = np.random.default_rng(0)
    made = []
    for i in range(len(samples)):
        source = samples[i - i % 3]
        if i % 3:
            picture = source["picture"].astype(int)
            off = rng.integers(-2, 3, picture.shape)
            source = {**source, "picture": np.clip(picture + off, 0, 255).astype(np.uint8)}
        made.append(source)
    return made


def _mean_in_training(original: Any) -> Any:
    def source(self: FlowModel, captions: Any, noise: Tensor) -> Any:
        return original(self, captions, noise * 0 if self.training else noise)

    return source


def _large_eps(original: Any) -> Any:
    def build(*args: Any) -> Any:
        optimizer = original(*args)
        for group in optimizer.param_groups:
            group["eps"] = 1.0
        return optimizer

    return build


EXAMPLES: tuple[Fault, ...] = (
    Fault(
        "meta_queries_detached",
        ("queries_idle",),
        bug=replacing(CausalQueries, "forward", _without_gradient),
        kind="gradient",
        about=("queries", "gradient"),
    ),
    Fault(
        "clip_grad_of_a_millionth",
        ("clip_too_tight",),
        {"optim.clip_grad": 1e-6},
        kind="optimiser",
        about=("clip_grad", "effective step"),
    ),
    Fault(
        "contrastive_labels_shifted",
        ("contrastive_wrong",),
        bug=everywhere(
            terms,
            "info_nce",
            lambda original: (
                lambda text, image, scale, gather=False: original(
                    text, image.roll(1, 0), scale, gather=gather
                )
            ),
        ),
        kind="loss",
        about=("contrastive", "pairs", "labels"),
    ),
    Fault(
        "two_thirds_near_copies",
        ("dataset_near_copies", "dataset_duplicated"),
        data=rewritten(_near_copies),
        kind="data",
        about=("near-duplicates",),
    ),
    Fault(
        "time_left_out",
        ("time_unused",),
        bug=replacing(TimeEmbedding, "forward", lambda f: lambda self, code: f(self, code) * 0),
        kind="time",
        about=("time", "not used"),
    ),
    Fault(
        "time_code_constant",
        ("time_unused", "time_frozen"),
        bug=replacing(TimeEmbedding, "forward", lambda f: lambda self, code: f(self, code * 0)),
        kind="time",
        about=("time code", "constant", "not used"),
    ),
    Fault(
        "ema_decay_zero",
        ("ema_off",),
        {"train.ema": 0.0},
        harms=False,
        kind="ema",
        about=("EMA", "decay"),
    ),
    Fault(
        "posterior_mean_in_training",
        ("seam_draws_trained", "seam_z0"),
        bug=replacing(FlowModel, "source", _mean_in_training),
        kind="source",
        about=("z0", "training against sampling", "drawn", "sigma"),
    ),
    Fault(
        "warmup_of_15000",
        ("warmup_too_long",),
        {"optim.schedule.warmup": 15_000},
        kind="optimiser",
        about=("warm-up", "run length"),
    ),
    Fault(
        "adam_eps_one",
        ("eps_too_large",),
        bug=replacing(state, "build_optimizer", _large_eps),
        kind="optimiser",
        about=("eps", "effective step"),
    ),
    Fault(
        "kl_sign_turned",
        ("kl_wrong",),
        bug=everywhere(terms, "kl_per_dim", lambda f: lambda *args: -f(*args)),
        kind="loss",
        about=("KL", "sign"),
    ),
    Fault(
        "schedule_ends_at_a_third",
        ("schedule_spent",),
        bug=everywhere(
            optim,
            "lr_at",
            lambda f: (
                lambda config, lr, step, total: (
                    f(config, lr, step, total) if step < 0.3 * total else 0.0
                )
            ),
        ),
        kind="optimiser",
        about=("schedule", "lr is 0"),
    ),
    Fault(
        "source_too_narrow_open",
        ("source_averages",),
        {**OPEN, **ANCHORED, "model.posterior": {"logvar_min": -4.0, "logvar_max": -3.9}},
        pictures="open",
        kind="source",
        about=("source", "too narrow", "sigma"),
    ),
    Fault("healthy_on_digits", (), pictures="digits", harms=False, kind="healthy"),
)
