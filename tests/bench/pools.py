"""Synthetic pools: closed-form learning curves whose ranks are known."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from benchmarks.pool import Entry, Pool
from flowray.sweepconfig.file import dump_sweep
from flowray.sweepconfig.sweep import Sweep

METRIC, LOSS = "ema/shoot/nmse", "loss/flow"
BUDGET, EVERY = 500, 50


def make_sweep(**changes) -> Sweep:
    plain = {
        "name": "synthetic",
        "base": "sweep_proxy",
        "metric": {"name": METRIC},
        "parameters": {
            "optim.lr": {"distribution": "log_uniform_values", "min": 1e-4, "max": 1e-2},
            "loss.clip.weight": {"distribution": "uniform", "min": 0, "max": 2},
            "model.head.kind": {"distribution": "categorical", "values": ["pooled", "grid"]},
        },
        "early_terminate": {"type": "hyperband", "min_iter": 100, "eta": 3},
        "stop": [{"metric": "ema/std/mean", "below": 0.1, "after": 150, "patience": 2}],
        "max_concurrent": 2,
    }
    return Sweep.model_validate({**plain, **changes})


def make_pool(count: int = 60, *, probe: float = 1.0, loss: float = 0.0, seed: int = 0) -> Pool:
    """`count` random configurations whose quality falls off around one point of the space.

    probe, loss: 1, the metric falls over the steps and ranks as the final score does at each; 0, it
    is noise that knows nothing.
    """
    rng = np.random.default_rng(seed)
    entries = []
    for number in range(count):
        lr, clip, head = (
            10 ** rng.uniform(-4, -2),
            rng.uniform(0, 2),
            ["pooled", "grid"][rng.integers(2)],
        )
        quality = float(
            np.exp(-((np.log10(lr) + 3) ** 2) - (clip - 1) ** 2 / 2)
            * (1.0 if head == "pooled" else 0.9)
        )
        noise = rng.uniform(size=2)
        level = {
            METRIC: probe * (1 - quality) + (1 - probe) * noise[0],
            LOSS: loss * (1 - quality) + (1 - loss) * noise[1],
        }
        rows = tuple(
            {
                "step": step,
                "ema/std/mean": 0.8,
                **{key: 0.1 + value + 50 / step for key, value in level.items()},
            }
            for step in range(EVERY, BUDGET + 1, EVERY)
        )
        params = {"optim.lr": lr, "loss.clip.weight": clip, "model.head.kind": head}
        entries.append(
            Entry(
                number,
                params,
                rows,
                {"mean_attribute_accuracy": quality, "all_correct": quality / 2},
            )
        )
    return Pool(make_sweep(), BUDGET, count, tuple(entries))


def write_pool(pool: Pool, path: Path) -> Path:
    """The pool as the recording command writes it."""
    head = {"sweep": dump_sweep(pool.sweep), "budget_steps": pool.budget_steps, "drawn": pool.drawn}
    lines = [{"pool": {**head, "facts": dict(pool.facts)}}]
    for e in pool.entries:
        lines.append(
            {
                "number": e.number,
                "params": e.params,
                "score": e.score,
                "error": e.error,
                "seconds": 1.0,
                "rows": e.rows,
            }
        )
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path
