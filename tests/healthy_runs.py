"""Healthy runs of many settings, drawn once and for all: `CALIB`, by which the doctor's thresholds
are set, and those on which its false alarms are counted: `FRESH` first, `LATER` when what FRESH
showed had been mended, `LAST` when what LATER showed had been.

Healthy by construction: every draw is a setting that a researcher would call sane. None was chosen
or left out by what the doctor says of it. Where captions leave things open, z0 is as wide as the
data or noise, because a narrow source is a fault there.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from faults import ADALN, ANCHORED, NOISE, OPEN, Fault, Pictures

COUNT = 40
HEADS: tuple[dict[str, Any], ...] = (
    {"kind": "pooled", "hidden": 1024},
    {"kind": "grid"},
    {"kind": "conv"},
    {"kind": "transencoder", "layers": 2, "ffn": 256},
)
CROSS = {"model.velocity.condition": {"kind": "cross_attention"}}
EMA = {150: (0.95, 0.97, 0.98), 300: (0.97, 0.98, 0.99), 450: (0.98, 0.99, 0.993)}
PICTURES: tuple[Pictures, ...] = ("closed", "open", "digits")


def _pick(rng: np.random.Generator, options: Any) -> Any:
    return options[int(rng.integers(len(options)))]


def _near(rng: np.random.Generator, value: float, factor: float) -> float:
    """The value up to `factor` times more or less, to two digits."""
    return float(f"{value * factor ** rng.uniform(-1, 1):.1e}")


def _text_source(rng: np.random.Generator, pictures: Pictures) -> dict[str, Any]:
    """Head, source and condition of a text source."""
    condition = _pick(rng, ({}, ADALN, CROSS))
    keys: dict[str, Any] = {"model.head": _pick(rng, HEADS), **condition}
    style = _pick(rng, ("free", "anchored", "wide")) if pictures == "closed" else "wide"
    if style == "free":
        keys |= {"loss.kl.weight": _near(rng, 2.0, 1.5), "loss.clip.weight": _near(rng, 0.3, 1.7)}
    elif style == "anchored":
        keys |= {**ANCHORED, "loss.anchor.weight": _near(rng, 4.0, 1.5)}
        keys |= _pick(rng, ({}, {"loss.clip.weight": 0.0}))
    else:
        keys |= {**OPEN, "loss.anchor.weight": _near(rng, 1.0, 1.6)}
        keys |= {"loss.kl.weight": _near(rng, 0.1, 1.6)}
        if condition:
            keys["model.source"] = {"kind": "text", "drop_null": bool(rng.integers(2))}
    return keys


def _time(rng: np.random.Generator, *, near_text: bool) -> dict[str, Any]:
    kinds: list[dict[str, Any]] = [
        {"kind": "uniform"},
        {"kind": "logit_normal", "mean": _pick(rng, (-0.3, 0.0, 0.3))},
        {"kind": "log_snr"},
        {"kind": "alpha", "low": 0.0, "high": 0.15, "uniform_floor": 0.35},
    ]
    return dict(_pick(rng, kinds if near_text else kinds[:3]))


def draw(name: str, *seed: int) -> Fault:
    """The healthy run of this seed."""
    rng = np.random.default_rng([16, *seed])
    pictures: Pictures = _pick(rng, PICTURES)
    noise = rng.uniform() < 0.35
    source = {**NOISE, **_pick(rng, (ADALN, CROSS)), "loss.clip.weight": 0.0}
    keys = source if noise else _text_source(rng, pictures)
    steps, batch = _pick(rng, (150, 300, 450)), _pick(rng, (16, 32, 64))
    width = _pick(rng, (48, 64, 96, 128))
    # less for wide networks and small batches, as is usual
    lr = 3e-3 * (64 / width) ** 0.5 * (batch / 32) ** 0.5
    keys |= {
        "seed": int(rng.integers(1000)),
        "model.velocity.width": width,
        "model.velocity.depth": _pick(rng, (2, 3, 4)),
        "model.velocity.indicator": _pick(rng, ("embedding", "token")),
        "flow.time": _time(rng, near_text=not noise and pictures == "closed"),
        "flow.null_probability": _pick(rng, (0.1, 0.1, 0.15)),
        "optim.lr": _near(rng, min(lr, 4e-3), 1.3),
        "optim.clip_grad": _pick(rng, (1.0, 2.0)),
        "optim.weight_decay": _pick(rng, (0.0, 0.01, 0.03)),
        "optim.betas": _pick(rng, ([0.9, 0.95], [0.9, 0.99])),
        "optim.schedule": {
            "kind": _pick(rng, ("cosine", "cosine", "constant")),
            "warmup": _pick(rng, (10, 20, 30)),
        },
        "train.steps": steps,
        "train.batch_size": batch,
        "train.probe_every": steps // 2,
        "train.ema": _pick(rng, EMA[steps]),
        "sample.guidance_scale": _pick(rng, (1.0, 1.0, 2.0)),
    }
    return Fault(name, (), keys, pictures=pictures)


CALIB = tuple(draw(f"calib_{i:02d}", 0, i) for i in range(COUNT))
FRESH = tuple(draw(f"fresh_{i:02d}", 1, i) for i in range(COUNT))
LATER = tuple(draw(f"later_{i:02d}", 2, i) for i in range(COUNT))
LAST = tuple(draw(f"last_{i:02d}", 3, i) for i in range(COUNT))
