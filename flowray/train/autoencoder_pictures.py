"""The pictures that an autoencoder is trained on and measured with, in batches."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from flowray.config.errors import InputError
from flowray.data.order import EpochOrder, evenly
from flowray.data.pictures import decode_image, decode_sized
from flowray.data.pixels import to_pictures
from flowray.data.prepare import AS_THEY_ARE, Preparation
from flowray.data.reader import ShardReader

BATCH = 32  # pictures of a measurement


class _Steps(Dataset[Tensor | InputError]):
    """The batch of a training step, each picture mirrored at every other of its places.

    What cannot be read is handed back as the InputError: raised in a worker process, it would come
    wrapped in that one's traceback.
    """

    def __init__(self, reader: ShardReader, size: int, seed: int, prepare: Preparation):
        self.reader, self.order = reader, EpochOrder(len(reader), seed)
        self.size, self.seed, self.prepare = size, seed, prepare
        self.shape = decode_image(reader, 0, prepare).shape[:2]

    def __getitem__(self, step: int) -> Tensor | InputError:
        places = range(self.size * step, self.size * (step + 1))
        try:
            return to_pictures([self._picture(place) for place in places])
        except InputError as error:
            return error

    def _picture(self, place: int) -> np.ndarray:
        index = int(self.order(np.array([place]))[0])
        picture = decode_sized(self.reader, index, self.shape, self.prepare)
        mirrored = np.random.default_rng([self.seed, place]).random() < 0.5
        return picture[:, ::-1] if mirrored else picture


def batches(
    reader: ShardReader,
    size: int,
    seed: int,
    first: int,
    steps: int,
    workers: int = 0,
    *,
    prepare: Preparation = AS_THEY_ARE,
) -> Iterator[Tensor]:
    """Pictures (size, 3, H, W) in [-1, 1] of steps `first` to `steps`, by seed and step alone.

    InputError names the sample that does not decode or has another size than the first.
    """
    made = _Steps(reader, size, seed, prepare)
    for batch in DataLoader(
        made, batch_size=None, sampler=range(first, steps), num_workers=workers
    ):
        if isinstance(batch, InputError):
            raise batch
        yield batch


def in_order(
    reader: ShardReader, most: int, prepare: Preparation = AS_THEY_ARE
) -> Iterator[Tensor]:
    """At most `most` pictures, spread evenly over the set, in batches (B, 3, H, W).

    InputError names one that does not decode or has another size than the first.
    """
    shape = decode_image(reader, 0, prepare).shape[:2]
    chosen = evenly(len(reader), most)
    for part in np.array_split(chosen, -(-len(chosen) // BATCH)):
        yield to_pictures([decode_sized(reader, int(i), shape, prepare) for i in part])
