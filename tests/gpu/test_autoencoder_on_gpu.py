"""`flowray.train_autoencoder` on a GPU."""

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from flowray.data.make import png, sample
from flowray.data.reader import ShardReader
from flowray.data.shards import find_shards, write_shards
from flowray.train.autoencoder import Design, held_out_psnr, train_autoencoder
from flowray.train.autoencoder_pictures import in_order

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]
DESIGN = Design(steps=30, decoder_steps=20)


def test_two_trainings_come_to_the_same_bits_and_are_judged_there(tmp_path: Path) -> None:
    rng, device = np.random.default_rng(0), torch.device("cuda")
    pictures = rng.integers(256, size=(64, 32, 32, 3), dtype=np.uint8)
    samples = (sample(f"{i:03d}", png(p), ["noise"], {}) for i, p in enumerate(pictures))
    shards = write_shards(tmp_path / "pictures", samples, meta={})
    reader = ShardReader(find_shards(str(shards)))
    for name in ("a", "b"):
        train_autoencoder(reader, DESIGN, tmp_path / name, device=device)
    first, second = (
        load_file(tmp_path / name / "diffusion_pytorch_model.safetensors") for name in ("a", "b")
    )
    assert [name for name in first if not torch.equal(first[name], second[name])] == []
    here, there = (
        held_out_psnr(tmp_path / "a", in_order(reader, 8), 0, where)
        for where in (torch.device("cpu"), device)
    )
    assert here == pytest.approx(there, abs=0.05)
