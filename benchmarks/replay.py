"""Sweeps replayed on a recorded pool: how many steps each search trains until one of the best
configurations has been trained in full.

Nothing is trained. Trials run one after another; a trial's probe rows are those that were recorded.
Every search goes on until it has drawn the whole pool, so that what it loses to early stops can be
counted. One that has stopped all of the best by then finishes what it stopped, the most promising
first, until one of them is through: its compute has an end too.
"""

from __future__ import annotations

import json
import math
import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend

from benchmarks.pool import Entry, Pool, Space
from flowray.sweepconfig.sweep import Metric, Sweep
from flowray.tune.policy import Policy
from flowray.tune.session import SweepSession

ROUND, KEPT = 9, 3  # the one-rung search draws so many, and trains so many of them in full


@dataclass
class Ledger:
    """The account of one replay, in steps.

    finished: (steps spent by then, configuration) of each one trained in full.
    """

    pool: Pool
    goal: frozenset[int]
    spent: int = 0
    finished: list[tuple[int, int]] = field(default_factory=list)
    stopped: dict[int, Stopped] = field(default_factory=dict)

    def train(self, entry: Entry, start: int, end: int) -> None:
        """Pay for the steps from `start` to `end` of a configuration; at the budget it has been
        trained in full.
        """
        self.spent += end - start
        if end >= self.pool.budget_steps:
            self.finished.append((self.spent, entry.number))
            self.stopped.pop(entry.number, None)

    @property
    def hit(self) -> int | None:
        """Steps spent when the first of the best had been trained in full; None where none has."""
        return next((spent for spent, number in self.finished if number in self.goal), None)

    def close(self) -> Replay:
        """The account at the end: what was stopped is finished, furthest and best first, while
        none of the best is through.
        """
        spent, finished = self.spent, tuple(self.finished)
        lost = {number: stop.why for number, stop in self.stopped.items() if number in self.goal}
        entries = {entry.number: entry for entry in self.pool.entries}
        for number, stop in sorted(
            self.stopped.items(), key=lambda item: (-item[1].step, item[1].cost, item[0])
        ):
            if self.hit is not None:
                break
            self.train(entries[number], stop.step, end_of(self.pool, entries[number]))
        assert self.hit is not None  # the best were all drawn, and each is finished or stopped
        return Replay(self.hit, spent, lost, finished)


@dataclass(frozen=True)
class Stopped:
    """Where a configuration was stopped, what it was worth there (lower is better) and why it
    was, in words.
    """

    step: int
    cost: float
    why: str


@dataclass(frozen=True)
class Replay:
    """One search with one seed. hit: steps until one of the best was through; spent: for the whole
    pool; lost: those of the best that it stopped, and why; finished: (steps spent, configuration)
    of all that it trained in full before it turned to what it had stopped.
    """

    hit: int
    spent: int
    lost: Mapping[int, str]
    finished: tuple[tuple[int, int], ...]


def shuffled(pool: Pool, seed: int) -> list[Entry]:
    """The pool in random order."""
    return [pool.entries[i] for i in np.random.default_rng(seed).permutation(len(pool.entries))]


def random_search(pool: Pool, goal: frozenset[int], seed: int) -> Replay:
    """Draw at random, train in full."""
    ledger = Ledger(pool, goal)
    for entry in shuffled(pool, seed):
        ledger.train(entry, 0, end_of(pool, entry))
    return ledger.close()


def one_rung(pool: Pool, goal: frozenset[int], seed: int, metric: Metric, rung: int) -> Replay:
    """Draw ROUND at random, train them to the first probe from step `rung` on, the best KEPT of
    them in full; again with the next ROUND.

    The strong simple baseline of arXiv 2307.15422 (keep the top K after one epoch).
    """
    ledger, order = Ledger(pool, goal), shuffled(pool, seed)
    for start in range(0, len(order), ROUND):
        waiting: list[Entry] = []
        for entry in order[start : start + ROUND]:
            row = next((row for row in entry.rows if row["step"] >= rung), None)
            ledger.train(entry, 0, int(row["step"]) if row else end_of(pool, entry))
            if row and row["step"] < pool.budget_steps:
                ledger.stopped[entry.number] = Stopped(
                    int(row["step"]), _cost(metric, row), f"not among the best {KEPT} of its round"
                )
                waiting.append(entry)
        for entry in sorted(
            waiting, key=lambda entry: (ledger.stopped[entry.number].cost, entry.number)
        )[:KEPT]:
            ledger.train(entry, ledger.stopped[entry.number].step, end_of(pool, entry))
    return ledger.close()


def sweep_search(pool: Pool, goal: frozenset[int], seed: int, sweep: Sweep, every: int) -> Replay:
    """`sweep` as flowray.tune runs it, trials of the pool in place of new ones: the real study,
    session, rules and rungs.

    Whatever point the study suggests, the nearest configuration that is left is trained, and the
    study is told so.
    every: steps between the probes that the sweep sees; recorded ones in between are left out.
    """
    one_by_one = {
        "max_concurrent": 1,
        "seeds": 1,
        "time_budget": None,
        "warm_start": (),
        "more_metrics": (),
    }
    sweep = sweep.model_copy(update={"seed": seed, "run_cap": len(pool.entries), **one_by_one})
    ledger, space, left = (
        Ledger(pool, goal),
        Space(sweep.parameters),
        {entry.number: entry for entry in pool.entries},
    )
    with _scratch() as folder:
        session = SweepSession(sweep, folder, Policy(sweep, pool.budget_steps))
        correct = Correction(folder / "study.journal", sweep)
        trained: dict[int, Entry] = {}
        while (left or session.ledger.waiting()) and (chosen := session.next()):
            number, point = chosen
            start = session.ledger.trials[number].last_step
            if number not in trained:
                trained[number] = left.pop(space.nearest(point, left.values()).number)
                correct(number, trained[number])
            entry = trained[number]
            stopped = _run(session, number, entry, pool.budget_steps, every)
            ledger.train(entry, start, stopped.step if stopped else end_of(pool, entry))
            if stopped:
                ledger.stopped[entry.number] = stopped
            session.end(number, error=None if stopped else entry.error)
    # a sweep gives up where its first trials all fail; the rest is then trained as it comes
    for entry in left.values():
        ledger.train(entry, 0, end_of(pool, entry))
    return ledger.close()


def _run(
    session: SweepSession, number: int, entry: Entry, budget: int, every: int
) -> Stopped | None:
    """Show the session what it looks at of a trial's rows until it says stop; None where it does
    not.
    """
    sweep = session.sweep
    watched = {sweep.metric.name, *sweep.rule_metrics}
    for row in entry.rows:
        step = int(row["step"])
        if (step % every and step < budget) or step <= session.ledger.trials[number].last_step:
            continue
        # null was a nan when it was reported
        shown = {key: math.nan if row[key] is None else row[key] for key in watched & row.keys()}
        if session.report(number, {"step": step, "budget_steps": budget, **shown}):
            return Stopped(
                step, _cost(sweep.metric, row), session.ledger.trials[number].stopped_by or ""
            )
    return None


class Correction:
    """Tells a study which point was really trained, so that the sampler learns from that one."""

    def __init__(self, journal: Path, sweep: Sweep):
        self._storage = JournalStorage(JournalFileBackend(str(journal)))
        self._study = self._storage.get_study_id_from_name(sweep.name)

    def __call__(self, number: int, entry: Entry) -> None:
        trial = self._storage.get_trial_id_from_study_id_trial_number(self._study, number)
        for key, distribution in self._storage.get_trial(trial).distributions.items():
            # None: a parameter of a choice that this configuration did not take
            value = entry.params.get(key)
            value = json.dumps(value) if isinstance(value, list | dict) else value
            if value is not None:
                self._storage.set_trial_param(
                    trial, key, distribution.to_internal_repr(value), distribution
                )


def end_of(pool: Pool, entry: Entry) -> int:
    """The step at which the configuration's training ends by itself: the budget, or its last
    probe before it failed.
    """
    return (
        pool.budget_steps
        if entry.error is None
        else int(entry.rows[-1]["step"])
        if entry.rows
        else 0
    )


@contextmanager
def _scratch() -> Iterator[Path]:
    """A folder for the block, in memory where the system has such a place: a study syncs every
    line that it writes.
    """
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(
        prefix="flowray-replay-", dir=memory if os.access(memory, os.W_OK) else None
    ) as folder:
        yield Path(folder)


def _cost(metric: Metric, row: Mapping[str, Any]) -> float:
    value = row.get(metric.name)
    if value is None:
        return math.inf
    return float(value) if metric.goal == "minimize" else -float(value)
