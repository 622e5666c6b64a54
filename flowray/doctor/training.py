"""The training path on one of its own batches: gradients, updates, and whether evaluation agrees
with it on the very same batch.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor

from flowray.config.errors import InputError
from flowray.config.recipe import Recipe
from flowray.doctor.measured import Rows
from flowray.doctor.optimiser import optimiser_rows
from flowray.doctor.subject import Subject
from flowray.flow.path import psi, time_code, velocity_target
from flowray.losses.gradients import autocast, blocks, loss_gradients
from flowray.losses.terms import Forward, box_sum, flow_mse, loss_term
from flowray.losses.total import Batch, active_terms, total_loss, weights_at
from flowray.model.semantic import Views
from flowray.probes.battery import derangement
from flowray.probes.broken import broken_rows, first_bad_module
from flowray.probes.grads import gradient_rows, step_gradient
from flowray.probes.untouched import untouched


def first_rows(batch: Batch, count: int) -> Batch:
    """The first `count` samples of a batch."""
    parts = {part.name: getattr(batch, part.name) for part in fields(batch)}
    return replace(batch, **{name: x[:count] for name, x in parts.items() if x is not None})


def without_null(batch: Batch) -> Batch:
    """The same batch with every sample aimed at its own image."""
    return replace(batch, target=batch.z1, null=torch.zeros_like(batch.null))


@contextmanager
def training_mode(subject: Subject) -> Iterator[None]:
    """The modes and the precision of a training step; the semantic networks, which count their
    batches in that mode, stay in eval.
    """
    with untouched(subject.model), autocast(subject.recipe, subject.device):
        subject.model.train()
        subject.model.semantic.eval()
        yield


def training_rows(subject: Subject, batch: Batch) -> tuple[Rows, dict[str, Any]]:
    """loss/*, weight/*, grad/*, share/*, step/*, optim/*, clip/*, dino/*, ent/* of one training
    batch; and what was not finite.
    """
    recipe, model = subject.recipe, subject.model
    weights = weights_at(recipe.loss, subject.step, recipe.train.steps)
    factors = {
        name: weight * subject.multipliers.get(name, 1.0) for name, weight in weights.items()
    }
    idle = frozenset(name for name, weight in weights.items() if weight == 0)
    with training_mode(subject), first_bad_module(model) as bad:
        losses, forward = subject.objective(batch, idle)
        gradients = loss_gradients(list(losses.values()), list(subject.parameters.values()))
        rows = {f"loss/{name}": float(loss.detach()) for name, loss in losses.items()}
        rows["loss/total"] = float(total_loss(losses, factors).detach())
        rows |= {name: float(value) for name, value in forward.side.items()}
        rows |= _semantic_rows(recipe, batch, forward, losses)
    factors = {name: factors[name] for name in losses}
    rows |= {f"weight/{name}": weight for name, weight in weights.items()} | gradient_rows(
        gradients, subject.parameters, factors
    )
    step = step_gradient(gradients, subject.parameters, factors, recipe.optim.clip_grad)
    rows |= optimiser_rows(subject, batch, step, rows["grad/total"])
    found: dict[str, Any] = {"module": bad[0]} if bad else {}
    if rows_of := broken_rows(forward, batch):
        found["rows"] = rows_of
    if wrong := [name for name, loss in losses.items() if not math.isfinite(float(loss.detach()))]:
        found["loss"] = wrong[0]
    broken = [
        name
        for name, block in blocks(gradients, subject.parameters).items()
        if not bool(block.isfinite().all())
    ]
    rows["finite/forward"] = float(not bad)
    rows["finite/gradients"] = 1 - len(broken) / len(subject.parameters)
    if broken:
        found["gradient"] = broken[0]
    return rows, found


def _semantic_rows(
    recipe: Recipe, batch: Batch, forward: Forward, losses: Mapping[str, Tensor]
) -> Rows:
    """The semantic losses with captions deranged minus with their own, and what chance would
    score.
    """
    clip, dino = forward.views.clip, forward.views.dino
    try:
        others = derangement(list(batch.captions)).to(batch.t.device)
    except InputError:  # all captions alike
        return {}

    def gain(name: str, views: Views) -> float:
        swapped = loss_term(getattr(recipe.loss, name), replace(forward, views=views))
        return float(swapped.detach() - losses[name].detach())

    rows: Rows = {}
    if clip is not None:
        text, image, scale = clip
        rows |= {
            "clip/cond_gain": gain("clip", Views(clip=(text[others], image, scale))),
            "clip/chance": math.log(len(text)),
            "clip/scale": float(scale.detach()),
        }
    if dino is not None:
        student, teacher = dino
        rows |= {
            "dino/cond_gain": gain("dino", Views(dino=(student[others], teacher))),
            "ent/chance": math.log(student.shape[1]),
        }
    return rows


@torch.no_grad()
def same_batch_rows(subject: Subject, batch: Batch) -> Rows:
    """same_batch/*: the flow loss as training computes it against the probes' way, raw weights,
    no null samples.
    """
    plain, rho = without_null(batch), subject.recipe.flow.path.rho
    terms = active_terms(subject.recipe.loss)
    with training_mode(subject):
        losses, forward = subject.objective(plain, frozenset(terms) - {"flow"})
        lower = [
            weight * flow_mse(level, box_sum(forward.path.v_target, level))
            for weight, level in forward.lower
        ]
        trained = float(losses["flow"] - sum(lower, start=torch.zeros(())))
    with untouched(subject.model):
        subject.model.eval()
        source = subject.model.source(plain.captions, plain.noise)
        z0, field = source.z0, subject.model.field(source)
        v = field(psi(plain.t, z0, plain.z1, rho), time_code(plain.t), plain.null).float()
    target = velocity_target(z0, plain.z1, rho)
    evaluated, energy = float((v - target).square().mean()), float(target.square().mean())
    return {
        "same_batch/train_loss": trained,
        "same_batch/eval_loss": evaluated,
        "same_batch/ratio": evaluated / max(trained, 1e-12),
        "same_batch/train_nmse": trained / energy,
        "same_batch/eval_nmse": evaluated / energy,
    }
