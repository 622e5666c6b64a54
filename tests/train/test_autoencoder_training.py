"""`flowray.train_autoencoder`: what it saves, that a killed command goes on bit for bit, and what
it refuses.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from PIL import Image
from safetensors.torch import load_file

from flowray.cli.train_autoencoder import main
from flowray.config.errors import InputError
from flowray.config.progress import Silent
from flowray.data.reader import ShardReader
from flowray.data.shards import find_shards, write_shards
from flowray.train.autoencoder import Design, batches, in_order, preview, train_autoencoder

CPU = torch.device("cpu")
WEIGHTS = "diffusion_pytorch_model.safetensors"
SMALL = Design(channels=(8, 16), steps=6, decoder_steps=4, batch_size=4)


def shard_set(folder: Path, count: int, side: tuple[int, int] = (16, 16)) -> ShardReader:
    """Two-coloured pictures, (width, height) = side."""

    def samples() -> Iterator[dict[str, object]]:
        rng = np.random.default_rng(0)
        for i in range(count):
            picture = np.empty((side[1], side[0], 3), np.uint8)
            picture[:] = rng.integers(256, size=3)
            picture[: rng.integers(1, side[1])] = rng.integers(256, size=3)
            buffer = io.BytesIO()
            Image.fromarray(picture).save(buffer, format="png")
            yield {"__key__": f"{i:04d}", "png": buffer.getvalue(), "txt": b"two colours"}

    return ShardReader(find_shards(str(write_shards(folder, samples(), meta={}))))


class Killed(Exception):
    pass


class KilledAfter(Silent):
    """Progress that ends the training at its n-th step."""

    def __init__(self, steps: int):
        self.left = steps

    def task(self, what, total=None, done=0):
        from contextlib import contextmanager

        @contextmanager
        def running():
            def advance(count=1, note=""):
                self.left -= what.startswith("training")
                if self.left == 0:
                    raise Killed

            yield advance

        return running()


@pytest.mark.parametrize("steps", [1, 3, 5, 6, 7, 9])
def test_a_killed_training_goes_on_bit_for_bit(tmp_path: Path, steps: int) -> None:
    reader = shard_set(tmp_path / "pictures", 12)
    train_autoencoder(reader, SMALL, tmp_path / "whole", device=CPU)
    with pytest.raises(Killed):
        train_autoencoder(
            reader, SMALL, tmp_path / "cut", device=CPU, save_every=2, progress=KilledAfter(steps)
        )
    assert not (tmp_path / "cut").exists()
    train_autoencoder(reader, SMALL, tmp_path / "cut", device=CPU, save_every=2)
    ours, theirs = (load_file(tmp_path / name / WEIGHTS) for name in ("whole", "cut"))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    configs = [json.loads((tmp_path / n / "config.json").read_text()) for n in ("whole", "cut")]
    assert configs[0] == configs[1]
    assert not list(tmp_path.glob(".*training*"))


def test_another_design_does_not_go_on_from_what_was_left(tmp_path: Path) -> None:
    reader = shard_set(tmp_path / "pictures", 12)
    with pytest.raises(Killed):
        train_autoencoder(
            reader, SMALL, tmp_path / "a", device=CPU, save_every=1, progress=KilledAfter(4)
        )
    other = Design(channels=(8, 16), steps=6, decoder_steps=4, batch_size=4, seed=1)
    train_autoencoder(reader, other, tmp_path / "a", device=CPU)
    train_autoencoder(reader, other, tmp_path / "b", device=CPU)
    ours, theirs = (load_file(tmp_path / name / WEIGHTS) for name in ("a", "b"))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_latents_have_mean_0_and_variance_1_and_the_first_three_show_the_picture(
    tmp_path: Path,
) -> None:
    reader = shard_set(tmp_path / "pictures", 64)
    design = Design(channels=(8, 16), steps=90, decoder_steps=1, batch_size=8, preview=1.0)
    train_autoencoder(reader, design, tmp_path / "out", device=CPU)
    net = AutoencoderKL.from_pretrained(tmp_path / "out")
    pictures = torch.cat(list(in_order(reader, 64)))
    with torch.no_grad():
        latents = net.encode(pictures).latent_dist.mean
    mean, std = (torch.tensor(net.config[f"latents_{name}"]) for name in ("mean", "std"))
    normal = (latents - mean[:, None, None]) / std[:, None, None]
    assert normal.mean((0, 2, 3)).abs().max() < 0.02
    assert (normal.std((0, 2, 3)) - 1).abs().max() < 0.02
    small = preview(pictures, design.factor)
    error = (latents[:, :3] - small).square().mean()
    assert error < 0.2 * small.var()


def test_order_is_a_function_of_seed_and_step(tmp_path: Path) -> None:
    reader = shard_set(tmp_path / "pictures", 12)
    whole = list(batches(reader, SMALL, 0, 0, 6, 0))
    assert [len(part) for part in whole] == [4] * 6
    for mine, alike in zip(batches(reader, SMALL, 0, 4, 6, 0), whole[4:], strict=True):
        assert torch.equal(mine, alike)
    assert not torch.equal(next(batches(reader, SMALL, 1, 0, 1, 0)), whole[0])


def test_the_command_judges_held_out_pictures_and_writes_a_card(tmp_path: Path, capsys) -> None:
    shard_set(tmp_path / "train", 16)
    shard_set(tmp_path / "val", 8)
    out = tmp_path / "made"
    argv = [str(tmp_path / "train"), "--val", str(tmp_path / "val"), "--out", str(out)]
    small = ["--channels", "8,16", "--steps", "4", "--decoder-steps", "2", "--batch-size", "4"]
    assert main([*argv, *small, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["latent"] == [4, 8, 8]
    assert 0 < told["psnr"] < 60
    assert f"{told['psnr']:.2f} dB" in (out / "CARD.md").read_text()
    with pytest.raises(InputError, match="exists already"):
        main([*argv, *small])


@pytest.mark.parametrize("side", [(16, 12), (18, 18)])
def test_pictures_that_do_not_fit_the_levels_are_refused(tmp_path: Path, side) -> None:
    shard_set(tmp_path / "train", 4, side)
    with pytest.raises(InputError, match="multiple of 8"):
        main([str(tmp_path / "train"), "--out", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("channels", ["32", "12,24", "a,b", "8,8,8,8,8,8,8"])
def test_levels_that_cannot_be_are_refused(tmp_path: Path, channels: str) -> None:
    with pytest.raises(InputError, match="multiples of 8"):
        main([str(tmp_path), "--out", str(tmp_path / "out"), "--channels", channels])
