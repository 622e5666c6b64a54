"""The pictures that an autoencoder is trained on and measured with, in batches."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

import numpy as np
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from flowray.config.cores import usable_cores
from flowray.config.errors import InputError
from flowray.config.progress import Progress
from flowray.config.writing import write_whole
from flowray.data.order import EpochOrder, evenly
from flowray.data.pictures import decode_image, decode_sized
from flowray.data.pixels import to_pictures
from flowray.data.prepare import AS_THEY_ARE, OTHER_SIZE, Preparation
from flowray.data.reader import ShardReader
from flowray.data.remote import stat_of
from flowray.store.encode import DECODERS, Budget, decode_or_bad
from flowray.store.latent_shards import Bad, bad_row

BATCH = 32  # pictures of a measurement
JUDGED = 1024  # held-out pictures
PLANNED = 4096  # pictures that a plan looks through: seconds
_LOOKED_AT = 1024  # pictures handed to the threads that decode at a time


def look_through(
    reader: ShardReader,
    budget: Budget,
    prepare: Preparation,
    progress: Progress,
    cache: Path,
    *,
    most: int | None = None,
    planned: bool = False,
) -> tuple[ShardReader, list[dict[str, str]]]:
    """The reader without what is bad and what `prepare` leaves out, and the rows of
    `bad_samples.jsonl` that name this. Every picture is decoded, once: what is found is kept in
    `cache`, for as long as the shards are the same. Bad is one that does not decode, or that has
    another size than most. InputError where more are bad than `budget` allows.

    most: of as many pictures alone, spread evenly over the set. planned: of more than PLANNED
    look at none, and leave out what is known from before.
    """
    chosen = evenly(len(reader), len(reader) if most is None else most).tolist()
    file = cache / f"looked-{_stands_for(reader, prepare, most)}.json"
    found = _known(file)
    for bad in found or ():
        budget.add(reader.path(bad.index), [bad])
    if found is None and (not planned or len(chosen) <= PLANNED):
        found = _look(reader, chosen, budget, prepare, progress)
        if not planned:
            with suppress(OSError):  # a read-only or full disk: another time they are seen again
                write_whole(file, json.dumps([asdict(bad) for bad in found]), shared=True)
    left_out = {bad.index: bad for bad in found or ()}
    unused = set(range(len(reader))) - set(chosen) | left_out.keys()
    rows = [
        {"split": budget.split, **bad_row(reader.path(index), left_out[index])}
        for index in sorted(left_out)
    ]
    without = reader.places(sorted(unused))
    return ShardReader(reader.paths, without=without, caption_key=reader.caption_key), rows


def _stands_for(reader: ShardReader, prepare: Preparation, most: int | None) -> str:
    """16 hex digits for the shards as they lie there, and how they are looked at."""
    shards = [(str(path), *stat_of(path)) for path in reader.paths]
    made_of = shards, reader.fingerprint(), prepare.tag, most
    return hashlib.sha256(json.dumps(made_of).encode()).hexdigest()[:16]


def _known(file: Path) -> list[Bad] | None:
    """What was found before; None where there is no such file, or it is not whole."""
    try:
        return [Bad(**row) for row in json.loads(file.read_text(encoding="utf-8"))]
    except (OSError, ValueError, TypeError):
        return None


def _look(
    reader: ShardReader,
    chosen: Sequence[int],
    budget: Budget,
    prepare: Preparation,
    progress: Progress,
) -> list[Bad]:
    """What is to be left out of these pictures, each of which is decoded."""
    left_out, sizes = list[Bad](), dict[int, tuple[int, ...]]()

    def look(index: int) -> tuple[int, ...] | Bad:
        found = decode_or_bad(reader, index, prepare, captioned=False)
        return found if isinstance(found, Bad) else found.shape[:2]

    def leave_out(bad: Bad) -> None:
        budget.add(reader.path(bad.index), [bad])
        left_out.append(bad)

    what = f"looking through the {budget.split} pictures"
    with (
        progress.task(what, len(chosen)) as advance,
        ThreadPoolExecutor(min(usable_cores(), DECODERS)) as pool,
    ):
        for start in range(0, len(chosen), _LOOKED_AT):
            part = chosen[start : start + _LOOKED_AT]
            for index, found in zip(part, pool.map(look, part), strict=True):
                if isinstance(found, Bad):
                    leave_out(found)
                else:
                    sizes[index] = found
                advance()
    for usual, _ in Counter(sizes.values()).most_common(1):
        for index in (index for index, size in sizes.items() if size != usual):
            (h, w), (height, width) = sizes[index], usual
            message = (
                f"{w} x {h} px among pictures of {width} x {height} px; --size PX brings pictures"
                " of several sizes to one"
            )
            leave_out(Bad(index, reader.key(index), OTHER_SIZE, message))
    return left_out


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
