"""What an autoencoder is given at once does not grow with the number of pictures."""

import pytest
import torch
from support import tiny_autoencoder, tiny_latents

from flowray.config.base import LatentSpec
from flowray.config.model import KLAutoencoder
from flowray.model import autoencoder as module
from flowray.model.autoencoder import load_autoencoder, pieces
from flowray.probes.vae import vae_metrics
from flowray.store.latents import load_latents


@pytest.mark.parametrize(
    ("side", "cell", "count", "sizes"),
    [
        (512, 1, 64, [4] * 16),
        (64, 8, 10, [4, 4, 2]),  # latents of 512 px
        (2048, 1, 2, [1, 1]),
        (64, 1, 64, [64]),
    ],
)
def test_sizes(side, cell, count, sizes):
    parts = pieces(torch.empty(count, 4, side, side, device="meta"), cell)
    assert [len(part) for part in parts] == sizes


def test_the_round_trip_goes_in_pieces_to_the_same_number(tmp_path, monkeypatch):
    spec = LatentSpec(channels=4, height=4, width=4)
    held_out = load_latents(tiny_latents(tmp_path / "latents", 8))
    net = load_autoencoder(KLAutoencoder(path=str(tiny_autoencoder(tmp_path / "ae"))), spec)
    whole = vae_metrics(net, held_out, 8, 0)
    seen: list[int] = []
    hook = lambda _, given: seen.append(len(given[0]))  # noqa: E731
    net.net.encoder.register_forward_pre_hook(hook)
    net.net.decoder.register_forward_pre_hook(hook)
    monkeypatch.setattr(module, "PIECE", 3 * 8 * 8)
    assert vae_metrics(net, held_out, 8, 0) == pytest.approx(whole, rel=1e-5)
    assert seen == [3, 3, 2] * 2
