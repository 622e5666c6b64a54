"""Ray Tune's searcher and scheduler of a sweep: thin adapters through which a session hands out,
judges and ends trials.
"""

from __future__ import annotations

from typing import Any, cast

from ray.tune.execution.tune_controller import TuneController
from ray.tune.experiment import Trial
from ray.tune.schedulers import FIFOScheduler, TrialScheduler
from ray.tune.search import Searcher

from flowray.config.errors import InputError
from flowray.config.writing import NO_ROOM
from flowray.tune.session import SweepSession

# Keys of a row with which a trial ends: why it failed, in one line; the number of the system's
# error behind that, if any; which node lacks the storage, in one line, and it has not failed.
FAILED, ERRNO, NO_STORAGE = "failed", "errno", "no_storage"


class NotRestored:
    """Tune pickles all that it is given, to restore a sweep from; flowray restores from its own
    files instead, so what derives from this is pickled without its state.
    """

    def __getstate__(self) -> dict[str, Any]:
        return {}


class StudySearch(NotRestored, Searcher):
    """Optuna through ask and tell, numbered by the study.

    Tune's config of a trial is {"number", "params"}.
    """

    def __init__(self, session: SweepSession):
        super().__init__()
        self._session = session
        self._numbers: dict[str, int] = {}

    def suggest(self, trial_id: str) -> dict[str, Any] | None:
        try:
            chosen = self._session.next()
        except OSError as error:
            self._session.suspend(error)
            chosen = None
        if chosen is None:
            # a string, which the base class does not declare
            return None if self._session.may_promote() else cast(None, Searcher.FINISHED)
        self._numbers[trial_id], params = chosen
        return {"number": chosen[0], "params": params}

    def on_trial_complete(
        self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False
    ) -> None:
        number = self._numbers[trial_id]
        # the error's text comes with the callback that follows
        if not error and self._session.ledger.trials[number].status == "running":
            try:
                self._session.end(number)
            except OSError as full:
                self._session.suspend(full)

    def save(self, checkpoint_path: str) -> None:
        """Nothing: the journal is the state, and a new session rebuilds from it without
        unpickling.
        """

    def restore(self, checkpoint_path: str) -> None:
        raise NotImplementedError(
            "a sweep is resumed from its study, not from Tune's experiment directory"
        )


class ProbeScheduler(NotRestored, FIFOScheduler):
    """Shows every reported row to the session and stops the trial when it says so."""

    def __init__(self, session: SweepSession):
        super().__init__()
        self._session = session

    def on_trial_result(
        self, tune_controller: TuneController, trial: Trial, result: dict[str, Any]
    ) -> str:
        number, failure = trial.config["number"], str(result.get(FAILED, ""))
        # every trial that lands there would fail; where it is right they all go on
        if NO_STORAGE in result:
            words = "the sweep waits: when the node has it, or is gone, type the same command again"
            self._session.suspend(InputError(f"{result[NO_STORAGE]}; {words}"))
            return TrialScheduler.STOP
        row = {key: value for key, value in result.items() if not key.startswith("config/")}
        try:
            if result.get(ERRNO) in NO_ROOM:
                raise OSError(result[ERRNO], failure)
            if not failure:
                return (
                    TrialScheduler.STOP
                    if self._session.report(number, row)
                    else TrialScheduler.CONTINUE
                )
            self._session.end(number, error=failure)
        except OSError as error:
            self._session.suspend(error)
        return TrialScheduler.STOP
