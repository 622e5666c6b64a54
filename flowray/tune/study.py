"""The Optuna study of a sweep, in a journal file: numbers are trial numbers, stopped trials are told as PRUNED at their step.

Nothing is unpickled: a new session reads the journal and asks the sampler afresh, seeded by (seed, trial number), so that it neither
repeats the draws of the first session nor depends on where that one ended.
"""

from __future__ import annotations

from pathlib import Path

import optuna
from optuna.samplers import BaseSampler, RandomSampler, TPESampler
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, Trial, TrialState

from flowray.config.sweep import Sweep
from flowray.tune.space import Params, grid, suggest

REASON = "flowray"  # the user attribute that holds why a trial ended as it did


class SweepStudy:
    """The study of one sweep; `path` is the journal file, made if it is not there."""

    def __init__(self, sweep: Sweep, path: Path, *, concurrent: int = 1):
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        _drop_torn_line(path)
        self._sweep, self._concurrent = sweep, concurrent
        direction = StudyDirection.MINIMIZE if sweep.minimise else StudyDirection.MAXIMIZE
        self._study = optuna.create_study(
            storage=JournalStorage(JournalFileBackend(str(path))),
            study_name=sweep.name,
            direction=direction,
            sampler=self._sampler(0),
            pruner=optuna.pruners.NopPruner(),
            load_if_exists=True,
        )
        self._live: dict[int, Trial] = {}

    def trials(self) -> list[FrozenTrial]:
        """Every trial as it stands in the journal."""
        return self._study.get_trials(deepcopy=False)

    def ask(self) -> tuple[int, Params]:
        """A new trial: its number and its parameters."""
        number = len(self.trials())
        if self._sweep.method == "grid":  # trial n is point n; an unused point of a killed session is taken up first
            waiting = any(t.state == TrialState.WAITING for t in self.trials())
            if not waiting:
                self._study.enqueue_trial(grid(self._sweep.parameters)[number])
        self._study.sampler = self._sampler(number)
        trial = self._study.ask()
        self._live[trial.number] = trial
        return trial.number, suggest(trial, self._sweep.parameters)

    def unfinished(self) -> list[tuple[int, Params]]:
        """The trials that a killed session left running, ready to be continued under their numbers."""
        left = [t for t in self.trials() if t.state == TrialState.RUNNING and t.number not in self._live]
        for frozen in left:
            self._study.sampler = self._sampler(frozen.number)
            self._live[frozen.number] = Trial(self._study, frozen._trial_id)
        return [(t.number, suggest(self._live[t.number], self._sweep.parameters)) for t in left]

    def report(self, number: int, step: int, value: float) -> None:
        """An intermediate value; a step that has one keeps it."""
        trial = self._live[number]
        if step not in self._study.trials[number].intermediate_values:
            trial.report(value, step)

    def finish(self, number: int, value: float) -> None:
        self._study.tell(number, value, state=TrialState.COMPLETE)

    def stop(self, number: int, why: str) -> None:
        """PRUNED: Optuna takes the last reported value as the trial's, at its step, and ranks it below trials that went further."""
        self._live[number].set_user_attr(REASON, why)
        self._study.tell(number, state=TrialState.PRUNED)

    def fail(self, number: int, why: str) -> None:
        self._live[number].set_user_attr(REASON, why)
        self._study.tell(number, state=TrialState.FAIL)

    def _sampler(self, number: int) -> BaseSampler:
        seed = (self._sweep.seed * 1_000_003 + number) % 2**32
        if self._sweep.method != "bayes":
            return RandomSampler(seed=seed)
        return TPESampler(seed=seed, multivariate=True, n_startup_trials=self._sweep.startup_trials, constant_liar=self._concurrent > 1)


def _drop_torn_line(path: Path) -> None:
    """Cut an incomplete last line off the journal: the next append would join it and make the file unreadable."""
    if not path.exists():
        return
    data = path.read_bytes()
    whole = data.rfind(b"\n") + 1
    if whole < len(data):
        with path.open("r+b") as file:
            file.truncate(whole)
