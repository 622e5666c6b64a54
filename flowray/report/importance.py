"""How much each parameter mattered in a sweep, from its records alone."""

from __future__ import annotations

import json
from typing import Any

from flowray.report.load import Sweep, numeric, spans_decades

# below the first nothing is said, below the second it is said with a warning
MIN_TRIALS, FEW_TRIALS = 8, 20


def importances(sweep: Sweep) -> dict[str, float]:
    """Share of each varied parameter, summing to 1, most important first (Optuna's PED-ANOVA); {}
    when it cannot be said.

    Trials count at their last value, early-stopped ones too: it says what separates the good region
    from the rest.
    """
    metric = sweep.metric
    trials = [t for t in sweep.trials if t.value(metric.name) is not None and t.status != "failed"]
    # a conditional one has no share
    keys = [key for key in sweep.varied() if key != "seed" and all(key in t.params for t in trials)]
    if not keys or len(trials) < MIN_TRIALS:
        return {}
    import optuna  # slow to import and needed by long sweeps only

    columns = {key: _column([trial.params[key] for trial in trials]) for key in keys}
    spaces = {key: _space(column) for key, column in columns.items()}
    talk = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)  # no line about this throw-away study
    study = optuna.study.create_study(direction=metric.goal)
    optuna.logging.set_verbosity(talk)
    for row, trial in enumerate(trials):
        params = {key: column[row] for key, column in columns.items()}
        study.add_trial(
            optuna.trial.create_trial(
                params=params, distributions=spaces, value=trial.value(metric.name)
            )
        )
    found = optuna.importance.get_param_importances(
        study, evaluator=optuna.importance.PedAnovaImportanceEvaluator()
    )
    return (
        {} if sum(found.values()) == 0 else dict(sorted(found.items(), key=lambda item: -item[1]))
    )


def _column(values: list[Any]) -> list[Any]:
    """The values as numbers where all are, else all as text: null beside numbers is one choice
    among others.
    """
    return values if numeric(values) else [json.dumps(value) for value in values]


def _space(values: list[Any]) -> Any:
    """The narrowest Optuna distribution that holds a whole column."""
    from optuna.distributions import CategoricalDistribution, FloatDistribution

    if numeric(values):
        return FloatDistribution(min(values), max(values), log=spans_decades(values))
    return CategoricalDistribution(sorted(set(values)))
