"""Features of pictures for the evaluation: pixels, the run's own latents, or a network that lies in
a folder.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModel

from flowray.config.errors import InputError
from flowray.config.model import AutoencoderConfig
from flowray.config.towers import ClipNet, DinoV2Net, ImageNetConfig, SiglipNet
from flowray.data.pixels import to_pictures
from flowray.model.autoencoder import Autoencoder
from flowray.model.efficientnet import load_efficientnet
from flowray.model.files import CONFIG, content_of, open_model, read_json, refused
from flowray.model.images import IMAGENET, load_image_encoder
from flowray.model.pretrained import load_weights, transformers_config
from flowray.sample.clipscore import ClipPictures, load_clip
from flowray.store.fingerprints import autoencoder_fingerprint

PIXELS, LATENTS = "pixels", "latents"
OPTION = "--features"
SIDE = 32  # px of a picture whose pixels are compared
BATCH = 8  # of 32 pictures a network takes twice as long for each on a CPU
GPU_BATCH = 64
SIDE_OF_NETS = 224  # px, where a network's config says none
PREPARED = "preprocessor_config.json"
NORM = ("mean", "std")
MADE = 2  # raise it where the same picture and network come to other features: kept ones are stale
_NETS: dict[str, Callable[..., ImageNetConfig]] = {
    "siglip": SiglipNet,
    "clip": ClipNet,
    "dinov2": DinoV2Net,
}


@dataclass(frozen=True)
class Judge:
    """Features (B, dims) of pictures (B, 3, H, W) in [-1, 1].

    name: as it was asked for; fingerprint: stands for what the features depend on.
    """

    name: str
    fingerprint: str
    features: Callable[[Tensor], Tensor]
    device: torch.device

    @property
    def batch(self) -> int:
        """How many pictures to look at at once."""
        return BATCH if self.device.type == "cpu" else GPU_BATCH

    def look_at(self, pictures: Sequence[np.ndarray] | np.ndarray) -> np.ndarray:
        """`look` of any number of pictures."""
        return np.concatenate(
            [self.look(pictures[i : i + self.batch]) for i in range(0, len(pictures), self.batch)]
        )

    @torch.no_grad()
    def look(self, pictures: Sequence[np.ndarray] | np.ndarray) -> np.ndarray:
        """Features (B, dims) fp32 of pictures uint8 (H, W, 3) of one size."""
        seen = to_pictures(list(pictures)).to(self.device)
        return self.features(seen).flatten(1).float().cpu().numpy()


def open_judge(
    name: str, autoencoder: Autoencoder, config: AutoencoderConfig, device: torch.device
) -> Judge:
    """PIXELS: the picture at no more than SIDE px; LATENTS: what the run's autoencoder makes of it;
    else the feature of the network in a folder (of a whole CLIP model the image embeds, the pooled
    one of its vision half alone, SigLIP and DINOv2),
    brought to length root(dims): distances are then those of cosines, which find a caption's other
    pictures better.

    InputError: no such folder, or no network that is read.
    """
    if name == PIXELS:
        return Judge(name, PIXELS, _pixels, device)
    if name == LATENTS:

        def latents(pictures: Tensor) -> Tensor:
            moments = autoencoder.encode_moments(pictures)
            return autoencoder.sample(moments, torch.zeros_like(moments.mean))

        return Judge(name, f"{LATENTS}-{MADE}-{autoencoder_fingerprint(config)}", latents, device)
    folder = Path(name)
    if not folder.is_dir():
        raise InputError(
            f"{OPTION}: {name!r}: want {PIXELS}, {LATENTS}, or the folder of a network"
        )
    pooled = _network(folder, device)

    def features(pictures: Tensor) -> Tensor:
        found = pooled(pictures).float()
        return F.normalize(found, dim=1) * found.shape[1] ** 0.5

    return Judge(name, f"net-{MADE}-{_content(folder)}", features, device)


def _pixels(pictures: Tensor) -> Tensor:
    height, width = (min(side, SIDE) for side in pictures.shape[2:])
    return F.adaptive_avg_pool2d(pictures, (height, width))


def _network(folder: Path, device: torch.device) -> Callable[[Tensor], Tensor]:
    if not _described(folder):
        return load_efficientnet(folder, OPTION).to(device).features
    kind = read_json(folder / CONFIG, OPTION).get("model_type")
    if kind == "clip":
        return ClipPictures(load_clip(str(folder), OPTION), device)
    for family, net in _NETS.items():
        if str(kind).startswith(family):
            encoder = load_image_encoder(net(path=str(folder)), OPTION, frozen=True).to(device)
            return lambda pictures: encoder(pictures).pooled
    return _AnyNetwork(folder, device).features


class _AnyNetwork:
    """Any vision model that transformers reads: its feature is the mean over places or tokens of
    its last layer, since a pooler may be without weights of its own.
    """

    def __init__(self, folder: Path, device: torch.device):
        files = open_model(str(folder), OPTION, "image_encoder")
        config = transformers_config(files, OPTION, "image_encoder")
        self.net = load_weights(AutoModel, files, OPTION, torch.float32, unread="pooler")
        self.net.to(device).eval()
        if self.net.main_input_name != "pixel_values":
            want = "want one of pictures alone, or SigLIP or CLIP"
            raise refused(OPTION, folder, f"holds a {config.model_type} model; {want}")
        file = folder / PREPARED
        says = read_json(file, OPTION) if file.is_file() else {}
        sizes = getattr(config, "image_size", None) or SIDE_OF_NETS
        self.size = (sizes, sizes) if isinstance(sizes, int) else tuple(sizes)
        mean, std = (says.get(f"image_{name}") or IMAGENET[i] for i, name in enumerate(NORM))
        self.norm = torch.tensor([mean, std], device=device).view(2, 1, 3, 1, 1)

    def features(self, pictures: Tensor) -> Tensor:
        """(B, dims) of pictures (B, 3, H, W) in [-1, 1]."""
        resized = F.interpolate(pictures.float(), self.size, mode="bicubic", antialias=True)
        mean, std = self.norm
        out = self.net(pixel_values=((resized.clamp(-1, 1) + 1) / 2 - mean) / std)
        last: Tensor = out.last_hidden_state
        return last.mean(1) if last.dim() == 3 else last.flatten(2).mean(2)


def _described(folder: Path) -> bool:
    return (folder / CONFIG).is_file()


def _content(folder: Path) -> str:
    """Stands for the network: its config, how it prepares pictures, and its weights."""
    files = [file for name in (CONFIG, PREPARED) if (file := folder / name).is_file()]
    config = b"".join(file.read_bytes() for file in files)
    weights = sorted(folder.glob("*.safetensors")) + sorted(folder.glob("*.bin"))
    return f"{hashlib.sha256(config).hexdigest()[:8]}-{content_of(*weights)}"
