"""One rank of the plain loop, alone or under torchrun: `python -P rank.py RECIPE key=value ...`.

It takes of flowray what every commit of it has, so that the same file trains older ones.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch

from flowray.config.load import load_recipe
from flowray.store.run import RunDirectory
from flowray.train.group import Group
from flowray.train.loop import train


def main(recipe_name: str, *overrides: str) -> None:
    """Train the recipe; a gloo group where torchrun has started several."""
    recipe = load_recipe(recipe_name, list(overrides)).recipe
    torch.set_num_threads(recipe.resources.cpus_per_worker)
    several = int(os.environ.get("WORLD_SIZE", "1")) > 1
    if several:
        torch.distributed.init_process_group("gloo")
    run = RunDirectory(Path(recipe.storage_path) / recipe.name)
    train(recipe, run, Group.current(recipe.train.device), lambda row: None)
    if several:
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
