"""A sweep directory made of records alone, for the tests of its report."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

METRIC = "ema/shoot/nmse"
LR = {"distribution": "log_uniform_values", "min": 1e-4, "max": 1e-2}


def make(folder: Path, trials: list[dict[str, Any]], **settings: Any) -> Path:
    """A sweep of these records; a `config` among a record's keys becomes the trial's
    config.yaml.
    """
    folder.mkdir(exist_ok=True)
    plain = {"name": "s", "base": "sweep_proxy", "metric": {"name": METRIC, "goal": "minimize"}}
    (folder / "sweep.yaml").write_text(yaml.safe_dump({**plain, **settings}))
    rows = []
    for number, trial in enumerate(trials):
        config = trial.pop("config", None)
        if config is not None:
            (folder / str(number)).mkdir(exist_ok=True)
            (folder / str(number) / "config.yaml").write_text(yaml.safe_dump(config))
        row = {
            "trial": number,
            "params": {},
            "status": "finished",
            "last_step": 400,
            "budget_steps": 400,
            "metrics": {},
            "seconds": 0.0,
        }
        rows.append(row | {"stopped_by": None, "error": None} | trial)
    (folder / "trials.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder
