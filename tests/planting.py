"""Ways of planting a bug that the faults of both halves share."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
from faults import ADALN, NOISE, OPEN, SETS, Bug, replacing
from torch import Tensor, nn

from flowray.data.make import png
from flowray.data.pictures import decode_image
from flowray.data.reader import ShardReader
from flowray.data.shards import MANIFEST, find_shards, write_shards
from flowray.doctor import subject
from flowray.losses.total import Batch
from flowray.model.latent import Moments
from flowray.sample import generate
from flowray.store.latents import LatentSet
from flowray.train.step import BatchMaker

# of a sample: `picture` uint8 (H, W, 3), `captions` and whatever else its json holds
Sample = dict[str, Any]
# from noise, on captions that fix the picture
CLOSED_NOISE = {**NOISE, "loss.clip.weight": 0.0}
# healthy runs that code of sampling is examined on
WIDE = {"healthy": "healthy_open_text", "keys": OPEN, "pictures": "open", "late": True}
GUIDED = {
    "healthy": "healthy_guided",
    "keys": {**OPEN, **ADALN, "sample.guidance_scale": 3.0},
    "pictures": "open",
    "late": True,
}


def everywhere(owner: Any, name: str, make: Callable[[Any], Any]) -> Callable[[], Bug]:
    """A bug in a function's source: make(original) wherever a module of flowray holds it."""

    def bug() -> Bug:
        original, stack = getattr(owner, name), ExitStack()
        made = make(original)
        for module in [m for n, m in sys.modules.items() if n.startswith("flowray")]:
            for key in [key for key, held in vars(module).items() if held is original]:
                stack.enter_context(patch.object(module, key, made))
        return stack

    return bug


def together(*bugs: Callable[[], Bug]) -> Callable[[], Bug]:
    """Several at once."""

    def bug() -> Bug:
        stack = ExitStack()
        for each in bugs:
            stack.enter_context(each())
        return stack

    return bug


def once_built(owner: type[nn.Module], change: Callable[[Any], None]) -> Callable[[], Bug]:
    """A bug in a module's constructor: `change` of what it has built."""

    def make(original: Any) -> Any:
        def start(self: Any, *args: Any, **keywords: Any) -> None:
            original(self, *args, **keywords)
            change(self)

        return start

    return replacing(owner, "__init__", make)


def batches(change: Callable[[Batch], Batch]) -> Callable[[], Bug]:
    """A bug in how training makes its batches."""
    return replacing(
        BatchMaker, "__call__", lambda original: lambda self, step: change(original(self, step))
    )


def captions(change: Callable[[list[str]], list[str]]) -> Callable[[], Bug]:
    """A bug in which captions a training batch has."""
    return replacing(
        BatchMaker, "_captions", lambda original: lambda *given: change(original(*given))
    )


def training_moments(change: Callable[[Moments, np.ndarray], Moments]) -> Callable[[], Bug]:
    """A bug in the cached latents of the training set (`closed` pictures)."""

    def make(original: Any) -> Any:
        def moments(self: LatentSet, indices: np.ndarray) -> Moments:
            made = original(self, indices)
            return change(made, np.asarray(indices)) if len(self) == SETS["train"] else made

        return moments

    return replacing(LatentSet, "moments", make)


def sampled(change: Callable[[list[str], Tensor], tuple[list[str], Tensor]]) -> Callable[[], Bug]:
    """A bug in the prompts or the noise with which sampling begins."""
    return everywhere(
        generate,
        "generate_latents",
        lambda original: (
            lambda model, prompts, config, noise, *rest: original(
                model, *_between(change(list(prompts), noise), config), *rest
            )
        ),
    )


def _between(pair: tuple[list[str], Tensor], config: Any) -> tuple[Any, ...]:
    return pair[0], config, pair[1]


def not_loaded(prefix: str) -> Callable[[], Bug]:
    """Weights of this prefix stay as they were before training, in the raw weights and the EMA."""

    def bug() -> Bug:
        kept: dict[str, Tensor] = {}
        copy, load = subject.copy_found, subject.load_tensors

        def copy_most(found: Any, parameters: Any, tensors: Any) -> None:
            fresh = {n: p.detach().clone() for n, p in parameters.items() if n.startswith(prefix)}
            kept.update(fresh)
            copy(found, parameters, {**tensors, **fresh})

        def load_most(checkpoint: Path, group: str) -> Any:
            return {**load(checkpoint, group), **(kept if group == "ema" else {})}

        stack = ExitStack()
        stack.enter_context(patch.object(subject, "copy_found", copy_most))
        stack.enter_context(patch.object(subject, "load_tensors", load_most))
        return stack

    return bug


def read_samples(folder: Path) -> list[Sample]:
    """Every sample of a split."""
    reader = ShardReader(find_shards(str(folder)))
    return [
        {**json.loads(reader.read(i, "json")), "picture": decode_image(reader, i)}
        for i in range(len(reader))
    ]


def write_samples(folder: Path, samples: Iterable[Sample]) -> Path:
    """Samples as a split of their own."""

    def packed(i: int, sample: Sample) -> dict[str, Any]:
        row = {key: value for key, value in sample.items() if key != "picture"}
        return {
            "__key__": f"train-{i:06d}",
            "png": png(np.ascontiguousarray(sample["picture"])),
            "txt": sample["captions"][0].encode(),
            "json": json.dumps(row).encode(),
        }

    return write_shards(folder, (packed(i, s) for i, s in enumerate(samples)), meta={})


def rewritten(change: Callable[[list[Sample]], list[Sample]]) -> Callable[[Path, Path], Path]:
    """Faulty training data: what `change` makes of the healthy samples."""

    def make(healthy: Path, folder: Path) -> Path:
        if not (folder / MANIFEST).is_file():
            write_samples(folder, change(read_samples(healthy)))
        return folder

    return make
