"""Two gloo ranks train as one process does: the same global batches, the same losses."""

from pathlib import Path

import pytest
import torch
from support import on_two_ranks, tiny_recipe

from flowray.config.errors import InputError
from flowray.config.load import override_recipe
from flowray.config.recipe import Recipe
from flowray.store.rows import read_rows
from flowray.store.run import RunDirectory
from flowray.train.group import Group
from flowray.train.loop import train


def go(recipe: Recipe, rank: int = 0) -> None:
    """One rank of a run; leaves the rows it was reported in reported-RANK."""
    run = RunDirectory(Path(recipe.storage_path) / recipe.name)
    reported: list[dict] = []
    train(recipe, run, Group.current("cpu"), reported.append)
    torch.save(reported, run.path / f"reported-{rank}")


def worker(rank: int, plain: dict) -> None:
    go(Recipe.model_validate(plain), rank)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU can be used here")
def test_a_rank_that_cannot_use_its_gpu_does_not_train_on_the_cpu(tmp_path):
    recipe, run = (
        override_recipe(Recipe(), {"resources.gpus_per_worker": 1}),
        RunDirectory(tmp_path / "run"),
    )
    with pytest.raises(
        InputError,
        match=r"resources.gpus_per_worker=1: torch .* can use no GPU on .* train.device=cpu",
    ) as told:
        train(recipe, run, Group.current(), lambda row: None)
    assert "\n" not in str(told.value)
    assert not run.path.exists()
    Group.current("cpu").require_gpus(1, "cpu")  # as told
    Group.current().require_gpus(0, "auto")  # none was given


def test_two_ranks_equal_one(tmp_path):
    recipe = tiny_recipe(
        tmp_path, **{"train.log_every": 1, "train.sample_every": 100, "train.steps": 8}
    )
    go(recipe)
    two = override_recipe(recipe, {"name": "two", "resources.num_workers": 2})
    on_two_ranks(worker, two.model_dump(mode="json"))

    alone, both = (RunDirectory(tmp_path / "runs" / name) for name in ("tiny", "two"))
    rows, pairs = read_rows(alone.metrics), read_rows(both.metrics)
    assert [row["step"] for row in pairs] == list(range(1, 9))
    for row, pair in zip(rows, pairs, strict=True):
        for key in (
            "loss/flow",
            "loss/kl",
            "loss/total",
            "loss/kl_raw",
            "grad/total",
            "std/mean",
            "mu/abs_mean",
        ):
            assert pair[key] == pytest.approx(row[key], rel=1e-5, abs=1e-6), (key, row["step"])
    for row, pair in zip(read_rows(alone.probes), read_rows(both.probes), strict=True):
        assert pair["ema/shoot/nmse"] == pytest.approx(row["ema/shoot/nmse"], rel=1e-5)
    lead, other = (torch.load(both.path / f"reported-{rank}", weights_only=True) for rank in (0, 1))
    assert lead == other  # every rank reports the lead's row
    assert [row["step"] for row in lead] == [4, 8]


def test_a_batch_that_ranks_cannot_share_is_refused():
    assert Group(1, 3, torch.device("cpu")).rows(6) == slice(2, 4)
    with pytest.raises(ValueError, match="a multiple of the 4 ranks, got 6"):
        Group(0, 4, torch.device("cpu")).rows(6)
