"""The doctor's examination: a subject (a run directory, a checkpoint, a live state) becomes
numbers, facts, pictures and curves.

It judges nothing; flowray.findings reads what is here.
"""

from __future__ import annotations

import math
import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from flowray.config.progress import SILENT, Progress
from flowray.config.rows import Row
from flowray.doctor.battery import PARTS, run_battery
from flowray.doctor.measured import Measured
from flowray.doctor.subject import Subject
from flowray.findings.facts import recipe_facts
from flowray.probes.field import BIN_CENTRES, BINS
from flowray.probes.rollout import ENDPOINT_STEPS, TEACHER_STEPS
from flowray.probes.shots import DT_SCALES

Curves = dict[str, dict[str, list[float]]]


@dataclass(frozen=True)
class Examination:
    """metrics: flat, by key; raw weights, or `ema/KEY`, or the sampler's weights where
    flowray/config/keys.py says so.

    history: rows of metrics.jsonl and probes.jsonl by step. facts: what the recipe and the files
    say. pictures: uint8 (N, H, W, 3). curves: series by name, `x` the axis. What could not be
    measured is absent, and `facts["notes"]` says why.
    """

    where: str
    step: int
    metrics: dict[str, float]
    history: list[Row]
    facts: dict[str, Any]
    pictures: dict[str, np.ndarray]
    curves: Curves


def examine(
    subject: Subject,
    *,
    batch: int | None = None,
    seed: int = 0,
    parts: Collection[str] = PARTS,
    progress: Progress = SILENT,
) -> Examination:
    """Examine an opened run or a live state (flowray.doctor.subject); it is the same after it as
    before.

    batch: samples, as many as the recipe's own probes have unless given; with seed 0 the very same
    ones. parts: of battery.PARTS; without `standard`, which training's own probes measure, and
    `field` it takes seconds. A live state's weights, gradients, optimiser, RNG and module modes are
    not changed.
    """
    start = time.perf_counter()
    count = batch or subject.recipe.probes.batch_size
    made = run_battery(subject, count, seed, parts, progress)
    made.metrics |= {f"lr/{group}": rate for group, rate in subject.rates(subject.lr).items()}
    facts = _facts(subject) | _data_facts(subject, made) | made.facts
    facts |= {"notes": made.notes, "seconds": time.perf_counter() - start}
    return Examination(
        subject.where,
        subject.step,
        made.metrics,
        subject.history,
        facts,
        made.pictures,
        _curves(made, subject),
    )


def _facts(subject: Subject) -> dict[str, Any]:
    """What the recipe says, flat."""
    recipe = subject.recipe
    return recipe_facts(recipe.model_dump(mode="json")) | {
        "step": subject.step,
        "run": subject.where,
        "lr": subject.lr,
        "warmup_over": subject.step >= recipe.optim.schedule.warmup,
        "parameters": sum(p.numel() for p in subject.parameters.values()),
    }


def _data_facts(subject: Subject, made: Measured) -> dict[str, Any]:
    """What the files say: sizes, the latent scale in use, in the cache and in the autoencoder's
    own config.
    """
    scale, own = subject.autoencoder.scale, subject.autoencoder.net.config
    samples, duplicates = len(subject.latents), made.metrics.get("data/duplicate_share", 0.0)
    return {
        "samples": samples,
        "val_samples": len(subject.held_out),
        "duplicates": round(duplicates * samples),
        "epochs": made.metrics.get("data/epochs", 0.0),
        "scale": scale.scale,
        "scale_cached": subject.latents.scale.scale,
        "scale_own": getattr(own, "scaling_factor", None),
        "shift": float(np.mean(scale.shift)),
        "deterministic": scale.deterministic,
    }


def _curves(made: Measured, subject: Subject) -> Curves:
    """The series that a report draws, from the rows."""
    curves, sampled = dict(made.curves), "ema/" if subject.recipe.sample.weights == "ema" else ""

    def series(places: Sequence[float], **keys: str) -> dict[str, list[float]]:
        found = {
            name: [made.metrics.get(key.format(place), math.nan) for place in places]
            for name, key in keys.items()
        }
        return {"x": [float(place) for place in places]} | found

    curves["t"] = (
        curves.get("t", {})
        | series(
            range(BINS),
            nmse="flow/nmse_t{}",
            cos="flow/cos_t{}",
            gain_ls="gain/ls_t{}",
            gain_median="gain/median_t{}",
            ema_nmse="ema/flow/nmse_t{}",
            ema_cos="ema/flow/cos_t{}",
        )
        | {"x": BIN_CENTRES}
    )
    curves["endpoint"] = series(
        ENDPOINT_STEPS,
        euler=f"{sampled}flow/endpt_rmse@{{}}",
        heun="flow/endpt_rmse_heun@{}",
        standing_still="trivial/flow/endpt_rmse@{}",
    )
    curves["teacher"] = series(TEACHER_STEPS, fp32="teacher/mse@{}", native="teacher_native/mse@{}")
    curves["dt_scale"] = series(DT_SCALES, nmse="shoot/nmse_dt{}")
    return curves
