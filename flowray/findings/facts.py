"""What a recipe tells the rules, by the names that they use. The one place: the doctor and every
report ask the same.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from flowray.config.dotted import dotted

KEYS: Mapping[str, str] = {
    "steps": "train.steps",
    "batch_size": "train.batch_size",
    "recipe_name": "name",
    "seed": "seed",
    "weights_sampled": "sample.weights",
    "head": "model.head.kind",
    "velocity": "model.velocity.kind",
    "condition": "model.velocity.condition.kind",
    "autoencoder": "model.autoencoder.kind",
    "autoencoder_path": "model.autoencoder.path",
    "precision": "train.precision",
    "velocity_fp32": "train.velocity_fp32",
    "text_dtype": "model.text.dtype",
    "null_probability": "flow.null_probability",
    "guidance_scale": "sample.guidance_scale",
    "sample_steps": "sample.steps",
    "sample_grid": "sample.grid",
    "sample_solver": "sample.solver.kind",
    "lr_peak": "optim.lr",
    "lr_schedule": "optim.schedule.kind",
    "warmup": "optim.schedule.warmup",
    "ema_decay": "train.ema",
    "clip_grad": "optim.clip_grad",
    "weight_decay": "optim.weight_decay",
    "kl_form": "loss.kl.form",
    "kl_weight": "loss.kl.weight",
    "source_grad": "loss.flow.source_grad",
    "balance": "loss.balance.kind",
    "time_kind": "flow.time.kind",
    "time_low": "flow.time.low",
    "time_high": "flow.time.high",
    "uniform_floor": "flow.time.uniform_floor",
    "shards": "data.shards",
}


def recipe_facts(config: Mapping[str, Any]) -> dict[str, Any]:
    """Facts of a recipe, nested or with dotted keys; what the config of an older run lacks is left
    out.
    """
    known = dotted(config)
    facts = {name: known[key] for name, key in KEYS.items() if key in known}
    weights = {
        found[1]: weight
        for key, weight in known.items()
        if (found := re.fullmatch(r"loss\.(\w+)\.weight", key))
    }
    facts["loss_weights"] = {name: weight for name, weight in weights.items() if weight > 0}
    sides = [known.get(f"model.latent.{side}") for side in ("channels", "height", "width")]
    if all(isinstance(side, int) for side in sides):
        facts["latent"] = sides
    low, high = (known.get(f"model.posterior.{end}") for end in ("logvar_min", "logvar_max"))
    if low is not None and high is not None:
        facts |= {"logvar_range": [low, high], "source_capped": high < 0}
    return facts | {"curriculum": bool(known.get("flow.curriculum"))}
