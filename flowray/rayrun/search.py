"""Ray Tune's searcher and scheduler of a sweep: thin adapters that let the referee hand out, judge and end trials."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

from ray.tune.execution.tune_controller import TuneController
from ray.tune.experiment import Trial
from ray.tune.schedulers import AsyncHyperBandScheduler, FIFOScheduler, TrialScheduler
from ray.tune.search import Searcher

from flowray.config.sweep import Sweep
from flowray.tune.referee import Referee

_NO_CONTROLLER = cast(TuneController, None)  # ASHA does not look at it


class Unpickled:
    """Tune pickles all that it is given, to restore from; a sweep never does, so its parts leave their state out."""

    def __getstate__(self) -> dict[str, Any]:
        return {}


class StudySearch(Unpickled, Searcher):
    """Optuna through ask and tell, numbered by the study. Tune's config of a trial is {"number", "params"}."""

    def __init__(self, referee: Referee):
        super().__init__()
        self._referee = referee
        self._numbers: dict[str, int] = {}

    def suggest(self, trial_id: str) -> dict[str, Any] | None:
        chosen = self._referee.next()
        if chosen is None:
            return cast(None, Searcher.FINISHED)  # a string, which the base class does not declare
        self._numbers[trial_id], params = chosen
        return {"number": chosen[0], "params": params}

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        if not error:  # the error's text comes with the callback that follows
            self._referee.ended(self._numbers[trial_id])

    def save(self, checkpoint_path: str) -> None:
        """Nothing: the journal is the state, and a new session rebuilds from it without unpickling."""

    def restore(self, checkpoint_path: str) -> None:
        raise NotImplementedError("a sweep is resumed from its study, not from Tune's experiment directory")


class ProbeScheduler(Unpickled, FIFOScheduler):
    """Shows every reported row to the referee and stops the trial when it says so."""

    def __init__(self, referee: Referee):
        super().__init__()
        self._referee = referee

    def on_trial_result(self, tune_controller: TuneController, trial: Trial, result: dict[str, Any]) -> str:
        row = {key: value for key, value in result.items() if not key.startswith("config/")}
        stop = self._referee.see(trial.config["number"], row)
        return TrialScheduler.STOP if stop else TrialScheduler.CONTINUE


class Rungs:
    """ASHA (Ray's AsyncHyperBandScheduler on `step`), fed with trial numbers, so that a resumed sweep can replay it, and put in words."""

    def __init__(self, sweep: Sweep, budget_steps: int):
        assert sweep.early_terminate is not None
        self._metric, self._eta = sweep.metric.name, sweep.early_terminate.eta
        self._sign = -1.0 if sweep.minimise else 1.0  # Ray ranks by reward: higher is better
        self._asha = AsyncHyperBandScheduler(
            time_attr="step",
            metric=self._metric,
            mode="min" if sweep.minimise else "max",
            max_t=budget_steps,
            grace_period=min(sweep.early_terminate.min_iter, budget_steps),
            reduction_factor=self._eta,
            stop_last_trials=False,
        )
        self._trials: dict[int, Any] = {}

    def judge(self, number: int, step: int, value: float) -> str | None:
        """Record the value at the rung that `step` has reached; why the trial should stop there, or None."""
        if number not in self._trials:
            self._trials[number] = SimpleNamespace(trial_id=str(number))
            self._asha.on_trial_add(_NO_CONTROLLER, self._trials[number])
        bracket = self._asha._brackets[0]
        reached = [recorded for milestone, recorded in bracket._rungs if step >= milestone]
        recorded = dict(reached[0]) if reached else {}
        action = self._asha.on_trial_result(_NO_CONTROLLER, self._trials[number], {"step": step, self._metric: value})
        if action != TrialScheduler.STOP:
            return None
        cutoff = self._sign * cast(float, bracket.cutoff(recorded))
        share = f"1/{self._eta:g}" if self._eta == int(self._eta) else f"{1 / self._eta:.0%}"
        return f"{self._metric} {value:.3g} at step {step} is outside the best {share} of {len(recorded) + 1} trials (cutoff {cutoff:.3g})"
