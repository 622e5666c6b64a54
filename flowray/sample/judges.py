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

from flowray.config.errors import InputError
from flowray.config.model import AutoencoderConfig
from flowray.config.towers import ClipNet, DinoV2Net, ImageNetConfig, SiglipNet
from flowray.data.pixels import to_pictures
from flowray.model.autoencoder import Autoencoder
from flowray.model.efficientnet import load_efficientnet
from flowray.model.files import CONFIG, content_of, read_json
from flowray.model.images import load_image_encoder
from flowray.store.fingerprints import autoencoder_fingerprint

PIXELS, LATENTS = "pixels", "latents"
OPTION = "--features"
SIDE = 32  # px of a picture whose pixels are compared
BATCH = 8  # of 32 pictures a network takes twice as long for each on a CPU
GPU_BATCH = 64
MADE = 1  # raise it where the same picture and network come to other features: kept ones are stale
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
    else the pooled feature of the network in a folder, brought to length root(dims): distances are
    then those of cosines, which find a caption's other pictures better.

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
    kind = read_json(folder / CONFIG, OPTION).get("model_type") if _described(folder) else None
    for family, net in _NETS.items():
        if str(kind).startswith(family):
            encoder = load_image_encoder(net(path=str(folder)), OPTION, frozen=True).to(device)
            return lambda pictures: encoder(pictures).pooled
    return load_efficientnet(folder, OPTION).to(device).features


def _described(folder: Path) -> bool:
    return (folder / CONFIG).is_file()


def _content(folder: Path) -> str:
    """Stands for the network: its config and its weights."""
    config = (folder / CONFIG).read_bytes() if _described(folder) else b""
    weights = sorted(folder.glob("*.safetensors")) + sorted(folder.glob("*.bin"))
    return f"{hashlib.sha256(config).hexdigest()[:8]}-{content_of(*weights)}"
