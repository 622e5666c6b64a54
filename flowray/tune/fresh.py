"""A setting for a new trial that no trial of the sweep has.

Optuna's samplers draw a setting again, and a journal takes nothing back that a trial was given. So
a setting is drafted beside the study, anew while it is one that is there, and then given to the
trial as an enqueued one is. (Optuna's BruteForceSampler draws none twice, but knows no range
without steps.)
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence, Set
from typing import Any

import numpy as np
from optuna.distributions import BaseDistribution, CategoricalDistribution
from optuna.samplers import BaseSampler
from optuna.trial import Trial

from flowray.sweepconfig.distributions import Parameter
from flowray.tune.optuna_private import FIXED, DraftTrial, stored_trial
from flowray.tune.space import Params, as_categories, setting_of, settings, suggest


def fresh_setting(
    trial: Trial,
    planned: Params,
    parameters: Mapping[str, Parameter],
    samplers: Sequence[BaseSampler],
    own: Set[str],
    earlier: Set[str] = frozenset(),
) -> Params:
    """A setting for the trial as the study holds it.

    planned: what it was enqueued with, which it gets where that leaves a setting. samplers: asked
    one after the other; then comes the first setting that is left. own: settings of the sweep's
    other trials, which are never drawn again (see `setting_of`). earlier: those of other sweeps,
    which come last. Where there is nothing but repeats, it is one.
    """
    rng = np.random.default_rng(trial.number)
    drafted: Params = {}
    for fixed in (planned, {}) if planned else ({},):
        for avoided in (own | earlier, own) if earlier else (own,):
            for again, sampler in enumerate(samplers):
                draft, drafted = _draft(trial, sampler, fixed, again=again > 0)
                if setting_of(suggest(draft, parameters)) not in avoided:
                    return drafted
            left = (s for s in settings(parameters, fixed, rng) if setting_of(s) not in avoided)
            if (found := next(left, None)) is not None:
                return as_categories(parameters, found)
    return drafted


def _draft(
    trial: Trial, sampler: BaseSampler, fixed: Params, *, again: bool
) -> tuple[DraftTrial, Params]:
    """What the sampler would give the trial: as a trial to be asked, and the parameters that it
    has been asked for by then. The study's trial is given none of them.

    again: without what the sampler noted of an earlier draft, which it would give again.
    """
    study, frozen = trial.study, stored_trial(trial)
    if again:
        frozen = copy.copy(frozen)
        frozen.system_attrs = {FIXED: fixed} if fixed else {}
    space = sampler.infer_relative_search_space(study, frozen)
    jointly = sampler.sample_relative(study, frozen, space)

    def draw(name: str, distribution: BaseDistribution) -> Any:
        if isinstance(distribution, CategoricalDistribution) and distribution.single():
            return distribution.choices[0]
        if name in jointly:
            return jointly[name]
        return sampler.sample_independent(study, frozen, name, distribution)

    drafted = dict(fixed)
    return DraftTrial(drafted, trial.number, draw), drafted
