"""Training against sampling, step by step: the same captions, noise and latents go through both,
and what they hand on is compared at every seam, in the order of the data flow.

Nothing is written out again here: the objective trains and `sample.generate` samples, as they are,
and recorders on the model hear what passes. A fault that both share is no difference (but for the
spread of the source, which is held against the posterior), and one that was mended before the
doctor came left its traces in the weights alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from flowray.config.flow import EulerSolver, SampleConfig
from flowray.doctor.measured import Rows
from flowray.doctor.subject import Subject
from flowray.doctor.training import first_rows, training_mode, without_null
from flowray.losses.terms import Forward, box_sum, flow_mse
from flowray.losses.total import Batch, active_terms
from flowray.model.assemble import FlowModel, Source
from flowray.model.latent import over_channels
from flowray.model.text import Prompts
from flowray.probes.untouched import untouched
from flowray.sample import generate as sampling
from flowray.train.step import whole_batches

FEW = 8  # samples that go through both
DRAWS = 4  # of every caption's z0
PICTURES = 2
STEPS = 2  # of the sampler where its first is looked at: one that leaves out the last still has it
FIRST = 0.5 / STEPS  # the time of the first, by the midpoint rule
LEAST_CONTRAST = 0.1  # of pictures in [0, 1]: flatter ones are compared as if they had this
SAME = 1e-5  # two passes of one input; above, they draw
DIFFERS = 0.01
SHOWN = 64  # numbers kept of a module's output
Field = Callable[[Tensor], Tensor]


@dataclass
class Call:
    """One call of the velocity network: x (B, C, H, W), time code and null (B,), and what came."""

    x: Tensor
    code: Tensor
    null: Tensor
    v: Tensor


@dataclass
class Heard:
    """What passed through the model, in order. inside: of every module without parts, in the order
    in which they ran: name, some numbers of its input and of its output.
    """

    captions: list[str] = field(default_factory=list)
    prompts: Prompts | None = None
    text: Tensor | None = None
    mean: Tensor | None = None
    std: Tensor | None = None
    z0: Tensor | None = None
    calls: list[Call] = field(default_factory=list)
    inside: list[tuple[str, Tensor | None, Tensor]] = field(default_factory=list)

    @property
    def made(self) -> tuple[Tensor | None, ...]:
        """What the parts of the model made."""
        return self.text, self.mean, self.std, self.first.v

    @property
    def first(self) -> Call:
        """The first call of the velocity network; of nothing where there was none."""
        none = torch.zeros(0)
        return self.calls[0] if self.calls else Call(none, none, none, none)


def _some(value: Any) -> Tensor | None:
    """A few numbers of a tensor, spread over it."""
    if not isinstance(value, Tensor) or not value.is_floating_point() or not value.numel():
        return None
    flat = value.detach().flatten()
    return flat[:: max(1, len(flat) // SHOWN)].float().clone()


@contextmanager
def hearing(
    model: FlowModel, start: Tensor | None = None, true: Field | None = None
) -> Iterator[Heard]:
    """Within the block `heard` receives what passes through the model.

    start: where the paths begin in place of the source's draw; true: stands in for the velocity.
    """
    heard = Heard()
    source, levels, tokenize = model.source, model.levels, model.text.tokenize

    def hear_source(captions: Sequence[str], noise: Tensor) -> Source:
        heard.captions += captions
        made = source(captions, noise)
        posterior = made.posterior
        heard.mean, heard.std = posterior.mean.detach(), posterior.std.detach()
        heard.z0 = made.z0.detach()
        z0 = made.z0 if start is None else start[: len(captions)]
        return Source(made.posterior, z0, made.text)

    def hear_levels(
        source: Source, x: Tensor, time_code: Tensor, null: Tensor, kept: Tensor | None = None
    ) -> tuple[Tensor, ...]:
        made = levels(source, x, time_code, null, kept) if true is None else (true(x),)
        told = (x, time_code, null, made[-1])
        heard.calls.append(Call(*(part.detach().clone() for part in told)))
        return made

    def hear_prompts(prompts: Sequence[str]) -> Prompts:
        heard.prompts = tokenize(prompts)
        return heard.prompts

    def hear_module(name: str) -> Any:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            if (out := _some(output)) is not None:
                heard.inside.append((name, _some(inputs[0]) if inputs else None, out))

        return hook

    def hear_text(module: nn.Module, inputs: Any, output: Any) -> None:
        heard.text = output.values.detach()

    hooks = [model.text.register_forward_hook(hear_text)]
    hooks += [
        module.register_forward_hook(hear_module(name))
        for name, module in model.named_modules()
        if not any(True for _ in module.children())
    ]
    # these shadow the methods
    model.__dict__ |= {"source": hear_source, "levels": hear_levels}
    model.text.__dict__["tokenize"] = hear_prompts
    # a text that is kept runs no module
    kept, model.text.kept = model.text.kept, None
    try:
        yield heard
    finally:
        model.text.kept = kept
        del model.__dict__["source"], model.__dict__["levels"], model.text.__dict__["tokenize"]
        for hook in hooks:
            hook.remove()


def _uncompiled(model: FlowModel) -> AbstractContextManager[Any]:
    """Blocks that training compiles run as they are: for so few samples they would be compiled
    anew, and recorders do not go into a graph.
    """
    compiled = any("forward" in vars(module) for module in model.velocity.modules())
    return torch.compiler.set_stance("force_eager") if compiled else nullcontext()


@dataclass
class Paths:
    """Both ways of one batch, with the raw weights. drawing: parts of the model of which two passes
    in training mode differ (dropout), so these are heard in eval mode in training too.
    """

    subject: Subject
    batch: Batch
    drawing: tuple[nn.Module, ...] = ()

    def trained(
        self, t: float | Tensor, *, null: bool = False, noise: Tensor | None = None, seed: int = 0
    ) -> tuple[Heard, Forward, dict[str, Tensor]]:
        """A training step's forward pass with its samples at t, and its gradient graph. seed: of
        what it draws itself.
        """
        subject, batch = self.subject, self.batch
        batch = replace(
            batch,
            t=torch.as_tensor(t).to(batch.t).expand_as(batch.t).clone(),
            null=torch.full_like(batch.null, null),
            noise=batch.noise if noise is None else noise,
        )
        idle = frozenset(active_terms(subject.recipe.loss)) - {"flow"}
        with (
            training_mode(subject),
            torch.enable_grad(),
            _uncompiled(subject.model),
            hearing(subject.model) as heard,
        ):
            torch.manual_seed(seed)  # training mode puts the RNG back
            for part in self.drawing:
                part.eval()
            losses, forward = subject.objective(batch, idle)
        return heard, forward, {name: loss.detach() for name, loss in losses.items()}

    def sampled(
        self, config: SampleConfig, start: Tensor | None = None, true: Field | None = None
    ) -> tuple[Heard, Tensor]:
        """The sampler on the batch's captions and noise, and where it ends."""
        model, batch = self.subject.model, self.batch
        with untouched(model), hearing(model, start, true) as heard:
            model.eval()
            end = sampling.generate_latents(model, batch.captions, config, batch.noise)
        return heard, end

    def plain(self, nodes: str, guidance: float = 1.0) -> SampleConfig:
        """STEPS Euler steps."""
        solver = EulerSolver.model_validate({"nodes": nodes})
        # the batch as it is: one that were filled up would be heard with what fills it
        as_it_is = {"batch_size": len(self.batch.captions)}
        made = {"steps": STEPS, "solver": solver, "guidance_scale": guidance, "grid": "uniform"}
        return self.subject.recipe.sample.model_copy(update=made | as_it_is)


def off(a: Tensor | None, b: Tensor | None, size: Tensor | None = None) -> float:
    """||a - b|| over ||size||, without that over the larger norm: 0 where they are equal, 1 where
    the shapes differ or one is missing.
    """
    if a is None or b is None or a.shape != b.shape:
        return float(a is not b)
    a, b = a.detach().double(), b.detach().double()
    norm = torch.maximum(a.norm(), b.norm()) if size is None else size.double().norm()
    return float((a - b).norm() / norm.clamp_min(1e-12))


def seam_rows(subject: Subject, batch: Batch) -> tuple[Rows, dict[str, str]]:
    """seam/* of the first samples of a training batch, and which module of a part of the model is
    the first that differs, by part. Nothing where the latents or what the model makes are not
    finite.
    """
    if not bool(batch.z1.isfinite().all()):
        return {}, {}
    made_of = subject.recipe, subject.latents, subject.device, subject.sizes
    indices = whole_batches(*made_of).indices(subject.step)
    latents = _latents(subject, batch, indices)
    batch = without_null(first_rows(batch, FEW))
    paths = Paths(subject, batch)
    if not all(x is None or bool(x.isfinite().all()) for x in paths.trained(FIRST)[0].made):
        return {}, {}
    _calm(paths)
    begun = [paths.trained(0.0, noise=noise)[0] for noise in _noises(subject, batch)]
    sampled = paths.sampled(paths.plain("left"))[0]
    rows, places = _source_rows(begun, sampled)
    rows["seam/captions"] = max(
        _not_stored(subject, batch, indices),
        _changed(batch.captions, begun[0].captions),
        _changed(batch.captions, sampled.captions),
    )
    rows["seam/draws_sampled"] = _spread(_sampled_draws(paths))
    rows["seam/latents"] = latents
    found, first = _field_rows(paths, begun[0].first.x)
    rows |= found
    return {key: x for key, x in rows.items() if math.isfinite(x)}, places | first


def _calm(paths: Paths) -> None:
    """Finds the parts that draw."""
    model = paths.subject.model

    def draws() -> bool:
        once, again = (paths.trained(FIRST, seed=seed)[0] for seed in range(2))
        return max(off(a, b) for a, b in zip(once.made, again.made, strict=True)) > SAME

    if not draws():
        return
    parts = [part for part in (model.text, model.head, model.velocity) if part is not None]
    found = []
    for part in parts:
        paths.drawing = tuple(other for other in parts if other is not part)
        if draws():
            found.append(part)
    paths.drawing = tuple(found)


def _noises(subject: Subject, batch: Batch) -> list[Tensor]:
    """The batch's own source noise, and that of the next steps."""
    later = [subject.batches(subject.step + k).noise[: len(batch.t)] for k in range(1, DRAWS)]
    return [batch.noise, *later]


def _not_stored(subject: Subject, batch: Batch, indices: np.ndarray) -> float:
    """Share of training captions that are not as the data has them."""
    stored = [subject.latents.captions(int(i)) for i in indices[: len(batch.captions)]]
    wrong = [text not in known for text, known in zip(batch.captions, stored, strict=True)]
    return float(np.mean(wrong))


def _changed(given: Sequence[str], heard: Sequence[str]) -> float:
    """Share of captions that reach the text model otherwise than they were given."""
    if len(given) != len(heard):
        return 1.0
    return float(np.mean([a != b for a, b in zip(given, heard, strict=True)]))


def _tokens(a: Prompts | None, b: Prompts | None) -> float:
    """Share of token ids that differ, padding left out."""
    if a is None or b is None or a.ids.shape != b.ids.shape:
        return float(a is not b)
    wrong = ((a.ids != b.ids) & (a.mask | b.mask)) | (a.mask != b.mask)
    return float(wrong.float().mean())


def _source_rows(begun: list[Heard], sampled: Heard) -> tuple[Rows, dict[str, str]]:
    """Of everything up to z0 and the first x."""
    own = begun[0]
    rows = {
        "seam/tokens": _tokens(own.prompts, sampled.prompts),
        "seam/text": off(own.text, sampled.text),
        "seam/mu": off(own.mean, sampled.mean, own.z0),
        "seam/std": off(own.std, sampled.std),
        "seam/draws_trained": _spread(begun),
        "seam/z0": off(own.z0, sampled.z0),
        "seam/start": off(own.first.x, sampled.first.x),
    }
    return rows, {name: _first(own, sampled, f"{name}.") for name in ("text", "head")}


def _sampled_draws(paths: Paths) -> list[Heard]:
    """The batch's captions as pictures of other seeds begin."""
    model, heard = paths.subject.model, []
    for seed in range(DRAWS):
        with untouched(model), hearing(model) as one:
            for _ in sampling.latent_batches(
                model, paths.batch.captions, paths.plain("left"), seed
            ):
                pass
        heard.append(one)
    return heard


def _spread(draws: list[Heard]) -> float:
    """How far the spread of the first x over draws is from the posterior's, and how alike the
    noise of one draw is over captions; the worse of both.
    """
    if any(one.std is None or one.std.shape != one.first.x.shape for one in draws):
        return math.nan
    starts = torch.stack([one.first.x.double() for one in draws])
    std = torch.stack([one.std.double() for one in draws if one.std is not None])
    noise = (starts - starts.mean(0)) / std.mean(0).clamp_min(1e-12)
    size = float((noise.square().sum(0) / (len(draws) - 1)).mean().sqrt())
    if starts.shape[1] < 2:
        return abs(size - 1)
    one = noise.flatten(2) / noise.flatten(2).norm(dim=2, keepdim=True).clamp_min(1e-12)
    count = one.shape[1]
    alike = (one.sum(1).square().sum(1) - count) / (count * (count - 1))
    return max(abs(size - 1), float(alike.mean()))


def _latents(subject: Subject, batch: Batch, indices: np.ndarray) -> float:
    """How much more or less the batch's z1 are off the cached means than their posteriors' width
    makes them (and four standard errors of that), over the size of z1.
    """
    scale = subject.latents.scale
    moments = subject.latents.moments(indices[: len(batch.z1)])
    mean = scale.sample(moments, torch.zeros_like(moments.mean)).double()
    width = (0.5 * moments.logvar.double()).exp() * over_channels(scale.scale, moments.mean)
    drawn = torch.zeros_like(mean) if scale.deterministic else width.square()
    gone = (batch.z1.detach().cpu().double() - mean).square().mean()
    chance = 4 * (2 * drawn.square().mean() / drawn.numel()).sqrt()
    beyond = ((gone - drawn.mean()).abs() - chance).clamp_min(0)
    return float((beyond / (mean.square().mean() + drawn.mean()).clamp_min(1e-12)).sqrt())


def _field_rows(paths: Paths, x0: Tensor) -> tuple[Rows, dict[str, str]]:
    """Of everything from the first x on: the path, the sampler's steps along it, what the network
    is told and answers, what the loss asks of it, and the picture at the end.
    """
    subject = paths.subject
    heard, forward, losses = paths.trained(FIRST)
    blank, unled, _ = paths.trained(FIRST, null=True)
    x1, own, target = paths.trained(1.0)[0].first.x, heard.first, forward.path.v_target.detach()
    way = x1 - x0
    sampled = paths.sampled(paths.plain("midpoint"), start=own.x)[0]
    led, end = paths.sampled(subject.recipe.sample, x0, _constant(way))
    asked, loss = float((own.v.float() - target).square().mean()), losses.get("flow")
    if loss is not None:
        for weight, level in forward.lower:
            loss = loss - weight * flow_mse(level, box_sum(target, level)).detach()
        rows = {"seam/loss": abs(float(loss) - asked) / max(asked, abs(float(loss)), 1e-12)}
    else:
        rows = {}
    flags = torch.cat([x.cpu() for x in (own.null, ~blank.first.null, sampled.first.null)])
    rows |= {
        "seam/target": off(target, way),
        "seam/steps": off(end, x1),
        "seam/time_code": _time_code(paths, x0, way, led),
        "seam/null": float(flags.float().mean()),
        "seam/velocity": off(own.v, sampled.first.v),
        "seam/guidance": _guidance(paths, own, unled.v_pred.detach().float()),
        "seam/pixels": _pixels(paths, x0, x1),
    }
    return rows, {"velocity": _first(heard, sampled, "velocity.")}


def _constant(v: Tensor) -> Field:
    """A velocity that is everywhere the same, of the captions once or several times over."""
    return lambda x: v[: len(x)].repeat(len(x) // len(v[: len(x)]), 1, 1, 1)


def _guidance(paths: Paths, own: Call, null: Tensor) -> float:
    """The first guided step against the recipe's scale on what training answers with and without
    the caption.
    """
    scale, few = paths.subject.recipe.sample.guidance_scale, slice(len(own.x))
    if scale == 1.0:
        return 0.0
    calls = paths.sampled(paths.plain("midpoint", scale), start=own.x)[0].calls
    moved = [call.x[few] - own.x for call in calls if off(call.x[few], own.x) > 0]
    if not moved:
        return math.nan
    return off(STEPS * moved[0], null + scale * (own.v.float() - null))


def _time_code(paths: Paths, x0: Tensor, way: Tensor, led: Heard) -> float:
    """How far the codes that the recipe's solver tells, led along the path, are outside those that
    training tells at both ends of the step in which the state is; over the greatest code.
    """
    along = way.double().flatten() / way.double().square().sum().clamp_min(1e-12)
    at = [float((call.x[: len(x0)].double() - x0).flatten() @ along) for call in led.calls]
    if not at:
        return math.nan
    chosen = np.linspace(0, len(at) - 1, len(x0)).round().astype(int).tolist()
    # the network may be asked more than once in one place
    after = [next((x for x in at[k:] if abs(x - at[k]) > 1e-4), 1.0) for k in chosen]
    codes = torch.stack([led.calls[k].code[0].double().cpu() for k in chosen])
    ends = torch.stack(
        [
            paths.trained(torch.tensor(places).clamp(0, 1))[0].first.code.double().cpu()
            for places in ([at[k] for k in chosen], after)
        ]
    )
    outside = torch.maximum(ends.amin(0) - codes, codes - ends.amax(0)).clamp_min(0)
    return float(outside.max() / ends.abs().max().clamp_min(1e-6))


@torch.no_grad()
def _pixels(paths: Paths, x0: Tensor, x1: Tensor) -> float:
    """`generate`, led to training's own end of the path, against that decoded."""
    subject, model = paths.subject, paths.subject.model
    config, few = subject.recipe.sample, slice(PICTURES)
    captions = list(paths.batch.captions[few])
    with untouched(model), hearing(model, x0[few], _constant((x1 - x0)[few])):
        made = sampling.generate(model, subject.autoencoder, captions, config, 0)
    wanted = (subject.autoencoder.decode_with_grad(x1[few]).clamp(-1, 1) + 1) / 2
    drawn = torch.from_numpy(made).permute(0, 3, 1, 2).double() / 255
    error = float((drawn - wanted.cpu().double()).square().mean().sqrt())
    return error / max(float(wanted.std()), LEAST_CONTRAST)


def _first(trained: Heard, sampled: Heard, part: str) -> str:
    """The first module of a part of the model that differs between the two passes, or what it is
    given; empty where none does.
    """
    other: dict[str, list[tuple[Tensor | None, Tensor]]] = {}
    for name, given, made in sampled.inside:
        other.setdefault(name, []).append((given, made))
    for name, given, made in trained.inside:
        if not name.startswith(part) or not other.get(name):
            continue
        its_given, its_made = other[name].pop(0)
        if given is not None and off(given, its_given) > DIFFERS:
            return f"what {name} is given"
        if off(made, its_made) > DIFFERS:
            return name
    return ""
