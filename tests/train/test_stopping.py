"""A stop is heard after the step under way, whatever is logged, by all ranks at once."""

from __future__ import annotations

from pathlib import Path

from support import on_two_ranks, tiny_recipe

from flowray.config.load import override_recipe
from flowray.config.recipe import Recipe
from flowray.store.checkpoint import list_checkpoints
from flowray.store.rows import read_rows
from flowray.store.run import RunDirectory
from flowray.train.group import Group
from flowray.train.loop import train

RARELY = {"train.log_every": 1000, "train.checkpoint_every": 1000, "train.probe_every": 3}


def stopped_at_3(recipe: Recipe, rank: int) -> None:
    """One rank; the lead's report of step 3 asks for the stop. Leaves the outcome in told-RANK."""
    run = RunDirectory(Path(recipe.storage_path) / recipe.name)

    def ask(row: dict) -> None:
        if rank == 0:
            run.stop_request.touch()

    outcome = train(recipe, run, Group.current("cpu"), ask)
    (run.path / f"told-{rank}").write_text(outcome)


def worker(rank: int, plain: dict) -> None:
    stopped_at_3(Recipe.model_validate(plain), rank)


def test_between_logged_steps(tmp_path):
    recipe = tiny_recipe(tmp_path, **RARELY)
    two = override_recipe(recipe, {"name": "two", "resources.num_workers": 2})
    stopped_at_3(recipe, 0)
    on_two_ranks(worker, two.model_dump(mode="json"))
    for each, ranks in ((recipe, 1), (two, 2)):
        run = RunDirectory(Path(each.storage_path) / each.name)
        assert [path.name for path in list_checkpoints(run.checkpoints)] == ["step_000004"]
        told = [(run.path / f"told-{rank}").read_text() for rank in range(ranks)]
        assert told == ["stopped"] * ranks
        assert [row["step"] for row in read_rows(run.probes)] == [3]
