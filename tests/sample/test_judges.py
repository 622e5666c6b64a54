"""What pictures are compared by: pixels, latents, networks in folders of transformers."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from support import PICTURE, assert_refused, tiny_recipe
from transformers import (
    BertConfig,
    BertModel,
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    Dinov2Config,
    Dinov2Model,
    ResNetConfig,
    ResNetModel,
    SiglipVisionConfig,
    SiglipVisionModel,
    ViTConfig,
    ViTModel,
)

from flowray.config.errors import InputError
from flowray.data.pixels import to_pictures
from flowray.model.autoencoder import load_autoencoder
from flowray.model.efficientnet import WEIGHTS, EfficientNetLite0
from flowray.sample import judges
from flowray.sample.judges import BATCH, LATENTS, PIXELS, Judge, open_judge

CPU = torch.device("cpu")
SMALL: dict[str, Any] = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 8,
}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("judges")


def judge(place: Path, name: str) -> Judge:
    model = tiny_recipe(place).model
    return open_judge(
        name, load_autoencoder(model.autoencoder, model.latent), model.autoencoder, CPU
    )


def pictures(count: int, side: int = PICTURE) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return list(rng.integers(0, 256, (count, side, side, 3), dtype=np.uint8))


def test_pixels_are_averages_over_areas(place: Path) -> None:
    found = judge(place, PIXELS).look(pictures(3, 64))
    assert found.shape == (3, 3 * 32 * 32)
    whole = to_pictures(pictures(3, 64)).numpy()
    by_hand = whole.reshape(3, 3, 32, 2, 32, 2).mean((3, 5)).reshape(3, -1)
    assert found == pytest.approx(by_hand, abs=1e-5)
    small = judge(place, PIXELS).look(pictures(3))
    assert small == pytest.approx(to_pictures(pictures(3)).flatten(1).numpy())


def test_latents_are_the_mean_ones_that_a_run_is_trained_on(place: Path) -> None:
    model = tiny_recipe(place).model
    autoencoder = load_autoencoder(model.autoencoder, model.latent)
    moments = autoencoder.encode_moments(to_pictures(pictures(3)))
    scaled = autoencoder.scale.sample(moments, torch.zeros_like(moments.mean)).flatten(1)
    found = judge(place, LATENTS)
    assert found.look(pictures(3)) == pytest.approx(scaled.numpy(), abs=1e-5)
    many = pictures(2 * BATCH + 1)
    assert found.look_at(many) == pytest.approx(found.look(many), abs=1e-4)


def test_features_made_in_another_way_are_others(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = judge(place, LATENTS).fingerprint
    assert judge(place, LATENTS).fingerprint == before
    monkeypatch.setattr(judges, "MADE", judges.MADE + 1)
    assert judge(place, LATENTS).fingerprint != before


def test_a_gpu_looks_at_more_at_once(place: Path) -> None:
    on_cpu = judge(place, PIXELS)
    assert on_cpu.batch == BATCH
    assert replace(on_cpu, device=torch.device("cuda")).batch > BATCH


class JudgeContract(ABC):
    """What pictures may be compared by."""

    dims: int

    @abstractmethod
    def name(self, place: Path) -> str:
        """As `--features` has it."""

    @pytest.fixture
    def found(self, place: Path) -> Judge:
        return judge(place, self.name(place))

    def test_there_is_a_row_of_numbers_for_each_picture(self, found: Judge) -> None:
        features = found.look(pictures(4))
        assert features.shape == (4, self.dims)
        assert features.dtype == np.float32
        assert np.isfinite(features).all()
        assert np.abs(features[0] - features[1]).max() > 1e-4

    def test_a_picture_s_are_the_same_whatever_is_beside_it(self, found: Judge) -> None:
        many = pictures(BATCH + 3)
        alone = np.concatenate([found.look([one]) for one in many])
        assert found.look_at(many) == pytest.approx(alone, rel=1e-3, abs=1e-3)

    def test_the_fingerprint_is_that_of_the_same_judge(self, place: Path, found: Judge) -> None:
        assert judge(place, self.name(place)).fingerprint == found.fingerprint


class NetworkContract(JudgeContract):
    """Of a network in a folder."""

    dims = 16

    @abstractmethod
    def save(self, folder: Path) -> None:
        """One of random weights, as its library saves it."""

    def name(self, place: Path) -> str:
        folder = place / type(self).__name__
        if not folder.is_dir():
            folder.mkdir()
            with torch.random.fork_rng():
                torch.manual_seed(0)
                self.save(folder)
        return str(folder)

    def test_all_are_of_one_length(self, found: Judge) -> None:
        """So that distances are those of cosines."""
        lengths = np.linalg.norm(found.look(pictures(4)), axis=1)
        assert lengths == pytest.approx(np.full(4, self.dims**0.5), rel=1e-4)

    def test_other_weights_have_another_fingerprint(self, place: Path, found: Judge) -> None:
        with torch.random.fork_rng():
            torch.manual_seed(1)
            self.save(Path(self.name(place)))
        assert judge(place, self.name(place)).fingerprint != found.fingerprint


class TestPixels(JudgeContract):
    dims = 3 * PICTURE**2

    def name(self, place: Path) -> str:
        return PIXELS


class TestLatents(JudgeContract):
    dims = 4 * (PICTURE // 2) ** 2

    def name(self, place: Path) -> str:
        return LATENTS


class TestDinov2(NetworkContract):
    def save(self, folder: Path) -> None:
        Dinov2Model(Dinov2Config(**SMALL, mlp_ratio=2)).save_pretrained(folder)


class TestClip(NetworkContract):
    """A whole one: its image embeds, not what is pooled before them."""

    dims = 8

    def save(self, folder: Path) -> None:
        vision = {**SMALL, "intermediate_size": 32}
        text = {**vision, "vocab_size": 9, "max_position_embeddings": 8}
        config = CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)
        CLIPModel(config).save_pretrained(folder)

    @pytest.mark.parametrize("size", [(16, 16), (40, 24), (24, 50)])
    def test_features_are_the_image_embeds_that_transformers_has(
        self, place: Path, found: Judge, size: tuple[int, int]
    ) -> None:
        smooth = pictures(4, 4)
        shown = [np.asarray(Image.fromarray(each).resize(size)) for each in smooth]
        process = CLIPImageProcessor(size={"shortest_edge": 16}, crop_size=16)
        net = CLIPModel.from_pretrained(self.name(place)).eval()
        with torch.no_grad():
            seen = process(shown, return_tensors="pt")["pixel_values"]
            embeds = net.visual_projection(net.vision_model(pixel_values=seen).pooler_output)
        by_hand = embeds / embeds.norm(dim=1, keepdim=True) * 8**0.5
        assert found.look(shown) == pytest.approx(by_hand.numpy(), abs=0.03)


class TestSiglip(NetworkContract):
    def save(self, folder: Path) -> None:
        config = SiglipVisionConfig(**SMALL, intermediate_size=32)
        SiglipVisionModel(config).save_pretrained(folder)


class TestViT(NetworkContract):
    """Of no family that is known by name."""

    def save(self, folder: Path) -> None:
        ViTModel(ViTConfig(**SMALL, intermediate_size=32)).save_pretrained(folder)


class TestEfficientNet(NetworkContract):
    dims = 1280

    def save(self, folder: Path) -> None:
        save_file(EfficientNetLite0().state_dict(), folder / WEIGHTS)


def test_a_network_of_any_family_is_averaged_over_its_last_layer(place: Path) -> None:
    torch.manual_seed(0)
    config = ResNetConfig(embedding_size=4, hidden_sizes=[8, 16], depths=[1, 1])
    net = ResNetModel(config).eval()
    net.save_pretrained(place / "resnet")
    says = {"image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.3, 0.4]}
    (place / "resnet" / "preprocessor_config.json").write_text(json.dumps(says))
    found = judge(place, str(place / "resnet")).look(pictures(3, 224))
    mean, std = (torch.tensor(each).view(3, 1, 1) for each in says.values())
    with torch.no_grad():
        seen = ((to_pictures(pictures(3, 224)) + 1) / 2 - mean) / std
        last = net(pixel_values=seen).last_hidden_state.mean((2, 3))
    by_hand = last / last.norm(dim=1, keepdim=True) * 4  # the root of 16 dims
    assert found == pytest.approx(by_hand.numpy(), rel=1e-3, abs=1e-4)
    before = judge(place, str(place / "resnet")).fingerprint
    says["image_mean"] = [0.1, 0.4, 0.3]
    (place / "resnet" / "preprocessor_config.json").write_text(json.dumps(says))
    assert judge(place, str(place / "resnet")).fingerprint != before


def test_what_is_no_network_is_refused(place: Path) -> None:
    assert_refused(lambda: judge(place, "resnet"), InputError, "--features: 'resnet': want pixels")
    assert_refused(lambda: judge(place, str(place / "text")), InputError, "--features: .*")
    config = BertConfig(
        vocab_size=8, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8
    )
    BertModel(config).save_pretrained(place / "bert")
    assert_refused(lambda: judge(place, str(place / "bert")), InputError, "holds a bert model")
