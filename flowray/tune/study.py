"""The Optuna study of a sweep, in a journal file: numbers are trial numbers, stopped trials are told as PRUNED at their step.

Nothing is unpickled: a new session reads the journal and asks the sampler afresh, seeded by (seed, trial number), so that it neither
repeats the draws of the first session nor depends on where that one ended.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import optuna
from optuna.samplers import BaseSampler
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, Trial, TrialState

from flowray.config.sweep import Sweep
from flowray.tune.samplers import Setting, make_sampler
from flowray.tune.space import Params, as_categories, from_priors, grid, suggest

REASON = "flowray"  # the user attribute that holds why a trial ended as it did
FROM = "flowray:from"  # that of a trial of an earlier sweep: which one
FINISHES = "flowray:finishes"  # that of the value of a stopped trial that was finished later: its number


class SweepStudy:
    """The study of one sweep; `path` is the journal file, made if it is not there.

    earlier: trials of earlier sweeps that the sampler learns from. They have numbers in the study, but are not trials of the sweep.
    """

    def __init__(self, sweep: Sweep, path: Path, *, concurrent: int = 1, earlier: Sequence[FrozenTrial] = ()):
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        _drop_torn_line(path)
        self._sweep, self._concurrent = sweep, concurrent
        directions = [StudyDirection.MINIMIZE if m.goal == "minimize" else StudyDirection.MAXIMIZE for m in sweep.objectives]
        self._study = optuna.create_study(
            storage=JournalStorage(JournalFileBackend(str(path))),
            study_name=sweep.name,
            directions=directions,
            sampler=self._sampler(0),
            pruner=optuna.pruners.NopPruner(),
            load_if_exists=True,
        )
        self._live: dict[int, Trial] = {}
        if not self.trials():
            there = {t.user_attrs.get(FROM) for t in self._all()}  # some, where a session was killed just here
            for trial in earlier:
                if trial.user_attrs[FROM] not in there:
                    self._study.add_trial(trial)

    def _all(self) -> list[FrozenTrial]:
        return self._study.get_trials(deepcopy=False)

    def trials(self) -> list[FrozenTrial]:
        """Every trial of the sweep as it stands in the journal."""
        return [t for t in self._all() if FROM not in t.user_attrs and FINISHES not in t.user_attrs]

    def finished_later(self) -> list[int]:
        """Numbers of the stopped trials that were finished after all."""
        return [t.user_attrs[FINISHES] for t in self._all() if FINISHES in t.user_attrs]

    def ask(self) -> tuple[int, Params]:
        """A new trial: its number and its parameters. An unused point of a killed session is taken up first."""
        waiting = next((t for t in self._all() if t.state == TrialState.WAITING), None)
        number = waiting.number if waiting else len(self._all())
        if waiting is None and (point := self._planned(len(self.trials()), number)):
            self._study.enqueue_trial(point)
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
        """An intermediate value; a step that has one keeps it. With several metrics a study has none."""
        if self._sweep.more_metrics:
            return
        trial = self._live[number]
        if step not in self._all()[number].intermediate_values:
            trial.report(value, step)

    def finish(self, number: int, *values: float) -> None:
        """COMPLETE with a value for each metric."""
        self._study.tell(number, list(values), state=TrialState.COMPLETE)

    def finish_later(self, number: int, *values: float) -> None:
        """A stopped trial has been finished: what the study was told cannot be taken back, so its value comes as a further trial."""
        told = self._all()[number]
        later = optuna.trial.create_trial(
            values=list(values), params=told.params, distributions=told.distributions, user_attrs={FINISHES: number}
        )
        self._study.add_trial(later)

    def stop(self, number: int, why: str) -> None:
        """PRUNED: Optuna takes the last reported value as the trial's, at its step, and ranks it below trials that went further."""
        self._live[number].set_user_attr(REASON, why)
        self._study.tell(number, state=TrialState.PRUNED)

    def fail(self, number: int, why: str) -> None:
        self._live[number].set_user_attr(REASON, why)
        self._study.tell(number, state=TrialState.FAIL)

    def _planned(self, index: int, number: int) -> Params:
        """What is settled beforehand of the sweep's trial `index`: a point of the grid, a given one, or what the priors say.

        After the points comes a trial at the priors' values; the rest of the start-up trials is drawn from the priors.
        """
        sweep = self._sweep
        if sweep.method == "grid":
            return grid(sweep.parameters)[index]
        if index < len(sweep.points):
            return as_categories(sweep.parameters, sweep.points[index])
        if index == len(sweep.points):
            return from_priors(sweep.parameters, None)
        if index < sweep.startup_trials:
            return from_priors(sweep.parameters, np.random.default_rng([sweep.seed, number]))
        return {}

    def _sampler(self, number: int) -> BaseSampler:
        seed = (self._sweep.seed * 1_000_003 + number) % 2**32
        return make_sampler(self._sweep.sampler, Setting(seed, self._sweep.startup_trials, self._concurrent))


def _drop_torn_line(path: Path) -> None:
    """Cut an incomplete last line off the journal: the next append would join it and make the file unreadable."""
    if not path.exists():
        return
    data = path.read_bytes()
    whole = data.rfind(b"\n") + 1
    if whole < len(data):
        with path.open("r+b") as file:
            file.truncate(whole)
