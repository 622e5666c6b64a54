"""Latent statistics per channel against N(0, 1): exact, told in one line where they are far off,
in the run's first probe row.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from support import SCALE, SHIFT, SPEC, Heard, tiny_autoencoder, tiny_latents, tiny_pictures

from flowray.cli.data import main
from flowray.config.keys import describe
from flowray.config.model import KLAutoencoder
from flowray.config.train import DataConfig
from flowray.data.shards import MANIFEST
from flowray.model.latent import LatentScale, Moments
from flowray.store import variance
from flowray.store.latents import (
    channel_metrics,
    channel_statistics,
    channel_warning,
    ensure_latents,
    load_latents,
)


def test_statistics_are_those_of_drawn_latents(tmp_path: Path) -> None:
    latents = load_latents(tiny_latents(tmp_path / "latents", 40))
    mean, std = channel_statistics(latents)
    moments = latents.moments(np.arange(40))
    noise = torch.randn(400, *moments.mean.shape, generator=torch.Generator().manual_seed(0))
    drawn = (
        ((moments.mean + (moments.logvar / 2).exp() * noise - SHIFT) * SCALE)
        .transpose(2, 0)
        .flatten(1)
    )
    assert torch.allclose(mean, drawn.mean(1).double(), atol=2e-3)
    assert torch.allclose(std, drawn.std(1).double(), rtol=2e-3)
    assert float(std.std()) > 0  # the channels differ
    metrics = channel_metrics(latents)
    assert metrics["latent/channel_mean_max"] == pytest.approx(float(mean.abs().max()))
    assert (metrics["latent/channel_std_min"], metrics["latent/channel_std_max"]) == pytest.approx(
        (float(std.min()), float(std.max()))
    )
    assert all(describe(key) for key in metrics)


def test_a_large_set_is_read_in_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    latents = load_latents(tiny_latents(tmp_path / "latents", 40))
    whole = channel_statistics(latents)
    monkeypatch.setattr(variance, "STATISTICS", 7)
    part = channel_statistics(latents)
    mean = latents.scale.sample(
        latents.moments(np.linspace(0, 39, 7).round().astype(int)), torch.zeros(7, *SPEC.shape)
    )
    assert torch.allclose(part[0], mean.double().mean((0, 2, 3)))
    assert not torch.allclose(part[0], whole[0])


def test_scale_per_channel_is_kept_on_disk(tmp_path: Path) -> None:
    folder = tiny_latents(tmp_path / "latents", 16)
    manifest = json.loads((folder / MANIFEST).read_text())
    manifest["meta"] |= {"scale": [0.5, 1.0, 2.0, 4.0], "shift": [0.0, 1.0, 2.0, 3.0]}
    (folder / MANIFEST).write_text(json.dumps(manifest))
    latents = load_latents(folder)
    assert latents.scale == LatentScale(
        (0.5, 1.0, 2.0, 4.0), (0.0, 1.0, 2.0, 3.0), deterministic=False
    )
    raw = torch.randn(2, *SPEC.shape)
    z = latents.scale.sample(Moments(raw, torch.full_like(raw, -30)), torch.zeros_like(raw))
    assert torch.allclose(z[:, 3], (raw[:, 3] - 3.0) * 4.0)
    assert torch.allclose(latents.scale.unscale(z), raw, atol=1e-6)
    mean, std = channel_statistics(latents)
    plain_mean, plain_std = channel_statistics(load_latents(tiny_latents(tmp_path / "plain", 16)))
    assert torch.allclose(
        std, plain_std / SCALE * torch.tensor([0.5, 1.0, 2.0, 4.0]).double(), rtol=1e-5
    )
    assert float((mean - plain_mean).abs().min()) > 1e-3


@pytest.mark.parametrize(
    ("mean", "least", "most", "named"),
    [
        (0.2, 0.8, 1.2, None),
        (1.5, 0.8, 1.2, "mean_max is 1.5"),
        (0.2, 0.1, 1.2, "std_min is 0.1"),
        (0.2, 0.8, 9.0, "std_max is 9"),
    ],
)
def test_warning_above_the_thresholds(
    mean: float, least: float, most: float, named: str | None
) -> None:
    metrics = {
        "latent/channel_mean_max": mean,
        "latent/channel_std_min": least,
        "latent/channel_std_max": most,
    }
    warning = channel_warning(metrics)
    if named is None:
        assert warning is None
    else:
        assert warning is not None
        assert named in warning
        assert "\n" not in warning


def test_encoding_warns_of_a_scale_that_is_off(tmp_path: Path) -> None:
    """The tiny autoencoder's latents at a sane scale and at one that is ten times too large."""
    net = str(tiny_autoencoder(tmp_path / "autoencoder"))
    data = DataConfig(
        shards=str(tiny_pictures(tmp_path / "train", 24)),
        val_shards=str(tiny_pictures(tmp_path / "val", 8, start=24)),
        cache=str(tmp_path / "cache"),
    )
    first = ensure_latents(data, KLAutoencoder(path=net), SPEC)["train"]
    mean, std = channel_statistics(load_latents(first))
    middle = float(std.log().mean().exp())
    warned = {}
    for factor in (1.0, 10.0):
        heard = Heard()
        shift = float((mean / SCALE + SHIFT).mean())
        scale = factor * SCALE / middle
        config = KLAutoencoder(path=net, scaling_factor=scale, shift_factor=shift)
        ensure_latents(data, config, SPEC, heard)
        warned[factor] = [line for line in heard.said if line.startswith("warning: latent/channel")]
    assert warned[1.0] == []
    assert len(warned[10.0]) == 2  # train and val


def test_encode_prints_and_the_first_probe_row_has_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from support import tiny_recipe

    from flowray.config.load import dump_recipe

    recipe = tiny_recipe(tmp_path, **{"train.steps": 4, "train.probe_every": 2})
    file = tmp_path / "recipe.yaml"
    file.write_text(dump_recipe(recipe))
    assert main(["encode", str(file)]) == 0
    printed = capsys.readouterr().out.splitlines()
    latents = load_latents(next((tmp_path / "cache").glob("latents-*/val-*")))
    metrics = channel_metrics(latents)
    assert printed[-1].startswith("val ")
    assert f"mean within {metrics['latent/channel_mean_max']:.2f} of 0" in printed[-1]

    from flowray.store.run import RunDirectory
    from flowray.train.group import Group
    from flowray.train.loop import train

    run = RunDirectory(tmp_path / "run")
    train(recipe, run, Group(0, 1, torch.device("cpu")), lambda row: None)
    rows = [json.loads(line) for line in run.probes.read_text().splitlines()]
    assert [row["step"] for row in rows] == [2, 4]
    assert {
        key: value for key, value in rows[0].items() if key.startswith("latent/")
    } == pytest.approx(metrics)
    assert not any(key.startswith("latent/") for key in rows[1])
