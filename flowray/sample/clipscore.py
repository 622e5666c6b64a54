"""How well pictures fit their captions by a CLIP model in a folder (CLIPScore, arXiv 2104.08718,
without its factor of 2.5).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoTokenizer, CLIPModel

from flowray.data.pixels import to_pictures
from flowray.model.files import open_model, refused
from flowray.model.images import OPENAI
from flowray.model.pretrained import OFFLINE, load_weights, loading, transformers_config

OPTION = "--clip"
BATCH = 16


class ClipPictures:
    """The picture half of a CLIPModel, prepared as OpenAI published it: the short side brought to
    the model's by bicubic, the middle cut out.
    """

    def __init__(self, net: Any, device: torch.device):
        self.net = net.to(device).eval()
        self.side = int(net.config.vision_config.image_size)
        self.norm = torch.tensor(OPENAI, device=device).view(2, 1, 3, 1, 1)

    @torch.no_grad()
    def __call__(self, pictures: Tensor) -> Tensor:
        """Image embeds (B, dims), of any length, of pictures (B, 3, H, W) in [-1, 1]."""
        short = min(pictures.shape[2:])
        height, width = (self.side * side // short for side in pictures.shape[2:])
        resized = F.interpolate(pictures.float(), (height, width), mode="bicubic", antialias=True)
        top, left = (height - self.side) // 2, (width - self.side) // 2
        middle = resized[:, :, top : top + self.side, left : left + self.side].clamp(-1, 1)
        mean, std = self.norm
        out = self.net.vision_model(pixel_values=((middle + 1) / 2 - mean) / std)
        features: Tensor = self.net.visual_projection(out.pooler_output)
        return features


class ClipScorer:
    """A CLIPModel of transformers with its tokenizer."""

    def __init__(self, net: Any, tokenizer: Any, device: torch.device):
        self.net, self.tokenizer, self.device = net.to(device).eval(), tokenizer, device
        self.look = ClipPictures(net, device)
        self.length = int(net.config.text_config.max_position_embeddings)

    @torch.no_grad()
    def __call__(self, pictures: np.ndarray, texts: Sequence[str]) -> np.ndarray:
        """100 times the cosine of each picture, uint8 (N, H, W, 3), and its caption, 0 where that
        is negative; (N,). Captions are cut off at what the model reads.
        """
        found = []
        for start in range(0, len(texts), BATCH):
            part = slice(start, start + BATCH)
            cosine = F.cosine_similarity(self._pictures(pictures[part]), self._texts(texts[part]))
            found.append(100 * cosine.clamp_min(0).double().cpu().numpy())
        return np.concatenate(found)

    def _pictures(self, pictures: np.ndarray) -> Tensor:
        return self.look(to_pictures(list(pictures)).to(self.device))

    def _texts(self, texts: Sequence[str]) -> Tensor:
        read = self.tokenizer(
            list(texts), padding=True, truncation=True, max_length=self.length, return_tensors="pt"
        )
        ids, mask = (read[name].to(self.device) for name in ("input_ids", "attention_mask"))
        out = self.net.text_model(input_ids=ids, attention_mask=mask)
        features: Tensor = self.net.text_projection(out.pooler_output)
        return features


def open_clip(folder: str, device: torch.device) -> ClipScorer:
    """The CLIP model of a folder; InputError where it holds another one, or no tokenizer."""
    net, place = load_clip(folder, OPTION), open_model(folder, OPTION, "image_encoder").folder
    with loading(OPTION, place):
        tokenizer = AutoTokenizer.from_pretrained(place, **OFFLINE)
    return ClipScorer(net, tokenizer, device)


def load_clip(folder: str, option: str) -> Any:
    """The CLIPModel of a folder; InputError, which names the option, where it holds another one."""
    files = open_model(folder, option, "image_encoder")
    kind = transformers_config(files, option, "image_encoder").model_type
    if kind != "clip":
        raise refused(option, files.folder, f"holds a {kind} model; want CLIP, both halves of it")
    return load_weights(CLIPModel, files, option, torch.float32)
