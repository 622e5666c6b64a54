"""How well a predicted velocity agrees with the target in single steps, per sample
and by slices of t.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

BINS = 10
BIN_CENTRES = [0.05 + 0.1 * b for b in range(BINS)]


def cosines(v_pred: Tensor, v_target: Tensor) -> Tensor:
    """Cosine c of every sample, (B,)."""
    return F.cosine_similarity(v_pred.float().flatten(1), v_target.float().flatten(1), dim=1)


def speed_ratios(v_pred: Tensor, v_target: Tensor) -> Tensor:
    """k = ||v_pred|| / ||v_target|| of every sample, (B,)."""
    return v_pred.float().flatten(1).norm(dim=1) / v_target.float().flatten(1).norm(
        dim=1
    ).clamp_min(1e-12)


def nmse(v_pred: Tensor, v_target: Tensor) -> Tensor:
    """Ratio of batch means; per sample it is 1 + k^2 - 2 k c. Predicting zero scores 1, whatever
    the data's mean is.
    """
    return F.mse_loss(
        v_pred.float(), v_target.float()
    ) / v_target.float().square().mean().clamp_min(1e-12)


def best_gain(v_pred: Tensor, v_target: Tensor) -> Tensor:
    """The factor on v_pred with the least squared error: <v_pred, v_target> / ||v_pred||^2."""
    return (v_pred.float() * v_target.float()).sum() / v_pred.float().square().sum().clamp_min(
        1e-12
    )


def time_bins(t: Tensor) -> Tensor:
    """Bin 0 to 9 of every t in [0, 1]; both ends fall in a bin."""
    return (t * BINS).long().clamp(0, BINS - 1)


def field_metrics(v_pred: Tensor, v_target: Tensor, t: Tensor) -> dict[str, float]:
    """flow/* of a batch: v_* (B, C, H, W), t (B,)."""
    rows = {
        "flow/cos": float(cosines(v_pred, v_target).mean()),
        "flow/nmse": float(nmse(v_pred, v_target)),
        "flow/speed_ratio": float(speed_ratios(v_pred, v_target).mean()),
        "gain/best": float(best_gain(v_pred, v_target)),
    }
    bins = time_bins(t)
    for b in torch.unique(bins).tolist():
        here = bins == b
        rows[f"flow/nmse_t{b}"] = float(nmse(v_pred[here], v_target[here]))
        rows[f"flow/cos_t{b}"] = float(cosines(v_pred[here], v_target[here]).mean())
    return rows
