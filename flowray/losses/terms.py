"""Every loss term, unweighted, as a function of one forward pass."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from flowray.config.losses import ClipLossConfig, FlowLossConfig, KLLossConfig
from flowray.flow.path import PathSample
from flowray.model.posterior import Posterior


@dataclass(frozen=True)
class Forward:
    """One training forward: latents (B, C, H, W) fp32.

    z1 is each caption's own image latent; path.x1 is another sample's where the sample is null. `embeddings` are the semantic
    tower's (text, image), each (B, dim), where it is built.
    """

    posterior: Posterior
    z0: Tensor
    z1: Tensor
    path: PathSample
    v_pred: Tensor
    embeddings: tuple[Tensor, Tensor] | None
    logit_scale: Tensor | None


def flow_mse(v_pred: Tensor, v_target: Tensor) -> Tensor:
    """Mean squared velocity error over batch and dims."""
    return F.mse_loss(v_pred.float(), v_target)


def kl_per_dim(mu: Tensor, logvar: Tensor, form: str) -> Tensor:
    """KL to N(0, I), elementwise. gaussian: nats. box: (0.3 mu)^6 in place of mu^2, not nats; mu is free within about +-3."""
    square = (0.3 * mu) ** 6 if form == "box" else mu.square()
    return 0.5 * (square + logvar.exp() - 1 - logvar)


def info_nce(text: Tensor, image: Tensor, scale: Tensor) -> Tensor:
    """Symmetric InfoNCE of matched rows: the mean of the two cross-entropies; L2-normalised (B, dim)."""
    with torch.autocast(text.device.type, enabled=False):  # a bf16 product is off by 0.5 at scale 100
        logits = scale.float() * text.float() @ image.float().T
    labels = torch.arange(len(logits), device=logits.device)
    return (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2


def _flow(config: FlowLossConfig, forward: Forward) -> Tensor:
    return flow_mse(forward.v_pred, forward.path.v_target)


def _kl(config: KLLossConfig, forward: Forward) -> Tensor:
    return kl_per_dim(forward.posterior.mu, forward.posterior.logvar, config.form).mean()


def _clip(config: ClipLossConfig, forward: Forward) -> Tensor:
    if forward.embeddings is None or forward.logit_scale is None:
        raise RuntimeError("loss.clip needs the semantic tower, which is built where its weight is above 0")
    return info_nce(*forward.embeddings, forward.logit_scale)


_TERMS: dict[type, Callable[[Any, Forward], Tensor]] = {FlowLossConfig: _flow, KLLossConfig: _kl, ClipLossConfig: _clip}


def loss_term(config: FlowLossConfig | KLLossConfig | ClipLossConfig, forward: Forward) -> Tensor:
    """One term's scalar, unweighted."""
    return _TERMS[type(config)](config, forward)
