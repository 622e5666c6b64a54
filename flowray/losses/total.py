"""The training objective as one module: a batch in, every loss and what probes want to see of the forward pass out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from flowray.config.flow import FlowConfig
from flowray.config.losses import ClipLossConfig, FlowLossConfig, KLLossConfig, LossConfig
from flowray.flow.path import sample_path, time_code
from flowray.losses.schedule import weight_at
from flowray.losses.terms import Forward, loss_term
from flowray.model.assemble import FlowModel


@dataclass(frozen=True)
class Batch:
    """One rank's share of a step. z1, target, noise (B, C, H, W) fp32; t (B,) fp32; null (B,) bool.

    z1 is each caption's own image latent; target is the latent the velocity is trained towards, another sample's where null.
    """

    captions: Sequence[str]
    z1: Tensor
    target: Tensor
    noise: Tensor
    t: Tensor
    null: Tensor


def active_terms(config: LossConfig) -> dict[str, FlowLossConfig | KLLossConfig | ClipLossConfig]:
    """Terms of weight above 0, by name."""
    terms: dict[str, FlowLossConfig | KLLossConfig | ClipLossConfig] = {"flow": config.flow, "kl": config.kl, "clip": config.clip}
    return {name: term for name, term in terms.items() if term.weight > 0}


def weights_at(config: LossConfig, step: int, total: int) -> dict[str, float]:
    """Every active term's weight at a step."""
    return {name: weight_at(term.weight, term.schedule, step, total) for name, term in active_terms(config).items()}


class Objective(nn.Module):
    """The model and its losses; what DistributedDataParallel wraps."""

    def __init__(self, model: FlowModel, flow: FlowConfig, loss: LossConfig):
        super().__init__()
        self.model, self.flow, self.loss = model, flow, loss

    def run(self, batch: Batch) -> Forward:
        """The forward pass of a batch: text to z0, the path, the velocity."""
        posterior, z0 = self.model.source(batch.captions, batch.noise)
        path = sample_path(batch.t, z0, batch.target, self.flow.path.rho, self.loss.flow.source_grad)
        v_pred = self.model.velocity(path.xt, time_code(path.t), batch.null)
        tower = self.model.semantic
        embeddings = tower(z0, batch.z1) if tower is not None else None
        return Forward(posterior, z0, batch.z1, path, v_pred, embeddings, tower.scale if tower is not None else None)

    def forward(self, batch: Batch) -> tuple[dict[str, Tensor], Forward]:
        """(unweighted losses by name, the forward pass)."""
        forward = self.run(batch)
        return {name: loss_term(term, forward) for name, term in active_terms(self.loss).items()}, forward


def total_loss(losses: dict[str, Tensor], weights: dict[str, float]) -> Tensor:
    """The weighted sum."""
    terms = [weights[name] * loss for name, loss in losses.items()]
    return sum(terms[1:], start=terms[0])
