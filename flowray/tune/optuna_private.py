"""All that flowray uses of Optuna without Optuna's promise to keep it.

tests/test_private_names.py says what of it a new version lacks.
"""

from __future__ import annotations

from collections.abc import Callable, Container
from typing import Any

from optuna.distributions import BaseDistribution
from optuna.study import Study
from optuna.trial import FixedTrial, FrozenTrial, Trial, TrialState

FIXED = "fixed_params"  # system attribute: the parameters that a trial was enqueued with

View = Callable[[list[FrozenTrial]], list[FrozenTrial]]


class ViewedStudy(Study):
    """A study whose sampler sees the trials as `view` shows them; the storage keeps them as they
    are. A study that is viewed already is seen through both.
    """

    def __init__(self, study: Study, view: View):
        super().__init__(
            study.study_name, study._storage, sampler=study.sampler, pruner=study.pruner
        )
        inner = study.view if isinstance(study, ViewedStudy) else None
        self.view: View = (lambda trials: view(inner(trials))) if inner else view

    def _get_trials(
        self,
        deepcopy: bool = True,
        states: Container[TrialState] | None = None,
        use_cache: bool = False,
    ) -> list[FrozenTrial]:
        seen = self.view(super()._get_trials(deepcopy, None, use_cache))
        return seen if states is None else [trial for trial in seen if trial.state in states]


class DraftTrial(FixedTrial):
    """A trial beside the study: it has the parameters `given`, and asks `draw` for all others."""

    def __init__(
        self, given: dict[str, Any], number: int, draw: Callable[[str, BaseDistribution], Any]
    ):
        super().__init__(given, number=number)
        self._draw = draw

    def _suggest(self, name: str, distribution: BaseDistribution) -> Any:
        if name not in self._params:
            self._params[name] = self._draw(name, distribution)
        return super()._suggest(name, distribution)


def stored_trial(trial: Trial) -> FrozenTrial:
    """The trial as the storage has it now."""
    return trial.study._storage.get_trial(trial._trial_id)


def reopen_trial(study: Study, trial: Trial | FrozenTrial) -> Trial:
    """A running trial of the study, to be given its parameters and to be reported on; one that was
    left running before, or whose attributes have changed.
    """
    return Trial(study, trial._trial_id)


def set_attribute(study: Study, trial: Trial | FrozenTrial, key: str, value: Any) -> None:
    """Set a system attribute of a running trial."""
    study._storage.set_trial_system_attr(trial._trial_id, key, value)
