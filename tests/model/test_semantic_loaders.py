"""Picture encoders and VGG16 from files in the real formats, against the libraries' own forward
passes.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    Dinov2Config,
    Dinov2Model,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    SiglipConfig,
    SiglipModel,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from flowray.config.base import LatentSpec
from flowray.config.errors import InputError
from flowray.config.losses import LpipsLossConfig
from flowray.config.towers import ClipNet, DinoV2Net, ImageTower, SiglipNet, VisionDims
from flowray.model.images import load_image_encoder
from flowray.model.semantic import PictureTower
from flowray.model.vgg import STAGES, WIDTHS, Lpips, Vgg16, _standard, load_linear, load_vgg

SIZES = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 4,
}
VISION = SIZES | {"intermediate_size": 32}
TEXT = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "vocab_size": 32,
}


def make(kind: str) -> Any:
    """A tiny random model of a family, whole or its image half."""
    torch.manual_seed(3)
    models = {
        "dinov2": lambda: Dinov2Model(Dinov2Config(**SIZES, mlp_ratio=2)),
        "dinov2_registers": lambda: Dinov2WithRegistersModel(
            Dinov2WithRegistersConfig(**SIZES, mlp_ratio=2, num_register_tokens=3)
        ),
        "siglip": lambda: SiglipModel(SiglipConfig(text_config=TEXT, vision_config=VISION)),
        "siglip_vision": lambda: SiglipVisionModel(SiglipVisionConfig(**VISION)),
        "clip": lambda: CLIPModel(
            CLIPConfig(text_config=TEXT, vision_config=VISION, projection_dim=8)
        ),
        "clip_vision": lambda: CLIPVisionModel(CLIPVisionConfig(**VISION)),
    }
    net = models[kind]().eval()
    with torch.no_grad():
        # some weights start at zero, which a loader that drops them would also give
        for p in net.parameters():
            p += 0.05 * torch.randn_like(p)
    return net


def pictures(n: int = 3, side: int = 16, seed: int = 0) -> Tensor:
    return torch.rand(n, 3, side, side, generator=torch.Generator().manual_seed(seed)) * 2 - 1


IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
OPENAI = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
HALF = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
FAMILIES = {
    "dinov2": (DinoV2Net, IMAGENET, 1),
    "dinov2_registers": (DinoV2Net, IMAGENET, 4),
    "siglip": (SiglipNet, HALF, 0),
    "siglip_vision": (SiglipNet, HALF, 0),
    "clip": (ClipNet, OPENAI, 1),
    "clip_vision": (ClipNet, OPENAI, 1),
}


@pytest.mark.parametrize("kind", FAMILIES)
def test_an_encoder_read_back_by_path_sees_what_the_library_sees(kind: str, tmp_path: Path) -> None:
    family, (mean, std), extra = FAMILIES[kind]
    net = make(kind)
    net.save_pretrained(tmp_path)
    encoder = load_image_encoder(family(path=str(tmp_path)), "loss.repa.teacher", frozen=True)
    x = pictures()
    values = ((x + 1) / 2 - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    with torch.no_grad():
        expected = getattr(net, "vision_model", net)(pixel_values=values)
    seen = encoder(x)
    torch.testing.assert_close(seen.pooled, expected.pooler_output, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(
        seen.patches.flatten(1, 2), expected.last_hidden_state[:, extra:], rtol=1e-4, atol=1e-5
    )
    assert seen.patches.shape == (3, 4, 4, 16)
    assert encoder(pictures(2, side=40)).patches.shape == (2, 4, 4, 16)  # other sizes are resized


def test_frozen_stays_frozen_and_trainable_trains(tmp_path: Path) -> None:
    make("siglip_vision").save_pretrained(tmp_path)
    config = SiglipNet(path=str(tmp_path))
    frozen = nn.ModuleList([load_image_encoder(config, "here", frozen=True)]).train()[0]
    assert not any(module.training for module in frozen.modules())
    assert not any(p.requires_grad for p in frozen.parameters())
    assert not frozen(pictures()).pooled.requires_grad
    free = load_image_encoder(config, "here", frozen=False).train()
    free(pictures()).pooled.square().sum().backward()
    assert free.net.training
    assert [name for name, p in free.named_parameters() if p.grad is None] == []


@pytest.mark.parametrize(
    ("family", "kind", "words"),
    [
        (SiglipNet, "clip", "holds a clip model.*set here.kind"),
        (DinoV2Net, None, "no config.json"),
        (DinoV2Net, "cut", "lacks 18 weights"),
    ],
)
def test_weights_of_another_kind_or_not_whole_are_named(
    family: Any, kind: str | None, words: str, tmp_path: Path
) -> None:
    if kind == "cut":
        net = make("dinov2")
        net.save_pretrained(
            tmp_path,
            state_dict={name: x for name, x in net.state_dict().items() if "layer.1" not in name},
        )
    elif kind:
        make(kind).save_pretrained(tmp_path)
    with pytest.raises(InputError, match=words) as error:
        load_image_encoder(family(path=str(tmp_path)), "here", frozen=True)
    assert "\n" not in str(error.value)


def test_the_published_contrastive_heads_have_their_size() -> None:
    """CrossFlow's output heads on SigLIP L/16 at 256 px: 20.988 M at 256 px, 21.804 M at 512 px."""
    dims = VisionDims(width=1024, depth=24, heads=16, mlp=4096, image=256, patch=16)
    with torch.device("meta"):
        small = PictureTower(
            ImageTower(net=SiglipNet(dims=dims)), LatentSpec(channels=4, height=32, width=32)
        )
        large = PictureTower(
            ImageTower(net=SiglipNet(dims=dims), output="adaptor"),
            LatentSpec(channels=4, height=64, width=64),
        )
    sizes = [sum(p.numel() for p in tower.out.parameters()) / 1e6 for tower in (small, large)]
    assert sizes == pytest.approx([20.988, 21.804], rel=1e-4)
    # SigLIP L/16's image half
    assert sum(p.numel() for p in small.encoder.parameters()) / 1e6 == pytest.approx(316, rel=0.01)


def vgg_weights(widths: tuple[int, ...] = (4, 6, 8, 10, 12), seed: int = 0) -> dict[str, Tensor]:
    """Random weights under the names of torchvision's vgg16 state dict, its classifier's
    included.
    """
    generator, inputs, weights = (
        torch.Generator().manual_seed(seed),
        3,
        {"classifier.0.weight": torch.zeros(2, 2)},
    )
    for width, stage in zip(
        widths, ((0, 2), (5, 7), (10, 12, 14), (17, 19, 21), (24, 26, 28)), strict=True
    ):
        for index in stage:
            weights[f"features.{index}.weight"] = (
                torch.randn(width, inputs, 3, 3, generator=generator) * (2 / (9 * inputs)) ** 0.5
            )
            weights[f"features.{index}.bias"] = 0.1 * torch.randn(width, generator=generator)
            inputs = width
    return weights


def torchvision_stack(weights: dict[str, Tensor], x: Tensor) -> list[Tensor]:
    """The published layer list run in order: the maps after layers 3, 8, 15, 22 and 29."""
    plan, index, maps = (
        [64, 64, "M", 128, 128, "M", 256, 256, 256, "M", 512, 512, 512, "M", 512, 512, 512, "M"],
        0,
        [],
    )
    for layer in plan:
        if layer == "M":
            maps.append(x)
            x, index = F.max_pool2d(x, 2, 2) if len(maps) < 5 else x, index + 1
            continue
        x = F.relu(
            F.conv2d(
                x, weights[f"features.{index}.weight"], weights[f"features.{index}.bias"], padding=1
            )
        )
        index += 2
    return maps


@pytest.mark.parametrize("form", ["safetensors", "pth"])
def test_vgg_reads_a_local_state_dict(form: str, tmp_path: Path) -> None:
    weights, file = vgg_weights(), str(tmp_path / f"vgg16.{form}")
    if form == "pth":
        torch.save(weights, file)
    else:
        save_file(weights, file)
    stack = Vgg16(load_vgg(file))
    x = pictures(2, side=32)
    inputs = ((x + 1) / 2 - torch.tensor(IMAGENET[0]).view(3, 1, 1)) / torch.tensor(
        IMAGENET[1]
    ).view(3, 1, 1)
    for ours, theirs in zip(stack(x), torchvision_stack(weights, inputs), strict=True):
        torch.testing.assert_close(ours, theirs)
    assert not any(p.requires_grad for p in stack.parameters())


def test_the_full_stack_has_vgg16s_size() -> None:
    with torch.device("meta"):
        assert sum(p.numel() for p in Vgg16(_standard()).parameters()) == 14_714_688
    assert (len(STAGES), WIDTHS) == (5, (64, 128, 256, 512, 512))


def lpips_by_hand(weights: dict[str, Tensor], linear: list[Tensor], a: Tensor, b: Tensor) -> Tensor:
    """The distance as the paper writes it, one place at a time."""
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in IMAGENET)
    total = torch.zeros(len(a), dtype=torch.float64)
    for fa, fb, w in zip(
        *(torchvision_stack(weights, ((x + 1) / 2 - mean) / std) for x in (a, b)),
        linear,
        strict=True,
    ):
        for n in range(len(a)):
            places = [(i, j) for i in range(fa.shape[2]) for j in range(fa.shape[3])]
            for i, j in places:
                ua, ub = (
                    f[n, :, i, j].double() / (f[n, :, i, j].double().norm() + 1e-10)
                    for f in (fa, fb)
                )
                total[n] += float((w.double() * (ua - ub) ** 2).sum()) / len(places)
    return total


def test_lpips_is_the_papers_formula_and_its_gradient_reaches_the_estimate(tmp_path: Path) -> None:
    weights = vgg_weights()
    save_file(weights, tmp_path / "vgg.safetensors")
    linear = [
        torch.rand(width, generator=torch.Generator().manual_seed(width))
        for width in (4, 6, 8, 10, 12)
    ]
    torch.save(
        {f"lin{k}.model.1.weight": w.view(1, -1, 1, 1) for k, w in enumerate(linear)},
        tmp_path / "lin.pth",
    )
    a, b = pictures(2, seed=1), pictures(2, seed=2)
    plain = Lpips(LpipsLossConfig(vgg=str(tmp_path / "vgg.safetensors")))
    weighted = Lpips(
        LpipsLossConfig(vgg=str(tmp_path / "vgg.safetensors"), linear=str(tmp_path / "lin.pth"))
    )
    ones = [torch.ones_like(w) for w in linear]
    torch.testing.assert_close(
        plain(a, b).double(), lpips_by_hand(weights, ones, a, b), rtol=1e-4, atol=1e-6
    )
    torch.testing.assert_close(
        weighted(a, b).double(), lpips_by_hand(weights, linear, a, b), rtol=1e-4, atol=1e-6
    )
    assert plain(a, a).tolist() == [0, 0]
    guess, target = a.clone().requires_grad_(True), b.clone().requires_grad_(True)
    plain(guess, target).sum().backward()
    assert guess.grad is not None
    assert bool(guess.grad.isfinite().all())
    assert bool(guess.grad.any())
    assert target.grad is None
    still = torch.zeros(1, 3, 16, 16, requires_grad=True)
    Lpips(LpipsLossConfig(vgg=str(tmp_path / "vgg.safetensors")))(
        still, torch.zeros(1, 3, 16, 16)
    ).sum().backward()
    assert still.grad is not None
    assert bool(still.grad.isfinite().all())
    with pytest.raises(InputError, match=r"loss\.lpips\.size: .*8 px"):
        plain(pictures(2, side=8), pictures(2, side=8))
    resized = Lpips(LpipsLossConfig(vgg=str(tmp_path / "vgg.safetensors"), size=32))
    assert resized(pictures(2, side=8, seed=1), pictures(2, side=8, seed=2)).shape == (2,)


def test_files_that_are_not_what_they_should_be_are_named(tmp_path: Path) -> None:
    weights = vgg_weights()
    del weights["features.10.weight"]
    save_file(weights, tmp_path / "short.safetensors")
    with pytest.raises(InputError, match=r"loss\.lpips\.vgg: .*features\.10\.weight"):
        load_vgg(str(tmp_path / "short.safetensors"))
    with pytest.raises(InputError, match=r"absent.*no such file"):
        load_vgg(str(tmp_path / "absent.safetensors"))
    torch.save(nn.Linear(2, 2), tmp_path / "module.pth")
    with pytest.raises(InputError, match="never run"):  # a pickled module
        load_vgg(str(tmp_path / "module.pth"))
    torch.save({"epoch": 3}, tmp_path / "other.pth")
    with pytest.raises(InputError, match="no state dict"):
        load_vgg(str(tmp_path / "other.pth"))
    torch.save({"lin0.model.1.weight": torch.ones(1, 5, 1, 1)}, tmp_path / "lin.pth")
    with pytest.raises(InputError, match=r"loss\.lpips\.linear: .*\(1, 4, 1, 1\)"):
        load_linear(str(tmp_path / "lin.pth"), [4, 6, 8, 10, 12])
