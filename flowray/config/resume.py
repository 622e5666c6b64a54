"""What of a recipe may differ when a run goes on: the schedule and what shows, not what was
learnt.
"""

from __future__ import annotations

import glob
import os
import shlex
from typing import Any

from flowray.config.errors import InputError
from flowray.config.load import recipe_diffs
from flowray.config.recipe import Recipe
from flowray.config.schema import key_paths, show

# the data cursor and every draw follow from seed, steps, batches and data set; the weights fit one
# model, the optimiser's state one optimiser
_KEPT = ("seed", "data", "model", "train.batch_size", "optim.matrices.kind")
_BY_SAMPLES = ("data", "train.batch_size")  # what train.on_changed_data=continue lets differ
_FREE = (
    "data.cache",
    "data.max_bad",
    "data.prefetch",
    "data.remote_cache_gb",
    "model.autoencoder.parameters",
    "model.text.cache",
    "model.text.cache_gib",
    "model.text.dtype",
    "model.text.parameters",
    "model.text.width",
    "model.velocity.gradient_checkpointing",
    "model.velocity.route",
)
_CONTINUED = "train.on_changed_data=continue to go on by samples seen, or "
_LEARNS = ("clip", "dino", "repa")  # losses with weights of their own
_OF_DINO = tuple(f"loss.dino.{part}" for part in ("prototypes", "hidden", "bottleneck", "teacher"))
_SHAPES = (*_OF_DINO, "loss.repa")
_OF_NO_SHAPE = tuple(f"loss.repa.{part}" for part in ("weight", "schedule"))


def refuse_changes(before: Recipe, after: Recipe, step: int, where: str) -> None:
    """InputError, one line, where a run of `step` steps as `before` cannot go on as `after`.

    where: the run.
    """
    by_samples = after.train.on_changed_data == "continue"
    for key, (old, new) in recipe_diffs(before, after).items():
        counted = _under(key, _BY_SAMPLES)
        if by_samples and counted:
            continue
        if _is_kept(key, before, after) and not _has_moved(key, old):
            raise InputError(
                f"{key}: got {show(new)}, but {where} has trained {step} steps with {show(old)}; a"
                f" resume keeps it: type {shlex.quote(f'{key}={typed_value(old)}')}, or"
                f" {_CONTINUED if counted else ''}name=OTHER for a new run"
            )
    if after.train.steps < step:
        raise InputError(
            f"train.steps: got {after.train.steps}, but {where} has trained {step} steps already "
            f"(of {before.train.steps}); type train.steps=N for more, or name=OTHER for a new run"
        )


def _is_kept(key: str, before: Recipe, after: Recipe) -> bool:
    if _under(key, _FREE):
        return False
    if _under(key, _KEPT):
        return True
    section, _, rest = key.partition(".")
    term = rest.partition(".")[0]
    if section != "loss" or term not in _LEARNS:
        return False
    was, comes = (getattr(recipe.loss, term).weight > 0 for recipe in (before, after))
    if was != comes:
        return rest == f"{term}.weight"
    return was and _under(key, _SHAPES) and not _under(key, _OF_NO_SHAPE)


def _under(key: str, sections: tuple[str, ...]) -> bool:
    return any(f"{key}.".startswith(f"{section}.") for section in sections)


def _has_moved(key: str, old: Any) -> bool:
    """Whether a place that the run knew is gone: the other one is then taken for its new place."""
    is_place = isinstance(old, str) and key_paths(key) is not None and os.path.isabs(old)
    return is_place and not (os.path.exists(old) or glob.glob(old))


def typed_value(value: Any) -> str:
    """A value as it is typed behind `key=`."""
    return str(value) if isinstance(value, str) else show(value)
