"""VGG16's feature stack from local weights, and the perceptual distance LPIPS on it."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from flowray.config.errors import InputError
from flowray.config.losses import LpipsLossConfig
from flowray.config.paths import no_such
from flowray.model.files import check_file
from flowray.model.images import IMAGENET
from flowray.model.pretrained import loading, planning

# where torchvision's `features` has its convolutions
STAGES = ((0, 2), (5, 7), (10, 12, 14), (17, 19, 21), (24, 26, 28))
WIDTHS = (64, 128, 256, 512, 512)


class Vgg16(nn.Module):
    """The five stages of VGG16 (arXiv 1409.1556), each ending after its last ReLU; frozen. Pictures
    of 16 px and more.

    convs: weights and biases by torchvision's names, `features.N.weight`; their shapes say how wide
    each layer is.
    """

    def __init__(self, convs: dict[str, Tensor]):
        super().__init__()
        self.features = nn.ModuleDict()
        self.widths = [len(convs[f"features.{stage[-1]}.weight"]) for stage in STAGES]
        for index in (i for stage in STAGES for i in stage):
            weight, bias = convs[f"features.{index}.weight"], convs[f"features.{index}.bias"]
            conv = nn.Conv2d(weight.shape[1], weight.shape[0], 3, padding=1)
            conv.weight, conv.bias = nn.Parameter(weight.float()), nn.Parameter(bias.float())
            self.features[str(index)] = conv
        self.requires_grad_(False)
        mean, std = torch.tensor(IMAGENET).view(2, 1, 3, 1, 1)
        self.mean: Tensor
        self.std: Tensor
        self.register_buffer("mean", mean, persistent=False)
        self.register_buffer("std", std, persistent=False)

    def forward(self, pictures: Tensor) -> list[Tensor]:
        """Feature maps relu1_2, 2_2, 3_3, 4_3, 5_3 of pictures (B, 3, H, W) in [-1, 1]."""
        x = ((pictures + 1) / 2 - self.mean) / self.std
        maps: list[Tensor] = []
        for stage in STAGES:
            x = F.max_pool2d(x, 2) if maps else x
            for index in stage:
                x = F.relu(self.features[str(index)](x))
            maps.append(x)
        return maps


class Lpips(nn.Module):
    """Perceptual distance (arXiv 1801.03924): squared difference of unit-length features, weighted
    over channels, averaged over places, summed over the five stages. Without linear weights every
    channel counts 1.
    """

    def __init__(self, config: LpipsLossConfig):
        super().__init__()
        self.size, self.samples = config.size, config.samples
        self.vgg = Vgg16(_standard() if planning() else load_vgg(str(config.vgg)))
        widths = self.vgg.widths
        weights = (
            [torch.ones(width) for width in widths]
            if config.linear is None
            else load_linear(config.linear, widths)
        )
        self.linear = nn.ParameterList(
            nn.Parameter(weight, requires_grad=False) for weight in weights
        )

    def forward(self, estimate: Tensor, target: Tensor) -> Tensor:
        """Distances (B,) of pictures (B, 3, H, W) in [-1, 1]; the gradient goes into `estimate`."""
        with torch.no_grad():
            targets = self._features(target)
        distance = estimate.new_zeros(len(estimate), dtype=torch.float32)
        for ours, theirs, weight in zip(
            self._features(estimate), targets, self.linear, strict=True
        ):
            distance = distance + ((ours - theirs).square() * weight.view(1, -1, 1, 1)).sum(1).mean(
                (1, 2)
            )
        return distance

    def _features(self, pictures: Tensor) -> list[Tensor]:
        if self.size is not None:
            pictures = F.interpolate(
                pictures.float(), (self.size, self.size), mode="bilinear", antialias=True
            )
        if min(pictures.shape[2:]) < 16:
            got = min(pictures.shape[2:])
            raise InputError(
                f"loss.lpips.size: VGG16 wants 16 px and more, the decoded pictures have {got} px;"
                " set it to 64"
            )
        return [F.normalize(x.float(), dim=1, eps=1e-10) for x in self.vgg(pictures)]


def load_vgg(file: str) -> dict[str, Tensor]:
    """VGG16's convolutions from a state dict of torchvision's form; the classifier is left out."""
    tensors = _tensors(file, "loss.lpips.vgg")
    wanted: dict[str, Tensor] = {}
    inputs = 3
    for index in (i for stage in STAGES for i in stage):
        weight, bias = (
            tensors.get(f"features.{index}.weight"),
            tensors.get(f"features.{index}.bias"),
        )
        if (
            weight is None
            or bias is None
            or weight.ndim != 4
            or weight.shape[1:] != (inputs, 3, 3)
            or bias.shape != weight.shape[:1]
        ):
            got = "none" if weight is None else tuple(weight.shape)
            raise InputError(
                f"loss.lpips.vgg: {file!r} is not VGG16: features.{index}.weight of shape (n,"
                f" {inputs}, 3, 3) and its bias are wanted, got {got}; save torchvision's vgg16"
                " state dict (not vgg16_bn)"
            )
        wanted |= {f"features.{index}.weight": weight, f"features.{index}.bias": bias}
        inputs = len(weight)
    return wanted


def load_linear(file: str, widths: list[int]) -> list[Tensor]:
    """LPIPS's layer weights, (width,) each, from `linK.model.1.weight` of shape (1, width, 1,
    1).
    """
    tensors = _tensors(file, "loss.lpips.linear")
    for k, width in enumerate(widths):
        weight = tensors.get(f"lin{k}.model.1.weight")
        if weight is None or weight.shape != (1, width, 1, 1):
            got = "none" if weight is None else tuple(weight.shape)
            raise InputError(
                f"loss.lpips.linear: {file!r}: lin{k}.model.1.weight of shape (1, {width}, 1, 1) is"
                f" wanted, got {got}"
            )
    return [tensors[f"lin{k}.model.1.weight"].flatten().float() for k in range(len(widths))]


def _tensors(file: str, where: str) -> dict[str, Tensor]:
    """A state dict in safetensors, or in torch's format without running what a pickle holds."""
    place = Path(file)
    if not place.is_file():
        raise InputError(
            f"{where}: {file!r}: {'a folder; give the file' if place.is_dir() else no_such(file)}"
        )
    check_file(place, where)
    with loading(where, place):
        tensors = place.suffix == ".safetensors"
        kept = (
            load_file(file) if tensors else torch.load(file, map_location="cpu", weights_only=True)
        )
    if not isinstance(kept, dict) or not all(isinstance(value, Tensor) for value in kept.values()):
        raise InputError(
            f"{where}: {file!r} holds no state dict of tensors; save model.state_dict()"
        )
    return kept


def _standard() -> dict[str, Tensor]:
    """Empty convolutions of the published widths."""
    shapes: dict[str, Tensor] = {}
    inputs = 3
    for width, stage in zip(WIDTHS, STAGES, strict=True):
        for index in stage:
            shapes |= {
                f"features.{index}.weight": torch.empty(width, inputs, 3, 3),
                f"features.{index}.bias": torch.empty(width),
            }
            inputs = width
    return shapes
