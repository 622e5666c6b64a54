"""A run that was trained, found by its folder or a checkpoint's, without torch.

What is mistyped is refused before the seconds that torch takes to import.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flowray.config.errors import InputError
from flowray.config.load import load_recipe, recipe_diffs
from flowray.config.paths import exists, is_file, is_folder, no_such
from flowray.config.recipe import Recipe
from flowray.config.resume import typed_value
from flowray.config.sources import is_run, what_it_is
from flowray.config.yamlfile import COMMAND_LINE
from flowray.store.best import BEST, best_step
from flowray.store.checkpoint import copy_into, is_valid, load_state, newest_checkpoint
from flowray.store.run import RunDirectory

if TYPE_CHECKING:
    from flowray.store.checkpoint import Tensors

_SHAPING = ("model.", "loss.")  # sections of the recipe that weights belong to


@dataclass(frozen=True)
class Found:
    """A checkpoint, the run that it is of, and that run's recipe with what was typed over it.

    where: the path as it was given. typed: the keys that are not what they were in training, as
    (old, new).
    """

    where: str
    checkpoint: Path
    run: RunDirectory
    recipe: Recipe
    typed: dict[str, tuple[Any, Any]]


def find_checkpoint(path: Path, overrides: Sequence[str] = ()) -> Found:
    """A run directory, whose newest valid checkpoint it is, or one `checkpoints/step_*` folder, or
    `checkpoints/best`, the one that best.json there names.

    Overrides apply to the recipe. InputError, one line, where there is no such thing, or where its
    frozen models have other weights by now.
    """
    given = path.absolute()
    run_of_best = RunDirectory(given.parent.parent)
    if given == run_of_best.checkpoints / "best":
        if (step := best_step(run_of_best)) is None:
            raise InputError(
                f"{path}: {BEST} names none; a run has one with train.keep_best=METRIC"
            )
        given = run_of_best.checkpoint(step)
    is_checkpoint = is_file(given / "state.json")
    if is_checkpoint and not is_valid(given):
        instead = "name another step or the run directory"
        raise InputError(f"{path}: an incomplete checkpoint; {instead}")
    checkpoint = given if is_checkpoint else newest_checkpoint(RunDirectory(given).checkpoints)
    if checkpoint is None:
        if (what := what_it_is(path)) and not is_run(given):
            raise InputError(f"{path}: want a run, this is {what}")
        what = "a file" if exists(given) else no_such(path)
        what = "no valid checkpoint in it yet" if is_folder(given) else what
        instead = "give a run directory such as runs/quickstart or one of its checkpoints/step_*"
        raise InputError(f"{path}: {what}; {instead}")
    run = RunDirectory(checkpoint.parent.parent)
    if not run.config.is_file():
        why = "a checkpoint is read with its recipe"
        raise InputError(f"{run.path}: no config.yaml beside the checkpoints; {why}")
    recipe = load_recipe(str(run.config), overrides).recipe
    from flowray.store.frozen import refuse_other_weights  # what knows the hub takes its time

    refuse_other_weights(checkpoint, load_state(checkpoint), recipe.model)
    typed = recipe_diffs(load_recipe(str(run.config)).recipe, recipe) if overrides else {}
    return Found(str(path), checkpoint, run, recipe, typed)


def copy_found(found: Found, parameters: dict[str, Any], tensors: Tensors) -> None:
    """`copy_into` of the checkpoint's tensors.

    Where they do not fit, the InputError names what was typed, else the recipe: the checkpoint is
    whole.
    """
    try:
        copy_into(parameters, tensors, found.checkpoint)
    except InputError as error:
        typed = {key: pair for key, pair in found.typed.items() if key.startswith(_SHAPING)}
        if not typed:
            what = f"is not the recipe of its checkpoint: {error}"
            raise InputError(f"{found.run.config}: {what}") from error
        words = ", ".join(f"{key}={typed_value(new)}" for key, (_, new) in typed.items())
        was = ", ".join(f"{key}={typed_value(old)}" for key, (old, _) in typed.items())
        why = f"{found.run.path} was trained with {was}, other weights do not fit"
        raise InputError(f"{COMMAND_LINE}: {words}: {why}") from error
