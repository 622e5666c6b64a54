"""Weights of the losses: schedules, which terms are on, their sum."""

from __future__ import annotations

import pytest
import torch

from flowray.config.losses import (
    ClipLossConfig,
    Cosine,
    DinoLossConfig,
    FlowLossConfig,
    KLLossConfig,
    Linear,
    LossConfig,
    LpipsLossConfig,
    RepaLossConfig,
    TermConfig,
    Until,
)
from flowray.losses.schedule import weight_at
from flowray.losses.total import active_terms, total_loss, weights_at

TERMS = [type(term) for _, term in LossConfig() if isinstance(term, TermConfig)]


def test_schedules() -> None:
    assert [weight_at(2.0, Linear(steps=4), step, 100) for step in (0, 1, 2, 4, 50)] == [
        0.0,
        0.5,
        1.0,
        2.0,
        2.0,
    ]
    assert [weight_at(2.0, Linear(fraction=0.1), step, 100) for step in (0, 5, 10, 99)] == [
        0.0,
        1.0,
        2.0,
        2.0,
    ]
    assert [weight_at(2.0, Until(steps=3), step, 100) for step in (0, 2, 3, 99)] == [
        2.0,
        2.0,
        0.0,
        0.0,
    ]
    cosine = [weight_at(2.0, Cosine(floor=0.25), step, 100) for step in (0, 50, 100, 200)]
    assert cosine == pytest.approx([2.0, 1.25, 0.5, 0.5])
    assert weight_at(2.0, FlowLossConfig().schedule, 0, 100) == 2.0


@pytest.mark.parametrize("term", TERMS, ids=lambda term: term.__name__)
def test_every_terms_weight_takes_every_schedule(term: type[TermConfig]) -> None:
    cases = [
        ({"kind": "constant"}, 4, 1.0),
        ({"kind": "linear", "steps": 8}, 4, 0.5),
        ({"kind": "linear", "fraction": 0.1}, 4, 0.4),
    ]
    cases += [({"kind": "until", "steps": 4}, 4, 0.0), ({"kind": "cosine", "floor": 0.5}, 50, 0.75)]
    for schedule, step, factor in cases:
        made = term.model_validate({"schedule": schedule})
        assert weight_at(3.0, made.schedule, step, 100) == pytest.approx(3.0 * factor)


def test_active_terms_weights_and_total() -> None:
    config = LossConfig(
        kl=KLLossConfig(weight=3.0, schedule=Linear(steps=10)), clip=ClipLossConfig(weight=0.0)
    )
    assert list(active_terms(config)) == ["flow", "kl"]
    assert weights_at(config, 5, 100) == {"flow": 1.0, "kl": 1.5}
    losses = {"flow": torch.tensor(0.5), "kl": torch.tensor(2.0)}
    assert float(total_loss(losses, weights_at(config, 5, 100))) == pytest.approx(3.5)


def test_a_loss_without_the_weights_it_needs_is_refused() -> None:
    dims = {"width": 8, "depth": 1, "heads": 2, "mlp": 16, "image": 8, "patch": 4}
    with pytest.raises(ValueError, match="lpips needs vgg"):
        LpipsLossConfig(weight=0.1)
    with pytest.raises(ValueError, match="frozen teacher needs a path"):
        RepaLossConfig.model_validate({"teacher": {"kind": "dinov2", "dims": dims}})
    with pytest.raises(ValueError, match="frozen teacher needs a path"):
        DinoLossConfig.model_validate({"teacher": {"kind": "dinov2", "dims": dims}})
