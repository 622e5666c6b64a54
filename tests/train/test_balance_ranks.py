"""Two gloo ranks take the direction that one process takes, whatever the balancing; accumulation
sends gradients once.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support import on_two_ranks, tiny_recipe
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel

from flowray.config.load import override_recipe
from flowray.config.recipe import Recipe
from flowray.store.latents import ensure_latents, load_latents
from flowray.train.group import Group
from flowray.train.state import fresh_state
from flowray.train.step import BatchMaker, train_step

STEPS = 4
CASES: dict[str, dict[str, Any]] = {
    "accumulated": {"train.accumulate": 2},
    "probed": {"train.grad_every": 1, "train.log_every": 1},
    "shares": {
        "loss.balance.kind": "shares",
        "loss.balance.every": 2,
        "loss.balance.over": "source",
    },
    # negatives from both ranks
    "gradnorm": {"loss.balance.kind": "gradnorm", "loss.balance.lr": 0.1, "loss.clip.weight": 0.5},
    "pcgrad": {"loss.balance.kind": "pcgrad", "train.accumulate": 2, "loss.kl.weight": 50.0},
}


def steps(recipe: Recipe, group: Group) -> dict[str, Any]:
    """Rows and last weights of a few steps, and how many gradient buckets DDP sent in each step."""
    latents = load_latents(
        ensure_latents(recipe.data, recipe.model.autoencoder, recipe.model.latent)["train"]
    )
    state, sent = fresh_state(recipe, group.device), []
    objective, make_batch = group.wrap(state.objective), BatchMaker(recipe, latents, group)
    if isinstance(objective, DistributedDataParallel):
        objective.register_comm_hook(
            None, lambda _, bucket: (sent.append(state.step), allreduce_hook(None, bucket))[1]
        )
    rows = []
    for step in range(STEPS):
        row = train_step(state, objective, make_batch(step), recipe, group)
        rows.append({key: float(group.mean(value.float())) for key, value in row.items()})
    weights = torch.cat([p.detach().flatten() for p in state.parameters.values()])
    gradient = torch.cat(
        [p.grad.flatten() for p in state.parameters.values() if p.grad is not None]
    )
    return {
        "rows": rows,
        "weights": weights,
        "gradient": gradient,
        "sent": [sent.count(step) for step in range(STEPS)],
    }


def worker(rank: int, plain: dict, folder: Path) -> None:
    recipe = Recipe.model_validate(plain)
    found = {
        name: steps(override_recipe(recipe, options), Group.current("cpu"))
        for name, options in CASES.items()
    }
    torch.save(found, folder / f"rank-{rank}")


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Recipe:
    return tiny_recipe(
        tmp_path_factory.mktemp("ranks"),
        **{"loss.kl.schedule.kind": "constant", "resources.num_workers": 2},
    )


@pytest.fixture(scope="module")
def ranks(base, tmp_path_factory) -> list[dict[str, Any]]:
    """What each of two ranks found in every case."""
    ensure_latents(base.data, base.model.autoencoder, base.model.latent)
    folder = tmp_path_factory.mktemp("found")
    on_two_ranks(worker, base.model_dump(mode="json"), folder)
    return [torch.load(folder / f"rank-{rank}", weights_only=True) for rank in (0, 1)]


@pytest.mark.parametrize("case", CASES)
def test_ranks_agree_with_each_other_and_with_one_process(base, ranks, case):
    lead, other = (found[case] for found in ranks)
    assert torch.equal(lead["weights"], other["weights"])
    assert torch.equal(lead["gradient"], other["gradient"])
    alone = steps(
        override_recipe(base, {"resources.num_workers": 1, **CASES[case]}),
        Group(0, 1, torch.device("cpu")),
    )
    assert len(alone["rows"]) == STEPS
    for row, pair in zip(alone["rows"], lead["rows"], strict=True):
        assert row.keys() == pair.keys()
        for key in row:
            assert pair[key] == pytest.approx(row[key], rel=1e-3, abs=1e-5), key
    if case not in ("accumulated", "probed"):
        assert any(row["balance/kl"] != 1 for row in alone["rows"])


def test_gradients_are_sent_once_a_step_and_never_by_ddp_where_they_are_measured(ranks):
    sent = {case: ranks[0][case]["sent"] for case in CASES}
    assert sent["accumulated"] == [1] * STEPS  # the tiny model is one bucket; two without no_sync
    assert sent["probed"] == sent["gradnorm"] == sent["pcgrad"] == [0] * STEPS
    assert sent["shares"] == [0, 1, 0, 1]
