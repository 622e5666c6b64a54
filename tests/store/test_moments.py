"""Moments in fp16, bf16 and fp32: what is written, what rounding costs, what is refused for it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from support import SPEC, Heard, assert_refused, tiny_autoencoder, tiny_pictures

from flowray.config.errors import InputError
from flowray.config.model import KLAutoencoder
from flowray.config.train import DataConfig, MomentsKind
from flowray.data.shards import MANIFEST
from flowray.model.latent import LatentScale, Moments
from flowray.store.latents import ensure_latents, load_latents
from flowray.store.moments import ROUNDED, TOLERANCE, as_fp32, stored

KINDS: tuple[MomentsKind, ...] = ("fp16", "bf16", "fp32")


def moments_of(offset: float = 0.0, std: float = 1.0, logvar: float = -8.0) -> Moments:
    """Five samples of (4, 8, 8), drawn by a fixed seed."""
    drawn = torch.randn(5, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    return Moments(offset + std * drawn, torch.full_like(drawn, logvar))


def by_hand(moments: Moments, rows: np.ndarray, scale: float) -> list[float]:
    """`rounding_errors` in fp64, channel by channel."""
    mean, logvar = as_fp32(rows).double().numpy().reshape(5, 2, 4, 64).transpose(1, 0, 2, 3)
    old_mean, old_logvar = (each.double().numpy().reshape(5, 4, 64) for each in moments)
    sigma, old_sigma = np.exp(logvar / 2), np.exp(old_logvar / 2)
    errors = []
    for i in range(5):
        of_channels = []
        for c in range(4):
            squares = (mean[i, c] - old_mean[i, c]) ** 2 + (sigma[i, c] - old_sigma[i, c]) ** 2
            spread = old_mean[i, c].var() + (old_sigma[i, c] ** 2).mean()
            of_channels.append(scale * np.sqrt(squares.mean()) / max(1.0, scale * np.sqrt(spread)))
        errors.append(max(of_channels))
    return errors


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("offset", "std", "scale"), [(0, 1, 1.0), (0, 5, 0.2), (3, 9, 2.0)])
def test_errors_are_those_of_the_formula(
    kind: MomentsKind, offset: float, std: float, scale: float
) -> None:
    moments = moments_of(offset, std)
    found = stored(moments, kind, LatentScale(scale, 0.25, deterministic=False))
    np.testing.assert_allclose(found.errors, by_hand(moments, found.rows, scale), rtol=1e-3)
    assert found.faults == [None] * 5
    least, most = {"fp16": (1e-4, 4e-4), "bf16": (1e-3, 3e-3), "fp32": (0, 0)}[kind]
    assert least <= found.errors.min() <= found.errors.max() <= most


def test_bf16_is_that_of_torch_on_any_strides() -> None:
    moments = moments_of()
    rows = stored(moments, "bf16", LatentScale(1.0, 0.0, deterministic=True)).rows
    assert rows.dtype == np.uint16
    wanted = torch.cat(list(moments), 1).bfloat16().float()
    assert torch.equal(as_fp32(rows), wanted)
    wide = np.zeros((5, rows[0].size + 3), np.uint16)  # as a gathered batch lies in memory
    wide[:, 3:] = rows.reshape(5, -1)
    assert torch.equal(as_fp32(wide[:, 3:].reshape(rows.shape)), wanted)


@pytest.mark.parametrize(
    ("moments", "deterministic", "refused"),
    [
        (moments_of(offset=300.0), True, {"fp16", "bf16"}),  # between numbers 0.25 and 2 apart
        (moments_of(offset=12.0), True, {"bf16"}),
        (moments_of(offset=300.0, std=100.0), True, set()),  # little of so wide a channel
        (moments_of(logvar=-30.0), False, set()),  # far off, but of a noise that is nothing
        (moments_of(logvar=6.7), False, set()),
    ],
)
def test_what_is_refused(moments: Moments, deterministic: bool, refused: set[str]) -> None:
    for kind in KINDS:
        found = stored(moments, kind, LatentScale(1.0, 0.0, deterministic))
        assert [fault is not None for fault in found.faults] == [kind in refused] * 5
        assert (found.errors > TOLERANCE).tolist() == [kind in refused] * 5
        for cause, message in filter(None, found.faults):
            assert cause == ROUNDED
            assert message.startswith(f"{kind} moves its latents by")
            assert "data.moments=fp32" in message


@pytest.fixture
def data(tmp_path: Path) -> DataConfig:
    """48 training pictures, 16 a shard."""
    train, val = tiny_pictures(tmp_path / "train", 48), tiny_pictures(tmp_path / "val", 16, 1000)
    return DataConfig(shards=str(train), val_shards=str(val), cache=str(tmp_path / "cache"))


def autoencoder(tmp_path: Path, offset: float = 0.0) -> KLAutoencoder:
    """The tiny one, its means moved by `offset`, which its shift undoes."""
    path = tiny_autoencoder(tmp_path / f"autoencoder-{offset:g}")
    if offset:
        net = AutoencoderKL.from_pretrained(path)
        with torch.no_grad():
            net.quant_conv.bias[: SPEC.channels] += offset
        net.save_pretrained(path)
    return KLAutoencoder(path=str(path), shift_factor=offset, scaling_factor=1.0)


def test_each_kind_has_its_cache_and_says_its_error(tmp_path: Path, data: DataConfig) -> None:
    config, every, folders, sets = autoencoder(tmp_path), np.arange(48), {}, {}
    for kind in KINDS:
        heard = Heard()
        of_kind = data.model_copy(update={"moments": kind})
        folders[kind] = ensure_latents(of_kind, config, SPEC, heard)["train"]
        assert heard.tasks["encoding train pictures"] == 48
        sets[kind] = load_latents(folders[kind])
        manifest = json.loads((folders[kind] / MANIFEST).read_text())
        rows = [
            json.loads((folders[kind] / row["name"]).with_suffix(".json").read_text())
            for row in manifest["shards"]
        ]
        errors = [row["rounding"] for row in rows]
        assert sets[kind].rounding == manifest["meta"]["rounding"] == max(errors)
        (told,) = [line for line in heard.said if line.startswith("48 train pictures")]
        assert f"rounded by {max(errors):.2%} of" in told
    assert len({folder.parent for folder in folders.values()}) == 3
    assert sets["fp16"].rounding < sets["bf16"].rounding < TOLERANCE
    assert sets["fp32"].rounding == 0
    exact = sets["fp32"].moments(every)
    for kind, dtype in (("fp16", torch.float16), ("bf16", torch.bfloat16)):
        for found, wanted in zip(sets[kind].moments(every), exact, strict=True):
            assert found.dtype == torch.float32
            torch.testing.assert_close(found, wanted.to(dtype).float(), rtol=2**-7, atol=1e-4)
        assert sets[kind].variance == pytest.approx(sets["fp32"].variance, rel=1e-5)


def test_means_far_from_zero_are_refused_by_one_line(tmp_path: Path, data: DataConfig) -> None:
    config = autoencoder(tmp_path, offset=2000.0)
    refused = r"of 48 train samples .*fp16 moves its latents by .*data\.moments=fp32"
    assert_refused(lambda: ensure_latents(data, config, SPEC), InputError, refused)
    exact = data.model_copy(update={"moments": "fp32"})
    latents = load_latents(ensure_latents(exact, config, SPEC)["train"])
    assert len(latents) == 48
    assert abs(float(latents.moments(np.arange(48)).mean.mean()) - 2000) < 20


def test_a_cache_of_before_has_no_error_to_tell(tmp_path: Path, data: DataConfig) -> None:
    config = autoencoder(tmp_path)
    folder = ensure_latents(data, config, SPEC)["train"]
    for file in (folder.parent / "shards").glob("*.json"):
        row = json.loads(file.read_text())
        del row["rounding"]
        file.write_text(json.dumps(row))
    heard = Heard()
    assert load_latents(ensure_latents(data, config, SPEC, heard)["train"]).rounding is None
    assert not any(what.startswith("encoding") for what in heard.tasks)
