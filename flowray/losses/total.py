"""The training objective as one module: a batch in, every loss and what probes want to see of
the forward pass out.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from flowray.config.flow import FlowConfig
from flowray.config.losses import LossConfig, TermConfig
from flowray.flow import expect
from flowray.flow.path import LATENT, expand, sample_path, time_code
from flowray.losses.schedule import weight_at
from flowray.losses.terms import Forward, loss_term, side_metrics
from flowray.model.assemble import FlowModel


@dataclass(frozen=True)
class Batch:
    """One rank's share of a step. z1, target, noise (B, C, H, W) fp32; t (B,) fp32; null (B,) bool.

    z1 is each caption's own image latent; target is the latent the velocity is trained towards,
    another sample's where null. kept: the places (B, K) of the tokens that do not go past the
    blocks of the velocity network's route, where it has one.
    """

    captions: Sequence[str]
    z1: Tensor
    target: Tensor
    noise: Tensor
    t: Tensor
    null: Tensor
    kept: Tensor | None = None

    def __post_init__(self) -> None:
        """ValueError or TypeError where the parts do not fit: what broadcasts would train."""
        if isinstance(self.captions, str):
            raise TypeError(f"captions: want one for each sample, got {self.captions!r}")
        expect.alike(LATENT, z1=self.z1, target=self.target, noise=self.noise)
        if not isinstance(self.null, Tensor) or self.null.dtype != torch.bool:
            raise TypeError(f"null: want bool (B,), got {expect.described(self.null)}")
        counts = {name: len(getattr(self, name)) for name in ("captions", "z1", "t", "null")}
        if len(set(counts.values())) > 1:
            raise ValueError(f"want as many of each, got {counts}")


def active_terms(config: LossConfig) -> dict[str, TermConfig]:
    """Terms of weight above 0, by name."""
    terms = {name: getattr(config, name) for name in LossConfig.model_fields}
    return {
        name: term
        for name, term in terms.items()
        if isinstance(term, TermConfig) and term.weight > 0
    }


def weights_at(config: LossConfig, step: int, total: int) -> dict[str, float]:
    """Every active term's weight at a step."""
    return {
        name: weight_at(term.weight, term.schedule, step, total)
        for name, term in active_terms(config).items()
    }


class Objective(nn.Module):
    """The model and its losses; what DistributedDataParallel wraps. velocity_fp32: the velocity
    network ignores autocast.
    """

    def __init__(
        self, model: FlowModel, flow: FlowConfig, loss: LossConfig, *, velocity_fp32: bool = False
    ):
        super().__init__()
        self.model, self.flow, self.loss, self.velocity_fp32 = model, flow, loss, velocity_fp32

    def run(self, batch: Batch, idle: frozenset[str] = frozenset()) -> Forward:
        """The forward pass of a batch: text to z0, the path, the velocity, the semantic
        networks.
        """
        semantic = self.model.semantic
        source = self.model.source(batch.captions, batch.noise)
        posterior, z0 = source.posterior, source.z0
        # a null sample whose caption is dropped has nothing to tell the source
        start = torch.where(expand(batch.null, z0), z0.detach(), z0) if self.model.drops else z0
        path = sample_path(
            batch.t, start, batch.target, self.flow.path.rho, self.loss.flow.source_grad
        )
        island = (
            torch.autocast(path.xt.device.type, enabled=False)
            if self.velocity_fp32
            else nullcontext()
        )
        with semantic.listen(self.model.velocity) as tokens, island:
            *lower, v_pred = self.model.levels(
                source, path.xt, time_code(path.t), batch.null, batch.kept
            )
        # the last weight, 1, is the velocity's own
        weighted = tuple(zip(self.model.velocity.level_weights, lower, strict=False))
        estimate = path.xt + (1 - expand(path.t, path.xt)) * v_pred.float()
        views = semantic(z0, batch.z1, path.x1, estimate, tokens, idle)
        forward = Forward(posterior, z0, batch.z1, path, v_pred, weighted, views)
        return replace(forward, side=side_metrics(self.loss, forward))

    def forward(
        self, batch: Batch, idle: frozenset[str] = frozenset()
    ) -> tuple[dict[str, Tensor], Forward]:
        """(unweighted losses by name, the forward pass). idle: terms of weight 0 at this step.

        Of these lpips, which is dear and trains nothing of its own, is not computed; the others
        are, for their metrics and because every rank must use every parameter.
        """
        forward = self.run(batch, idle)
        terms = {
            name: term
            for name, term in active_terms(self.loss).items()
            if name != "lpips" or name not in idle
        }
        return {name: loss_term(term, forward) for name, term in terms.items()}, forward


def total_loss(losses: dict[str, Tensor], weights: dict[str, float]) -> Tensor:
    """The weighted sum. ValueError where there is no loss, or one has no weight."""
    if not losses or not losses.keys() <= weights.keys():
        lacking = sorted(losses.keys() - weights.keys()) or "no loss at all"
        raise ValueError(f"want a weight for every loss, got none for {lacking}")
    terms = [weights[name] * loss for name, loss in losses.items()]
    return sum(terms[1:], start=terms[0])
