"""Picture encoders of the semantic losses: SigLIP, CLIP and DINOv2 in transformers' format."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    Dinov2Config,
    Dinov2Model,
    Dinov2WithRegistersModel,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from flowray.config.errors import InputError
from flowray.config.paths import is_hub_name
from flowray.config.towers import ClipNet, DinoV2Net, ImageNetConfig, SiglipNet, VisionDims
from flowray.model.files import open_model
from flowray.model.local import local_place
from flowray.model.pretrained import load_weights, planning, transformers_config

Channels = tuple[float, float, float]
IMAGENET: tuple[Channels, Channels] = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
OPENAI: tuple[Channels, Channels] = (
    (0.48145466, 0.4578275, 0.40821073),
    (0.26862954, 0.26130258, 0.27577711),
)
HALVES: tuple[Channels, Channels] = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


class ImageFeatures(NamedTuple):
    """pooled (B, width) and one token per patch (B, rows, columns, width)."""

    pooled: Tensor
    patches: Tensor


@dataclass(frozen=True)
class _Family:
    """net: model classes by `model_type`, the first for a tower without weights; extra: tokens
    before the patches.
    """

    nets: dict[str, Any]
    config: Any
    norm: tuple[Channels, Channels]
    extra: int


_FAMILIES: dict[type, _Family] = {
    SiglipNet: _Family(
        {"siglip_vision_model": SiglipVisionModel, "siglip": SiglipVisionModel},
        SiglipVisionConfig,
        HALVES,
        0,
    ),
    ClipNet: _Family(
        {"clip_vision_model": CLIPVisionModel, "clip": CLIPVisionModel}, CLIPVisionConfig, OPENAI, 1
    ),
    DinoV2Net: _Family(
        {"dinov2": Dinov2Model, "dinov2_with_registers": Dinov2WithRegistersModel},
        Dinov2Config,
        IMAGENET,
        1,
    ),
}


class ImageEncoder(nn.Module):
    """A picture encoder with its own resizing and normalisation.

    Frozen: eval mode and no gradient, whatever holds it.
    """

    def __init__(self, config: ImageNetConfig, net: Any, frozen: bool):
        super().__init__()
        family = _FAMILIES[type(config)]
        self.net: Any = net.eval().requires_grad_(False) if frozen else net
        self.frozen = frozen
        self.width, self.side, self.patch = (
            int(net.config.hidden_size),
            int(net.config.image_size),
            int(net.config.patch_size),
        )
        self.extra = family.extra + int(getattr(net.config, "num_register_tokens", 0))
        mean, std = torch.tensor(family.norm).view(2, 1, 3, 1, 1)
        self.mean: Tensor
        self.std: Tensor
        self.register_buffer("mean", mean, persistent=False)
        self.register_buffer("std", std, persistent=False)

    def train(self, mode: bool = True) -> ImageEncoder:
        """A frozen encoder stays in eval mode."""
        return super().train(mode and not self.frozen)

    def forward(self, pictures: Tensor) -> ImageFeatures:
        """Features of pictures (B, 3, H, W) in [-1, 1] of any size, fp32."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen):
            resized = F.interpolate(
                pictures.float(), (self.side, self.side), mode="bicubic", antialias=True
            ).clamp(-1, 1)
            out = self.net(pixel_values=((resized + 1) / 2 - self.mean) / self.std)
            rows = self.side // self.patch
            return ImageFeatures(
                out.pooler_output.float(),
                out.last_hidden_state[:, self.extra :].float().unflatten(1, (rows, rows)),
            )

    def freeze_idle(self) -> None:
        """Take out of training what `pooled` does not depend on, such as DINOv2's mask token: a
        parameter that never has a gradient ends DistributedDataParallel's second step.

        Asked of a pass on the meta device, which computes nothing.
        """
        tensors = {**dict(self.named_parameters()), **dict(self.named_buffers())}
        shapes = {
            name: torch.empty_like(tensor, device="meta").requires_grad_(tensor.requires_grad)
            for name, tensor in tensors.items()
        }
        trained = {name: p for name, p in self.named_parameters() if p.requires_grad}
        with torch.device("meta"), torch.enable_grad():
            pictures = torch.empty(1, 3, self.side, self.side)
            pooled: Tensor = functional_call(self, shapes, (pictures,)).pooled
            gradients = torch.autograd.grad(
                pooled.sum(), [shapes[name] for name in trained], allow_unused=True
            )
        for parameter, gradient in zip(trained.values(), gradients, strict=True):
            parameter.requires_grad_(gradient is not None)


def load_image_encoder(config: ImageNetConfig, where: str, *, frozen: bool) -> ImageEncoder:
    """The encoder of a folder or hub name; from `dims`, with random weights, where there is no
    path. A plan loads no weights.

    where: the recipe key that named it. InputError: the weights are not there, of another kind, or
    not whole.
    """
    if config.dims is not None and (config.path is None or planning()):
        family = _FAMILIES[type(config)]
        return ImageEncoder(
            config, next(iter(family.nets.values()))(_shape(family, config.dims)), frozen
        )
    path = str(config.path)
    if planning() and local_place(path, "pictures") is None and is_hub_name(path):
        raise InputError(f"{where}.path: {_typed_in_a_plan(path, where)}")
    files = open_model(path, f"{where}.path", "image_encoder", weights=not planning())
    made = transformers_config(files, f"{where}.path", "image_encoder")
    kind, nets = made.model_type, _FAMILIES[type(config)].nets
    if kind not in nets:
        reads = f"kind {config.kind} reads {' or '.join(nets)}; set {where}.kind"
        raise InputError(f"{where}.path: {config.path!r} holds a {kind} model, {reads}")
    if planning():
        return ImageEncoder(config, nets[kind](getattr(made, "vision_config", made)), frozen)
    return ImageEncoder(
        config, load_weights(nets[kind], files, f"{where}.path", torch.float32), frozen
    )


def _typed_in_a_plan(path: str, where: str) -> str:
    """What is typed where a plan needs the sizes of an encoder that is not here."""
    dims = ", ".join(f"{name}: N" for name in VisionDims.model_fields)
    sizes = f"or its sizes, '{where}.dims={{{dims}}}'"
    return f"{path!r} is not on this machine; type `hf download {path} config.json`, {sizes}"


def _shape(family: _Family, dims: VisionDims) -> Any:
    mlp = (
        {"mlp_ratio": dims.mlp // dims.width}
        if family.config is Dinov2Config
        else {"intermediate_size": dims.mlp}
    )
    return family.config(
        hidden_size=dims.width,
        num_hidden_layers=dims.depth,
        num_attention_heads=dims.heads,
        image_size=dims.image,
        patch_size=dims.patch,
        **mlp,
    )
