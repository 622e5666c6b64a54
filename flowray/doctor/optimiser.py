"""The optimiser's arithmetic, made again from its state, the recipe and the history: how large its
steps are beside the weights, what made them so, and whether a step of training is that step.
"""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Collection, Iterable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

import torch
from torch import Tensor, nn

from flowray.config.rounding import finite
from flowray.config.train import ConstantLR, GroupScales
from flowray.doctor.measured import Rows
from flowray.doctor.subject import Subject
from flowray.losses.total import Batch
from flowray.model.assemble import FlowModel
from flowray.probes.grads import next_update_ratio
from flowray.train.group import Group
from flowray.train.optim import MUON, group_lr, lr_at, parameter_groups, resolve_schedule
from flowray.train.state import TrainState, optimizer_of, state_of
from flowray.train.step import train_step

Slots = Mapping[str, Mapping[str, Tensor]]
RECENT = 0.1  # share of the history that tells how things are now
IDLE = 0.01  # of the highest rate: less is as good as none
EPS = 1e-8  # of torch's AdamW, which the recipe leaves as it is
MOST = 200_000_000  # numbers that train: of more no copy is made
FORGOT = 3  # memories of the second moment, after which it has lost what was there
STALE = 10.0  # times the step's own: a gradient that lies there before it
NETWORK = ("trunk", "flow_head")
ROUNDS = 1e-5  # of a weight: smaller steps are lost in fp32 in part


@dataclass(frozen=True)
class Part:
    """A group of the optimiser. weights: those that train, by name; typical: what size they have
    at the start, None where that is not known; eps, betas: of the optimiser that training builds.
    """

    name: str
    weights: Mapping[str, Tensor]
    typical: float | None
    decay: float
    eps: float
    betas: tuple[float, float]

    def stepped(self, slots: Slots) -> dict[str, Mapping[str, Tensor]]:
        """The slots of those that have made a step."""
        return {n: slots[n] for n in self.weights if float(slots.get(n, {}).get("step", 0)) > 0}


def optimiser_rows(
    subject: Subject, batch: Batch, gradient: Mapping[str, Tensor], total: float
) -> Rows:
    """step/* and optim/*. gradient: of this batch, the next one, clipped; total: its norm before
    that.
    """
    recipe, parts = subject.recipe, parts_of(subject)
    rows = schedule_rows(subject) | update_rows(subject, parts, gradient)
    kept = _clip_rows(subject, total, rows)
    first, second = recipe.optim.betas
    rows["optim/memory"] = 1 / max(1 - first, 1e-12) / recipe.train.steps
    rows["optim/betas"] = first**2 - second
    paces: Rows = {}
    for part in parts:
        rates = _rates(subject, part.name)
        rows |= {
            f"optim/{name}/{part.name}": value
            for name, value in {
                **_slot_rows(subject, part, kept, gradient),
                **_travel_rows(subject, part, rates),
            }.items()
        }
        peak = group_lr(recipe.optim, part.name, recipe.optim.lr)
        rows[f"optim/scale/{part.name}"] = peak / recipe.optim.lr
        if part.typical is not None:
            paces[part.name] = peak / part.typical
            rows |= _size_rows(subject, part.name, part.typical, rows)
    if network := [paces[name] for name in NETWORK if name in paces]:
        rows["optim/pace"] = max(network)
        rows["optim/reach_peak"] = max(network) * recipe.train.steps
    rows["optim/eps_value"] = max(part.eps for part in parts)
    try:
        return rows | replay_rows(subject, parts, batch, gradient)
    except RuntimeError:  # the GPU has no room for the copy
        return rows


def _size_rows(subject: Subject, group: str, typical: float, rows: Rows) -> Rows:
    """The group's steps beside the size of its weights; nothing before its first."""
    if (size := rows.get(f"optim/direction/{group}")) is None:
        return {}
    optim, steps = subject.recipe.optim, subject.recipe.train.steps
    now, top, peak = (
        group_lr(optim, group, base) / typical
        for base in (subject.lr, highest_rate(subject), optim.lr)
    )
    left = rows[f"optim/eps/{group}"]
    return {
        f"optim/rate/{group}": top * left,
        f"optim/step/{group}": now * size,
        f"optim/step_highest/{group}": top * size,
        f"optim/reach/{group}": steps * rows.get("optim/schedule/planned", 1.0) * left * peak,
    }


def head_patterns(model: FlowModel) -> dict[str, re.Pattern[str]]:
    """Which parameters the two heads are, by the names of their optimiser groups."""
    return {
        "z_head": re.compile(r"head\."),
        "flow_head": re.compile(rf"velocity\.({model.velocity.last_layers})\."),
    }


def update_rows(subject: Subject, parts: Sequence[Part], gradient: Mapping[str, Tensor]) -> Rows:
    """step/*_update_ratio of the update that AdamW would make of `gradient` next, at the last
    step's rate and at the highest that the run has had: a warm-up may never reach its peak.
    """
    optim, eps = subject.recipe.optim, {part.name: part.eps for part in parts}
    rows = {}
    for group, pattern in head_patterns(subject.model).items():
        held = {name: p for name, p in subject.parameters.items() if pattern.match(name)}
        for suffix, base in {"": subject.lr, "_peak": highest_rate(subject)}.items():
            ratio = next_update_ratio(
                held,
                gradient,
                subject.slots,
                lr=group_lr(optim, group, base),
                betas=optim.betas,
                eps=eps.get(group, EPS),
            )
            if ratio is not None:
                rows[f"step/{group}_update_ratio{suffix}"] = ratio
    return rows


def parts_of(subject: Subject) -> list[Part]:
    """The groups that AdamW moves, with what the optimiser that training builds makes of them."""
    optim, last = subject.recipe.optim, subject.model.velocity.last_layers
    names = {id(p): name for name, p in subject.parameters.items()}
    built = optimizer_of(subject.recipe, subject.model)
    held = {id(p): group for group in built.param_groups for p in group["params"]}
    parts = []
    groups = parameter_groups(subject.parameters, optim, last)
    for group in (group for group in groups if group["name"] != MUON):
        of = next((held[id(p)] for p in group["params"] if id(p) in held), {})
        weights = {names[id(p)]: p.detach() for p in group["params"]}
        parts.append(
            Part(
                group["name"],
                weights,
                None if subject.initial is None else _typical(weights, subject.initial),
                float(of.get("weight_decay", group["weight_decay"])),
                float(of.get("eps", EPS)),
                of.get("betas", optim.betas),
            )
        )
    return parts


def schedule_rows(subject: Subject) -> Rows:
    """optim/schedule/*: the recipe's rates over the whole run and the logged ones so far, as
    shares of the peak.
    """
    recipe, rows = subject.recipe, Rows()
    if planned := _planned(subject):
        rows["optim/schedule/planned"] = statistics.fmean(planned) / recipe.optim.lr
        rows["optim/schedule/highest_planned"] = max(planned) / recipe.optim.lr
        plain = recipe.optim.schedule.model_copy(update={"warmup": 0})
        without = [
            lr_at(_resolved(subject, plain), recipe.optim.lr, step, recipe.train.steps)
            for step in _steps(recipe.train.steps)
        ]
        rows["optim/schedule/warmup"] = statistics.fmean(planned) / statistics.fmean(without)
    logged = _logged(subject)
    if len(logged) < 4:
        return rows
    values = [rate for _, rate in logged]
    rows["optim/schedule/used"] = statistics.fmean(values) / recipe.optim.lr
    rows["optim/schedule/highest"] = max(values) / recipe.optim.lr
    least = IDLE * min(max(values), recipe.optim.lr)
    idle = list(takewhile(lambda value: value <= least, reversed(values)))
    rows["optim/schedule/idle"] = len(idle) / len(values)
    if (agrees := _agrees(subject)) is not None:
        rows["optim/schedule/agrees"] = agrees
    return rows


def highest_rate(subject: Subject) -> float:
    """The highest base rate so far: a warm-up may never have reached the peak."""
    known = [rate for _, rate in _logged(subject)]
    if not known:
        done = _planned(subject, subject.step)
        known = done or [subject.recipe.optim.lr]
    return max([*known, subject.lr])


def replays(subject: Subject) -> bool:
    """Not under fp16, whose first steps look for a loss scale, nor of the largest models."""
    numbers = sum(p.numel() for p in subject.parameters.values())
    return subject.recipe.train.precision != "fp16" and numbers <= MOST


def replay_rows(
    subject: Subject, parts: Sequence[Part], batch: Batch, gradient: Mapping[str, Tensor]
) -> Rows:
    """optim/replay/*: one step of training on a copy, at the peak rate, against AdamW by hand.

    gradient: the doctor's own of this batch, clipped. A gradient that is no part of the step lies
    in the parameters before it. Nothing where it is not made. RuntimeError where it cannot be.
    """
    if not replays(subject):
        return {}
    state, recipe = _copied(subject, len(batch.t))
    before = {name: p.detach().clone() for name, p in state.parameters.items()}
    counts = _counts(state)
    with torch.no_grad():
        for name, p in state.parameters.items():
            p.grad = STALE * gradient[name].roll(1).to(p.dtype)
    alone = Group(0, 1, subject.device)
    average = {name: x.clone() for name, x in state.ema.average.items()}
    train_step(state, state.objective, batch, recipe, alone)
    if state.tally.look(alone):  # it was skipped
        return {}
    rows: Rows = {}
    used = {
        n: p.grad if p.grad is not None else torch.zeros_like(p)
        for n, p in state.parameters.items()
    }
    if not state.balancer.active and not _drops(subject.model):
        mine, theirs = _norm(gradient.values()), _norm(used.values())
        product = sum(float((used[n] * gradient[n]).sum()) for n in used)
        rows["optim/replay/gradient_cos"] = product / max(mine * theirs, 1e-30)
        rows["optim/replay/gradient"] = theirs / max(mine, 1e-30)
    if made := _counts(state):
        rows["optim/replay/count"] = max(made[n] - counts.get(n, 0.0) for n in made)
    for part in parts:
        lr = group_lr(recipe.optim, part.name, recipe.optim.lr)
        moved = {n: state.parameters[n].detach() - before[n] for n in part.weights}
        decay = recipe.optim.weight_decay if part.name == "trunk" else 0.0
        wanted = {
            n: adamw_update(
                before[n], used[n], subject.slots.get(n, {}), lr, recipe.optim.betas, decay
            )
            for n in part.weights
        }
        size = _norm(wanted.values())
        if size > ROUNDS * _norm(before[n] for n in part.weights):
            rows[f"optim/replay/size/{part.name}"] = _norm(moved.values()) / size
            off = _norm(moved[n] - wanted[n] for n in moved)
            rows[f"optim/replay/error/{part.name}"] = off / size
    decay = min(recipe.train.ema, (1 + subject.step) / (10 + subject.step))
    way = {n: (1 - decay) * (p.detach() - average[n]) for n, p in state.parameters.items()}
    if (far := _norm(way.values())) > ROUNDS * _norm(average.values()):
        went = (state.ema.average[n] - average[n] for n in average)
        rows["optim/replay/ema"] = _norm(went) / far
    return rows


@torch.no_grad()
def adamw_update(
    weight: Tensor,
    gradient: Tensor,
    slots: Mapping[str, Tensor],
    lr: float,
    betas: tuple[float, float],
    decay: float,
) -> Tensor:
    """What AdamW adds to a weight, written out (Loshchilov and Hutter 2019)."""
    count = float(slots["step"]) + 1 if slots else 1.0
    first, second = ((slots[k].to(weight.device) if slots else 0.0) for k in _MOMENTS)
    first = betas[0] * first + (1 - betas[0]) * gradient
    second = betas[1] * second + (1 - betas[1]) * gradient.square()
    first, second = first / (1 - betas[0] ** count), second / (1 - betas[1] ** count)
    return -lr * (first / (second.sqrt() + EPS) + decay * weight)


_MOMENTS = ("exp_avg", "exp_avg_sq")


def _copied(subject: Subject, size: int) -> tuple[TrainState, Any]:
    """A state to train, of copies but for what is frozen, and its recipe: `size` samples at the
    peak rate.
    """
    model, recipe = subject.model, subject.recipe
    moving = {x.data_ptr() for x in model.semantic.moving().values()}
    frozen = {
        id(p): p for p in model.parameters() if not p.requires_grad and p.data_ptr() not in moving
    }
    copied = deepcopy(model, frozen).train()
    for block in copied.velocity.token_blocks().blocks:
        vars(block).pop("forward", None)  # a compiled one runs the block that it was made of
    # in one piece: contrastive losses see one micro-batch at a time
    train = recipe.train.model_copy(update={"batch_size": size, "accumulate": 1, "grad_every": 0})
    optim = recipe.optim.model_copy(update={"schedule": ConstantLR()})
    recipe = recipe.model_copy(update={"train": train, "optim": optim})
    state = state_of(recipe, copied)
    for group in state.optimizer.param_groups:
        names = {id(p): name for name, p in state.parameters.items()}
        for p in group["params"]:
            for slot, value in subject.slots.get(names[id(p)], {}).items():
                state.optimizer.state[p][slot] = value.detach().to(p.device, copy=True)
    with torch.no_grad():
        for name, x in state.ema.average.items():
            x.copy_(subject.ema[name])
    state.balancer.restore({"multipliers": dict(subject.multipliers)})
    state.step = subject.step
    return state, recipe


def _counts(state: TrainState) -> dict[str, float]:
    """Steps that the optimiser says it made of each parameter."""
    slots = {name: state.optimizer.state.get(p, {}) for name, p in state.parameters.items()}
    return {name: float(held["step"]) for name, held in slots.items() if "step" in held}


def _drops(model: nn.Module) -> bool:
    return any(isinstance(m, nn.Dropout) and m.p > 0 for m in model.modules())


def _norm(tensors: Iterable[Tensor]) -> float:
    return math.sqrt(sum(float(x.detach().double().square().sum()) for x in tensors))


def _rms(tensors: Collection[Tensor]) -> float:
    return _norm(tensors) / math.sqrt(max(sum(x.numel() for x in tensors), 1))


def _typical(weights: Mapping[str, Tensor], initial: Mapping[str, Tensor]) -> float:
    """Root mean square of the matrices at the start, or the width that layers start with where
    they are smaller (some start at 0).
    """
    matrices = {n: w for n, w in weights.items() if w.ndim >= 2} or weights
    start, squares = [initial[n] for n in matrices], 0.0
    for x in start:
        inputs = max(x[0].numel() if x.ndim >= 2 else x.numel(), 1)
        mean = float(x.double().square().mean())
        squares += x.numel() * max(mean, 1 / (3 * inputs))
    return math.sqrt(squares / max(sum(x.numel() for x in start), 1))


@torch.no_grad()
def _slot_rows(subject: Subject, part: Part, kept: float, gradient: Mapping[str, Tensor]) -> Rows:
    """Of a group's slots; see the keys optim/* in flowray/config/keys.py."""
    stepped, numbers = part.stepped(subject.slots), sum(w.numel() for w in part.weights.values())
    rows: Rows = {}
    if subject.step > 0:
        missing = sum(
            w.numel()
            for n, w in part.weights.items()
            if n not in stepped and bool(gradient[n].any())
        )
        rows["left_out"] = missing / numbers
    if not stepped:
        return rows
    sums = dict.fromkeys(("made", "free", "unclipped", "first", "second", "still", "n", "all"), 0.0)
    counts = []
    for slots in stepped.values():
        count = float(slots["step"])
        first = slots["exp_avg"].double() / (1 - part.betas[0] ** count)
        root = (slots["exp_avg_sq"].double() / (1 - part.betas[1] ** count)).sqrt()
        some = root > 0
        first, root = first[some], root[some]
        counts.append(count)
        sums["made"] += float((first / (root + part.eps)).square().sum())
        sums["free"] += float((first / root).square().sum())
        sums["unclipped"] += float((first / (root + part.eps * kept)).square().sum())
        sums["first"] += float(first.square().sum())
        sums["second"] += float(root.square().sum())
        sums["still"] += float((~some).sum())
        sums["n"] += float(some.sum())
        sums["all"] += some.numel()
    direction = math.sqrt(sums["made"] / max(sums["n"], 1))
    shrinks = part.decay * _rms(part.weights.values())
    rows |= {
        "direction": direction,
        "decay": shrinks / max(shrinks + direction, 1e-30),
        "snr": sums["first"] / max(sums["second"], 1e-300),
        "still": sums["still"] / sums["all"],
        "count": max(counts) / max(subject.step, 1),  # a loss may start late
    }
    if sums["free"] > 0:
        rows["eps"] = math.sqrt(sums["made"] / sums["free"])
        rows["eps_unclipped"] = math.sqrt(sums["unclipped"] / sums["free"])
        if max(counts) * (1 - part.betas[1]) >= FORGOT:  # the first gradients are large
            seen = _norm(gradient[n] for n in stepped if n in gradient)
            rows["gradient"] = seen / max(math.sqrt(sums["second"]), 1e-300)
    else:
        rows["eps"] = rows["eps_unclipped"] = 1.0
    return rows


@torch.no_grad()
def _travel_rows(subject: Subject, part: Part, rates: list[float]) -> Rows:
    """How far the group has come beside what its rates allow: at least a random walk's way, at
    most a straight line's.
    """
    if part.typical is None or subject.initial is None or not rates or subject.step == 0:
        return {}
    squares, numbers = 0.0, 0
    for name, slots in part.stepped(subject.slots).items():
        weight = part.weights[name]
        some = (slots["exp_avg_sq"] > 0).to(weight.device)  # the others have no gradient
        way = (weight - subject.initial[name].to(weight.device))[some]
        squares, numbers = squares + float(way.double().square().sum()), numbers + way.numel()
    if numbers == 0:
        return {}
    gone = math.sqrt(squares / numbers)
    straight = subject.step * statistics.fmean(rates)
    walk = math.sqrt(subject.step * statistics.fmean(rate**2 for rate in rates))
    if straight < ROUNDS * part.typical:
        return {}
    return {
        "moved": gone / part.typical,
        "travel_walk": gone / walk,
        "travel_straight": gone / straight,
    }


def _clip_rows(subject: Subject, total: float, rows: Rows) -> float:
    """optim/clip/* and optim/gradient_logged into `rows`; by what factor clipping shortens the
    gradient of late.
    """
    clip = subject.recipe.optim.clip_grad
    logged = [row for row in subject.history if finite(row.get("grad/total")) is not None]
    if not logged:
        return 1.0
    norms = [float(row["grad/total"]) for row in logged]
    recent = statistics.median(norms[-max(3, int(RECENT * len(norms))) :])
    cut = [float(row.get("grad/clip_frac") or 0.0) for row in logged]
    kept = min(1.0, clip / max(recent, 1e-30))
    rows["optim/clip/share"] = statistics.fmean(cut)
    rows["optim/clip/kept"] = kept
    rows["optim/gradient_logged"] = recent / max(total, 1e-30)
    return kept


def _rates(subject: Subject, group: str) -> list[float]:
    """The group's logged rates."""
    found = (finite(row.get(f"lr/{group}")) for row in subject.history)
    return [rate for rate in found if rate is not None]


def _logged(subject: Subject) -> list[tuple[int, float]]:
    """(step, base rate) of the history: the highest that the groups' rates come from, as a cap
    lowers some.
    """
    optim, found = subject.recipe.optim, []
    scales = {group: group_lr(optim, group, 1.0) for group in ("trunk", "flow_head", "text")}
    for row in subject.history:
        rates = [
            rate / getattr(optim.lr_scale, group)
            for group in scales
            if (rate := finite(row.get(f"lr/{group}"))) is not None
        ]
        if rates:
            found.append((int(row["step"]), max(rates)))
    return found


def _agrees(subject: Subject) -> float | None:
    """The last logged rates over the recipe's; earlier ones may be of another recipe, before a
    resume.
    """
    recipe, schedule = subject.recipe, _resolved(subject, subject.recipe.optim.schedule)
    for row in reversed(subject.history):
        logged = {g: finite(row.get(f"lr/{g}")) for g in GroupScales.model_fields}
        rates = {group: rate for group, rate in logged.items() if rate is not None}
        if rates:
            base = lr_at(schedule, recipe.optim.lr, int(row["step"]) - 1, recipe.train.steps)
            wanted = sum(group_lr(recipe.optim, group, base) for group in rates)
            return sum(rates.values()) / wanted if wanted > 0 else None
    return None


def _steps(total: int) -> range:
    """At most a thousand steps, evenly over the run."""
    return range(0, max(total, 1), max(total // 1000, 1))


def _resolved(subject: Subject, schedule: Any) -> Any:
    return resolve_schedule(schedule, *subject.restart)


def _planned(subject: Subject, until: int | None = None) -> list[float]:
    """The recipe's base rate at steps of the whole run, or of its first ones."""
    recipe = subject.recipe
    schedule = _resolved(subject, recipe.optim.schedule)
    last = recipe.train.steps if until is None else until
    return [lr_at(schedule, recipe.optim.lr, step, recipe.train.steps) for step in _steps(last)]
