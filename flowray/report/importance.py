"""How much each parameter mattered in a sweep, from its records alone."""

from __future__ import annotations

import json
from typing import Any

from flowray.report.load import Sweep, numeric, spans_decades

MIN_TRIALS, FEW_TRIALS = 8, 20  # below the first nothing is said, below the second it is said with a warning


def importances(sweep: Sweep) -> dict[str, float]:
    """Share of each varied parameter, summing to 1, most important first (Optuna's PED-ANOVA); {} when it cannot be said.

    Trials count at their last value, early-stopped ones too: it says what separates the good region from the rest.
    """
    metric = sweep.metric
    trials = [t for t in sweep.trials if t.value(metric.name) is not None and t.status != "failed"]
    keys = [key for key in sweep.varied() if key != "seed" and all(key in t.params for t in trials)]  # a conditional one has no share
    if not keys or len(trials) < MIN_TRIALS:
        return {}
    import optuna  # slow to import and needed by long sweeps only

    spaces = {key: _space([trial.params[key] for trial in trials]) for key in keys}
    talk = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)  # no line about this throw-away study
    study = optuna.study.create_study(direction=metric.goal)
    optuna.logging.set_verbosity(talk)
    for trial in trials:
        params = {key: trial.params[key] if numeric([trial.params[key]]) else json.dumps(trial.params[key]) for key in keys}
        study.add_trial(optuna.trial.create_trial(params=params, distributions=spaces, value=trial.value(metric.name)))
    found = optuna.importance.get_param_importances(study, evaluator=optuna.importance.PedAnovaImportanceEvaluator())
    return {} if sum(found.values()) == 0 else dict(sorted(found.items(), key=lambda item: -item[1]))


def _space(values: list[Any]) -> Any:
    """The narrowest Optuna distribution that holds all values."""
    from optuna.distributions import CategoricalDistribution, FloatDistribution

    if numeric(values):
        return FloatDistribution(min(values), max(values), log=spans_decades(values))
    return CategoricalDistribution(sorted({json.dumps(value) for value in values}))
