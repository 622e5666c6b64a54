"""Every loss on its batch with a known answer: right as it is, and each of its bugs is seen."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from torch import Tensor

from flowray.config.load import load_recipe
from flowray.config.losses import LossConfig
from flowray.doctor.terms import KNOWN, UNKNOWN, term_off, term_rows
from flowray.losses import terms
from flowray.losses.total import Objective, active_terms


def off(name: str, **options: Any) -> float:
    config = getattr(LossConfig(), name).model_copy(update=options)
    return max(term_off(name, config))


@pytest.mark.parametrize("name", KNOWN)
def test_a_right_term_is_exact_in_value_and_gradient(name: str) -> None:
    assert off(name) < 1e-5


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("kl", {"form": "gaussian"}),
        ("anchor", {"form": "likelihood"}),
        ("dino", {"student_temperature": 0.3, "teacher_temperature": 0.2}),
        ("clip", {"gather": True}),
    ],
)
def test_whatever_the_recipe_sets(name: str, options: dict[str, Any]) -> None:
    assert off(name, **options) < 1e-5


Bug = Callable[[Callable[..., Tensor]], Callable[..., Tensor]]
BUGS: dict[str, tuple[str, str, Bug]] = {
    "shifted labels": (
        "clip",
        "info_nce",
        lambda right: lambda text, image, *a, **k: right(text, image.roll(1, 0), *a, **k),
    ),
    "detached image": (
        "clip",
        "info_nce",
        lambda right: lambda text, image, *a, **k: right(text, image.detach(), *a, **k),
    ),
    "negative KL": ("kl", "kl_per_dim", lambda right: lambda *a: -right(*a)),
    "KL without a gradient": ("kl", "kl_per_dim", lambda right: lambda *a: right(*a).detach()),
    "KL of sigma for its square": (
        "kl",
        "kl_per_dim",
        lambda right: lambda mu, logvar, form: right(mu, logvar / 2, form),
    ),
    "half a flow loss": ("flow", "flow_mse", lambda right: lambda *a: right(*a) / 2),
    "a prediction of minus v": ("flow", "flow_mse", lambda right: lambda u, v: right(-u, v)),
    "one direction of neighbours": (
        "tv",
        "total_variation",
        lambda right: lambda z: z.diff(dim=2).abs().mean(),
    ),
}


@pytest.mark.parametrize("bug", BUGS)
def test_a_bug_in_a_term_is_seen(bug: str, monkeypatch: pytest.MonkeyPatch) -> None:
    name, function, spoil = BUGS[bug]
    monkeypatch.setattr(terms, function, spoil(getattr(terms, function)))
    assert off(name) > 1e-2


@pytest.mark.parametrize("name", ["dino", "anchor", "norm", "repa"])
def test_a_term_that_does_nothing_is_seen(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    kind = type(getattr(LossConfig(), name))
    monkeypatch.setitem(terms._TERMS, kind, lambda config, forward: forward.z0.sum() * 0)
    assert off(name) > 1e-2


def test_the_terms_of_the_recipe_are_asked_and_one_that_raises_costs_no_other(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    recipe = load_recipe("quickstart_closed", ["loss.clip.weight=0.3"]).recipe
    asked = {name for name in active_terms(recipe.loss) if name in KNOWN}
    rows = term_rows(recipe)
    assert rows.keys() == {"known/path"} | {
        f"known/{name}{what}" for name in asked for what in ("", "_gradient")
    }
    assert max(rows.values()) < 1e-5

    def broken(*args: Any, **options: Any) -> Tensor:
        raise KeyError("no such code")

    monkeypatch.setattr(terms, "info_nce", broken)
    assert term_rows(recipe) == {**rows, "known/clip": UNKNOWN, "known/clip_gradient": UNKNOWN}


def test_the_objective_itself_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    right = Objective.forward

    def doubled(self: Objective, *given: Any) -> Any:
        losses, forward = right(self, *given)
        return {name: 2 * loss for name, loss in losses.items()}, forward

    monkeypatch.setattr(Objective, "forward", doubled)
    assert off("flow") > 0.5
