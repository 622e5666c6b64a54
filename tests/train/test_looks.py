"""Probes and pictures are spread over the ranks: each takes its rows, the lead finds what it would
find alone, and a rank that fails leaves none waiting.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support import on_ranks, on_two_ranks, tiny_pictures, tiny_recipe

from flowray.config.load import override_recipe
from flowray.config.recipe import Recipe
from flowray.store.latents import ensure_latents, load_latents, load_training
from flowray.store.rows import read_rows
from flowray.store.run import RunDirectory
from flowray.train import looks as module
from flowray.train.group import Group
from flowray.train.looks import Looks
from flowray.train.loop import train
from flowray.train.sharding import local
from flowray.train.spread import RankFailed, attempted_by_all, share_of
from flowray.train.state import TrainState, fresh_state, restore_state

ALONE = Group(0, 1, torch.device("cpu"))
CASES: dict[str, dict[str, Any]] = {
    "all": {},
    "parts": {"resources.shard": "full"},
    "text in parts": {"resources.shard": "full", "resources.shard_text": True},
    "raw pictures, each step its own size": {
        "sample.weights": "raw",
        "sample.solver.kind": "dopri5",
        "resources.shard": "full",
    },
}


def run_of(recipe: Recipe) -> RunDirectory:
    return RunDirectory(Path(recipe.storage_path) / recipe.name)


def kept(state: TrainState) -> list[torch.Tensor]:
    """What trains on this rank, and torch's own generator."""
    tensors = [*state.parameters.values(), *state.ema.average.values()]
    return [local(x.detach()).clone() for x in tensors] + [torch.get_rng_state()]


def looked(recipe: Recipe, group: Group) -> dict[str, Any]:
    """Look at the last checkpoint of the run. velocity: rows that the velocity network was given
    for probes, and for pictures.
    """
    state = fresh_state(recipe, group.device, group)
    restore_state(state, recipe, run_of(recipe), group)
    folders = ensure_latents(recipe.data, recipe.model.autoencoder, recipe.model.latent)
    looks = Looks(
        recipe, load_training(folders["train"], recipe), load_latents(folders["val"]), group
    )
    model = state.shards.whole if state.shards else state.model
    rows: list[int] = []
    model.velocity.blocks_in_order()[0].register_forward_pre_hook(
        lambda _, given: rows.append(len(given[0]))
    )
    before, modes = kept(state), [each.training for each in state.model.modules()]
    seen = looks(state, pictures=False, probes=True)
    probing = sum(rows)
    painted = looks(state, pictures=True, probes=False)
    assert painted.probes == {}
    assert all(torch.equal(a, b) for a, b in zip(kept(state), before, strict=True))
    assert [each.training for each in state.model.modules()] == modes
    if state.shards:  # the whole weights are let go of
        held = [p for p in model.parameters() if p.requires_grad]
        assert sum(p.untyped_storage().nbytes() for p in held) <= 4 * len(held)
    found: dict[str, Any] = {"velocity": (probing, sum(rows) - probing)}
    if group.lead:
        found["delta"] = seen.delta_rms
        found["pictures"] = torch.from_numpy(painted.pictures.get())
        found["probes"] = {kind: probed.get() for kind, probed in seen.probes.items()}
    return found


def worker(rank: int, plain: dict, folder: Path) -> None:
    group, recipe = Group.current("cpu"), Recipe.model_validate(plain)
    recipes = {name: override_recipe(recipe, options) for name, options in CASES.items()}
    found = {name: looked(each, group) for name, each in recipes.items()}
    torch.save(found, folder / f"rank-{rank}")


def few_rows(rank: int, plain: dict, folder: Path) -> None:
    torch.save(looked(Recipe.model_validate(plain), Group.current("cpu")), folder / f"rank-{rank}")


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Recipe:
    """A run of two ranks that has trained, on one; 7 rows of probes and 3 pictures, two of one
    caption.
    """
    recipe = tiny_recipe(
        tmp_path_factory.mktemp("looks"),
        **{
            "train.batch_size": 6,
            "train.sample_every": 12,
            "probes.batch_size": 7,
            "sample.prompts": ["a red circle", "a red circle", "a blue square"],
            "sample.steps": 3,
        },
    )
    assert train(recipe, run_of(recipe), ALONE, lambda row: None) == "finished"
    return recipe


@pytest.fixture(scope="module")
def ranks(base, tmp_path_factory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("found")
    two = override_recipe(base, {"resources.num_workers": 2})
    on_two_ranks(worker, two.model_dump(mode="json"), folder)
    return [torch.load(folder / f"rank-{rank}", weights_only=True) for rank in (0, 1)]


def assert_alike(found: dict[str, Any], alone: dict[str, Any]) -> None:
    assert found["delta"] == pytest.approx(alone["delta"], rel=1e-6)
    assert found["probes"].keys() == alone["probes"].keys() == {"ema", "raw"}
    for kind, probed in alone["probes"].items():
        assert list(found["probes"][kind]) == list(probed)
        for key, value in probed.items():
            assert found["probes"][kind][key] == pytest.approx(value, rel=1e-4, abs=1e-5), key
    apart = found["pictures"].int() - alone["pictures"].int()
    assert apart.abs().max() <= 1  # rounding to a byte
    assert alone["pictures"].float().std() > 1


@pytest.mark.parametrize("case", CASES)
def test_ranks_find_what_one_finds(base, ranks, case):
    alone = looked(override_recipe(base, {**CASES[case], "resources.num_workers": 2}), ALONE)
    assert_alike(ranks[0][case], alone)
    assert "flow/endpt_rmse@64" in alone["probes"]["ema"]  # of the last step


def test_each_rank_takes_its_rows(base, ranks):
    """Of 7 rows of probes 3 and 4, of 3 pictures 1 and 2; none is filled up to sample.batch_size as
    one rank does.
    """
    rows = 2 * (2 * 10 + 2 * base.probes.shoot_steps + 8 + 16 + 32 + 64)
    assert [found["all"]["velocity"] for found in ranks] == [(3 * rows, 2 * 3), (4 * rows, 2 * 3)]
    alone = looked(base, ALONE)
    assert alone["velocity"] == (7 * rows, base.sample.batch_size * 3)


def test_one_rank_finds_what_its_run_wrote(base):
    row = read_rows(run_of(base).probes)[-1]
    found = looked(base, ALONE)
    wanted = {f"ema/{key}": value for key, value in found["probes"]["ema"].items()}
    wanted |= found["probes"]["raw"] | {"ema/delta_rms": found["delta"]}
    assert {key: row[key] for key in wanted} == wanted


def test_more_ranks_than_rows(base, tmp_path):
    few = tiny_pictures(tmp_path / "few", 2, start=64)
    options = {"data.val_shards": str(few), "sample.prompts": ["a red circle", "a blue square"]}
    recipe = override_recipe(base, {**options, "resources.num_workers": 3})
    alone = looked(recipe, ALONE)
    on_ranks(3, few_rows, recipe.model_dump(mode="json"), tmp_path)
    found = [torch.load(tmp_path / f"rank-{rank}", weights_only=True) for rank in range(3)]
    assert_alike(found[0], alone)
    assert found[0]["velocity"] == (0, 0)
    assert found[1]["velocity"] == found[2]["velocity"]


def test_shares():
    for count, world in ((7, 2), (2, 3), (8, 4), (64, 7)):
        shares = [share_of(count, Group(rank, world, ALONE.device)) for rank in range(world)]
        assert [i for share in shares for i in range(count)[share]] == list(range(count))
        sizes = {share.stop - share.start for share in shares}
        assert max(sizes) - min(sizes) <= 1


def failing(rank: int, plain: dict) -> None:
    """A run of which the look fails at 2, 4, 6 and 8: a rank's probes, the lead's pictures, room
    for the weights, both ranks' probes of the raw weights.
    """
    group, recipe = Group.current("cpu"), Recipe.model_validate(plain)
    now, probed = [0], [0]
    view_of, look, generate = module.view_of, module.look, module.generate

    def viewed(state: TrainState) -> Any:
        now[0], probed[0] = state.step, 0
        if state.step == 6 and rank == 1:
            raise torch.OutOfMemoryError("no room\nfor it")
        return view_of(state)

    def passed(*args: Any, **kwargs: Any) -> Any:
        probed[0] += 1
        if (now[0] == 2 and rank == 1 and probed[0] == 1) or (now[0] == 8 and probed[0] == 2):
            raise ValueError("planted")
        return look(*args, **kwargs)

    def painted(*args: Any, **kwargs: Any) -> np.ndarray:
        if now[0] == 4 and rank == 0:
            raise OSError("planted")
        return generate(*args, **kwargs)

    module.view_of, module.look, module.generate = viewed, passed, painted
    reported: list[dict] = []
    assert train(recipe, run_of(recipe), group, reported.append) == "finished"
    assert [row["step"] for row in reported] == [2, 4, 6, 8]


@pytest.mark.parametrize("shard", ["none", "full"])
def test_a_rank_that_fails_is_a_gap_and_leaves_none_waiting(base, shard):
    cadence = dict.fromkeys(("train.probe_every", "train.sample_every"), 2)
    options = {"name": f"failing-{shard}", "train.steps": 8, "optim.schedule.warmup": 1}
    ranks = {"resources.num_workers": 2, "resources.shard": shard}
    recipe = override_recipe(base, {**cadence, **options, **ranks})
    on_two_ranks(failing, recipe.model_dump(mode="json"))
    run = run_of(recipe)
    raw, room = "the probes of the raw weights", "RankFailed: rank 1: OutOfMemoryError: for it"
    assert [(row["step"], row["what"], row["why"]) for row in read_rows(run.gaps)] == [
        (2, "the probes", "RankFailed: rank 1: ValueError: planted"),
        (4, "pictures", "RankFailed: rank 0: OSError: planted"),
        (6, "pictures", room),
        (6, "the probes", room),
        (6, raw, room),
        (8, raw, "RankFailed: rank 0: ValueError: planted (and 1 more)"),
    ]
    assert [int(strip.stem[5:]) for strip in run.strips()] == [2, 8]
    keys = "ema/shoot/nmse", "shoot/nmse", "ema/delta_rms"
    there = [[key in row for key in keys] for row in read_rows(run.probes)]
    assert there == [
        [False, True, True],
        [True, True, True],
        [False, False, True],
        [True, False, True],
    ]


def test_a_rank_alone_keeps_its_own_error():
    def fail() -> None:
        raise OSError(28, "No space left on device")

    made = attempted_by_all(ALONE, fail)
    with pytest.raises(OSError, match="No space left") as told:
        made.get()
    assert told.value.errno == 28
    assert not isinstance(told.value, RankFailed)
    assert attempted_by_all(ALONE, lambda: 3).get() == 3
