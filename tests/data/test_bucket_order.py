"""The order of samples in buckets: a batch is of one bucket, each sample comes once in every pass
of its bucket, and a step's batch does not depend on the steps before it.
"""

from __future__ import annotations

import numpy as np
import pytest

from flowray.data.bucket_order import BucketOrder
from flowray.data.order import BatchSizes

CASES = 60


def drawn(case: int) -> tuple[np.ndarray, int, int]:
    """Buckets, batch and seed; small buckets and large batches among them."""
    rng = np.random.default_rng(case)
    counts = rng.integers(1, 90, rng.integers(1, 9))
    buckets = rng.permutation(np.repeat(np.arange(len(counts)) * 3, counts))  # numbers with gaps
    return buckets.astype(np.uint8), int(rng.integers(1, 40)), case


@pytest.mark.parametrize("case", range(CASES))
def test_passes_are_complete_and_buckets_come_by_their_samples(case: int) -> None:
    buckets, batch, seed = drawn(case)
    order, epochs = BucketOrder(buckets, BatchSizes.of(batch), seed), 7
    steps = sum(epochs * int(n) // batch for n in np.bincount(buckets))
    batches = [order(step) for step in range(steps)]
    streams: dict[int, list[int]] = {}
    for chosen in batches:
        assert chosen.shape == (batch,)
        assert chosen.dtype == np.int64
        (bucket,) = set(buckets[chosen].tolist())
        streams.setdefault(bucket, []).extend(chosen.tolist())
    for bucket, count in enumerate(np.bincount(buckets).tolist()):
        stream = streams.get(bucket, [])
        assert len(stream) == epochs * count // batch * batch  # what is left over comes later
        own = np.flatnonzero(buckets == bucket).tolist()
        for start in range(0, len(stream) - count + 1, max(count, 1)):
            assert sorted(stream[start : start + count]) == own


@pytest.mark.parametrize("case", range(0, CASES, 3))
def test_a_step_needs_no_other_step(case: int) -> None:
    buckets, batch, seed = drawn(case)
    order = BucketOrder(buckets, BatchSizes.of(batch), seed)
    steps = list(range(50))
    whole = [order(step) for step in steps]
    for step in np.random.default_rng(case).permutation(steps).tolist():
        np.testing.assert_array_equal(
            BucketOrder(buckets, BatchSizes.of(batch), seed)(step), whole[step]
        )
        np.testing.assert_array_equal(order(step), whole[step])


@pytest.mark.parametrize("case", range(CASES))
def test_another_batch_size_goes_on_at_the_sample_where_each_bucket_stands(case: int) -> None:
    buckets, batch, seed = drawn(case)
    rng = np.random.default_rng([case, 1])
    sizes = BatchSizes.of(batch)
    for step in np.sort(rng.choice(np.arange(1, 60), 3, replace=False)).tolist():
        sizes = sizes.changed(step, int(rng.integers(1, 40)))
    order = BucketOrder(buckets, sizes, seed)
    first = sizes.changes[1][0]
    alone = BucketOrder(buckets, BatchSizes.of(batch), seed)
    streams: dict[int, list[int]] = {}
    for step in range(150):
        chosen = order(step)
        if step < first:
            np.testing.assert_array_equal(chosen, alone(step))
        assert chosen.shape == (sizes.at(step),)
        (bucket,) = set(buckets[chosen].tolist())
        streams.setdefault(bucket, []).extend(chosen.tolist())
        # no bucket is an epoch ahead of where its share of the samples seen is, or behind
        seen, largest = sizes.seen(step + 1), max(size for _, size in sizes.changes)
        for own, count in zip(*np.unique(buckets, return_counts=True), strict=True):
            ahead = len(streams.get(int(own), [])) - seen * count / len(buckets)
            assert abs(ahead) <= count + 8 * largest
    for bucket, stream in streams.items():
        own = np.flatnonzero(buckets == bucket).tolist()
        for start in range(0, len(stream) - len(own) + 1, len(own)):
            assert sorted(stream[start : start + len(own)]) == own
    np.testing.assert_array_equal(BucketOrder(buckets, sizes, seed)(120), order(120))


def test_an_epoch_ends_where_it_did_for_every_bucket() -> None:
    """What it lacked of each bucket at the change comes in it, and no more."""
    buckets = np.repeat([0, 1, 2], [64, 320, 128]).astype(np.uint8)
    order = BucketOrder(buckets, BatchSizes.of(8).changed(20, 16).changed(29, 4), 3)
    seen = [int(i) for step in range(20 + 9 + (512 - 160 - 144) // 4) for i in order(step)]
    assert sorted(seen) == list(range(512))


def test_an_epoch_is_mixed_and_no_two_are_alike() -> None:
    buckets = np.repeat([0, 1, 2], 320).astype(np.uint8)
    order = BucketOrder(buckets, BatchSizes.of(8), 5)
    epochs = [[int(buckets[order(e * 120 + i)[0]]) for i in range(120)] for e in range(2)]
    for epoch in epochs:
        assert [epoch.count(bucket) for bucket in range(3)] == [40, 40, 40]
        assert epoch != sorted(epoch)
    assert epochs[0] != epochs[1]
    # equally large buckets do not go through their samples side by side
    first = {b: next(order(s) for s in range(9) if buckets[order(s)[0]] == b) for b in (0, 1)}
    assert (first[0] != first[1] - 320).any()


def test_far_steps_cost_no_more() -> None:
    buckets = np.array([0, 0, 1, 0, 1], np.uint8)
    order = BucketOrder(buckets, BatchSizes.of(2), 0)
    far = 10**12
    assert len({tuple(order(far + i).tolist()) for i in range(40)}) > 5
    np.testing.assert_array_equal(order(far), BucketOrder(buckets, BatchSizes.of(2), 0)(far))


def test_a_batch_larger_than_the_set() -> None:
    order = BucketOrder(np.zeros(3, np.uint8), BatchSizes.of(8), 0)
    stream = np.concatenate([order(step) for step in range(3)])
    assert (np.sort(stream.reshape(8, 3), axis=1) == np.arange(3)).all()


def test_seed_decides() -> None:
    buckets = np.repeat([0, 1], 50)
    a, b = (BucketOrder(buckets, BatchSizes.of(10), seed)(0) for seed in (0, 1))
    assert sorted(a.tolist()) != sorted(b.tolist())


@pytest.mark.parametrize(("count", "batch", "seed"), [(0, 4, 0), (4, 0, 0), (4, 4, -1)])
def test_refuses_nonsense(count: int, batch: int, seed: int) -> None:
    with pytest.raises(ValueError, match="must be positive"):
        BucketOrder(np.zeros(count, np.uint8), BatchSizes.of(batch), seed)
    with pytest.raises(ValueError, match="count from 0"):
        BucketOrder(np.zeros(4, np.uint8), BatchSizes.of(4), 0)(-1)
