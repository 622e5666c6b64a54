"""Each loss term on constructed batches whose answer is known: value and gradient of what training
calls against what the method prescribes, in milliseconds, on the run's own settings.

The theory is written out here once more and nowhere else; `flowray.doctor --selfcheck` asks the
same of quickstart's settings.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from flowray.config.losses import ClipLossConfig, LossConfig, TermConfig
from flowray.config.recipe import Recipe
from flowray.flow.path import PathSample, sample_path
from flowray.losses.terms import Forward
from flowray.losses.total import Objective, active_terms
from flowray.model.posterior import Posterior
from flowray.model.semantic import Views

SAMPLES, SHAPE, DIM = 8, (4, 4, 4), 12
SCALE = 2.0  # of the contrastive logits: neither chance nor certainty
UNKNOWN = 1e6  # how far off is what raises, or gives no finite number
Inputs = dict[str, Tensor]


class Given(Objective):
    """The objective on a forward pass that is given: its losses are those of training."""

    def __init__(self, loss: LossConfig, forward: Forward):
        nn.Module.__init__(self)
        self.loss, self.given = loss, forward

    def run(self, batch: Any, idle: frozenset[str] = frozenset()) -> Forward:
        return self.given


@dataclass(frozen=True)
class Known:
    """A term with a known answer: what it is a function of, how a forward pass holds that, and its
    value by theory.
    """

    inputs: Callable[[], Inputs]
    forward: Callable[[Forward, Inputs], Forward]
    theory: Callable[[Any, Inputs], Tensor]


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def on_path(t: Tensor, z0: Tensor, z1: Tensor, rho: float) -> tuple[Tensor, Tensor]:
    """(x_t, v*) by theory."""
    t = t.view(-1, 1, 1, 1)
    return (1 + t * (rho - 1)) * z0 + t * z1, (rho - 1) * z0 + z1


def _latents(*names: str) -> Callable[[], Inputs]:
    return lambda: {name: normal(i, SAMPLES, *SHAPE) for i, name in enumerate(names)}


def _posterior(forward: Forward, given: Inputs) -> Forward:
    made = replace(forward, posterior=Posterior(given["mu"], given["logvar"]))
    return replace(made, z1=given["z1"]) if "z1" in given else made


def _velocity(forward: Forward, given: Inputs) -> Forward:
    path = replace(forward.path, v_target=given["target"].detach())
    return replace(forward, path=path, v_pred=given["v"])


def _kl(config: Any, given: Inputs) -> Tensor:
    mu, logvar = given["mu"], given["logvar"]
    source = torch.distributions.Normal(mu, (0.5 * logvar).exp())
    prior = torch.distributions.Normal(torch.zeros_like(mu), torch.ones_like(mu))
    gaussian = torch.distributions.kl_divergence(source, prior).mean()
    # the box form has (0.3 mu)^6 in the place of mu^2
    box = ((0.3 * mu) ** 6 - mu.square()).mean() / 2
    return gaussian + box if config.form == "box" else gaussian


def _clip(config: Any, given: Inputs) -> Tensor:
    products = SCALE * given["text"] @ given["image"].T
    own = products.diagonal()
    return torch.stack([products.logsumexp(dim) - own for dim in (0, 1)]).mean()


def _dino(config: Any, given: Inputs) -> Tensor:
    targets = (given["teacher"].detach() / config.teacher_temperature).softmax(-1)
    student = given["student"] / config.student_temperature
    return (student.logsumexp(-1) - (targets * student).sum(-1)).mean()


def _anchor(config: Any, given: Inputs) -> Tensor:
    square = (given["mu"] - given["z1"].detach()).square()
    if config.form == "likelihood":
        return 0.5 * (given["logvar"] + square / given["logvar"].exp()).mean()
    return square.mean()


def _repa(config: Any, given: Inputs) -> Tensor:
    a, b = (x / x.norm(dim=-1, keepdim=True) for x in (given["ours"], given["theirs"].detach()))
    return -(a * b).sum(-1).mean()


def _tv(config: Any, given: Inputs) -> Tensor:
    z = given["z0"]
    steps = [z[:, :, 1:] - z[:, :, :-1], z[..., 1:] - z[..., :-1]]
    return torch.cat([x.flatten() for x in steps]).abs().mean()


def _norm(config: Any, given: Inputs) -> Tensor:
    sizes = [x.flatten(1).square().sum(1).sqrt() for x in (given["v"], given["target"].detach())]
    return (sizes[0] - sizes[1]).square().mean()


def _views(make: Callable[[Inputs], Views]) -> Callable[[Forward, Inputs], Forward]:
    return lambda forward, given: replace(forward, views=make(given))


def _pairs(a: str, b: str) -> Callable[[], Inputs]:
    """Rows that belong together more than to others, of other lengths, so that no two directions
    agree by accident.
    """

    def made() -> Inputs:
        first = normal(6, SAMPLES, DIM)
        return {a: first, b: first + normal(7, SAMPLES, DIM)}

    return made


def _clip_views(given: Inputs) -> Views:
    return Views(clip=(given["text"], given["image"], torch.tensor(SCALE)))


def _dino_views(given: Inputs) -> Views:
    return Views(dino=(given["student"], given["teacher"]))


def _repa_views(given: Inputs) -> Views:
    return Views(repa=(given["ours"], given["theirs"]))


def _flow(config: Any, given: Inputs) -> Tensor:
    return (given["v"] - given["target"].detach()).square().mean()


def _start(forward: Forward, given: Inputs) -> Forward:
    return replace(forward, z0=given["z0"])


KNOWN: Mapping[str, Known] = {
    "flow": Known(_latents("v", "target"), _velocity, _flow),
    "kl": Known(_latents("mu", "logvar"), _posterior, _kl),
    "clip": Known(_pairs("text", "image"), _views(_clip_views), _clip),
    "dino": Known(_pairs("student", "teacher"), _views(_dino_views), _dino),
    "anchor": Known(_latents("mu", "logvar", "z1"), _posterior, _anchor),
    "repa": Known(_pairs("ours", "theirs"), _views(_repa_views), _repa),
    "tv": Known(_latents("z0"), _start, _tv),
    "norm": Known(_latents("v", "target"), _velocity, _norm),
}
# of what a gradient is taken: the rest are targets
TRAINED = {"v", "mu", "logvar", "text", "image", "student", "ours", "z0"}


def _blank() -> Forward:
    """A forward pass of zeros, of which a term's own part is then filled in."""
    zero = torch.zeros(SAMPLES, *SHAPE)
    path = PathSample(zero, zero, torch.zeros(SAMPLES), zero, zero)
    return Forward(Posterior(zero, zero), zero, zero, path, zero)


def _value_and_gradient(value: Tensor, inputs: list[Tensor]) -> tuple[float, Tensor]:
    if not value.requires_grad:
        return float(value), torch.zeros(sum(x.numel() for x in inputs), dtype=torch.float64)
    parts = torch.autograd.grad(value, inputs, allow_unused=True)
    full = [torch.zeros_like(x) if g is None else g for x, g in zip(inputs, parts, strict=True)]
    return float(value.detach()), torch.cat([g.double().flatten() for g in full])


def term_off(name: str, config: TermConfig) -> tuple[float, float]:
    """How far a term is from theory on its batch: its value over max(|theory|, 1), its gradient
    over theory's norm.
    """
    known, held = KNOWN[name], []
    config = config.model_copy(update={"weight": 1.0})
    if isinstance(config, ClipLossConfig):  # no other rank takes part in this
        config = config.model_copy(update={"gather": False})
    for dtype in (torch.float32, torch.float64):
        given = {key: x.to(dtype) for key, x in known.inputs().items()}
        trained = [x.requires_grad_() for key, x in given.items() if key in TRAINED]
        if dtype == torch.float64:
            value = known.theory(config, given)
        else:
            losses, _ = Given(_alone(name, config), known.forward(_blank(), given))(None)
            value = losses[name]
        held.append(_value_and_gradient(value, trained))
    (got, ours), (want, theirs) = held
    size = max(float(theirs.norm()), 1e-12)
    return abs(got - want) / max(abs(want), 1.0), float((ours - theirs).norm()) / size


def _alone(name: str, config: TermConfig) -> LossConfig:
    """The loss that consists of this term."""
    loss = LossConfig()
    others = {
        other: term.model_copy(update={"weight": 0.0})
        for other, term in loss
        if other != name and isinstance(term, TermConfig)
    }
    return loss.model_copy(update={**others, name: config})


def path_off(rho: float) -> float:
    """How far x_t and v* of a training batch are from theory."""
    z0, z1, t = normal(0, SAMPLES, *SHAPE), normal(1, SAMPLES, *SHAPE), torch.arange(SAMPLES) + 0.5
    made, (xt, v) = sample_path(t / SAMPLES, z0, z1, rho), on_path(t / SAMPLES, z0, z1, rho)
    return max(float((made.xt - xt).abs().max()), float((made.v_target - v).abs().max()))


def term_rows(recipe: Recipe) -> dict[str, float]:
    """known/*: how far each loss that the recipe trains, and the path, are from theory; UNKNOWN
    where what is called raises or gives no finite number.
    """
    rows = {"known/path": _finite(path_off, recipe.flow.path.rho)[0]}
    for name, config in active_terms(recipe.loss).items():
        if name in KNOWN:
            value, gradient = _finite(term_off, name, config)
            rows |= {f"known/{name}": value, f"known/{name}_gradient": gradient}
    return rows


def _finite(off: Callable[..., Any], *given: Any) -> tuple[float, float]:
    try:
        made = off(*given)
    except Exception:  # of changed source anything may come, and the others still count
        return UNKNOWN, UNKNOWN
    pair = made if isinstance(made, tuple) else (made, made)
    first, second = (x if math.isfinite(x) else UNKNOWN for x in pair)
    return first, second
