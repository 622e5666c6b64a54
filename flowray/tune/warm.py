"""Trials of earlier sweeps as a start: what a sampler may learn from them without mixing what
does not compare.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from optuna.trial import FixedTrial, FrozenTrial, TrialState, create_trial

from flowray.config.errors import InputError
from flowray.config.load import load_recipe, override_recipe, recipe_diffs
from flowray.config.recipe import Recipe
from flowray.config.rows import read_rows
from flowray.config.scale import OLDER_UNIT, older_unit
from flowray.sweepconfig.distributions import Categorical, Constant, drawn, in_order, inside
from flowray.sweepconfig.sweep import Sweep
from flowray.tune.ledger import Ledger
from flowray.tune.records import TrialRecord
from flowray.tune.space import Params, as_categories, suggest
from flowray.tune.study import FROM

# what may differ between trials that compare: places, cadence, and what only shows
_CADENCE = (
    "log_every",
    "probe_every",
    "sample_every",
    "checkpoint_every",
    "keep_checkpoints",
    "keep_best",
    "checkpoint_url",
    "checkpoint_patience_s",
    "on_changed_data",
    "grad_every",
    "device",
)
_PLACES = (
    "name",
    "storage_path",
    "seed",
    "card",
    "resources",
    "sample",
    "data.cache",
    "data.max_bad",
    "probes.raw",
    "probes.doctor_every",
)
_ABSENT = object()  # null is a value
_FREE = (*_PLACES, *(f"train.{key}" for key in _CADENCE))


@dataclass(frozen=True)
class Earlier:
    """trials: those taken over; left_out: why others are not -> how many."""

    trials: tuple[FrozenTrial, ...]
    left_out: Counter[str]

    def __str__(self) -> str:
        why = "; ".join(f"{count} left out: {reason}" for reason, count in self.left_out.items())
        return f"warm start with {len(self.trials)} trials" + (f" ({why})" if why else "")


def earlier_trials(sweep: Sweep, base: Recipe) -> Earlier:
    """The finished and stopped trials of `warm_start` whose recipes differ from this sweep's base
    in searched keys alone, in range.

    So the data, the autoencoder, the latent and its scale, the losses that are not searched and the
    number of steps are the same, or the trial stays out. Stopped ones come with their values up to
    the stop. InputError where a folder holds no sweep.
    """
    trials: list[FrozenTrial] = []
    left_out: Counter[str] = Counter()
    for source in sweep.warm_start:
        folder = Path(source)
        if not (folder / "trials.jsonl").is_file():
            raise InputError(
                f"warm_start: {source} holds no sweep (no trials.jsonl); give a sweep directory"
                " such as runs/head"
            )
        for record in Ledger(folder / "trials.jsonl").trials.values():
            if record.status not in ("finished", "stopped", "waiting"):
                continue
            made = _taken_over(sweep, base, folder / str(record.trial), record)
            if isinstance(made, str):
                left_out[made] += 1
            else:
                trials.append(made)
    return Earlier(tuple(trials), left_out)


def _taken_over(
    sweep: Sweep, base: Recipe, run_dir: Path, record: TrialRecord
) -> FrozenTrial | str:
    """The trial as the new study has it, or why not."""
    if not (run_dir / "config.yaml").is_file():
        return "no config.yaml"
    recipe = load_recipe(str(run_dir / "config.yaml")).recipe
    params = _params(sweep, recipe)
    if isinstance(params, str):
        return params
    differing = [
        key
        for key in recipe_diffs(override_recipe(base, params), recipe)
        if not any(f"{key}.".startswith(f"{f}.") for f in _FREE)
    ]
    if differing:
        return f"{differing[0]} differs"
    for metric in sweep.objectives:
        if older_unit(metric.name, record.metrics):
            return f"{metric.name} {OLDER_UNIT}"
    values = [record.metrics.get(metric.name) for metric in sweep.objectives]
    told = [value for value in values if value is not None]
    if len(told) < len(values):
        return f"no {sweep.objectives[values.index(None)].name}"
    plain = as_categories(sweep.parameters, params)
    asked = FixedTrial(plain)
    suggest(asked, sweep.parameters)
    seen: dict[int, float] = {}
    if not sweep.more_metrics:
        rows = [
            (row["step"], row.get(sweep.metric.name)) for row in read_rows(run_dir / "probes.jsonl")
        ]
        seen = {step: value for step, value in rows if value is not None}
    stopped = record.status != "finished"
    if stopped and not seen:
        return "stopped, without a value at its step"
    return create_trial(
        state=TrialState.PRUNED if stopped else TrialState.COMPLETE,
        values=told,
        params=plain,
        distributions=asked.distributions,
        intermediate_values=seen,
        user_attrs={FROM: str(run_dir)},
    )


def _params(sweep: Sweep, recipe: Recipe) -> Params | str:
    """What the recipe has of the searched keys, or the one that is out of range."""
    params: Params = {}
    for key in in_order(sweep.parameters):
        parameter = sweep.parameters[key]
        if not drawn(parameter, params):
            continue
        value: Any = recipe
        for name in key.split("."):
            value = getattr(value, name, _ABSENT)
        ranged = not isinstance(parameter, Categorical | Constant)
        if value is _ABSENT or (value is None and ranged) or not inside(parameter, value):
            return f"{key} out of range"
        params[key] = value
    return params
