"""Latents encoded by Ray tasks are those that one process encodes, also where tasks are killed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import killed_once
import numpy as np
import pytest
import ray
import torch
from killed_once import KilledOnce
from support import SPEC, Heard, tiny_autoencoder, tiny_pictures

from flowray.cluster.session import started
from flowray.config.errors import InputError
from flowray.config.model import KLAutoencoder
from flowray.config.progress import Progress
from flowray.config.train import DataConfig
from flowray.data.make import png
from flowray.data.shards import write_shards
from flowray.rayrun.encoder import RayTasks
from flowray.store.encode import Pace
from flowray.store.latents import ensure_latents, load_latents

pytestmark = pytest.mark.timeout(300)
ray.cloudpickle.register_pickle_by_value(killed_once)  # tasks cannot import it


@pytest.fixture(scope="module", autouse=True)
def ray_here() -> Iterator[None]:
    with started(2):
        yield


@pytest.fixture
def config(tmp_path: Path) -> KLAutoencoder:
    return KLAutoencoder(path=str(tiny_autoencoder(tmp_path / "autoencoder")))


@pytest.fixture
def data(tmp_path: Path) -> DataConfig:
    """96 training pictures, 16 a shard."""
    train, val = tiny_pictures(tmp_path / "train", 96), tiny_pictures(tmp_path / "val", 16, 1000)
    return DataConfig(shards=str(train), val_shards=str(val), cache=str(tmp_path / "cache"))


def check_equal_to_one_process(data: DataConfig, config: KLAutoencoder) -> None:
    alone = data.model_copy(update={"cache": f"{data.cache}-alone"})
    sets = [load_latents(ensure_latents(d, config, SPEC)["train"]) for d in (data, alone)]
    ours, theirs = sets
    assert ours.reader.keys == theirs.reader.keys
    every = np.arange(96)
    torch.testing.assert_close(ours.moments(every), theirs.moments(every), rtol=2e-3, atol=2e-3)
    assert ours.variance == pytest.approx(theirs.variance, rel=1e-5)


def test_two_tasks_encode_what_one_process_does(data: DataConfig, config: KLAutoencoder) -> None:
    heard = Heard()
    ensure_latents(data, config, SPEC, heard, fleet=RayTasks(2, 1))
    assert heard.tasks["encoding train pictures"] == 96
    again = Heard()
    ensure_latents(data, config, SPEC, again)
    for what in (*heard.tasks, *again.tasks):  # each task reads its own shards for their sums
        assert not what.startswith("reading shards")
    assert not any(what.startswith("encoding") for what in again.tasks)
    check_equal_to_one_process(data, config)


def test_a_task_that_is_killed_goes_on_elsewhere(
    data: DataConfig, config: KLAutoencoder, tmp_path: Path
) -> None:
    class Killed(RayTasks):
        def __call__(self, works: Sequence[Any], progress: Progress) -> list[Pace]:
            killed = [KilledOnce(work, tmp_path / "killed", "encoding", 48) for work in works]
            return super().__call__(killed, progress)

    heard = Heard()
    ensure_latents(data, config, SPEC, heard, fleet=Killed(1, 1))
    assert (tmp_path / "killed").exists()
    assert heard.tasks["encoding train pictures"] == 96  # what was counted twice is taken back
    check_equal_to_one_process(data, config)


def test_bad_samples_end_it_as_they_end_one_process(
    data: DataConfig, config: KLAutoencoder, tmp_path: Path
) -> None:
    picture = png(np.zeros((16, 16, 3), np.uint8))
    samples = ({"__key__": f"x{i}", "png": picture, "txt": b"a word"} for i in range(4))
    wrong = write_shards(tmp_path / "other", samples, meta={})
    data = data.model_copy(update={"shards": f"{{{data.shards},{wrong}}}"})
    with pytest.raises(InputError, match=r"data\.max_bad"):
        ensure_latents(data, config, SPEC, fleet=RayTasks(2, 1))
