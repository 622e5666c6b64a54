"""Every loss term, unweighted, as a function of one forward pass."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from flowray.config.losses import (
    AnchorLossConfig,
    ClipLossConfig,
    DinoLossConfig,
    FlowLossConfig,
    KLLossConfig,
    LossConfig,
    LpipsLossConfig,
    NormLossConfig,
    RepaLossConfig,
    TermConfig,
    TVLossConfig,
)
from flowray.flow import expect
from flowray.flow.path import LATENT, PathSample
from flowray.model.layers import boxes
from flowray.model.posterior import Posterior
from flowray.model.ranks import gather_rows, rank_and_world
from flowray.model.semantic import Views


@dataclass(frozen=True)
class Forward:
    """One training forward: latents (B, C, H, W) fp32.

    z1 is each caption's own image latent; path.x1 is another sample's where the sample is null.
    `views` is what the semantic networks made of it; `side` what the terms tell besides their
    losses, by metric key.
    """

    posterior: Posterior
    z0: Tensor
    z1: Tensor
    path: PathSample
    v_pred: Tensor
    # a multi-resolution network's coarser velocities (B, C, H/k, W/k) and their weights
    lower: tuple[tuple[float, Tensor], ...] = ()
    views: Views = field(default_factory=Views)
    side: dict[str, Tensor] = field(default_factory=dict)


def flow_mse(v_pred: Tensor, v_target: Tensor) -> Tensor:
    """Mean squared velocity error over batch and dims. ValueError where the shapes differ."""
    expect.alike(LATENT, v_pred=v_pred, v_target=v_target)
    return F.mse_loss(v_pred.float(), v_target)


def box_sum(v_target: Tensor, level: Tensor) -> Tensor:
    """A coarser level's target, `boxes` of the finest. ValueError where the shapes do not fit."""
    for name, value in (("v_target", v_target), ("level", level)):
        expect.floating(name, value, LATENT, 4)
    k = max(v_target.shape[-1] // level.shape[-1], 1)
    if v_target.shape != (*level.shape[:2], *(k * n for n in level.shape[2:])):
        got = f"level {tuple(level.shape)} of v_target {tuple(v_target.shape)}"
        raise ValueError(f"want a level (B, C, H/k, W/k) of a target (B, C, H, W), got {got}")
    return boxes(v_target, k)


def kl_per_dim(mu: Tensor, logvar: Tensor, form: str) -> Tensor:
    """KL to N(0, I), elementwise. gaussian: nats. box: (0.3 mu)^6 in place of mu^2, not nats.

    In the box form mu is free within about +-3.
    ValueError for another form, and where the shapes of mu and logvar differ.
    """
    expect.one_of("loss.kl.form", form, ("gaussian", "box"))
    expect.alike(LATENT, mu=mu, logvar=logvar)
    square = (0.3 * mu) ** 6 if form == "box" else mu.square()
    return 0.5 * (square + logvar.exp() - 1 - logvar)


def info_nce(text: Tensor, image: Tensor, scale: Tensor, *, gather: bool = False) -> Tensor:
    """Symmetric InfoNCE of matched rows: the mean of the two cross-entropies; L2-normalised (B,
    dim).

    gather: the negatives are those of every rank, with gradient; the mean over ranks, of losses and
    of gradients, is then what one process makes of the joined batch. ValueError where the shapes
    differ or are not (B, dim).
    """
    expect.floating("text", text, "(B, dim)", 2)
    expect.alike("(B, dim)", text=text, image=image)
    text, image = text.float(), image.float()
    texts, images = (gather_rows(text), gather_rows(image)) if gather else (text, image)
    first = rank_and_world()[0] * len(text) if gather else 0
    # a bf16 product is off by 0.5 at scale 100
    with torch.autocast(text.device.type, enabled=False):
        of_text, of_image = scale.float() * text @ images.T, scale.float() * image @ texts.T
    labels = torch.arange(first, first + len(text), device=text.device)
    return (F.cross_entropy(of_text, labels) + F.cross_entropy(of_image, labels)) / 2


def soft_entropy(logits: Tensor, temperature: float) -> Tensor:
    """Mean entropy (nats) of softmax(logits / temperature), rows (B, K). temperature: above 0."""
    expect.floating("logits", logits, "(B, K)")
    expect.number("temperature", temperature, 1e-12)
    log_p = F.log_softmax(logits.float() / temperature, dim=-1)
    return -(log_p.exp() * log_p).sum(-1).mean()


def total_variation(z: Tensor) -> Tensor:
    """Mean |difference| over all pairs of vertical and horizontal neighbours of (B, C, H, W)."""
    expect.floating("z", z, LATENT, 4)
    steps = torch.cat([z.diff(dim=2).flatten(), z.diff(dim=3).flatten()])
    return steps.abs().mean() if len(steps) else z.sum() * 0


def _flow(config: FlowLossConfig, forward: Forward) -> Tensor:
    target = forward.path.v_target
    lower = (weight * flow_mse(level, box_sum(target, level)) for weight, level in forward.lower)
    return sum(lower, start=flow_mse(forward.v_pred, target))


def _kl(config: KLLossConfig, forward: Forward) -> Tensor:
    return kl_per_dim(forward.posterior.mu, forward.posterior.logvar, config.form).mean()


def _built(view: Any, name: str) -> Any:
    if view is None:
        raise RuntimeError(
            f"loss.{name} needs its semantic network, which is built where its weight is above 0"
        )
    return view


def _clip(config: ClipLossConfig, forward: Forward) -> Tensor:
    text, image, scale = _built(forward.views.clip, "clip")
    return info_nce(text, image, scale, gather=config.gather)


def _dino(config: DinoLossConfig, forward: Forward) -> Tensor:
    student, teacher = _built(forward.views.dino, "dino")
    targets = F.softmax(teacher.float() / config.teacher_temperature, dim=-1)
    return (
        -(targets * F.log_softmax(student.float() / config.student_temperature, dim=-1))
        .sum(-1)
        .mean()
    )


def _repa(config: RepaLossConfig, forward: Forward) -> Tensor:
    projected, features = _built(forward.views.repa, "repa")
    return -F.cosine_similarity(projected.float(), features.float(), dim=-1).mean()


def _lpips(config: LpipsLossConfig, forward: Forward) -> Tensor:
    distances: Tensor = _built(forward.views.lpips, "lpips")
    return distances.mean()


def _tv(config: TVLossConfig, forward: Forward) -> Tensor:
    return total_variation(forward.z0)


def _norm(config: NormLossConfig, forward: Forward) -> Tensor:
    predicted, target = (
        v.float().flatten(1).norm(dim=1) for v in (forward.v_pred, forward.path.v_target.detach())
    )
    return (predicted - target).square().mean()


def _anchor(config: AnchorLossConfig, forward: Forward) -> Tensor:
    mu, logvar = forward.posterior.mu, forward.posterior.logvar
    if config.form == "likelihood":
        return F.gaussian_nll_loss(mu, forward.z1, logvar.exp())
    return F.mse_loss(mu, forward.z1)


_TERMS: dict[type, Callable[[Any, Forward], Tensor]] = {
    FlowLossConfig: _flow,
    KLLossConfig: _kl,
    ClipLossConfig: _clip,
    DinoLossConfig: _dino,
    RepaLossConfig: _repa,
    LpipsLossConfig: _lpips,
    TVLossConfig: _tv,
    NormLossConfig: _norm,
    AnchorLossConfig: _anchor,
}


def loss_term(config: TermConfig, forward: Forward) -> Tensor:
    """One term's scalar, unweighted."""
    term: Tensor = expect.member("loss", config, _TERMS)(config, forward)
    return term


@torch.no_grad()
def side_metrics(config: LossConfig, forward: Forward) -> dict[str, Tensor]:
    """What the terms tell besides their losses: the KL summed over latent dims in its configured
    form, DINO's entropies.
    """
    rows = {"loss/kl_raw": _kl(config.kl, forward) * forward.posterior.mu[0].numel()}
    if forward.views.dino is not None:
        student, teacher = forward.views.dino
        rows["ent/student"] = soft_entropy(student, config.dino.student_temperature)
        rows["ent/teacher"] = soft_entropy(teacher, config.dino.teacher_temperature)
    return rows
