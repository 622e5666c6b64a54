"""What a step that measures each loss's gradient takes on top of an ordinary one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from support import tiny_recipe
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from flowray.cli.plan import make_plan
from flowray.config.load import override_recipe
from flowray.config.recipe import Recipe
from flowray.losses.gradients import loss_gradients
from flowray.losses.total import Batch
from flowray.store.latents import ensure_latents, load_latents
from flowray.train.group import Group
from flowray.train.state import fresh_state
from flowray.train.step import BatchMaker, train_step

CPU = Group(0, 1, torch.device("cpu"))
FP32 = 4  # bytes


class Peak(TorchDispatchMode):
    """Most bytes, in storages made within the block, that were alive at once."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0
        self._alive: dict[StorageWeakRef, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {
            StorageWeakRef(x.untyped_storage())
            for x in tree_leaves((args, kwargs or {}))
            if isinstance(x, torch.Tensor)
        }
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if isinstance(x, torch.Tensor):
                made = StorageWeakRef(x.untyped_storage())
                if made not in given:
                    self._alive[made] = x.untyped_storage().nbytes()
        self._alive = {made: size for made, size in self._alive.items() if not made.expired()}
        self.bytes = max(self.bytes, sum(self._alive.values()))
        return out


def peak(work: Callable[[], Any]) -> int:
    with Peak() as seen:
        work()
    return seen.bytes


@pytest.mark.parametrize("count", [1, 2, 4])
@pytest.mark.parametrize("again", [False, True])
def test_rows_take_one_gradient_each_and_one_in_the_making(count: int, again: bool) -> None:
    net, x = nn.Sequential(*(nn.Linear(256, 256) for _ in range(4))), torch.randn(2, 256)
    parameters = list(net.parameters())
    size = FP32 * sum(p.numel() for p in parameters)
    into = torch.zeros(count, size // FP32) if again else None
    losses = [net(x).mul(i + 1).square().mean() for i in range(count)]
    most = peak(lambda: loss_gradients(losses, parameters, into)) + (again * count * size)
    assert count * size < most < (count + 1.1) * size


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    wide = {"model.velocity.width": 64, "model.velocity.depth": 4, "train.batch_size": 32}
    return tiny_recipe(
        tmp_path_factory.mktemp("memory"),
        **wide,
        **{"loss.kl.schedule.kind": "constant", "loss.clip.weight": 0.5, "train.log_every": 1},
    )


@pytest.fixture(scope="module")
def batch(base: Recipe) -> Batch:
    folders = ensure_latents(base.data, base.model.autoencoder, base.model.latent)
    return BatchMaker(base, load_latents(folders["train"]), CPU)(0)


@pytest.mark.parametrize("parts", [1, 2, 4])
def test_one_graph_and_a_gradient_for_each_loss_as_the_plan_says(
    base: Recipe, batch: Batch, parts: int
) -> None:
    found = []
    for every in (0, 1):
        recipe = override_recipe(base, {"train.accumulate": parts, "train.grad_every": every})
        state = fresh_state(recipe, CPU.device)
        train_step(state, state.objective, batch, recipe, CPU)  # AdamW's moments are there
        state.optimizer.zero_grad()
        found.append(peak(lambda r=recipe, s=state: train_step(s, s.objective, batch, r, CPU)))
    planned = make_plan(recipe)["memory_per_gpu"]
    ordinary, measuring = found
    assert planned["loss_gradients"] == 3 * planned["gradients"]
    # an ordinary step peaks as its backward pass begins, with the graph and no gradient yet
    assert measuring < 1.05 * ordinary + planned["gradients"] + planned["loss_gradients"]
