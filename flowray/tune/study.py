"""The Optuna study of a sweep, in a journal file: numbers are trial numbers, stopped trials are
told as PRUNED at their step.

Nothing is unpickled: a new session reads the journal and asks the sampler afresh, seeded by (seed,
trial number), so that it neither repeats the draws of the first session nor depends on where that
one ended.
"""

from __future__ import annotations

import copy
import json
import os
import time
from collections.abc import Callable, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import optuna
from optuna.samplers import BaseSampler
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock
from optuna.study import StudyDirection
from optuna.trial import FixedTrial, FrozenTrial, Trial, TrialState

from flowray.config.errors import InputError
from flowray.sweepconfig.search import RandomSearch, SearchConfig
from flowray.sweepconfig.sweep import Sweep
from flowray.tune.fresh import fresh_setting
from flowray.tune.nsga import STEP
from flowray.tune.optuna_private import FIXED, ViewedStudy, reopen_trial, set_attribute
from flowray.tune.samplers import Setting, make_sampler
from flowray.tune.space import (
    Params,
    as_categories,
    can_repeat,
    from_priors,
    setting_of,
    settings,
    suggest,
)

# user attributes of the study's trials
REASON = "flowray"  # why the trial was stopped or failed, in words
STOPPED_BY = "flowray:stop"  # [kind, rule] of the decision that stopped it
FROM = "flowray:from"  # the run directory of a trial that an earlier sweep trained
FINISHES = "flowray:finishes"  # the number of the stopped trial whose value after all this one has
# drafts by the sampler, then as many at random; after them the first unused setting is taken
TRIES = 4
# a lock of the journal lasts milliseconds; one that stays so long belonged to a killed process
LOCK_S = 2.0


class Journal(JournalFileBackend):
    """Optuna's journal file, where an entry that a full disk cut off does not stay.

    The next one would join it and spoil the file. Its lock is a file and not a symbolic link, as
    mounted buckets and drives have none; with a process that takes the link it still excludes.
    """

    def __init__(self, path: Path):
        super().__init__(str(path), JournalFileOpenLock(str(path)))
        self._path = path

    def append_logs(self, logs: list[dict[str, Any]]) -> None:
        try:
            super().append_logs(logs)
        except OSError:
            drop_torn_line(self._path)
            raise


class PartialResult(NamedTuple):
    """How far a trial that has not finished came, and the metrics there."""

    step: int
    values: list[float]


PartialResultOf = Callable[[int], PartialResult | None]


def with_partial_results(
    partial_result: PartialResultOf, trials: Sequence[FrozenTrial]
) -> list[FrozenTrial]:
    """The trials as a sampler learns from them: each with a partial result counts as pruned, with
    that result as its values. These are the ones that have come to a rung, waiting or running, and
    in a sweep of several metrics the stopped ones, of which the journal keeps no values.
    """

    def seen(trial: FrozenTrial) -> FrozenTrial:
        unfinished = trial.state in (TrialState.RUNNING, TrialState.PRUNED)
        found = partial_result(trial.number) if unfinished and trial.values is None else None
        if found is None:
            return trial
        pruned = copy.copy(trial)
        pruned.state, pruned.values = TrialState.PRUNED, found.values
        pruned.system_attrs = {**trial.system_attrs, STEP: found.step}
        return pruned

    return [seen(trial) for trial in trials]


class SweepStudy:
    """The study of one sweep; `path` is the journal file, made if it is not there. What a killed
    writer left in its way is removed.

    earlier: trials of earlier sweeps that the sampler learns from. They have numbers in the study,
    but are not trials of the sweep.
    partial_result: of a trial that has not finished, by its number; None where a sampler has
    nothing to learn from it yet. InputError where the journal is spoilt.
    """

    def __init__(
        self,
        sweep: Sweep,
        path: Path,
        *,
        concurrent: int = 1,
        earlier: Sequence[FrozenTrial] = (),
        partial_result: PartialResultOf = lambda number: None,
    ):
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        drop_torn_line(path)
        _free_lock(path)
        self.path, self._sweep, self._concurrent = path, sweep, concurrent
        self._repeats = sweep.method != "grid" and can_repeat(sweep.parameters)
        directions = [
            StudyDirection.MINIMIZE if m.goal == "minimize" else StudyDirection.MAXIMIZE
            for m in sweep.objectives
        ]
        try:
            storage = JournalStorage(Journal(path))
            self._stored = optuna.create_study(
                storage=storage,
                sampler=self._sampler(0),
                pruner=optuna.pruners.NopPruner(),
                study_name=sweep.name,
                directions=directions,
                load_if_exists=True,
            )
            self._study = ViewedStudy(self._stored, partial(with_partial_results, partial_result))
        except (ValueError, KeyError) as error:
            raise InputError(
                f"{path}: cannot be read: {error}; put back a copy of it, or type name=OTHER for a"
                " new sweep"
            ) from error
        self._live: dict[int, Trial] = {}
        if not self.trials():
            # some, where a session was killed just here
            there = {t.user_attrs.get(FROM) for t in self._all()}
            for trial in earlier:
                if trial.user_attrs[FROM] not in there:
                    self._study.add_trial(trial)

    def _all(self) -> list[FrozenTrial]:
        """As they stand in the journal, those of earlier sweeps too."""
        return self._stored.get_trials(deepcopy=False)

    def trials(self) -> list[FrozenTrial]:
        """Every trial of the sweep as it stands in the journal."""
        return [t for t in self._all() if FROM not in t.user_attrs and FINISHES not in t.user_attrs]

    def finished_later(self) -> list[int]:
        """Numbers of the stopped trials that were finished after all."""
        return [t.user_attrs[FINISHES] for t in self._all() if FINISHES in t.user_attrs]

    def ask(self) -> tuple[int, Params]:
        """A new trial: its number and its parameters, a setting that no trial of the sweep has.

        An unused point of a killed session is taken up first.
        """
        waiting = next((t for t in self._all() if t.state == TrialState.WAITING), None)
        number = waiting.number if waiting else len(self._all())
        if waiting is None and (point := self._planned(len(self.trials()), number)):
            self._study.enqueue_trial(point)
        self._study.sampler = self._sampler(number)
        trial = self._unrepeated(self._study.ask())
        self._live[trial.number] = trial
        return trial.number, suggest(trial, self._sweep.parameters)

    def unfinished(self) -> list[tuple[int, Params]]:
        """The trials that a killed session left running, ready to be continued under their
        numbers.
        """
        left = [
            t for t in self.trials() if t.state == TrialState.RUNNING and t.number not in self._live
        ]
        found: list[tuple[int, Params]] = []
        # what has none yet avoids the others'
        for frozen in sorted(left, key=lambda t: not t.params):
            self._study.sampler = self._sampler(frozen.number)
            trial = self._unrepeated(reopen_trial(self._study, frozen))
            self._live[frozen.number] = trial
            found.append((frozen.number, suggest(trial, self._sweep.parameters)))
        return sorted(found, key=lambda each: each[0])

    def _unrepeated(self, trial: Trial) -> Trial:
        """The trial, with a setting fixed for it that no other trial has, where the sampler might
        draw one again. A trial that a killed session gave some of its parameters keeps them.
        """
        sweep, planned = self._sweep, self._all()[trial.number].system_attrs.get(FIXED, {})
        if trial.params or not (self._repeats or planned):
            return trial
        others = [t for t in self.trials() if t.number != trial.number and t.params]
        own = {setting_of(self.params(t)) for t in others}
        earlier = {setting_of(self.params(t)) for t in self._all() if FROM in t.user_attrs}
        samplers = [self._sampler(trial.number, i) for i in range(TRIES)]
        samplers += [self._sampler(trial.number, i, RandomSearch()) for i in range(TRIES)]
        setting = fresh_setting(trial, planned, sweep.parameters, samplers, own, earlier)
        set_attribute(self._study, trial, FIXED, setting)
        return reopen_trial(self._study, trial)

    def params(self, trial: FrozenTrial) -> Params:
        """What a trial that has ended was given, as the recipe takes it."""
        return suggest(FixedTrial(trial.params), self._sweep.parameters)

    def report(self, number: int, step: int, value: float) -> None:
        """An intermediate value; a step that has one keeps it. With several metrics a study has
        none.
        """
        if self._sweep.more_metrics:
            return
        trial = self._live[number]
        if step not in self._all()[number].intermediate_values:
            trial.report(value, step)

    def finish(self, number: int, *values: float) -> None:
        """COMPLETE with a value for each metric."""
        self._study.tell(number, list(values), state=TrialState.COMPLETE)

    def finish_later(self, number: int, *values: float) -> None:
        """Record the values of a stopped trial that was trained to its end after all. A study
        does not let a pruned trial change, so they become those of a further trial.
        """
        told = self._all()[number]
        later = optuna.trial.create_trial(
            values=list(values),
            params=told.params,
            distributions=told.distributions,
            user_attrs={FINISHES: number},
        )
        self._study.add_trial(later)

    def stop(self, number: int, why: str, by: Sequence[Any] = (None, None)) -> None:
        """PRUNED: Optuna takes the last reported value as the trial's, at its step, and ranks it
        below trials that went further.

        by: the kind and the rule of its `Stop`, for a session whose ledger is lost or behind.
        """
        self._live[number].set_user_attr(REASON, why)
        self._live[number].set_user_attr(STOPPED_BY, list(by))
        self._study.tell(number, state=TrialState.PRUNED)

    def fail(self, number: int, why: str) -> None:
        self._live[number].set_user_attr(REASON, why)
        self._study.tell(number, state=TrialState.FAIL)

    def _planned(self, index: int, number: int) -> Params:
        """What is settled beforehand of the sweep's trial `index`: a point of the grid, a given
        one, or what the priors say.

        After the points comes a trial at the priors' values; the rest of the start-up trials is
        drawn from the priors.
        """
        sweep = self._sweep
        if sweep.method == "grid":
            return as_categories(
                sweep.parameters, next(islice(settings(sweep.parameters), index, None))
            )
        if index < len(sweep.points):
            return as_categories(sweep.parameters, sweep.points[index])
        if index == len(sweep.points):
            return from_priors(sweep.parameters, None)
        if index < sweep.startup_trials:
            return from_priors(sweep.parameters, np.random.default_rng([sweep.seed, number]))
        return {}

    def _sampler(
        self, number: int, again: int = 0, search: SearchConfig | None = None
    ) -> BaseSampler:
        """again: the place among several draws for the same trial."""
        seed = (self._sweep.seed * 1_000_003 + number + again * 998_244_353) % 2**32
        setting = Setting(seed, self._sweep.startup_trials, self._concurrent)
        return make_sampler(search or self._sweep.sampler, setting)


def drop_torn_line(path: Path) -> None:
    """Cut what is not a whole entry off the end of the journal: the next one would join it and
    make the file unreadable.
    """
    if not path.exists():
        return
    data = path.read_bytes()
    whole = data.rfind(b"\n") + 1
    last = data.rfind(b"\n", 0, max(0, whole - 1)) + 1
    try:
        json.loads(data[last:whole] or b"0")
    except ValueError:
        whole = last
    if whole < len(data):
        with path.open("r+b") as file:
            file.truncate(whole)


def _free_lock(path: Path) -> None:
    """Remove the lock that a killed writer left: Optuna would wait for half a minute, and for
    ever once the folder was moved.
    """
    lock = path.with_name(f"{path.name}.lock")
    deadline = time.monotonic() + LOCK_S
    while os.path.lexists(lock) and time.monotonic() < deadline:
        time.sleep(0.05)
    lock.unlink(missing_ok=True)
