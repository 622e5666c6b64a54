"""Which samples a step takes where the set is in buckets, of which a batch holds one: a pure
function of (seed, step), as `order` is for a set without.

Each bucket b of n_b samples is a stream of its own, an EpochOrder. In epoch e of the whole set come
floor((e + 1) n_b / B) - floor(e n_b / B) batches of B of it, all buckets' in an order drawn from
[seed, e]. What does not fill a batch is so carried on to the next epoch: every sample of a bucket
comes exactly once in every pass through it, and buckets come as often as they have samples.

Where the batch changes every stream goes on at the sample where it stands, and what the epoch under
way still lacks of each bucket comes in batches of the new size, in an order drawn anew.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from flowray.data.order import BatchSizes, EpochOrder


class BucketOrder:
    """The samples of a step's batch, all of one bucket. It does not know the number of ranks."""

    def __init__(self, buckets: np.ndarray, sizes: BatchSizes, seed: int):
        """buckets: the number of every sample's bucket, (samples,)."""
        if seed < 0 or not len(buckets):
            raise ValueError(f"samples {len(buckets)} must be positive, seed {seed} not negative")
        numbers = np.unique(buckets)  # a bucket without samples never comes
        small = np.int32 if len(buckets) < 2**31 else np.int64
        self._samples = [np.flatnonzero(buckets == b).astype(small) for b in numbers.tolist()]
        # streams of their own: equally large buckets must not go through their samples side by side
        seeds = (np.random.SeedSequence([seed, b]).generate_state(1)[0] for b in numbers.tolist())
        self._orders = [
            EpochOrder(len(samples), int(own))
            for samples, own in zip(self._samples, seeds, strict=True)
        ]
        counts = [len(samples) for samples in self._samples]
        (_, size), *later = sizes.changes
        self._stretches = [_Stretch(counts, size, seed)]
        for step, size in later:
            self._stretches.append(self._stretches[-1].followed(step, size))

    def __call__(self, step: int) -> np.ndarray:
        """Sample indices (batch,) int64 of a step >= 0."""
        if step < 0:
            raise ValueError(f"step {step}: steps count from 0")
        stretch = [each for each in self._stretches if each.start <= step][-1]
        bucket, position = stretch.place(step)
        positions = np.arange(position, position + stretch.batch)
        return self._samples[bucket][self._orders[bucket](positions)].astype(np.int64)


class _Stretch:
    """Steps of one batch size, from step `start` on. counts: the samples of each bucket; taken: how
    many of each bucket's stream have come before; epoch: the one that is then under way.
    """

    def __init__(
        self,
        counts: Sequence[int],
        batch: int,
        seed: int,
        start: int = 0,
        taken: Sequence[int] | None = None,
        epoch: int = 0,
    ):
        self.batch, self.start = batch, start
        self._counts, self._seed, self._first = counts, seed, epoch
        self._taken = taken or [0] * len(counts)
        self._kept: tuple[int, np.ndarray] | None = None

    def place(self, step: int) -> tuple[int, int]:
        """The bucket of a step's batch, and where in its stream the batch begins."""
        come, sequence = self._come(step)
        bucket = int(sequence[0])
        return bucket, self._taken[bucket] + come[bucket] * self.batch

    def followed(self, step: int, batch: int) -> _Stretch:
        """What goes on from `step` with another batch."""
        come, _ = self._come(step)
        taken = [at + here * self.batch for at, here in zip(self._taken, come, strict=True)]
        return _Stretch(self._counts, batch, self._seed, step, taken, self._epoch_of(step))

    def _come(self, step: int) -> tuple[list[int], np.ndarray]:
        """How many batches of each bucket have come here before a step, and the buckets of those
        that come from there on in its epoch.
        """
        epoch = self._epoch_of(step)
        sequence, place = self._sequence(epoch), step - self.start - self._steps_before(epoch)
        within = np.bincount(sequence[:place], minlength=len(self._counts))
        return np.add(self._batches_before(epoch), within).tolist(), sequence[place:]

    def _batches_before(self, epoch: int) -> list[int]:
        """How many batches of each bucket have come here when an epoch begins."""
        if epoch <= self._first:
            return [0] * len(self._counts)
        return [
            (epoch * count - taken) // self.batch
            for count, taken in zip(self._counts, self._taken, strict=True)
        ]

    def _steps_before(self, epoch: int) -> int:
        return sum(self._batches_before(epoch))

    def _epoch_of(self, step: int) -> int:
        """The last epoch that begins at or before a step; one of too few samples has no steps."""
        # epoch e begins at most len(counts) - 1 batches before (e * size - taken) / batch
        size, taken, steps = sum(self._counts), sum(self._taken), step - self.start
        low = max((steps * self.batch + taken) // size, self._first)
        high = -(-((steps + len(self._counts)) * self.batch + taken) // size)
        high = max(high, self._first + 1)
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self._steps_before(middle) <= steps else (low, middle)
        return low

    def _sequence(self, epoch: int) -> np.ndarray:
        """The bucket of each batch of an epoch."""
        if self._kept is None or self._kept[0] != epoch:
            counts = np.subtract(self._batches_before(epoch + 1), self._batches_before(epoch))
            sequence = np.repeat(np.arange(len(counts), dtype=np.uint8), counts)
            np.random.Generator(np.random.PCG64([self._seed, epoch])).shuffle(sequence)
            self._kept = epoch, sequence
        return self._kept[1]
