"""Ray Tune's searcher and scheduler of a sweep: thin adapters that let the referee hand out, judge and end trials."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType, SimpleNamespace
from typing import Any, cast

from ray.tune.execution.tune_controller import TuneController
from ray.tune.experiment import Trial
from ray.tune.schedulers import AsyncHyperBandScheduler, FIFOScheduler, TrialScheduler
from ray.tune.search import Searcher

from flowray.config.base import Config
from flowray.config.sweep import Hyperband, Median, Sweep
from flowray.tune.median import MedianRule
from flowray.tune.referee import Halving, Referee

FAILED = "failed"  # key of a row that says, in one line, why its trial ended
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
        number = self._numbers[trial_id]
        if not error and self._referee.records.trials[number].status == "running":  # the error's text comes with the callback that follows
            self._referee.ended(number)

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
        if FAILED in result:
            self._referee.ended(trial.config["number"], error=str(result[FAILED]))
            return TrialScheduler.STOP
        row = {key: value for key, value in result.items() if not key.startswith("config/")}
        stop = self._referee.see(trial.config["number"], row)
        return TrialScheduler.STOP if stop else TrialScheduler.CONTINUE


class Rungs:
    """ASHA (Ray's AsyncHyperBandScheduler on `step`), fed with trial numbers, so that a resumed sweep can replay it, and put in words.

    Every rung compares values at its very step: between two probes on either side of it the value is interpolated.
    """

    def __init__(self, sweep: Sweep, budget_steps: int):
        halving = sweep.early_terminate
        assert isinstance(halving, Hyperband)
        self._metric, self._eta = sweep.metric.name, halving.eta
        self._sign = -1.0 if sweep.minimise else 1.0  # Ray ranks by reward: higher is better
        self._asha = AsyncHyperBandScheduler(
            time_attr="step",
            metric=self._metric,
            mode="min" if sweep.minimise else "max",
            max_t=budget_steps,
            grace_period=min(halving.min_iter, budget_steps),
            reduction_factor=self._eta,
            stop_last_trials=False,
        )
        self._trials: dict[int, Any] = {}
        self._last: dict[int, tuple[int, float]] = {}

    def judge(self, number: int, step: int, value: float) -> str | None:
        """Record the value at the rungs that the trial has reached since its last probe; why it should stop there, or None."""
        if number not in self._trials:
            self._trials[number] = SimpleNamespace(trial_id=str(number))
            self._asha.on_trial_add(_NO_CONTROLLER, self._trials[number])
        before, old = self._last.get(number, (0, value))
        self._last[number] = (step, value)
        for milestone in sorted(milestone for milestone, _ in self._asha._brackets[0]._rungs):
            if before < milestone <= step:
                there = value if before == 0 else old + (value - old) * (milestone - before) / (step - before)
                if why := self._judge_rung(number, milestone, there):
                    return why
        return None

    def _judge_rung(self, number: int, milestone: float, value: float) -> str | None:
        bracket = self._asha._brackets[0]
        recorded = dict(next(values for at, values in bracket._rungs if at == milestone))
        action = self._asha.on_trial_result(_NO_CONTROLLER, self._trials[number], {"step": milestone, self._metric: value})
        if action != TrialScheduler.STOP:
            return None
        cutoff = self._sign * cast(float, bracket.cutoff(recorded))
        share = f"1/{self._eta:g}" if self._eta == int(self._eta) else f"{1 / self._eta:.0%}"
        others = f"the best {share} of {len(recorded) + 1} trials (cutoff {cutoff:.3g})"
        return f"{self._metric} {value:.3g} at step {milestone:g} is outside {others}"


HALVING: Mapping[type[Config], Callable[[Sweep, int], Halving]] = MappingProxyType({Hyperband: Rungs, Median: MedianRule})


def make_halving(sweep: Sweep, budget_steps: int) -> Halving | None:
    """What compares the trials of the sweep with each other, None where nothing does."""
    return HALVING[type(sweep.early_terminate)](sweep, budget_steps) if sweep.early_terminate else None
