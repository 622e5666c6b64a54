"""`benchmarks data`: what reading costs, beside stock webdataset on the same tars.

Ratios, webdataset's seconds over ours, each side in a fresh process of one thread:

- `cold_latents`: from opening the set to the end of its first epoch, imports done and the tars in
  the page cache, flowray's index files beside them as the first use of a shard leaves them;
- `first_latents`: the same with those files to be made, once in a shard's life;
- `uncached_latents`: as cold, the tars and indexes dropped from the page cache before;
- `warm_latents`, `pictures`: the epoch after, everything open; pictures half PNG, half JPEG;
- `resume`: from opening the set to the batch at a position, the furthest of `resume_s`; the other
  side skips, without decoding what it skips.

A round is all of it once, the sides one after the other and their order swapped every round.
Sets of millions are hard links of one tar and its index: every sample can be read, and
webdataset, which reads tars from their beginning, finds them in the page cache.
"""

from __future__ import annotations

import io
import json
import multiprocessing
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from PIL import Image

from benchmarks.data_arms import ARMS, RESUMES, Times, index_memory, read
from benchmarks.overhead import ratio
from benchmarks.record import machine
from flowray.data.captions import captions_in
from flowray.data.index import SUFFIX, load_index
from flowray.data.shards import MANIFEST, tars, write_shards

SIDES = ("flowray", "webdataset")
FLAT = 2.0  # times what a resume at the first position takes, that the last may take
MOST_BYTES = 16  # of memory a sample that an index may take
MOST_GROWTH = 8.0  # MiB from one half of an epoch to the other
WORDS = ("a", "the", "large", "small", "red", "blue", "green", "circle", "square", "with", "dots")
Result = TypeVar("Result")


@dataclass(frozen=True)
class Scale:
    """samples, side: of the latents, (4, side, side); pictures: how many, of 8 * side px;
    positions: of a resume; indexed: samples of the set whose index is weighed, a multiple of
    `linked`: samples of a tar of the sets that are linked together.
    """

    samples: int = 8192
    side: int = 32
    rounds: int = 7
    pictures: int = 1024
    positions: tuple[int, ...] = (1_000, 10_000, 100_000, 1_000_000)
    resumes: int = 3
    linked: int = 10_000
    indexed: int = 10_000_000


QUICK = Scale(1024, 8, 1, 512, (100, 1_000, 4_000), 1, 1_000, 200_000)


def run(scale: Scale, say: Callable[[str], None] = lambda _: None) -> dict[str, Any]:
    """The command's JSON object."""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        say("making the sets")
        latents = made_latents(folder / "latents", scale.samples, scale.side)
        pictures = made_pictures(folder / "pictures", scale.pictures, 8 * scale.side)
        one = made_latents(folder / "one", scale.linked, 1, per_shard=scale.linked)
        tars_to_resume = scale.positions[-1] // scale.linked + 2
        resumed = linked(one, folder / "resumed", tars_to_resume)
        indexed = linked(one, folder / "indexed", scale.indexed // scale.linked)
        passes = _passes(scale, latents, pictures, say)
        resumes = _resumes(scale, resumed, say)
        memory = alone(index_memory, indexed, latents)
    return facts(scale, passes, resumes, memory)


def _passes(
    scale: Scale, latents: Path, pictures: Path, say: Callable[[str], None]
) -> dict[str, dict[str, list[Times]]]:
    """What was read -> side -> the rounds' times."""
    ways: dict[str, tuple[str, Path, Callable[[Path], None]]] = {
        "cold": ("latents", latents, with_index),
        "first": ("latents", latents, without_index),
        "uncached": ("latents", latents, out_of_cache),
        "pictures": ("pictures", pictures, with_index),
    }
    found: dict[str, dict[str, list[Times]]] = {way: {s: [] for s in SIDES} for way in ways}
    for number in range(scale.rounds):
        for way, (what, folder, before) in ways.items():
            for side in turns(number):
                before(folder)
                check = number == 0 and way in ("cold", "pictures")
                times = alone(read, ARMS[what][side], folder, check)
                found[way][side].append(times)
                say(
                    f"round {number + 1}, {way}, {side}: {times.cold:.2f} s, then"
                    f" {times.warm:.2f} s"
                )
    return found


def _resumes(
    scale: Scale, folder: Path, say: Callable[[str], None]
) -> dict[int, dict[str, list[float]]]:
    """position -> side -> the rounds' seconds."""
    found = {p: {side: list[float]() for side in SIDES} for p in scale.positions}
    for number in range(scale.resumes):
        for position, sides in found.items():
            for side in turns(number):
                sides[side].append(alone(RESUMES[side], folder, position))
                say(f"round {number + 1}, resume at {position}, {side}: {sides[side][-1]:.3f} s")
    return found


def facts(
    scale: Scale,
    passes: Mapping[str, Mapping[str, Sequence[Times]]],
    resumes: Mapping[int, Mapping[str, Sequence[float]]],
    memory: tuple[int, float, float],
) -> dict[str, Any]:
    """What the measurements say, as JSON has it."""
    timed = {
        "cold_latents": ("cold", "cold"),
        "warm_latents": ("cold", "warm"),
        "pictures": ("pictures", "warm"),
        "first_latents": ("first", "cold"),
        "uncached_latents": ("uncached", "cold"),
    }
    seconds, cpu = (
        {
            name: {side: [getattr(t, part + unit) for t in passes[way][side]] for side in SIDES}
            for name, (way, part) in timed.items()
        }
        for unit in ("", "_cpu")
    )
    samples = {name: passes[way]["flowray"][0].samples for name, (way, _) in timed.items()}
    first, last = resumes[scale.positions[0]], resumes[scale.positions[-1]]
    digests = {
        way: [passes[way][side][0].digests for side in SIDES] for way in ("cold", "pictures")
    }
    counted, bytes_each, opened = memory
    grown = {side: passes["cold"][side][0].grown for side in SIDES}
    ratios = {name: _ratio(each) for name, each in seconds.items()} | {"resume": _ratio(last)}
    flat = float(np.median(last["flowray"])) / float(np.median(first["flowray"]))
    return {
        "bench": "data",
        "machine": machine(),
        "ratios": ratios,
        "guards": {
            "equal_samples": all(ours[0] == theirs[0] for ours, theirs in digests.values()),
            "equal_tensors": all(ours[1] == theirs[1] for ours, theirs in digests.values()),
            "resume_flat": flat <= FLAT,
            "index_memory": bytes_each <= MOST_BYTES,
            "flat_memory": grown["flowray"] <= MOST_GROWTH,
        },
        "scale": vars(scale),
        "cpu_ratios": {name: _ratio(each) for name, each in cpu.items()},
        "microseconds": {
            name: {side: 1e6 * float(np.median(each[side])) / samples[name] for side in SIDES}
            for name, each in seconds.items()
        },
        "resume_s": {
            str(p): {side: float(np.median(each[side])) for side in SIDES}
            for p, each in resumes.items()
        },
        "index": {"samples": counted, "bytes_per_sample": bytes_each, "open_s": opened},
        "grown_mib": grown,
    }


def _ratio(sides: Mapping[str, Sequence[float]]) -> dict[str, float]:
    return ratio(sides["webdataset"], sides["flowray"])


def turns(number: int) -> tuple[str, ...]:
    """The sides in the order of a round."""
    return SIDES[:: 1 if number % 2 == 0 else -1]


def alone(work: Callable[..., Result], *args: Any) -> Result:
    """What `work(*args)` returns in a fresh process."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["benchmarks.data_arms"])
    with ProcessPoolExecutor(1, mp_context=context) as process:
        return process.submit(work, *args).result()


def made_latents(folder: Path, count: int, side: int, per_shard: int = 1000) -> Path:
    """A split of random moments (8, side, side) as the encoder writes it, all captions unlike
    each other, its tars indexed.
    """
    rng = np.random.default_rng(0)

    def samples() -> Iterator[dict[str, Any]]:
        for i in range(count):
            buffer = io.BytesIO()
            np.save(buffer, rng.standard_normal((8, side, side), dtype=np.float32).astype("f2"))
            yield _sample(rng, i, "moments.npy", buffer.getvalue())

    meta = {"scale": 1.0, "shift": 0.0, "deterministic": False, "variance": 1.0, "pictures": []}
    write_shards(folder, samples(), per_shard=per_shard, meta=meta)
    with_index(folder)
    return folder


def made_pictures(folder: Path, count: int, side: int) -> Path:
    """Pictures of `side` px, smooth with a little noise as photographs are, PNG and JPEG (quality
    90) in turn, their tars indexed.
    """
    rng = np.random.default_rng(0)

    def samples() -> Iterator[dict[str, Any]]:
        for i in range(count):
            coarse = Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8))
            smooth = np.asarray(coarse.resize((side, side), Image.Resampling.BICUBIC))
            noisy = smooth + rng.normal(0, 3, smooth.shape)
            picture, buffer = Image.fromarray(noisy.clip(0, 255).astype(np.uint8)), io.BytesIO()
            kind = ("png", "jpeg")[i % 2]
            picture.save(buffer, kind, **({"quality": 90} if kind == "jpeg" else {}))
            yield _sample(rng, i, ("png", "jpg")[i % 2], buffer.getvalue())

    write_shards(folder, samples(), per_shard=1000, meta={})
    with_index(folder)
    return folder


def _sample(rng: np.random.Generator, i: int, extension: str, data: bytes) -> dict[str, Any]:
    caption = f"{' '.join(rng.choice(WORDS, 12))}, number {i}"
    row = json.dumps({"captions": [caption]}).encode()
    return {"__key__": f"{i:08d}", extension: data, "json": row}


def linked(one: Path, folder: Path, count: int) -> Path:
    """A split of `count` times the one tar of another, which takes no room."""
    folder.mkdir()
    (tar,) = tars(one)
    names = [f"shard-{i:06d}.tar" for i in range(count)]
    for name in names:
        os.link(tar, folder / name)
        os.link(f"{tar}{SUFFIX}", folder / f"{name}{SUFFIX}")
    manifest = json.loads((one / MANIFEST).read_text(encoding="utf-8"))
    manifest["shards"] = [{**manifest["shards"][0], "name": name} for name in names]
    (folder / MANIFEST).write_text(json.dumps(manifest), encoding="utf-8")
    return folder


def with_index(folder: Path) -> None:
    """Leave the index files of the tars beside them, with their captions, as an encode does."""
    for tar in tars(folder):
        load_index(tar, captions_in)


def without_index(folder: Path) -> None:
    """Remove the index files."""
    for path in folder.glob(f"*{SUFFIX}"):
        path.unlink()


def out_of_cache(folder: Path) -> None:
    """Have the tars and their index files read from the disk again."""
    with_index(folder)
    for path in folder.iterdir():
        file = os.open(path, os.O_RDONLY)
        try:
            os.fsync(file)  # what is not written yet would stay
            os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(file)
