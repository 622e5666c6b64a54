"""Every part of the computation, and every input of the velocity network, is asked whether it takes
part: has it a gradient, has it moved, and does the velocity notice when it is taken away.

All of it is asked of the training path itself: its batches, its objective, and what the velocity
network is given there.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from flowray.config.errors import InputError
from flowray.config.flow import AlphaTime, LogitNormalTime, LogSNRTime, TimeConfig, UniformTime
from flowray.doctor.measured import Rows
from flowray.doctor.subject import Subject
from flowray.doctor.training import first_rows, training_mode
from flowray.flow.time import time_config
from flowray.losses.total import Batch, weights_at
from flowray.model.assemble import Source
from flowray.model.levels import VelocityNet
from flowray.probes.battery import derangement
from flowray.probes.untouched import holding

HEARD = 16  # patches that are changed one by one
DRAWN = 512  # samples whose times and null flags are looked at
TOLD = 16  # samples, of two steps or more, for which it is looked at how they reach the network
EXPECTED = 5  # null samples: of fewer their number tells nothing
TINY = 1e-30
FP16 = 2.0**12  # times the loss, as training's scaler has it: else fp16 rounds gradients to 0
Given = tuple[Any, ...]  # to velocity.levels: x, time code, null, text


@dataclass(frozen=True)
class Part:
    """Parameters that do one thing. of: a pattern of their names; its first group, if it has one,
    tells its pieces apart, of which the least counts. LAST in it: the network's last layers.

    loss: which one is to reach it. felt: where its absence is looked for, by the velocity network
    alone or from the captions on; '' nowhere.
    """

    name: str
    of: str
    loss: str = "flow"
    felt: Literal["velocity", "captions", ""] = "velocity"


PARTS = (
    Part("queries", r"text\.queries$", felt="captions"),
    Part("connector", r"text\.connector\.", felt="captions"),
    Part("head", r"head\.", felt="captions"),
    Part("tower", r"(semantic\.clip\.tower\.(?:image|text|out))\.", "clip", felt=""),
    Part("student", r"semantic\.dino\.student\.", "dino", felt=""),
    Part("projector", r"semantic\.repa\.projector\.", "repa", felt=""),
    Part("patches", r"velocity\.(?:\w+\.)?patch_in\."),
    Part("time", r"velocity\.(?:time\..*|.*(?:scale|shift)\.(?:p0|p1|w|b))$"),
    Part("null", r"velocity\.(?:\w+\.)?null\."),
    Part("caption", r"velocity\.(?:.*\.)?(?:pooled|caption)\."),
    Part("gates", r"(velocity\.blocks\.\d+\.modulation)\."),
    Part("blocks", r"(velocity\.(?:\w+\.)?blocks\.\d+)\."),
    Part("output", r"velocity\.(?:LAST)\."),
)
TEXT_SIDE = ("queries", "connector", "head")


def parts_rows(subject: Subject, count: int) -> tuple[Rows, dict[str, str]]:
    """part/* and input/* of the next step's batch, `count` samples of it, raw weights; and which
    piece of a part each least number is of.
    """
    pieces = _pieces(subject)
    batch = first_rows(subject.batches(subject.step), count)
    least: dict[str, str] = {}
    rows: Rows = {}
    with training_mode(subject):
        kinds = {"grad": _gradients(subject, pieces, batch), "moved": _moved(subject, pieces)}
        with _same_precision(subject):
            kinds["matters"] = _felt(subject, pieces, batch)
            rows |= _inputs_matter(subject, batch)
            rows |= _draws(subject, count)
    for kind, found in kinds.items():
        for name, values in found.items():
            piece = min(values, key=values.__getitem__)
            rows[f"part/{name}/{kind}"] = values[piece]
            if len(values) > 1:
                least[f"part/{name}/{kind}"] = piece
    return rows, least


def _same_precision(subject: Subject) -> AbstractContextManager[object]:
    """fp32 throughout: autocast keeps its copies of the weights, so that changed ones go unnoticed,
    and velocity_fp32 is of the objective alone.
    """
    return torch.autocast(subject.device.type, enabled=False)


Pieces = dict[str, dict[str, dict[str, nn.Parameter]]]  # part -> piece -> its parameters


def _pieces(subject: Subject) -> Pieces:
    """The model's parameters by part; those without a gradient too, for that may be the fault."""
    model, recipe = subject.model, subject.recipe
    found: Pieces = {}
    for part in PARTS:
        pattern = re.compile(part.of.replace("LAST", model.velocity.last_layers))
        if part.name == "null" and recipe.flow.null_probability == 0:
            continue
        if part.name in TEXT_SIDE and model.head is None and not model.velocity.conditioned:
            continue  # nothing reads the captions
        for name, p in model.named_parameters():
            if (hit := pattern.match(name)) is not None:
                piece = hit[1] if pattern.groups else part.name
                found.setdefault(part.name, {}).setdefault(piece, {})[name] = p
    return found


def _gradients(subject: Subject, pieces: Pieces, batch: Batch) -> dict[str, dict[str, float]]:
    """Root mean square gradient of a piece's own loss, over that of the piece with the most of
    it.
    """
    model = subject.model
    weights = weights_at(subject.recipe.loss, subject.step, subject.recipe.train.steps)
    idle = frozenset(name for name, weight in weights.items() if weight == 0)
    losses, forward = subject.objective(batch, idle)
    on = {name: loss for name, loss in losses.items() if name not in idle}
    by_z0 = subject.recipe.loss.flow.source_grad != "none"
    reached = {"head": by_z0} | dict.fromkeys(
        ("queries", "connector"), by_z0 or model.velocity.conditioned
    )
    everything = sum((weights[name] * loss for name, loss in on.items()), torch.zeros(()))
    asked: dict[str, Pieces] = {}
    for part in PARTS:
        # a source that the flow loss is not to reach may have others; or none, and is to stay
        own = part.loss if reached.get(part.name, True) else "all but flow"
        if own == "all but flow" and not on.keys() & {"kl", "clip", "dino", "tv", "anchor"}:
            continue
        if (own in on or own == "all but flow") and part.name in pieces:
            asked.setdefault(own, {})[part.name] = pieces[part.name]
    sizes = {own: _rms_gradients(on.get(own, everything), parts) for own, parts in asked.items()}
    found = {
        name: {piece: size / max(most, TINY) for piece, size in values.items()}
        for own in sizes.values()
        for most in [max(size for values in own.values() for size in values.values())]
        for name, values in own.items()
    }
    # the head makes both; a log-variance at its clamp may be without
    made = {name: {"": getattr(forward.posterior, name)} for name in ("mu", "logvar")}
    mu, logvar = _rms_gradients(everything, {"": made})[""].values()
    return found | ({"mu": {"mu": mu / max(mu, logvar)}} if max(mu, logvar) > 0 else {})


def _rms_gradients(
    loss: Tensor, parts: Mapping[str, Mapping[str, Mapping[str, Tensor]]]
) -> dict[str, dict[str, float]]:
    """Of each piece of each part; 0 where none reaches it. One backward pass for all of them."""
    every = {id(p): p for part in parts.values() for held in part.values() for p in held.values()}
    live = [p for p in every.values() if p.requires_grad]
    squares = dict.fromkeys(every, 0.0)
    if live and loss.requires_grad:
        made = torch.autograd.grad(FP16 * loss, live, retain_graph=True, allow_unused=True)
        for p, g in zip(live, made, strict=True):
            squares[id(p)] = 0.0 if g is None else float(g.double().square().sum())
    return {
        part: {
            piece: math.sqrt(
                sum(squares[id(p)] for p in held.values()) / sum(p.numel() for p in held.values())
            )
            for piece, held in pieces.items()
        }
        for part, pieces in parts.items()
    }


@torch.no_grad()
def _moved(subject: Subject, pieces: Pieces) -> dict[str, dict[str, float]]:
    """Root mean square change of a piece's weights since step 0 but for mere decay, over that of
    the piece that moved most.
    """
    if (initial := subject.initial) is None:
        return {}

    def gone(name: str, p: Tensor) -> float:
        if name not in initial:  # it does not train
            return 0.0
        start, now = initial[name].double().flatten(), p.detach().cpu().double().flatten()
        kept = float(now @ start / (start @ start).clamp_min(TINY))
        # weight decay alone draws every weight towards 0 by one factor
        return float((now - (kept if 0 < kept < 1 else 1.0) * start).square().sum())

    moved = {
        part: {
            piece: math.sqrt(
                sum(gone(name, p) for name, p in held.items())
                / sum(p.numel() for p in held.values())
            )
            for piece, held in found.items()
        }
        for part, found in pieces.items()
    }
    most = max(size for values in moved.values() for size in values.values())
    return {
        part: {piece: size / max(most, TINY) for piece, size in values.items()}
        for part, values in moved.items()
    }


class _Told(Exception):
    """Ends a forward pass whose rest nobody asked for."""


@dataclass(frozen=True)
class Heard:
    """What a training step's forward pass gave the velocity network, and what that made of it."""

    source: Source
    given: Given
    velocity: Tensor


@torch.no_grad()
def _pass(subject: Subject, batch: Batch) -> Heard:
    """Of a batch, up to the velocity: the losses that look at pictures are dear. Every pass has the
    same dropout.
    """
    model = subject.model
    heard: dict[str, Any] = {}
    source_of, levels = model.source, model.velocity.levels

    def source(*inputs: Any) -> Source:
        heard["source"] = source_of(*inputs)
        return heard["source"]

    def told(*given: Any) -> tuple[Tensor, ...]:
        heard["given"], heard["velocity"] = given, levels(*given)[-1]
        raise _Told

    torch.manual_seed(0)
    # as attributes of the objects: what a class has, changed or not, is what runs
    vars(model)["source"], vars(model.velocity)["levels"] = source, told
    try:
        with suppress(_Told):
            subject.objective(batch)
    finally:
        del vars(model)["source"], vars(model.velocity)["levels"]
    return Heard(**heard)


def _change(now: Tensor, before: Tensor) -> float:
    return float((now.float() - before.float()).norm() / before.float().norm().clamp_min(TINY))


@torch.no_grad()
def _felt(subject: Subject, pieces: Pieces, batch: Batch) -> dict[str, dict[str, float]]:
    """How much the velocity changes where a piece's weights are zero, over its norm; nothing of a
    velocity of 0.
    """
    heard, velocity = _pass(subject, batch), subject.model.velocity
    before = heard.velocity
    found: dict[str, dict[str, float]] = {}
    for part in PARTS if bool(before.any()) else ():
        for piece, held in pieces.get(part.name, {}).items() if part.felt else ():
            with holding(held, {name: torch.zeros_like(p) for name, p in held.items()}):
                made = (
                    velocity.levels(*heard.given)[-1]
                    if part.felt == "velocity"
                    else _pass(subject, batch).velocity
                )
            found.setdefault(part.name, {})[piece] = _change(made, before)
    return found


@torch.no_grad()
def _inputs_matter(subject: Subject, batch: Batch) -> Rows:
    """input/NAME/matters: how much the velocity changes, over its norm, where an input is
    another's; nothing of a velocity of 0.
    """
    heard, velocity = _pass(subject, batch), subject.model.velocity
    before, (x, code, null, *text) = heard.velocity, heard.given
    if not bool(before.any()):
        return {}
    late_first = torch.linspace(4, -4, len(code), device=code.device, dtype=code.dtype)
    others: dict[str, Given] = {
        "x": (x.roll(1, 0), code, null, *text),
        # early where it was late, and all kinds of where it was one
        "time": (x, late_first[code.argsort(stable=True).argsort()], null, *text),
    }
    if subject.recipe.flow.null_probability > 0:
        others["null"] = (x, code, ~null, *text)
    made = {name: velocity.levels(*given)[-1] for name, given in others.items()}
    swapped = {"noise": replace(batch, noise=batch.noise.roll(1, 0))}
    with suppress(InputError):  # captions all alike
        order = derangement(list(batch.captions)).tolist()
        swapped["caption"] = replace(batch, captions=[batch.captions[i] for i in order])
    made |= {name: _pass(subject, other).velocity for name, other in swapped.items()}
    rows = {f"input/{name}/matters": _change(v, before) for name, v in made.items()}
    return (
        rows
        | _positions_matter(velocity, heard.given, before)
        | _patches_heard(velocity, heard.given, before)
    )


def _positions_matter(velocity: VelocityNet, given: Given, before: Tensor) -> Rows:
    """input/position/matters: how far the velocity of patches that changed places is from the
    velocity whose patches did; without positions attention cannot tell.
    """
    patch = velocity.token_blocks().patch
    x, *rest = given
    rows, columns = x.shape[-2] // patch, x.shape[-1] // patch
    if rows * columns < 2:
        return {}
    order = torch.randperm(rows * columns, generator=torch.Generator().manual_seed(0))

    def mixed(z: Tensor) -> Tensor:
        cells = z.unflatten(-1, (columns, patch)).unflatten(-3, (rows, patch)).transpose(-3, -2)
        taken = cells.flatten(-4, -3)[..., order.to(z.device), :, :]
        return taken.unflatten(-3, (rows, columns)).transpose(-3, -2).flatten(-2).flatten(-3, -2)

    made = velocity.levels(mixed(x), *rest)[-1]
    return {"input/position/matters": _change(made, mixed(before))}


def _patches_heard(velocity: VelocityNet, given: Given, before: Tensor) -> Rows:
    """input/patches/heard: of HEARD patches the share whose change the other patches notice, by
    more than a hundredth of what they notice of the loudest.
    """
    patch = velocity.token_blocks().patch
    x, *rest = given
    rows, columns = x.shape[-2] // patch, x.shape[-1] // patch
    if rows * columns < 2:
        return {}
    noticed = []
    for place in torch.linspace(0, rows * columns - 1, HEARD).round().long().unique().tolist():
        row, column = patch * (place // columns), patch * (place % columns)
        spot = torch.zeros_like(x[0, :1], dtype=torch.bool)
        spot[:, row : row + patch, column : column + patch] = True
        made = velocity.levels(torch.where(spot, x.roll(1, 0), x), *rest)[-1]
        noticed.append(float(((made - before).float() * ~spot).norm()))
    loudest = max(noticed)
    return {"input/patches/heard": sum(n > 0.01 * loudest for n in noticed) / len(noticed)}


@torch.no_grad()
def _draws(subject: Subject, count: int) -> Rows:
    """input/{noise,time,null}/*: whether what is drawn differs between samples and between steps,
    as it reaches the velocity network; times and null flags against the recipe.
    """
    size = subject.recipe.train.batch_size
    told = max(2, -(-TOLD // min(size, count)))
    steps = range(subject.step, subject.step + max(told, -(-DRAWN // size)))
    many = [subject.batches(step) for step in steps]
    batches = [first_rows(batch, count) for batch in many[:told]]
    heard = [_pass(subject, batch) for batch in batches]
    rows = _noise_draws([one.source for one in heard[:2]])
    rows |= _time_draws(subject, [one.given[1] for one in heard], [batch.t for batch in many])
    given, asked = (
        torch.cat(flags).float().cpu()
        for flags in ([one.given[2] for one in heard], [batch.null for batch in batches])
    )
    share, drawn = subject.recipe.flow.null_probability, torch.cat([batch.null for batch in many])
    as_drawn = torch.equal(given, asked)
    seen = drawn.float().cpu() if as_drawn else given
    rows["input/null/share"] = float(seen.mean())
    if 0 < share < 1 and (not as_drawn or len(seen) * min(share, 1 - share) >= EXPECTED):
        error = math.sqrt(share * (1 - share) / len(seen))
        rows["input/null/off"] = abs(float(seen.mean()) - share) / error
    return rows


def _noise_draws(sources: Sequence[Source]) -> Rows:
    """Of the noise in z0, as the posterior has it; of two steps."""
    noise = torch.stack([((s.z0 - s.posterior.mean) / s.posterior.std).flatten(1) for s in sources])
    rows = {"input/noise/std": float(noise.square().mean().sqrt())}
    if len(noise[0]) < 2 or not bool(noise.any()):
        return rows
    first, second = nn.functional.normalize(noise.double(), dim=-1)
    cosines = first @ first.T
    among = (cosines.sum() - cosines.trace()) / (cosines.numel() - len(cosines))
    rows["input/noise/rows"] = 1 - float(among)
    rows["input/noise/steps"] = 1 - float((first * second).sum(-1).mean())
    return rows


def _time_draws(subject: Subject, codes: Sequence[Tensor], drawn: Sequence[Tensor]) -> Rows:
    """By the distribution function of the recipe's own times, under which they are uniform."""
    flow, total = subject.recipe.flow, subject.recipe.train.steps
    functions = [
        _distribution(time_config(flow, subject.step + i, total)) for i in range(len(drawn))
    ]
    known = [function for function in functions if function is not None]
    if len(known) < len(drawn):
        return {}
    every = torch.cat(
        [function(t.double().cpu()) for function, t in zip(known, drawn, strict=True)]
    ).sort()[0]
    places = torch.arange(len(every), dtype=torch.float64)
    gap = torch.maximum((places + 1) / len(every) - every, every - places / len(every)).max()
    rows = {"input/time/off": float(gap) * math.sqrt(len(every))}
    times = torch.stack(
        [
            function((0.5 - code.double().cpu() / 8).clamp(0, 1))
            for function, code in zip(known, codes, strict=False)
        ]
    )  # (steps, samples)
    if times.shape[1] > 1:
        rows["input/time/rows"] = math.sqrt(12 * float(times.var(dim=1).mean()))
        rows["input/time/steps"] = 3 * float(times.diff(dim=0).abs().mean())
    return rows


def _distribution(config: TimeConfig) -> Callable[[Tensor], Tensor] | None:
    """The share of training times below t; None where there is none: all times one, or a sampler
    of one's own.
    """

    def inner(t: Tensor) -> Tensor:
        match config:
            case LogitNormalTime():
                return torch.special.ndtr((t.logit() - config.mean) / config.std)
            case LogSNRTime():
                return (2 * t.logit() - config.low) / (config.high - config.low)
            case AlphaTime():
                return (t - config.low) / (config.high - config.low)
        return t

    known = isinstance(config, UniformTime | LogitNormalTime | LogSNRTime | AlphaTime)
    if not known or (isinstance(config, AlphaTime) and config.low == config.high):
        return None
    floor = config.uniform_floor
    return lambda t: floor * t + (1 - floor) * inner(t).clamp(0, 1)
