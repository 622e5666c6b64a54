"""Sweeps, sessions and probe rows as the tests of this folder need them."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend

from flowray.config.errors import InputError
from flowray.sweepconfig.distributions import LogUniform
from flowray.sweepconfig.file import text_sweep
from flowray.sweepconfig.sweep import Sweep
from flowray.tune import study
from flowray.tune.observers import Observer
from flowray.tune.policy import Policy
from flowray.tune.pruners import Pruner
from flowray.tune.records import repeat_dir
from flowray.tune.session import SweepSession

METRIC = "shoot/nmse"
HEAD = """\
name: s
base: base
metric: {name: ema/shoot/nmse}
run_cap: 6
"""


def make_sweep(**changes: Any) -> Sweep:
    """A sweep over the learning rate, with `changes`."""
    plain = {
        "name": "s",
        "base": "b",
        "metric": {"name": METRIC},
        "parameters": {"optim.lr": LogUniform(min=1e-4, max=1e-2)},
    }
    return Sweep(**{**plain, **changes})


def open_session(
    sweep: Sweep,
    folder: Path,
    steps: int,
    *,
    pruner: Pruner | None = None,
    observers: Sequence[Observer] = (),
    **options: Any,
) -> SweepSession:
    """A session of the sweep in `folder`, trials of `steps` steps."""
    return SweepSession(sweep, folder, Policy(sweep, steps, pruner), observers, **options)


def seen_by_samplers(monkeypatch: pytest.MonkeyPatch) -> list[list[optuna.trial.FrozenTrial]]:
    """The trials that the samplers of studies are shown from now on, at each draw: all but the
    one that is drawn.
    """
    seen, make = [], study.make_sampler

    def watched(*args: Any) -> optuna.samplers.BaseSampler:
        sampler = make(*args)
        before = sampler.infer_relative_search_space

        def infer(shown: optuna.Study, trial: optuna.trial.FrozenTrial) -> Any:
            others = shown.get_trials(deepcopy=False)
            seen.append([other for other in others if other.number != trial.number])
            return before(shown, trial)

        sampler.infer_relative_search_space = infer
        return sampler

    monkeypatch.setattr(study, "make_sampler", watched)
    return seen


def study_trials(folder: Path, name: str = "s") -> list[optuna.trial.FrozenTrial]:
    """The study as anyone else would open it."""
    storage = JournalStorage(JournalFileBackend(str(folder / "study.journal")))
    return optuna.load_study(study_name=name, storage=storage).trials


def probe(
    folder: Path,
    number: int,
    step: int,
    value: float,
    repeat: int = 0,
    *,
    budget: int = 40,
    metric: str = METRIC,
    **more: Any,
) -> dict[str, Any]:
    """A probe row, written as a run writes it and returned as its trial reports it."""
    run = repeat_dir(folder / str(number), repeat)
    run.mkdir(parents=True, exist_ok=True)
    row = {"step": step, metric: value, **more}
    with (run / "probes.jsonl").open("a") as file:
        file.write(json.dumps(row) + "\n")
    return {**row, "budget_steps": budget, "repeat": repeat}


def sweep_of(parameters: str, more: str = "") -> Sweep:
    """The sweep of a file with these parameters and more keys."""
    return text_sweep(f"{HEAD}{more}\nparameters:\n{parameters}", "s.yaml")


def one(spec: str, key: str = "optim.lr") -> Any:
    """The parameter that a file describes so."""
    return sweep_of(f"  {key}: {spec}").parameters[key]


def refused(parameters: str, more: str = "", cap: int = 6) -> str:
    """The line with which such a file is refused."""
    with pytest.raises(InputError) as caught:
        text_sweep(f"{HEAD.replace('6', str(cap))}{more}\nparameters:\n{parameters}", "s.yaml")
    return str(caught.value)
