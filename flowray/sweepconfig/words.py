"""What to type in place of an unknown key: the words of W&B and of Ray Tune among them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from flowray.config.base import Config
from flowray.config.errors import InputError, did_you_mean
from flowray.config.keys import KEYS, alternatives, describe
from flowray.config.schema import kind_of, known_keys, members
from flowray.config.yamlfile import YamlFile
from flowray.sweepconfig.search import LearningSearch
from flowray.sweepconfig.stop import rule_keys
from flowray.sweepconfig.sweep import (
    Asha,
    Hyperband,
    Median,
    Metric,
    Sweep,
    SweepCard,
    SweepResources,
)

_WANDB_ONLY = (
    "program",
    "command",
    "project",
    "entity",
    "description_file",
    "job",
    "image_uri",
    "controller",
    "enable",
)


_INSTEAD = {  # W&B's and Ray's words for what a sweep has under another name
    "prior_runs": "warm_start: [runs/OLD]",
    "num_samples": "run_cap",
    "count": "run_cap",
    "mode": "metric: {name: ..., goal: minimize}",
    "search_alg": "search: {kind: tpe}",
    "scheduler": "early_terminate: {type: hyperband, min_iter: 100}",
    "time_budget_s": "time_budget",
    "max_concurrent_trials": "max_concurrent",
    "param_space": "parameters",
    "resources_per_trial": "resources",
}


def unknown_key_words(key: str) -> str:
    if key in known_keys():
        return (
            f"{key} is a recipe key; for every trial type set.{key}=..., to search it put it under"
            " parameters"
        )
    if key in _INSTEAD:
        return f"{key} is called otherwise here; type {_INSTEAD[key]}"
    if key in _WANDB_ONLY:
        return f"{key} is known to W&B only; leave it out (base names the recipe that is trained)"
    return (
        f"unknown key {key}{did_you_mean(key, Sweep.model_fields)}; allowed:"
        f" {', '.join(Sweep.model_fields)}"
    )


def allowed_words(loc: tuple[int | str, ...]) -> str:
    models: dict[str, Any] = {name: field.annotation for name, field in Sweep.model_fields.items()}
    sections: dict[str, type[Config]] = {
        "metric": Metric,
        "card": SweepCard,
        "resources": SweepResources,
    }
    kinds = {name: ", ".join(model.model_fields) for name, model in sections.items()}
    kinds["stop"] = ", ".join(rule_keys())
    if loc[0] == "search":
        kinds["search"] = ", ".join(
            next(
                (cls.model_fields for cls in members(LearningSearch) if kind_of(cls) in loc),
                ["kind"],
            )
        )
    if loc[0] == "early_terminate":
        named = next((cls for cls in (Asha, Median) if cls.__name__.lower() in loc), Hyperband)
        kinds["early_terminate"] = ", ".join(named.model_fields)
    allowed = kinds.get(str(loc[0]), ", ".join(models))
    return f"{did_you_mean(str(loc[-1]), allowed.split(', '))}; allowed: {allowed}"


def check_metrics(data: Mapping[str, Any], file: YamlFile) -> None:
    """A misspelt metric would never stop a trial, and end the sweep without a value."""
    metric, rules = data.get("metric"), data.get("stop")
    named = {"metric.name": _at(metric, "name")}
    for index, each in enumerate(metric if isinstance(metric, list) else ()):
        named[f"metric[{index}].name"] = _at(each, "name")
    for index, each in enumerate(rules if isinstance(rules, list) else ()):
        named[f"stop[{index}].metric"] = _at(each, "metric")
    known = [name for key in KEYS for name in alternatives(key.name)]
    for key, name in named.items():
        if isinstance(name, str) and describe(name) is None:
            near = (
                did_you_mean(name, [*known, *(f"ema/{k}" for k in known)])
                or "; trials are judged by a probe, such as ema/shoot/nmse"
            )
            where = file.where(key.partition("[")[0])
            raise InputError(f"{where}: {key}: unknown metric {name}{near}")
    if _at(metric, "target") is not None:
        raise InputError(
            f"{file.where('metric.target')}: metric.target: a sweep has no target; it ends with"
            " run_cap or time_budget"
        )


def _at(section: Any, key: str) -> Any:
    return section.get(key) if isinstance(section, Mapping) else None


def check_halving(early: Any, file: YamlFile) -> None:
    """W&B also gives the rungs from the top down: max_iter / eta, max_iter / eta^2, ..., s of
    them.
    """
    if not isinstance(early, Mapping) or "max_iter" not in early or "min_iter" in early:
        return
    try:
        eta, levels = float(early.get("eta", 3)), float(early.get("s", 1))
        first = max(1, round(float(early["max_iter"]) / eta**levels))
        least = f"; yours is min_iter: {first}"
    except (TypeError, ValueError, ArithmeticError):
        least = ""
    raise InputError(
        f"{file.where('early_terminate.max_iter')}: early_terminate: max_iter and s are W&B's; type"
        f" min_iter, the first rung in steps, max_iter / eta^s{least}"
    )
