"""How the trials of a running sweep stand to each other, as its report will have them."""

from __future__ import annotations

import json
from collections.abc import Collection
from functools import cached_property

from flowray.config.errors import InputError
from flowray.config.ranking import best, ranked
from flowray.config.scale import scale_keys
from flowray.sweepconfig.check import base_recipe
from flowray.sweepconfig.sweep import Sweep
from flowray.tune.records import TrialRecord


class Standing:
    """Ranks trials, unless they differ in what sets the scale of every value, as the autoencoder
    or the held-out pictures do: then their values do not compare, and none is the best.
    """

    def __init__(self, sweep: Sweep):
        self._sweep = sweep

    def best(self, trials: Collection[TrialRecord]) -> TrialRecord | None:
        return best(trials, self._sweep.metric) if self._compare(trials) else None

    def in_order(self, trials: Collection[TrialRecord]) -> list[TrialRecord]:
        """Best first; as they were drawn where they do not compare."""
        if self._compare(trials):
            return ranked(trials, self._sweep.metric)
        return sorted(trials, key=lambda trial: trial.number)

    def _compare(self, trials: Collection[TrialRecord]) -> bool:
        told = [trial for trial in trials if trial.metrics]  # as the report asks those with a run
        scales = {json.dumps([trial.params.get(key) for key in self._keys]) for trial in told}
        return len(scales) < 2

    @cached_property
    def _keys(self) -> list[str]:
        """The searched keys that set the scale."""
        keys = self._sweep.parameters
        fixed = "data.shards" in keys and "data.val_shards" not in keys and self._own_pictures()
        return scale_keys(keys, own_pictures=fixed)

    def _own_pictures(self) -> bool:
        """Whether all trials are judged on the same held-out pictures."""
        try:
            return bool(base_recipe(self._sweep).data.val_shards)
        except InputError:  # it is there no more
            return False
