"""The full battery of a subject: every number that a finding reads, the pictures and the curves
that show it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from functools import cache

import numpy as np
import torch
from torch import Tensor

from flowray.config.progress import SILENT, Progress
from flowray.data.pixels import from_pictures
from flowray.doctor.dataset import SHOWN, ask_autoencoder, ask_data, indices_of
from flowray.doctor.measured import Measured, Rows
from flowray.doctor.optimiser import head_patterns, replays
from flowray.doctor.parts import parts_rows
from flowray.doctor.sampler import (
    latent_metrics,
    native_teacher,
    opened_metrics,
    picture_metrics,
    strip_psnr,
)
from flowray.doctor.seams import seam_rows
from flowray.doctor.subject import Subject
from flowray.doctor.terms import term_rows
from flowray.doctor.training import first_rows, same_batch_rows, training_rows
from flowray.flow.guidance import conditional, with_time_code
from flowray.flow.path import sample_path, time_code
from flowray.flow.solver import VelocityFn, time_grid
from flowray.model.assemble import Source
from flowray.model.posterior import Posterior
from flowray.model.ranks import rank_and_world
from flowray.probes.battery import ProbeBatch, make_probe_batch, run_probes
from flowray.probes.calibrate import (
    aligned,
    code_metrics,
    fit_metrics,
    gain_metrics,
    null_metrics,
    variant_metrics,
    view_field,
)
from flowray.probes.field import best_gain
from flowray.probes.interface import histogram
from flowray.probes.latent import pairwise_cosine
from flowray.probes.rollout import ENDPOINT_STEPS, mse, shoot
from flowray.probes.shots import (
    falling,
    gain_shots,
    heun_metrics,
    shot_metrics,
    trace_generation,
    trace_metrics,
)
from flowray.probes.untouched import untouched
from flowray.sample.generate import in_precision

# In this order; what each looks at. `standard` and `field` take most of the time.
PARTS = {
    "weights": "how far the weights have moved",
    "data": "the data, and whether captions tell its pictures",
    "autoencoder": "the autoencoder on held-out pictures",
    "training": "the losses and gradients of the next batch",
    "standard": "what training's own probes measure",
    "field": "what the velocity network predicts",
    "sampler": "pictures as flowray.sample draws them",
}
QUICK_STEPS = 25  # Euler steps of the shots that are compared among themselves only
EDGES = np.linspace(-4, 4, 41).tolist()


def run_battery(
    subject: Subject,
    count: int,
    seed: int,
    parts: Collection[str] = PARTS,
    progress: Progress = SILENT,
) -> Measured:
    """The probes of `parts` on `count` samples.

    One that cannot be made (no pictures left, captions all alike) becomes a note.
    """
    made = Measured()

    @cache
    def batch() -> ProbeBatch:
        return _probe_batch(subject, count, seed)

    probes: dict[str, Callable[[], None]] = {
        "weights": lambda: _weights(subject, made),
        "data": lambda: ask_data(subject, made),
        "autoencoder": lambda: ask_autoencoder(subject, made),
        "training": lambda: _training(subject, made, count),
        "standard": lambda: _standard(subject, made, batch(), count),
        "field": lambda: _field(subject, made, batch()),
        "sampler": lambda: _sampler(subject, made, batch()),
    }
    for name in PARTS:
        if name not in parts:
            continue
        looking = progress.task(f"probing: {PARTS[name]}")
        with made.trying(name), looking, untouched(subject.model):
            probes[name]()
    return made


def _probe_batch(subject: Subject, count: int, seed: int, *, training: bool = False) -> ProbeBatch:
    """The first `count` held-out (or training) samples; seed 0 is the noise that training's own
    probes have.
    """
    probes = subject.recipe.probes.model_copy(
        update={"batch_size": max(count, 4), "seed": subject.recipe.probes.seed + seed}
    )
    recipe = subject.recipe.model_copy(update={"probes": probes})
    sets = (subject.latents, None) if training else (subject.held_out, subject.latents)
    return make_probe_batch(recipe, sets[0], subject.device, sets[1])


def _standard(subject: Subject, made: Measured, batch: ProbeBatch, count: int) -> None:
    """The probes of training on raw and EMA weights, where there is an EMA, and on training
    samples; end points of the weights that sampling uses.
    """
    averaged = {"ema": "ema/"} if subject.ema else {}
    for kind, prefix in (averaged | {"raw": ""}).items():
        with subject.weights(kind):
            rows = run_probes(
                subject.model,
                subject.recipe,
                batch,
                endpoints=kind == subject.recipe.sample.weights,
            )
        made.metrics |= {
            key if key.startswith("trivial/") else f"{prefix}{key}": value
            for key, value in rows.items()
        }
    named = {"shoot_nmse": "shoot/nmse", "flow_nmse": "flow/nmse", "flow_cos": "flow/cos"}
    with made.trying("standard: training samples"):
        ours = _probe_batch(subject, count, 0, training=True)
        with subject.weights(subject.recipe.sample.weights):
            fitted = run_probes(subject.model, subject.recipe, ours, endpoints=False)
        made.metrics |= {f"train_set/{name}": fitted[key] for name, key in named.items()}


def _velocity(subject: Subject, source: Source) -> VelocityFn:
    return conditional(with_time_code(subject.model.field(source)))


@torch.no_grad()
def _field(subject: Subject, made: Measured, batch: ProbeBatch) -> None:
    """What the sampler's weights predict: fits, gains, variants, time codes, null, shots."""
    model, rho, variance = subject.model.eval(), subject.recipe.flow.path.rho, batch.variance
    with subject.weights(subject.recipe.sample.weights):
        source = model.source(batch.captions, batch.noise)
        posterior, z0, network = source.posterior, source.z0, model.field(source)
        velocity_fn = _velocity(subject, source)
        view = view_field(velocity_fn, z0, batch.z1, batch.noise, batch.times, rho)
        null = torch.ones(len(z0), dtype=torch.bool, device=z0.device)
        rows = (
            fit_metrics(view)
            | gain_metrics(view)
            | variant_metrics(velocity_fn, view, z0, batch.z1, rho)
        )
        rows |= code_metrics(lambda x, code: network(x, code, torch.zeros_like(null)), view)
        middle = sample_path(batch.times[len(batch.times) // 2], z0, batch.z1, rho)
        own, other = (
            network(middle.xt, time_code(middle.t), flag).float() for flag in (~null, null)
        )
        rows |= null_metrics(own, other, middle.v_target)
        rows |= heun_metrics(velocity_fn, z0, batch.z1) | shot_metrics(
            velocity_fn, z0, batch.z1, variance, QUICK_STEPS
        )
        gains = {"ls": float(best_gain(view.v_pred, view.v_target)), "median": rows["gain/median"]}
        rows |= {"gain/shoot_nmse_none": rows["shoot/nmse_dt1"]} | gain_shots(
            velocity_fn, z0, batch.z1, variance, QUICK_STEPS, gains
        )
        straight = aligned(velocity_fn, z0, batch.z1, rho)
        rows["variant/aligned_shoot_nmse"] = (
            mse(shoot(straight, z0, QUICK_STEPS), batch.z1) / variance
        )
        made.facts["prompts"] = prompts_of(subject)
        rows |= _time_embedding(subject, batch.times[:, 0])
        if model.head is not None:
            rows |= _text(subject, posterior, made.facts["prompts"])
    made.metrics |= rows
    prefix = "ema/" if subject.recipe.sample.weights == "ema" else ""
    keys = {f"{prefix}flow/endpt_rmse@{k}": f"flow/endpt_rmse@{k}" for k in ENDPOINT_STEPS}
    made.metrics |= falling(
        rows | {key: made.metrics[wanted] for wanted, key in keys.items() if wanted in made.metrics}
    )
    shown = {"z0": z0, "z1": batch.z1} | ({} if model.head is None else {"mu": posterior.mu})
    made.curves["latents"] = histogram(shown, EDGES)


def _text(subject: Subject, posterior: Posterior, prompts: list[str]) -> Rows:
    """text/cos_prompts and what the clamp and the noise leave of a text source's posterior."""
    bounds, model = subject.recipe.model.posterior, subject.model
    mu, logvar = posterior.mu, posterior.logvar
    # a recipe that keeps sigma under the prior's width means its source to sit there
    capped = bounds.logvar_max < 0
    clamped = (logvar <= bounds.logvar_min + 1e-4) | (
        (logvar >= bounds.logvar_max - 1e-4) & (not capped)
    )
    rows = {
        "logvar/min": float(logvar.min()),
        "logvar/max": float(logvar.max()),
        "logvar/clamped_share": float(clamped.float().mean()),
    }
    spread = posterior.std.square().mean().sqrt()
    rows["mu/rms_over_std"] = float(mu.square().mean().sqrt() / spread)
    if len(prompts) > 1:
        rows["text/cos_prompts"] = pairwise_cosine(model.posterior(model.read(prompts)).mu)
    return rows


def prompts_of(subject: Subject) -> list[str]:
    """The recipe's prompts, else held-out captions that differ, as the sample strip has them."""
    texts = [subject.held_out.captions(i)[0] for i in range(min(len(subject.held_out), 10 * SHOWN))]
    return list(subject.recipe.sample.prompts or tuple(dict.fromkeys(texts)))[:SHOWN]


def _time_embedding(subject: Subject, times: Tensor) -> Rows:
    """time/embed_norm, mean over times, and its ratio to the norm of an embedded token of noise;
    nothing for a network without one.
    """
    velocity = subject.model.velocity
    embed, patch_in = getattr(velocity, "time", None), getattr(velocity, "patch_in", None)
    if embed is None:
        return {}
    norm = float(embed(time_code(times)).norm(dim=-1).mean())
    rows = {"time/embed_norm": norm}
    if patch_in is not None:
        # of white noise, whose tokens have mean square |W|^2 + |b|^2: no draw is needed
        token = float((patch_in.weight.square().sum() + patch_in.bias.square().sum()).sqrt())
        rows["time/embed_ratio"] = norm / max(token, 1e-12)
    return rows


@torch.no_grad()
def _sampler(subject: Subject, made: Measured, batch: ProbeBatch) -> None:
    """sample.generate against the probes' own integration, the trace of a generation, and which
    weights the strip shows.
    """
    model, config, recipe = subject.model.eval(), subject.recipe.sample, subject.recipe
    prompts, decode = prompts_of(subject), subject.autoencoder.decode
    with subject.weights(config.weights):
        with in_precision(config, batch.noise.device):
            source = model.source(batch.captions, batch.noise)
        rows, z_end = latent_metrics(model, config, batch, source)
        rows |= native_teacher(
            source.z0, batch.z1, batch.captions, batch.noise, config, recipe.flow.path.rho
        )
        trace = trace_generation(
            _velocity(subject, source),
            config.solver,
            time_grid(config.grid, config.steps),
            source.z0,
            decode,
            SHOWN,
        )
        rows |= trace_metrics(trace)
        pictured, made.pictures["samples"] = picture_metrics(
            model, subject.autoencoder, config, prompts, recipe.probes.seed
        )
    made.metrics |= rows | pictured
    made.facts["captions"] = list(batch.captions[:SHOWN])
    made.pictures |= {
        "trace_init": from_pictures(trace.init_pictures),
        "trace_end": from_pictures(trace.end_pictures),
    }
    made.curves.setdefault("latents", {})["z_end"] = histogram({"z_end": z_end}, EDGES)["z_end"]
    with made.trying("sampler: the weights that sampling opens"):
        made.metrics |= opened_metrics(subject)
    if (strip := subject.strip) is None:
        return
    with made.trying("sampler: the samples that training wrote"):
        for kind in ("ema", "raw"):
            with subject.weights(kind):
                _, drawn = picture_metrics(
                    model, subject.autoencoder, config, prompts, recipe.probes.seed
                )
            if (close := strip_psnr(strip, drawn)) is not None:
                made.metrics[f"sampler/strip_psnr_{kind}"] = close


def _training(subject: Subject, made: Measured, count: int) -> None:
    """Gradients and the same batch in both paths, on the batch of the next step."""
    if rank_and_world()[1] > 1:
        made.notes.append(
            "training: not measured by one of several ranks; run the doctor on the checkpoint"
        )
        return
    made.metrics |= term_rows(subject.recipe)
    batch = first_rows(subject.batches(subject.step), count)
    rows, found = training_rows(subject, batch)
    if replays(subject) and not any(key.startswith("optim/replay/") for key in rows):
        made.notes.append(
            "training: a step on a copy of the model could not be made: it halts, or finds no room"
        )
    made.metrics |= rows | same_batch_rows(subject, batch)
    seams, made.facts["seams"] = seam_rows(subject, batch)
    made.metrics |= seams
    if rows_to_blame := found.pop("rows", []):
        found["keys"] = [
            subject.latents.reader.key(int(i))
            for i in indices_of(subject, subject.step)[rows_to_blame][:5]
        ]
    made.facts["nonfinite"] = found | made.facts.get("nonfinite", {})
    taking_part, made.facts["least"] = parts_rows(subject, count)
    made.metrics |= taking_part
    for name in (key.removeprefix("share/") for key in rows if key.startswith("share/")):
        made.curves.setdefault("shares", {})[name] = [
            rows[f"grad/{name}"],
            rows[f"grad/{name}_weighted"],
        ]


@torch.no_grad()
def _weights(subject: Subject, made: Measured) -> None:
    """How far the weights have moved, how far the EMA is from them, and whether all are finite."""
    raw, average = {name: p.detach() for name, p in subject.parameters.items()}, subject.ema
    finite = {"parameters": raw, "ema": average}
    for name, tensors in finite.items():
        made.metrics[f"finite/{name}"] = float(
            np.mean([bool(x.isfinite().all()) for x in tensors.values()])
        )
        if bad := next((key for key, x in tensors.items() if not bool(x.isfinite().all())), None):
            made.facts.setdefault("nonfinite", {})["parameter"] = bad
    average = {name: x.to(raw[name].device, raw[name].dtype) for name, x in average.items()}
    made.metrics["ema/delta_relative"] = _distance(average, raw)
    numbers = sum(x.numel() for x in raw.values())
    made.metrics["ema/delta_rms"] = (
        _norm({n: average[n] - raw[n] for n in raw}) ** 2 / numbers
    ) ** 0.5
    if (initial := subject.initial) is None:
        return
    initial = {name: x.to(raw[name].device) for name, x in initial.items()}
    gone = _distance(raw, initial)
    made.metrics["ema/moved"] = _distance(average, initial) / gone if gone > 0 else 1.0
    groups = {
        group: [n for n in raw if pattern.match(n)]
        for group, pattern in head_patterns(subject.model).items()
    }
    parts = {"head": groups["z_head"], "flow_head": groups["flow_head"]}
    parts |= {part: [n for n in raw if n.startswith(f"{part}.")] for part in ("text", "velocity")}
    for part, names in parts.items():
        if names:
            made.metrics[f"moved/{part}"] = _distance(
                {n: raw[n] for n in names}, {n: initial[n] for n in names}
            )


def _norm(tensors: dict[str, Tensor]) -> float:
    return float(torch.stack([x.float().square().sum() for x in tensors.values()]).sum().sqrt())


def _distance(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    """||a - b|| / ||b|| over all tensors; over ||a|| where b is 0 throughout."""
    return _norm({n: a[n] - b[n] for n in b}) / max(_norm(b) or _norm(a), 1e-12)
