"""EfficientNet-Lite0 against a network that is put together by hand from its state dict."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from support import assert_refused, count_parameters
from torch import Tensor, nn

from flowray.config.errors import InputError
from flowray.model.efficientnet import MEAN, SCALE, WEIGHTS, EfficientNetLite0, load_efficientnet

# block -> padding (left, right, top, bottom) and stride at 224 px, written out
STRIDED = {1: ((0, 1, 0, 1), 2), 3: ((1, 2, 1, 2), 2), 5: ((0, 1, 0, 1), 2), 11: ((1, 2, 1, 2), 2)}
ADDED = {2, 4, 6, 7, 9, 10, 12, 13, 14}


@pytest.fixture(scope="module")
def net() -> EfficientNetLite0:
    """Random weights that keep the activations' scale, and statistics as after training."""
    generator = torch.Generator().manual_seed(0)
    made = EfficientNetLite0()
    for name, x in made.state_dict().items():
        drawn = torch.randn(x.shape, generator=generator)
        if name.endswith("running_var"):
            x.copy_(drawn.abs() + 0.5)
        elif x.ndim == 4:
            x.copy_(drawn * (2 / x[0].numel()) ** 0.5)
        elif x.is_floating_point():
            x.copy_(0.2 * drawn + ("bn" in name and name.endswith("weight")))
    return made.eval()


def conv(weight: Tensor, pad: tuple[int, ...], stride: int) -> list[nn.Module]:
    outputs, inputs, side, _ = weight.shape
    groups = outputs if inputs == 1 and side > 1 else 1
    made = nn.Conv2d(inputs * groups, outputs, side, stride, groups=groups, bias=False)
    made.weight = nn.Parameter(weight)
    return [nn.ZeroPad2d(pad), made]  # type: ignore[arg-type]


def norm(state: dict[str, Tensor], name: str) -> nn.BatchNorm2d:
    made = nn.BatchNorm2d(len(state[f"{name}.weight"]), eps=1e-3)
    for part in ("weight", "bias", "running_mean", "running_var"):
        getattr(made, part).data = state[f"{name}.{part}"]
    return made


class Added(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return x + self.inner(x)


def by_hand(state: dict[str, Tensor]) -> nn.Sequential:
    """The network at 224 px, stem to logits."""
    none = (0, 0, 0, 0)
    stem = conv(state["_conv_stem.weight"], (0, 1, 0, 1), 2)
    layers = [*stem, norm(state, "_bn0"), nn.ReLU6()]
    for i in range(16):
        of, block = f"_blocks.{i}.", list[nn.Module]()
        if i:
            block += [*conv(state[f"{of}_expand_conv.weight"], none, 1), norm(state, f"{of}_bn0")]
            block.append(nn.ReLU6())
        depthwise = state[f"{of}_depthwise_conv.weight"]
        pad, stride = STRIDED.get(i, ((depthwise.shape[-1] // 2,) * 4, 1))
        block += [*conv(depthwise, pad, stride), norm(state, f"{of}_bn1"), nn.ReLU6()]
        block += [*conv(state[f"{of}_project_conv.weight"], none, 1), norm(state, f"{of}_bn2")]
        layers.append(Added(nn.Sequential(*block)) if i in ADDED else nn.Sequential(*block))
    linear = nn.Linear(1280, 1000)
    linear.weight.data, linear.bias.data = state["_fc.weight"], state["_fc.bias"]
    head = [*conv(state["_conv_head.weight"], none, 1), norm(state, "_bn1"), nn.ReLU6()]
    return nn.Sequential(*layers, *head, nn.AdaptiveAvgPool2d(1), nn.Flatten(), linear).eval()


def test_its_size_and_names_are_those_of_the_published_state_dict() -> None:
    net = EfficientNetLite0()
    assert count_parameters(net) == 4_652_008  # published: 4.65 million
    shapes = {name: tuple(x.shape) for name, x in net.state_dict().items()}
    assert len(shapes) == 296
    assert shapes["_conv_stem.weight"] == (32, 3, 3, 3)
    assert shapes["_blocks.0._depthwise_conv.weight"] == (32, 1, 3, 3)
    assert "_blocks.0._expand_conv.weight" not in shapes
    assert shapes["_blocks.11._depthwise_conv.weight"] == (672, 1, 5, 5)
    assert shapes["_blocks.15._project_conv.weight"] == (320, 1152, 1, 1)
    assert shapes["_conv_head.weight"] == (1280, 320, 1, 1)
    assert shapes["_bn1.running_var"] == (1280,)
    assert shapes["_fc.weight"] == (1000, 1280)


def test_it_computes_what_its_state_dict_says(net: EfficientNetLite0) -> None:
    pictures = torch.rand(2, 3, 224, 224, generator=torch.Generator().manual_seed(1)) * 2 - 1
    reference = by_hand(net.state_dict())
    with torch.no_grad():
        pixels = (pictures + 1) / 2 * 255
        wanted = reference((pixels - MEAN) / SCALE)
        assert wanted.std() > 0.05
        assert torch.allclose(net(pictures), wanted, atol=1e-4)
        features = net.features(pictures)
        assert features.shape == (2, 1280)
        assert torch.allclose(net._fc(features), wanted, atol=1e-4)
        assert not torch.allclose(features[0], features[1], atol=1e-3)
        # any size: a plain colour is the same one however large it is
        plain = [net.features(torch.full((1, 3, side, side), 0.3)) for side in (112, 224, 300)]
        assert torch.allclose(plain[0], plain[1], atol=1e-4)
        assert torch.allclose(plain[2], plain[1], atol=1e-4)


def test_it_loads_from_a_folder_and_refuses_other_weights(
    net: EfficientNetLite0, tmp_path: Path
) -> None:
    state = {name: x for name, x in net.state_dict().items() if "num_batches" not in name}
    save_file(state, tmp_path / WEIGHTS)
    loaded = load_efficientnet(tmp_path, "--features")
    picture = torch.zeros(1, 3, 32, 32)
    assert torch.allclose(loaded.features(picture), net.features(picture), atol=1e-4)
    assert not loaded.training
    assert not any(p.requires_grad for p in loaded.parameters())
    state.pop("_bn1.running_var")
    save_file(state, tmp_path / WEIGHTS)
    assert_refused(
        lambda: load_efficientnet(tmp_path, "--features"), InputError, "--features.*cannot be load"
    )
    (tmp_path / WEIGHTS).unlink()
    assert_refused(
        lambda: load_efficientnet(tmp_path, "--features"), InputError, f"has no {WEIGHTS}"
    )
