"""Shards of pictures to latent shards, one for one, each written whole: what was encoded before a
kill stays. Threads decode while the autoencoder works.
"""

from __future__ import annotations

import io
import time
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import astuple, dataclass, field, replace
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from flowray.config.base import LatentSpec
from flowray.config.cores import usable_cores
from flowray.config.errors import InputError
from flowray.config.model import AutoencoderConfig
from flowray.config.progress import Advance, Progress, duration
from flowray.config.train import MomentsKind
from flowray.data.decode import picture_of
from flowray.data.index import samples_in
from flowray.data.pictures import decode_image
from flowray.data.pixels import to_pictures
from flowray.data.prepare import FILTERED, Preparation, Refused
from flowray.data.reader import ShardReader
from flowray.data.remote import ahead
from flowray.model.latent import LatentScale, Moments, over_channels
from flowray.store.latent_shards import Bad, Encoded, LatentShards, Source, label, letters
from flowray.store.moments import NOT_FINITE, Stored, stored
from flowray.store.sums import Sums

if TYPE_CHECKING:
    from webdataset.writer import TarWriter

    from flowray.model.autoencoder import Autoencoder

ENCODE_BATCH = 32
_AHEAD = 2  # batches that are decoded while one is encoded
DECODERS = 8  # threads at most
_TEXTS = ("json", "txt")  # what a latent shard keeps of a sample beside its moments


@dataclass
class Budget:
    """How many samples of a split may be bad, and those found so far, each with its shard.

    filtered: those that `data.prepare` leaves out, of which there may be any number. option: how
    `max_bad` is typed. kept: what the line beyond it says of the work so far.
    """

    split: str
    samples: int
    max_bad: float
    found: list[tuple[Path, Bad]] = field(default_factory=list)
    filtered: Counter[str] = field(default_factory=Counter)
    option: str = "data.max_bad="
    kept: str = " (shards encoded so far are kept)"

    def add(self, path: Path, left_out: Sequence[Bad]) -> None:
        """InputError, with the first three, where these are more bad ones than may be."""
        bad = [each for each in left_out if each.cause not in FILTERED]
        self.filtered.update(each.cause for each in left_out if each.cause in FILTERED)
        self.found += ((path, each) for each in bad)
        allowed = int(self.max_bad * self.samples + 1e-9)  # 0.29 * 100 is 28.999...
        if bad and len(self.found) > allowed:
            first = "; ".join(label(*each) for each in self.found[:3])
            hint = ""
            if all(each.cause == NOT_FINITE for _, each in self.found):
                hint = "; are the weights of model.autoencoder whole?"
            share = len(self.found) / self.samples
            leave = f", or type {self.option}{_above(share):g} to leave them out" * (share < 1)
            raise InputError(
                f"{len(self.found)} bad of {self.samples} {self.split} samples so far,"
                f" {self.option.rstrip('= ')} {self.max_bad:g} allows {allowed}: {first}{hint};"
                f" mend them{leave}{self.kept}"
            )

    def told(self) -> str:
        """What was left out, in one line; "" for nothing."""
        kinds = {
            "skipped": Counter(bad.cause for _, bad in self.found),
            "left out by data.prepare": self.filtered,
        }
        parts = []
        for how, causes in kinds.items():
            why = ", ".join(f"{cause} x{count}" for cause, count in causes.most_common())
            of = f"of {self.samples} {self.split} samples {how}"
            parts += [f"{causes.total()} {of}: {why}"] if causes else []
        return "; ".join(parts)


def _above(share: float) -> float:
    """The share, rounded up to one digit."""
    digit = 10.0 ** np.floor(np.log10(share))
    return float(min(1.0, np.ceil(share / digit - 1e-9) * digit))


@dataclass
class Pace:
    """What was done and the seconds it took, those of all threads that decode added up."""

    decoded: int = 0
    decode_s: float = 0.0
    encoded: int = 0
    encode_s: float = 0.0
    written: int = 0  # bytes
    write_s: float = 0.0
    rounding: float = 0.0  # the largest of the samples' `rounding_errors`

    def __add__(self, other: Pace) -> Pace:
        added = Pace(*(a + b for a, b in zip(astuple(self), astuple(other), strict=True)))
        return replace(added, rounding=max(self.rounding, other.rounding))

    def __str__(self) -> str:
        stages = (
            f"decoded {self.decoded / max(self.decode_s, 1e-9):,.0f} pictures/s a thread",
            f"encoded {self.encoded / max(self.encode_s, 1e-9):,.0f} pictures/s a process",
            f"written {self.written / 1e6 / max(self.write_s, 1e-9):,.0f} MB/s",
            f"rounded by {self.rounding:.2%} of a channel's std at most",
        )
        return ", ".join(stages)


class _Decoded(NamedTuple):
    """The picture (H, W, 3) of a sample, or what is wrong with it; place: in its shard; seconds: of
    the thread.
    """

    place: int
    picture: np.ndarray | Bad
    seconds: float


class _Batch(NamedTuple):
    source: Source
    reader: ShardReader
    samples: list[Future[_Decoded]]


@dataclass(frozen=True)
class Encoding:
    """Shards of one split to encode; it can be pickled, and called in any process.

    samples: in all of the shards. sums: the folder of their sha256. cores: for it to use; None: all
    that this process may.
    """

    sources: tuple[Source, ...]
    samples: int
    cache: LatentShards
    autoencoder: AutoencoderConfig
    latent: LatentSpec
    budget: Budget
    sums: Path
    cores: int | None = None

    def __call__(self, progress: Progress) -> Pace:
        """Encode what the cache has not got. InputError beyond the budget, and where the cache
        cannot be written; whole shards stay.
        """
        cores = usable_cores() if self.cores is None else self.cores
        if self.cores is not None:
            torch.set_num_threads(cores)
        with progress.task("loading the autoencoder"):
            # diffusers takes seconds to import; a cached run never needs it
            from flowray.model.autoencoder import load_autoencoder

            device = "cuda" if torch.cuda.is_available() else "cpu"
            autoencoder = load_autoencoder(self.autoencoder, self.latent).to(device)
        pool = ThreadPoolExecutor(min(cores, DECODERS), thread_name_prefix="decode")
        try:
            with progress.task(self.what, self.samples) as advance:
                return self._encode(autoencoder, pool, advance)
        except BrokenPipeError:  # whoever shows the progress has died
            raise
        except OSError as error:
            why = error.strerror or error
            raise InputError(f"{self.cache.folder}: cannot be written: {why}") from error
        finally:
            pool.shutdown(cancel_futures=True)

    @property
    def what(self) -> str:
        return f"encoding {self.budget.split} pictures"

    def parts(self, count: int, cores: int) -> list[Encoding]:
        """The same by several processes of so many cores, every `count`-th shard each."""
        chosen = [self.sources[i::count] for i in range(min(count, len(self.sources)))]
        return [replace(self, sources=each, cores=cores) for each in chosen]

    def _encode(self, autoencoder: Autoencoder, pool: ThreadPoolExecutor, advance: Advance) -> Pace:
        pace = Pace()
        sized = [autoencoder.of_size(size) for size in self.cache.sizes] or [autoencoder]
        size, *others = (each.picture_size for each in sized)
        prepare = Preparation(self.cache.preparing, size, tuple(others), strict=True)
        batches = self._ahead(prepare, pool, advance)
        for source, group in groupby(batches, lambda batch: batch.source):
            writer = _Writer(sized, self.cache.moments, self.budget, source, pace)
            with self.cache.writing(source) as tar:
                for batch in group:
                    writer.add(batch, tar)
                    advance(len(batch.samples))
                started = time.perf_counter()
            pace.write_s += time.perf_counter() - started
            size = (self.cache.folder / source.tar).stat().st_size
            pace.written += size
            row = writer.row(size)
            pace.rounding = max(pace.rounding, row.rounding or 0.0)
            self.cache.keep(source, row)
        return pace

    def _ahead(
        self, prepare: Preparation, pool: ThreadPoolExecutor, advance: Advance
    ) -> Iterator[_Batch]:
        """The batches, each of one shard, with the decoding of the next ones under way."""
        waiting = deque[_Batch]()
        paths = {source.path: source for source in self.sources}
        wanted = ahead(paths, lambda path: not self.cache.find(paths[path]))
        for path, source in zip(wanted, self._named(pool), strict=True):
            if self.cache.find(source):  # another process was first, or has its bytes elsewhere
                advance(samples_in(path))
                continue
            reader = ShardReader([path], caption_key=self.cache.caption_key)
            reader.key(0)  # mapped at once: a fetched shard may make room before a thread opens it
            for start in range(0, len(reader), ENCODE_BATCH):
                indices = range(start, min(start + ENCODE_BATCH, len(reader)))
                samples = [pool.submit(_decode, reader, i, prepare) for i in indices]
                waiting.append(_Batch(source, reader, samples))
                if len(waiting) > _AHEAD:
                    yield waiting.popleft()
        yield from waiting

    def _named(self, pool: ThreadPoolExecutor) -> Iterator[Source]:
        """The shards, all with keys: the next one is read for its own while one is encoded."""
        sums, waiting = Sums(self.sums), deque[Future[Source]]()
        for source in self.sources:
            waiting.append(pool.submit(source.named, sums))
            if len(waiting) > 1:
                yield waiting.popleft().result()
        if waiting:
            yield waiting.popleft().result()


class _Writer:
    """Encodes the batches of one shard and adds up what its JSON will say.

    sized: the autoencoder for the pictures of each bucket; one alone where there are none.
    """

    def __init__(
        self,
        sized: Sequence[Autoencoder],
        kind: MomentsKind,
        budget: Budget,
        source: Source,
        pace: Pace,
    ):
        self._sized, self._kind, self._budget, self._source = sized, kind, budget, source
        self._pace, self._bad, self._buckets = pace, list[Bad](), list[int]()
        self._samples, self._values, self._total, self._squares = 0, 0, 0.0, 0.0
        self._rounding = 0.0

    def add(self, batch: _Batch, tar: TarWriter) -> None:
        looked = [future.result() for future in batch.samples]
        self._pace.decoded += len(looked)
        self._pace.decode_s += sum(each.seconds for each in looked)
        bad = [each.picture for each in looked if isinstance(each.picture, Bad)]
        good = [(i, picture) for i, picture, _ in looked if not isinstance(picture, Bad)]
        if good:
            started = time.perf_counter()
            made, unfit = self._made(batch.reader, dict(good))
            self._pace.encoded += len(good)
            self._pace.encode_s += time.perf_counter() - started
            bad += unfit
            started = time.perf_counter()
            for i, (bucket, row) in made.items():
                tar.write(_sample(batch.reader, i, row))
                self._buckets.append(bucket)
            self._pace.write_s += time.perf_counter() - started
        self._bad += sorted(bad, key=lambda each: each.index)
        self._budget.add(self._source.path, bad)

    def _made(
        self, reader: ShardReader, pictures: dict[int, np.ndarray]
    ) -> tuple[dict[int, tuple[int, np.ndarray]], list[Bad]]:
        """Sample -> its bucket and moments (2C, H, W) as they are written, in the samples' order,
        and those that cannot be; pictures of one bucket go through the autoencoder together.
        """
        made, bad = dict[int, tuple[int, np.ndarray]](), list[Bad]()
        for bucket, autoencoder in enumerate(self._sized):
            size = autoencoder.picture_size
            mine = [index for index, picture in pictures.items() if picture.shape[:2] == size]
            if mine:
                of = reader, mine, [pictures[index] for index in mine]
                rows, _, faults = self._moments(autoencoder, *of)
                for index, row, fault in zip(mine, rows, faults, strict=True):
                    if fault:
                        bad.append(Bad(index, reader.key(index), *fault))
                    else:
                        made[index] = bucket, row
        return dict(sorted(made.items())), bad

    def _moments(
        self,
        autoencoder: Autoencoder,
        reader: ShardReader,
        indices: Sequence[int],
        pictures: list[np.ndarray],
    ) -> Stored:
        """The samples' moments, those without a fault counted."""
        device, scale = next(autoencoder.parameters()).device, autoencoder.scale
        try:
            moments = autoencoder.encode_moments(to_pictures(pictures).to(device))
        except ValueError as error:
            where = reader.label(indices[0])
            raise InputError(f"model.latent: {error}, first {where}") from error
        found = stored(moments, self._kind, scale)
        kept = [i for i, fault in enumerate(found.faults) if fault is None]
        moments = Moments(moments.mean[kept], moments.logvar[kept])
        z = scale.sample(moments, torch.zeros_like(moments.mean)).double()
        self._total += float(z.sum())
        self._squares += float((z.square() + posterior_variance(moments, scale)).sum())
        self._values += z.numel()
        self._samples += len(z)
        self._rounding = max([self._rounding, *found.errors[kept].tolist()])
        return found

    def row(self, size: int) -> Encoded:
        """What is to be said of the tar, which has so many bytes."""
        scale = self._sized[0].scale
        return Encoded(
            samples=self._samples,
            bytes=size,
            values=self._values,
            total=self._total,
            squares=self._squares,
            scale=scale.scale,
            shift=scale.shift,
            deterministic=scale.deterministic,
            bad=tuple(self._bad),
            buckets=letters(self._buckets) if len(self._sized) > 1 else "",
            rounding=self._rounding,
        )


def _decode(reader: ShardReader, index: int, prepare: Preparation) -> _Decoded:
    started = time.perf_counter()
    picture = decode_or_bad(reader, index, prepare)
    return _Decoded(index, picture, time.perf_counter() - started)


def decode_or_bad(
    reader: ShardReader, index: int, prepare: Preparation, *, captioned: bool = True
) -> np.ndarray | Bad:
    """The picture of a sample, uint8 (H, W, 3), or what is wrong with it; `index` is its place in
    the reader. captioned: whether one without a caption is bad.
    """

    def bad(cause: str, message: str) -> Bad:
        message = message.removeprefix(f"{reader.label(index)}: ")
        return Bad(index, reader.key(index), cause, message)

    if fault := reader.fault(index):
        return bad(*fault)
    there = picture_of(reader.extensions(index)) is not None
    try:
        if there and captioned:  # else the next line says so
            reader.captions(index)
    except InputError as error:
        return bad("no caption", str(error))
    try:
        return decode_image(reader, index, prepare)
    except Refused as error:
        return bad(error.cause, str(error))
    except InputError as error:
        return bad("does not decode" if there else "no picture", str(error))


def _sample(reader: ShardReader, index: int, row: np.ndarray) -> dict[str, Any]:
    buffer = io.BytesIO()
    np.save(buffer, row)
    has = reader.extensions(index)
    texts = {name: reader.read(index, name) for name in _TEXTS if name in has}
    return {"__key__": reader.key(index), "moments.npy": buffer.getvalue(), **texts}


def posterior_variance(moments: Moments, scale: LatentScale) -> float | Tensor:
    """Variance of a drawn z1 about its mean, fp32, 0 for a deterministic autoencoder."""
    return (
        0.0
        if scale.deterministic
        else moments.logvar.exp() * over_channels(scale.scale, moments.logvar) ** 2
    )


class Fleet(Protocol):
    """Processes for work that can be pickled, of `cores` cores each; where they run is its own."""

    @property
    def count(self) -> int: ...

    @property
    def cores(self) -> int: ...

    def __call__(self, works: Sequence[Encoding], progress: Progress) -> list[Pace]:
        """Do them beside each other. Raises what one of them raises, and ends the others then."""


def encode(encoding: Encoding, fleet: Fleet | None, progress: Progress) -> None:
    """Do it, here or by a fleet, and say how fast it went."""
    started = time.perf_counter()
    encoding.cache.prepare()
    if fleet is None:
        pace = encoding(progress)
    else:
        with progress.task(encoding.what, encoding.samples) as advance:
            parts = encoding.parts(fleet.count, fleet.cores)
            pace = sum(fleet(parts, _AsOne(encoding.what, progress, advance)), Pace())
    took = time.perf_counter() - started
    progress.say(
        f"{encoding.samples:,} {encoding.budget.split} pictures in {duration(took)}: {pace}"
    )


@dataclass(frozen=True)
class _AsOne:
    """Progress of several processes that do parts of one task."""

    what: str
    progress: Progress
    advance: Advance

    def say(self, text: str) -> None:
        self.progress.say(text)

    @contextmanager
    def task(self, what: str, total: int | None = None, done: int = 0) -> Iterator[Advance]:
        """Of the task itself the count; loading the autoencoder is no task of its own."""
        yield self.advance if what == self.what else lambda count=1, note="": None
