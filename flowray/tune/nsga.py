"""NSGA-II whose generations also count the trials that early stopping cut short.

Optuna's counts finished trials only: where halving stops most of them its first generation, drawn
at random, hardly ends. Here a trial that was stopped, or has come to a rung, is one of its
generation, behind all that went further and compared with those that came as far.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import Any

from optuna.distributions import BaseDistribution
from optuna.samplers import NSGAIISampler
from optuna.study import Study, StudyDirection
from optuna.trial import FrozenTrial, TrialState

from flowray.tune.optuna_private import ViewedStudy

# attribute of a trial of several metrics, which has no intermediate values: the step of its values
STEP = "flowray:step"


class RungNsga(NSGAIISampler):
    """Optuna's NSGA-II on the trials as `graded` ranks them. Its name stands in studies on disk."""

    def infer_relative_search_space(
        self, study: Study, trial: FrozenTrial
    ) -> dict[str, BaseDistribution]:
        return super().infer_relative_search_space(_graded_study(study), trial)

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        return super().sample_relative(_graded_study(study), trial, search_space)

    def get_parent_population(self, study: Study, generation: int) -> list[FrozenTrial]:
        """Without the parents that went on from their rung and then failed."""
        return [
            parent
            for parent in super().get_parent_population(study, generation)
            if parent.state == TrialState.COMPLETE
        ]


def _graded_study(study: Study) -> Study:
    return ViewedStudy(study, lambda trials: graded(trials, study.directions))


def graded(
    trials: Sequence[FrozenTrial], directions: Sequence[StudyDirection]
) -> list[FrozenTrial]:
    """Stopped trials as finished ones that are worse in every metric than all that went further;
    among equals their values count.
    """
    known = [
        t
        for t in trials
        if t.state in (TrialState.COMPLETE, TrialState.PRUNED)
        and t.values
        and all(map(math.isfinite, t.values))
    ]
    rungs = sorted({_reached(trial) for trial in known}, reverse=True)
    spans = [
        1 + max(column) - min(column)
        for column in zip(*(trial.values for trial in known), strict=True)
    ]
    worse = [
        span if direction == StudyDirection.MINIMIZE else -span
        for span, direction in zip(spans, directions, strict=False)
    ]
    places = {trial.number: rungs.index(_reached(trial)) for trial in known}
    return [
        _moved(trial, places[trial.number], worse) if trial.number in places else trial
        for trial in trials
    ]


def _moved(trial: FrozenTrial, place: int, worse: Sequence[float]) -> FrozenTrial:
    moved = copy.copy(trial)
    moved.state = TrialState.COMPLETE
    moved.values = [value + place * step for value, step in zip(trial.values, worse, strict=True)]
    return moved


def _reached(trial: FrozenTrial) -> float:
    if trial.state == TrialState.COMPLETE:
        return math.inf
    return float(trial.system_attrs.get(STEP, 0) if trial.last_step is None else trial.last_step)
