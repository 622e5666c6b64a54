"""Wrong arguments of the functions of losses/ are errors: what was wanted, what came."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from support import assert_refused
from torch import nn

from flowray.config.losses import Constant, KLLossConfig
from flowray.losses.balance import Balancer, Measured, gradient_metrics
from flowray.losses.gradients import blocks, gramian
from flowray.losses.schedule import weight_at
from flowray.losses.terms import (
    box_sum,
    flow_mse,
    info_nce,
    kl_per_dim,
    loss_term,
    soft_entropy,
    total_variation,
)
from flowray.losses.total import Batch, total_loss

X, ROWS, ONE = torch.zeros(2, 4, 8, 8), torch.ones(2, 6), torch.ones(())
T, NULL = torch.tensor([0.1, 0.9]), torch.tensor([False, True])
WEIGHT = {"a": nn.Parameter(torch.zeros(3))}
GRAMIAN, ONES = torch.eye(2, dtype=torch.float64), {"flow": 1.0, "kl": 1.0}

Case = tuple[Callable[[], Any], type[Exception], str]
CASES: dict[str, Case] = {
    "a velocity of one channel": (
        lambda: flow_mse(X[:, :1], X),
        ValueError,
        r"v_pred \(2, 1, 8, 8\), v_target \(2, 4, 8, 8\)",
    ),
    "a level that does not divide": (lambda: box_sum(X, X[..., :3, :3]), ValueError, "H/k"),
    "a level larger than the target": (lambda: box_sum(X[..., :4, :4], X), ValueError, "H/k"),
    "a level of another shape": (lambda: box_sum(X, X[..., :4, :2]), ValueError, "H/k"),
    "no such form": (lambda: kl_per_dim(X, X, "gauss"), ValueError, "want one of gaussian, box"),
    "logvar of one channel": (lambda: kl_per_dim(X, X[:, :1], "box"), ValueError, "mu and logvar"),
    "rows that do not match": (lambda: info_nce(ROWS, ROWS[:1], ONE), ValueError, "text and image"),
    "latents for rows": (lambda: info_nce(X, X, ONE), ValueError, r"text: want shape \(B, dim\)"),
    "a temperature of 0": (lambda: soft_entropy(ROWS, 0.0), ValueError, "temperature: want"),
    "a vector for a latent": (lambda: total_variation(ROWS), ValueError, r"z: want shape \(B, C"),
    "a loss by its name": (lambda: loss_term("kl", None), TypeError, "loss: want a config"),
    "a schedule by its name": (
        lambda: weight_at(1.0, "cosine", 0, 10),
        TypeError,
        r"schedule: want a config.*did you mean Cosine\(\)\?",
    ),
    "a config for a schedule": (lambda: weight_at(1.0, KLLossConfig(), 0, 9), TypeError, "KLLoss"),
    "a weight below 0": (lambda: weight_at(-1.0, Constant(), 0, 10), ValueError, "weight: want"),
    "a run of no steps": (lambda: weight_at(1.0, Constant(), 0, 0), ValueError, "total must be"),
    "no loss": (lambda: total_loss({}, {}), ValueError, "no loss at all"),
    "a loss without a weight": (lambda: total_loss({"kl": ONE}, {"flow": 1.0}), ValueError, "kl"),
    "columns of other parameters": (
        lambda: blocks(ROWS, WEIGHT),
        ValueError,
        r"gradients: want 3 columns.*\(2, 6\)",
    ),
    "over what there is not": (
        lambda: gramian(torch.zeros(2, 3), WEIGHT, "sources"),
        ValueError,
        "over: want one of all, source, got 'sources'.*did you mean source",
    ),
    "one gradient alone": (
        lambda: gramian(torch.zeros(3), WEIGHT, "all"),
        ValueError,
        "losses, num",
    ),
    "a balance by its name": (
        lambda: Balancer("gradnorm"),
        TypeError,
        r"balance: want a config.*did you mean GradNormBalance\(\)\?",
    ),
    "a Gramian of other losses": (
        lambda: Measured(torch.eye(3), ONES, ONES, ONES, 0),
        ValueError,
        r"gramian: want 2 x 2 for \['flow', 'kl'\], got \(3, 3\)",
    ),
    "a loss that was not weighed": (
        lambda: Measured(GRAMIAN, ONES, {"flow": 1.0}, ONES, 0),
        ValueError,
        r"weights: want one for every loss, got none for \['kl'\]",
    ),
    "metrics of other losses": (
        lambda: gradient_metrics(GRAMIAN, {"kl": 1.0}),
        ValueError,
        "1 x 1",
    ),
    "one caption for all": (lambda: Batch("cross", X, X, X, T, NULL), TypeError, "captions: want"),
    "too few captions": (lambda: Batch(["cross"], X, X, X, T, NULL), ValueError, "'captions': 1"),
    "noise of one channel": (
        lambda: Batch(["a", "b"], X, X, X[:, :1], T, NULL),
        ValueError,
        r"noise \(2, 1, 8, 8\)",
    ),
    "a null of numbers": (lambda: Batch(["a", "b"], X, X, X, T, T), TypeError, "null: want bool"),
}


@pytest.mark.parametrize("case", CASES)
def test_says_what_was_wanted_and_what_came(case: str) -> None:
    assert_refused(*CASES[case])
