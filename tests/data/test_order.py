"""The order of samples: each epoch complete, ranks disjoint, resume and world size without
effect.
"""

from __future__ import annotations

import numpy as np
import pytest

from flowray.data.order import EpochOrder, evenly


@pytest.mark.parametrize("size", [1, 7, 96, 1000])
def test_every_epoch_is_a_permutation_of_its_own(size: int) -> None:
    indices = EpochOrder(size, 5)(np.arange(3 * size)).reshape(3, size)
    assert (np.sort(indices, axis=1) == np.arange(size)).all()
    if size > 7:
        assert not (indices[0] == indices[1]).all()
        assert not (indices[0] == np.arange(size)).all()


@pytest.mark.parametrize("world", [1, 2, 4])
def test_ranks_are_disjoint_complete_and_together_the_one_rank_order(world: int) -> None:
    size, batch = 120, 24
    alone = EpochOrder(size, 1)(np.arange(size))
    ranks = [EpochOrder(size, 1) for _ in range(world)]
    per_rank = batch // world
    seen: list[np.ndarray] = []
    for step in range(size // batch):
        slices = [
            order(step * batch + rank * per_rank + np.arange(per_rank))
            for rank, order in enumerate(ranks)
        ]
        np.testing.assert_array_equal(
            np.concatenate(slices), alone[step * batch : (step + 1) * batch]
        )
        seen += slices
    assert sorted(np.concatenate(seen).tolist()) == list(range(size))


def test_resuming_anywhere_gives_the_same_order() -> None:
    size, batch = 50, 16  # batches straddle epochs
    order = EpochOrder(size, 3)
    whole = [order(np.arange(s * batch, (s + 1) * batch)) for s in range(20)]
    for start in (0, 3, 11, 19):
        fresh = EpochOrder(size, 3)
        for s in range(start, 20):
            np.testing.assert_array_equal(fresh(np.arange(s * batch, (s + 1) * batch)), whole[s])


def test_asking_backwards_and_a_batch_over_many_epochs() -> None:
    positions = np.arange(40)
    order = EpochOrder(4, 0)
    forwards = order(positions)
    np.testing.assert_array_equal(order(positions[::-1])[::-1], forwards)
    assert len(order._kept) <= EpochOrder.KEPT


def test_seed_decides() -> None:
    a, b = (EpochOrder(100, seed)(np.arange(100)) for seed in (0, 1))
    assert not (a == b).all()


def test_refuses_nonsense() -> None:
    with pytest.raises(ValueError, match="size 0"):
        EpochOrder(0, 0)
    with pytest.raises(ValueError, match="from 0"):
        EpochOrder(3, 0)(np.array([-1]))


def test_samples_are_evenly_spread() -> None:
    assert evenly(100, 3).tolist() == [0, 50, 99]
    assert evenly(5, 9).tolist() == [0, 1, 2, 3, 4]
    assert evenly(7, 1).tolist() == [0]
