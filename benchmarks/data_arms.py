"""Reading the same tars through flowray and through stock webdataset, each in a process of its
own: what `benchmarks data` times.

webdataset is set up as its documentation has it: shards shuffled, a shuffle buffer of 1000, its
own decoders, `to_tuple`, `batched`; no worker processes, as everything here is of one core.
Both sides deliver the same: stacked arrays and a list of captions a batch.
"""

from __future__ import annotations

import gc
import hashlib
import os
import re
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import webdataset

from flowray.data.order import EpochOrder
from flowray.data.pictures import decode_image
from flowray.data.reader import ShardReader
from flowray.data.shards import tars
from flowray.store.latents import LatentSet, load_latents

BATCH = 256
SHUFFLE = 1000  # samples that webdataset draws from, as in its documentation
Arrays = tuple[np.ndarray | torch.Tensor, ...]
Batches = Iterator[tuple[Arrays, list[str]]]
Epoch = Callable[[int], Batches]
Arm = Callable[[Path], Epoch]  # opens the set of a folder


@dataclass(frozen=True)
class Times:
    """Seconds of an opening with a first epoch, and of the epoch after it, by the clock and by
    the processor; samples of an epoch.

    grown: MiB by which the most anonymous memory in the second half of an epoch is above that in
    the first; digests: of the captions, and of captions with their arrays, whatever the order. 0
    and none where they were not asked for.
    """

    cold: float
    warm: float
    cold_cpu: float
    warm_cpu: float
    samples: int
    grown: float
    digests: tuple[str, ...]


def flowray_latents(folder: Path) -> Epoch:
    """Moments fp32 (B, C, H, W) twice, and captions, in the order that training has."""
    latents = load_latents(folder)
    order = EpochOrder(len(latents), seed=0)

    def epoch(number: int) -> Batches:
        for start in range(number * len(latents), (number + 1) * len(latents), BATCH):
            yield _latents_at(latents, order, start)

    return epoch


def _latents_at(latents: LatentSet, order: EpochOrder, start: int) -> tuple[Arrays, list[str]]:
    indices = order(np.arange(start, start + BATCH))
    return latents.moments(indices), latents.chosen_captions(indices, [0.0] * len(indices))


def webdataset_latents(folder: Path) -> Epoch:
    """The same of webdataset."""
    dataset = _shuffled(folder).decode().to_tuple("moments.npy", "json").batched(BATCH)
    return lambda _: map(_as_moments, dataset)


def _as_moments(batch: tuple[np.ndarray, list[dict[str, Any]]]) -> tuple[Arrays, list[str]]:
    moments, told = batch
    arrays = torch.from_numpy(moments).float().chunk(2, dim=1)
    return arrays, [each["captions"][0] for each in told]


def flowray_pictures(folder: Path) -> Epoch:
    """Pictures uint8 (B, H, W, 3), and captions, in the order that training has."""
    reader = ShardReader(tars(folder))
    order = EpochOrder(len(reader), seed=0)

    def epoch(number: int) -> Batches:
        for start in range(number * len(reader), (number + 1) * len(reader), BATCH):
            indices = order(np.arange(start, start + BATCH)).tolist()
            pictures = np.stack([decode_image(reader, i) for i in indices])
            yield (pictures,), [reader.captions(i)[0] for i in indices]

    return epoch


def webdataset_pictures(folder: Path) -> Epoch:
    """The same of webdataset, decoded by its `rgb8`."""
    dataset = _shuffled(folder).decode("rgb8").to_tuple("png;jpg", "json").batched(BATCH)
    return lambda _: (
        ((pictures,), [each["captions"][0] for each in told]) for pictures, told in dataset
    )


def _shuffled(folder: Path) -> webdataset.WebDataset:
    paths = [str(path) for path in tars(folder)]
    return webdataset.WebDataset(paths, shardshuffle=len(paths), seed=0).shuffle(SHUFFLE)


ARMS: dict[str, dict[str, Arm]] = {
    "latents": {"flowray": flowray_latents, "webdataset": webdataset_latents},
    "pictures": {"flowray": flowray_pictures, "webdataset": webdataset_pictures},
}


def read(arm: Arm, folder: Path, check: bool) -> Times:
    """Open a set and read it twice; where it is to be checked again, untimed, for memory and
    digests.
    """
    torch.set_num_threads(1)
    gc.collect()
    wall, cpu = time.perf_counter(), time.process_time()
    epoch = arm(folder)
    samples = sum(len(captions) for _, captions in epoch(0))
    cold, cold_cpu = time.perf_counter() - wall, time.process_time() - cpu
    wall, cpu = time.perf_counter(), time.process_time()
    again = sum(len(captions) for _, captions in epoch(1))
    warm, warm_cpu = time.perf_counter() - wall, time.process_time() - cpu
    if again != samples:
        raise RuntimeError(f"{again} samples in the second epoch, {samples} in the first")
    grown = growth(epoch(2)) if check else 0.0
    digests = digests_of(epoch(3)) if check else ()
    return Times(cold, warm, cold_cpu, warm_cpu, samples, grown, digests)


def growth(batches: Batches) -> float:
    """MiB, as Times has it; a batch's own arrays come and go with the allocator's mood."""
    held = [anonymous_mib() for _ in batches]
    half = len(held) // 2
    return max(held[half:]) - max(held[:half])


def digests_of(batches: Batches) -> tuple[str, str]:
    """sha256 of all captions, and of all captions each with its arrays, in the captions' order."""
    rows = sorted(
        (caption, hashlib.sha256(b"".join(np.asarray(a[i]).tobytes() for a in arrays)).hexdigest())
        for arrays, captions in batches
        for i, caption in enumerate(captions)
    )
    return (
        hashlib.sha256("\n".join(caption for caption, _ in rows).encode()).hexdigest(),
        hashlib.sha256("\n".join(map("\t".join, rows)).encode()).hexdigest(),
    )


def flowray_resume(folder: Path, position: int) -> float:
    """Seconds from before the set is opened to the batch at a position."""
    torch.set_num_threads(1)
    began = time.perf_counter()
    latents = load_latents(folder)
    _, captions = _latents_at(latents, EpochOrder(len(latents), seed=0), position)
    return _of_whole(captions, began)


def webdataset_resume(folder: Path, position: int) -> float:
    """The same of webdataset, which skips; it skips before it decodes."""
    torch.set_num_threads(1)
    began = time.perf_counter()
    skipped = _shuffled(folder).slice(position, sys.maxsize)
    dataset = skipped.decode().to_tuple("moments.npy", "json").batched(BATCH)
    _, captions = _as_moments(next(iter(dataset)))
    return _of_whole(captions, began)


def _of_whole(captions: list[str], began: float) -> float:
    if len(captions) != BATCH:
        raise RuntimeError(f"{len(captions)} samples in a batch of {BATCH}")
    return time.perf_counter() - began


RESUMES: dict[str, Callable[[Path, int], float]] = {
    "flowray": flowray_resume,
    "webdataset": webdataset_resume,
}


def index_memory(folder: Path, other: Path) -> tuple[int, float, float]:
    """(samples of a set, bytes of anonymous memory a sample that opening it and reading 64
    batches spread over an epoch added, seconds to open it), in a process that has read another
    set before.
    """
    torch.set_num_threads(1)
    for _ in flowray_latents(other)(0):
        pass
    gc.collect()
    before, began = anonymous_mib(), time.perf_counter()
    latents = load_latents(folder)
    order = EpochOrder(len(latents), seed=0)
    opened = time.perf_counter() - began
    for start in np.linspace(0, len(latents) - BATCH, 64).astype(int).tolist():
        _latents_at(latents, order, start)
    gc.collect()
    grown = (anonymous_mib() - before) * 2**20 / len(latents)
    return len(latents), grown, opened


def anonymous_mib() -> float:
    """This process's resident memory without what is mapped from files (Linux)."""
    status = Path(f"/proc/{os.getpid()}/status").read_text()
    found = re.search(r"^RssAnon:\s+(\d+) kB", status, re.MULTILINE)
    if not found:
        raise RuntimeError("no RssAnon in /proc/self/status")
    return int(found[1]) / 1024
