"""Which samples a step takes where the set is in buckets, of which a batch holds one: a pure
function of (seed, step), as `order` is for a set without.

Each bucket b of n_b samples is a stream of its own, an EpochOrder. In epoch e of the whole set come
floor((e + 1) n_b / B) - floor(e n_b / B) batches of B of it, all buckets' in an order drawn from
[seed, e]. What does not fill a batch is so carried on to the next epoch: every sample of a bucket
comes exactly once in every pass through it, and buckets come as often as they have samples.
"""

from __future__ import annotations

import numpy as np

from flowray.data.order import EpochOrder


class BucketOrder:
    """The samples of a step's batch, all of one bucket. It does not know the number of ranks."""

    def __init__(self, buckets: np.ndarray, batch: int, seed: int):
        """buckets: the number of every sample's bucket, (samples,)."""
        if batch < 1 or seed < 0 or not len(buckets):
            raise ValueError(
                f"batch {batch} and samples {len(buckets)} must be positive, seed {seed} not"
                " negative"
            )
        numbers = np.unique(buckets)  # a bucket without samples never comes
        small = np.int32 if len(buckets) < 2**31 else np.int64
        self._samples = [np.flatnonzero(buckets == b).astype(small) for b in numbers.tolist()]
        # streams of their own: equally large buckets must not go through their samples side by side
        seeds = (np.random.SeedSequence([seed, b]).generate_state(1)[0] for b in numbers.tolist())
        self._orders = [
            EpochOrder(len(samples), int(own))
            for samples, own in zip(self._samples, seeds, strict=True)
        ]
        self.batch, self.seed, self._size = batch, seed, len(buckets)
        self._kept: tuple[int, np.ndarray] | None = None

    def __call__(self, step: int) -> np.ndarray:
        """Sample indices (batch,) int64 of a step >= 0."""
        epoch = self._epoch_of(step)
        sequence = self._sequence(epoch)
        place = step - self._steps_before(epoch)
        bucket = int(sequence[place])
        before = self._batches_before(epoch)[bucket]
        number = before + int(np.count_nonzero(sequence[:place] == bucket))
        positions = np.arange(number * self.batch, (number + 1) * self.batch)
        return self._samples[bucket][self._orders[bucket](positions)].astype(np.int64)

    def _batches_before(self, epoch: int) -> list[int]:
        """How many batches of each bucket have come when an epoch begins."""
        return [epoch * len(samples) // self.batch for samples in self._samples]

    def _steps_before(self, epoch: int) -> int:
        return sum(self._batches_before(epoch))

    def _epoch_of(self, step: int) -> int:
        """The last epoch that begins at or before a step; one of too few samples has no steps."""
        if step < 0:
            raise ValueError(f"step {step}: steps count from 0")
        # epoch e begins at most len(buckets) - 1 batches before e * size / batch
        low = step * self.batch // self._size
        high = -(-(step + len(self._samples)) * self.batch // self._size)
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self._steps_before(middle) <= step else (low, middle)
        return low

    def _sequence(self, epoch: int) -> np.ndarray:
        """The bucket of each batch of an epoch."""
        if self._kept is None or self._kept[0] != epoch:
            counts = np.subtract(self._batches_before(epoch + 1), self._batches_before(epoch))
            sequence = np.repeat(np.arange(len(counts), dtype=np.uint8), counts)
            np.random.Generator(np.random.PCG64([self.seed, epoch])).shuffle(sequence)
            self._kept = epoch, sequence
        return self._kept[1]
