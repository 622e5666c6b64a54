"""EfficientNet-Lite0 (arXiv 1905.11946, the Lite variant): features of pictures to judge by."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from flowray.model.files import check_file, refused
from flowray.model.pretrained import loading

WEIGHTS = "model.safetensors"
SIDE = 224  # px it was trained at
MEAN, SCALE = 127.0, 128.0  # of pixels in [0, 255]: the Lite variant's own normalisation
EPS = 1e-3  # of every batch norm, TensorFlow's
# blocks, side of the depthwise kernel, stride of the first block, expansion, width
STAGES = (
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)
STEM, HEAD, CLASSES = 32, 1280, 1000


class _SameConv(nn.Conv2d):
    """A convolution padded as TensorFlow's SAME: ceil(side / stride) places, the odd row and column
    of padding below and to the right.
    """

    def forward(self, x: Tensor) -> Tensor:
        pads: list[int] = []
        for side, kernel, stride in zip(
            reversed(x.shape[2:]), reversed(self.kernel_size), reversed(self.stride), strict=True
        ):
            whole = max((-(-side // stride) - 1) * stride + kernel - side, 0)
            pads += [whole // 2, whole - whole // 2]
        return super().forward(F.pad(x, pads))


class _Block(nn.Module):
    """Inverted residual without squeeze-excite: expand, depthwise, project; the input is added
    where the shape stays.
    """

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int, expansion: int):
        super().__init__()
        width = inputs * expansion
        self.expands, self.adds = expansion > 1, stride == 1 and inputs == outputs
        if self.expands:
            self._expand_conv = _SameConv(inputs, width, 1, bias=False)
            self._bn0 = nn.BatchNorm2d(width, EPS)
        self._depthwise_conv = _SameConv(width, width, kernel, stride, groups=width, bias=False)
        self._bn1 = nn.BatchNorm2d(width, EPS)
        self._project_conv = _SameConv(width, outputs, 1, bias=False)
        self._bn2 = nn.BatchNorm2d(outputs, EPS)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu6(self._bn0(self._expand_conv(x))) if self.expands else x
        y = F.relu6(self._bn1(self._depthwise_conv(y)))
        y = self._bn2(self._project_conv(y))
        return x + y if self.adds else y


class EfficientNetLite0(nn.Module):
    """The whole network, 4.65 million parameters, by the names of its published state dict."""

    def __init__(self) -> None:
        super().__init__()
        self._conv_stem = _SameConv(3, STEM, 3, 2, bias=False)
        self._bn0 = nn.BatchNorm2d(STEM, EPS)
        widths = [STEM, *(width for *_, width in STAGES)]
        self._blocks = nn.ModuleList(
            _Block(outputs if i else inputs, outputs, kernel, 1 if i else stride, expansion)
            for (inputs, outputs), (count, kernel, stride, expansion, _) in zip(
                pairwise(widths), STAGES, strict=True
            )
            for i in range(count)
        )
        self._conv_head = _SameConv(widths[-1], HEAD, 1, bias=False)
        self._bn1 = nn.BatchNorm2d(HEAD, EPS)
        self._fc = nn.Linear(HEAD, CLASSES)

    def features(self, pictures: Tensor) -> Tensor:
        """The averaged last feature map (B, 1280) of pictures (B, 3, H, W) in [-1, 1].

        They are resized to SIDE: of pictures of 64 px, 128 took a third of the time and found 0.69
        of the captions where 224 found 0.73.
        """
        x = F.interpolate(
            pictures.float(), (SIDE, SIDE), mode="bilinear", align_corners=False, antialias=True
        )
        x = x.contiguous(memory_format=torch.channels_last)  # a quarter off the time on a CPU
        x = F.relu6(self._bn0(self._conv_stem(((x + 1) * 127.5 - MEAN) / SCALE)))
        for block in self._blocks:
            x = block(x)
        return F.relu6(self._bn1(self._conv_head(x))).mean((2, 3))

    def forward(self, pictures: Tensor) -> Tensor:
        """Logits (B, 1000) of ImageNet's classes, of pictures as for `features`."""
        out: Tensor = self._fc(self.features(pictures))
        return out


def load_efficientnet(folder: Path, where: str) -> EfficientNetLite0:
    """The network, frozen and in eval mode, from WEIGHTS in a folder.

    where: what named the folder, for messages. InputError: no such network, or not whole.
    """
    file = folder / WEIGHTS
    if not file.is_file():
        raise refused(where, folder, f"has no {WEIGHTS}")
    check_file(file, where)
    net = EfficientNetLite0().eval().requires_grad_(False)
    with loading(where, folder):
        # a batch norm's count of training steps, which says nothing here, may be absent
        counts = {name: x for name, x in net.state_dict().items() if "num_batches" in name}
        net.load_state_dict(counts | load_file(file))
    return net
