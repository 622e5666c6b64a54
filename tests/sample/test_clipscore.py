"""The score of pictures against captions by a CLIP model in a folder: a random small one."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from support import assert_refused, captions, saved_run, tiny_recipe, tiny_text, word_tokenizer
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel

from flowray.cli.eval import evaluate
from flowray.config.errors import InputError
from flowray.config.progress import SILENT
from flowray.sample.clipscore import ClipScorer, open_clip
from flowray.sample.neighbours import Choices

CPU = torch.device("cpu")
TEXTS = captions(20)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights, as transformers saves them, with a tokenizer of the captions' words."""
    place, tokenizer = tmp_path_factory.mktemp("clip"), word_tokenizer()
    layers = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    layers |= {"intermediate_size": 32}
    text = {"vocab_size": len(tokenizer), "max_position_embeddings": 12, "eos_token_id": 1}
    torch.manual_seed(0)
    config = CLIPConfig(
        text_config={**layers, **text},
        vision_config={**layers, "image_size": 16, "patch_size": 8},
        projection_dim=8,
    )
    net = CLIPModel(config)
    with torch.no_grad():
        for parameter in net.parameters():  # random ones are so small that all captions look alike
            parameter += 0.3 * torch.randn_like(parameter)
    net.save_pretrained(place)
    tokenizer.save_pretrained(place)
    return place


def pictures(count: int, side: int = 16) -> np.ndarray:
    rng = np.random.default_rng(0)
    return rng.integers(0, 256, (count, side, side, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def scorer(folder: Path) -> ClipScorer:
    return open_clip(str(folder), CPU)


def test_the_score_is_the_cosine_that_transformers_has(folder: Path, scorer: ClipScorer) -> None:
    net, tokenizer = CLIPModel.from_pretrained(folder).eval(), word_tokenizer()
    process = CLIPImageProcessor(do_resize=False, do_center_crop=False)
    seen = process(list(pictures(20)), return_tensors="pt")["pixel_values"]
    short = [" ".join(text.split()[:6]) for text in TEXTS]
    read = tokenizer(short, padding=True, return_tensors="pt")
    with torch.no_grad():
        out = net(
            input_ids=read["input_ids"], attention_mask=read["attention_mask"], pixel_values=seen
        )
    cosines = (out.image_embeds * out.text_embeds).sum(1).numpy()
    assert np.std(cosines) > 0.01
    found = scorer(pictures(20), short)
    assert found == pytest.approx(100 * np.maximum(cosines, 0), abs=1e-2)


def test_long_captions_and_other_sizes_are_taken(scorer: ClipScorer) -> None:
    found = scorer(pictures(2, 40), ["a red circle " * 30, "a"])
    assert found.shape == (2,)
    assert ((found >= 0) & (found <= 100)).all()


def test_another_model_is_refused(tmp_path: Path) -> None:
    other = tiny_text(tmp_path / "text")
    assert_refused(lambda: open_clip(str(other), CPU), InputError, "--clip: .*holds a qwen3 model")
    assert_refused(lambda: open_clip(str(tmp_path / "none"), CPU), InputError, "--clip: ")


def test_the_evaluation_has_it_beside_its_controls(folder: Path, tmp_path: Path) -> None:
    run = saved_run(tiny_recipe(tmp_path)).path
    few = Choices(captions=5, draws=2, clip=str(folder))
    told = evaluate(run, [], 0, SILENT, choices=few)["neighbours"]
    low, high = told["interval"]["clip_score"]
    assert low <= told["clip_score"] <= high
    assert "clip_score" in told["beats_mu"]
    controls = told["controls"]
    for name in ("ceiling", "real", "mu", "z0", "shuffled"):
        assert 0 <= controls[name]["clip_score"] <= 100
    # the velocity of a fresh network is 0: all of a flow is its source
    assert controls["z0"]["clip_score"] == pytest.approx(told["clip_score"], abs=0.1)
    assert controls["real"]["clip_score"] != told["clip_score"]
