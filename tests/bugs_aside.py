"""The bugs in code that the faults set aside plant (faults_aside.py); not to be opened either."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from faults import replacing
from PIL import Image
from planting import Sample, read_samples, write_samples
from torch import Tensor
from torch.nn import functional as F
from torch.optim.swa_utils import get_ema_multi_avg_fn

from flowray.config.losses import AnchorLossConfig
from flowray.data.shards import MANIFEST
from flowray.flow.draws import Draws
from flowray.losses import terms
from flowray.model.dit import DiT, DiTBlock
from flowray.model.latent import Moments
from flowray.model.text import Prompts, TextModel
from flowray.train import optim
from flowray.train.optim import Ema


def clamped(original: Any) -> Any:
    def clip(parameters: Any, most: float) -> Tensor:
        norm = original(parameters, most)
        for p in parameters:
            if p.grad is not None:
                p.grad.clamp_(-1e-10, 1e-10)
        return norm

    return clip


def mostly_skipped(original: Any) -> Any:
    """As a loss scale that overflows in 19 of 20 steps."""
    seen = [0]

    def step(self: Any, optimizer: Any, *args: Any) -> Any:
        seen[0] += 1
        return original(self, optimizer, *args) if seen[0] % 20 == 0 else None

    return step


def cut_trunk(original: Any) -> Any:
    def forward(self: DiTBlock, x: Tensor, *rest: Tensor) -> Tensor:
        return original(self, x.detach(), *rest)

    return forward


def groups(change: Any) -> Any:
    """A bug in the optimiser's groups, (groups, parameters) -> groups."""

    def make(original: Any) -> Any:
        return lambda parameters, *rest: change(original(parameters, *rest), parameters)

    return replacing(optim, "parameter_groups", make)


def loud_patches(groups: list[dict[str, Any]], parameters: dict[str, Any]) -> Any:
    loud = parameters["velocity.patch_in.weight"]
    for group in groups:
        group["params"] = [p for p in group["params"] if p is not loud]
    alone = {"name": "patch_in", "params": [loud], "weight_decay": 0.0}
    return [*groups, {**alone, "scale": 100.0, "lr_max": math.inf}]


def decayed_head(groups: list[dict[str, Any]], parameters: dict[str, Any]) -> Any:
    return [{**g, "weight_decay": 10.0} if g["name"] == "z_head" else g for g in groups]


def forgetful(original: Any) -> Any:
    def step(self: Any, *args: Any, **keywords: Any) -> Any:
        self.state.clear()
        return original(self, *args, **keywords)

    return step


def rounded_weights(original: Any) -> Any:
    def step(self: Any, *args: Any, **keywords: Any) -> Any:
        result = original(self, *args, **keywords)
        for group in self.param_groups:
            for p in group["params"]:
                p.data.copy_(p.data.bfloat16())
        return result

    return step


def left_padded(original: Any) -> Any:
    """The ids end at the right edge, the mask begins at the left one."""

    def tokenize(self: TextModel, prompts: Sequence[str]) -> Prompts:
        ids, mask = original(self, prompts)
        gaps = (mask.shape[1] - mask.sum(1)).tolist()
        return Prompts(torch.stack([r.roll(gap) for r, gap in zip(ids, gaps, strict=True)]), mask)

    return tokenize


def first_noise(original: Any) -> Any:
    def normal(self: Draws, stream: str, shape: tuple[int, ...]) -> Tensor:
        return original(replace(self, step=0) if stream == "source" else self, stream, shape)

    return normal


def skip_first(net: DiT) -> None:
    net.blocks[0].forward = lambda x, *rest: x  # type: ignore[method-assign]


def dropping(original: Any) -> Any:
    def levels(self: DiT, x: Tensor, *rest: Any) -> Any:
        return original(self, x if self.training else F.dropout(x, 0.5), *rest)

    return levels


def swapped_weights(original: Any) -> Any:
    def weights(*args: Any) -> dict[str, float]:
        made = original(*args)
        return {**made, "anchor": made["kl"], "kl": made["anchor"]}

    return weights


def mean_error(original: Any) -> Any:
    return lambda v_pred, v_target: (v_pred.float() - v_target).mean(0).square().mean()


def neighbours_anchor(config: AnchorLossConfig, forward: terms.Forward) -> Tensor:
    return F.mse_loss(forward.posterior.mu, forward.z1.roll(1, 0))


def blurred(samples: list[Sample]) -> list[Sample]:
    def blur(picture: np.ndarray) -> np.ndarray:
        image = Image.fromarray(np.ascontiguousarray(picture))
        small = image.resize((8, 8), Image.Resampling.BOX)
        return np.asarray(small.resize(image.size, Image.Resampling.BICUBIC))

    return [{**sample, "picture": blur(sample["picture"])} for sample in samples]


def partly_wrong(samples: list[Sample]) -> list[Sample]:
    """Two of five samples have the captions of another one."""
    return [
        {**s, "captions": samples[(i + 7) % len(samples)]["captions"]} if i % 5 < 2 else s
        for i, s in enumerate(samples)
    ]


def with_held_out(healthy: Path, folder: Path) -> Path:
    if not (folder / MANIFEST).is_file():
        held_out = read_samples(healthy.parent / "val")
        write_samples(folder, [*held_out, *read_samples(healthy)[len(held_out) :]])
    return folder


def rounded(made: Moments, indices: np.ndarray) -> Moments:
    step = 1.5 * made.mean.std()
    return Moments((made.mean / step).round() * step, made.logvar)


def without_warmup(original: Any) -> Any:
    def update(self: Ema, step: int) -> None:
        live = [self._parameters[name].detach().float() for name in self.average]
        get_ema_multi_avg_fn(self.decay)(list(self.average.values()), live, None)

    return update


def inverted(original: Any) -> Any:
    def update(self: Ema, step: int) -> None:
        live = [self._parameters[name].detach().float() for name in self.average]
        get_ema_multi_avg_fn(1 - self.decay)(list(self.average.values()), live, None)

    return update


def velocity_alone(original: Any) -> Any:
    def update(self: Ema, step: int) -> None:
        whole = self.average
        self.average = {n: x for n, x in whole.items() if n.startswith("velocity.")}
        original(self, step)
        self.average = whole

    return update


def away(original: Any) -> Any:
    def guided(velocity: Any, scale: float, *how: Any) -> Any:
        towards, none = (original(velocity, s, *how) for s in (scale, 0.0))
        return lambda x, t: 2 * none(x, t) - towards(x, t)

    return guided


def backwards(original: Any) -> Any:
    return lambda config, velocity_fn, *rest: original(
        config, lambda x, t: velocity_fn(x, 1 - t), *rest
    )
