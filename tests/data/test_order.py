"""The order of samples: each epoch complete, ranks disjoint, resume and world size without
effect.
"""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest

from flowray.data.order import LISTED, BatchSizes, CipherPermutation, EpochOrder, evenly


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


LARGE = LISTED + 1
SIZES = (LISTED - 1, LISTED, LARGE, LISTED + 327, 362 * 362 * 2, 1_000_003)


@pytest.mark.parametrize("size", SIZES)
def test_every_sample_once_on_both_sides_of_the_bound_and_over_an_epochs_end(size: int) -> None:
    order = EpochOrder(size, 5)
    first, second = order(np.arange(2 * size)).reshape(2, size)
    for epoch in (first, second):
        assert (np.bincount(epoch, minlength=size) == 1).all()
    assert (first == second).mean() < 1e-3
    assert (EpochOrder(size, 6)(np.arange(size)) == first).mean() < 1e-3
    around = np.arange(size - 100, size + 100)
    np.testing.assert_array_equal(order(around), np.concatenate([first[-100:], second[:100]]))


@pytest.mark.parametrize("size", [1, 2, 3, 5, 12, 97, 1000, 100_003])
def test_the_cipher_is_a_permutation_of_any_size(size: int) -> None:
    for key in ([0, 0], [7, 1]):
        found = CipherPermutation(size, key)[np.arange(size)]
        assert (np.bincount(found, minlength=size) == 1).all()


def test_up_to_the_bound_the_order_is_the_one_that_older_runs_had() -> None:
    for size in (1000, LISTED):
        drawn = np.random.Generator(np.random.PCG64([3, 2])).permutation(size)
        np.testing.assert_array_equal(EpochOrder(size, 3)(2 * size + np.arange(size)), drawn)


def test_above_the_bound_the_order_is_the_same_for_ever() -> None:
    """A run that goes on with another numpy or flowray stands where it stood: known answers."""
    assert EpochOrder(LARGE, 0)(np.arange(4)).tolist() == [40355, 2733, 117770, 112180]
    billion = EpochOrder(10**9, 2)(5 * 10**9 + np.arange(4))
    assert billion.tolist() == [361553483, 9147161, 25011317, 238328897]


def test_a_large_order_does_not_hang_on_how_positions_are_asked_for() -> None:
    whole = EpochOrder(LARGE, 1)(np.arange(3000))
    order = EpochOrder(LARGE, 1)
    for width in (1, 7, 256):
        parts = [order(np.arange(i, min(i + width, 3000))) for i in range(0, 3000, width)]
        np.testing.assert_array_equal(np.concatenate(parts), whole)
    np.testing.assert_array_equal(
        order(np.arange(3000)[::-1].reshape(30, 100)).ravel()[::-1], whole
    )


def chi_square(kinds: np.ndarray, count: int) -> float:
    """Of `kinds` in [0, count), which should be equally frequent."""
    expected = len(kinds) / count
    return float(((np.bincount(kinds, minlength=count) - expected) ** 2 / expected).sum())


def test_a_large_order_looks_drawn_by_chance() -> None:
    """Statistics of 40 epochs, their means within 5 standard errors of those of uniform
    permutations. With 4 rounds of the network, pairs one row of its grid apart are far off.
    """
    strata, epochs, places = 64, 40, np.arange(LARGE)
    row = CipherPermutation(LARGE, [0])._columns
    order, fixed, neighbours = EpochOrder(LARGE, 11), 0, []
    chi: dict[int, list[float]] = {lag: [] for lag in (0, 1, 2, row, row + 1)}
    for epoch in range(epochs):
        found = order(epoch * LARGE + places)
        fixed += int((found == places).sum())
        neighbours.append(np.corrcoef(found[:-1], found[1:])[0, 1])
        # lag 0: which part of the set comes in which part of the epoch
        cells = places * strata // LARGE * strata + found * strata // LARGE
        chi[0].append(chi_square(cells, strata**2))
        for lag in (lag for lag in chi if lag):
            apart = (found[lag:] - found[:-lag]) % LARGE
            chi[lag].append(chi_square(apart * strata // LARGE, strata))
    assert abs(fixed - epochs) < 5 * epochs**0.5  # a permutation has one fixed point on average
    assert abs(np.mean(neighbours)) < 5 / (epochs * LARGE) ** 0.5
    for lag, values in chi.items():
        freedom = strata - 1 if lag else (strata - 1) ** 2
        assert abs(np.mean(values) - freedom) < 5 * (2 * freedom / epochs) ** 0.5, lag


def test_ten_million_samples_take_no_memory_and_no_time_ahead() -> None:
    order = EpochOrder(10**7, 0)
    tracemalloc.start()
    for epoch in range(3):
        order(np.arange(epoch * 10**7 - 128, epoch * 10**7 + 128) if epoch else np.arange(256))
    held, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(order._kept) == EpochOrder.KEPT
    assert held < 10**6
    assert peak < 2 * 10**6


def test_batch_sizes_count_what_was_seen() -> None:
    sizes = BatchSizes.of(8).changed(4, 16).changed(4, 12).changed(6, 2).changed(9, 2)
    assert sizes.changes == ((0, 8), (4, 12), (6, 2))
    taken = [8, 8, 8, 8, 12, 12, 2, 2, 2, 2]
    assert [sizes.at(step) for step in range(10)] == taken
    assert [sizes.seen(step) for step in range(11)] == [sum(taken[:step]) for step in range(11)]
    assert sizes.changed(4, 8) == BatchSizes.of(8)  # what came after is forgotten
    assert sizes.changed(0, 3) == BatchSizes.of(3)
    assert BatchSizes.of(7).seen(10**12) == 7 * 10**12


@pytest.mark.parametrize("changes", [(), ((1, 8),), ((0, 8), (4, 0)), ((0, 8), (4, 1), (4, 2))])
def test_batch_sizes_refuse_nonsense(changes: tuple[tuple[int, int], ...]) -> None:
    with pytest.raises(ValueError, match="must be"):
        BatchSizes(changes)
