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


class ClipScorer:
    """A CLIPModel of transformers with its tokenizer."""

    def __init__(self, net: Any, tokenizer: Any, device: torch.device):
        self.net, self.tokenizer, self.device = net.to(device).eval(), tokenizer, device
        self.side = int(net.config.vision_config.image_size)
        self.length = int(net.config.text_config.max_position_embeddings)
        self.norm = torch.tensor(OPENAI, device=device).view(2, 1, 3, 1, 1)

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
        seen = to_pictures(list(pictures)).to(self.device)
        resized = F.interpolate(seen, (self.side, self.side), mode="bicubic", antialias=True)
        mean, std = self.norm
        out = self.net.vision_model(pixel_values=((resized.clamp(-1, 1) + 1) / 2 - mean) / std)
        features: Tensor = self.net.visual_projection(out.pooler_output)
        return features

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
    files = open_model(folder, OPTION, "image_encoder")
    kind = transformers_config(files, OPTION, "image_encoder").model_type
    if kind != "clip":
        raise refused(OPTION, files.folder, f"holds a {kind} model; want CLIP, both halves of it")
    net = load_weights(CLIPModel, files, OPTION, torch.float32)
    with loading(OPTION, files.folder):
        tokenizer = AutoTokenizer.from_pretrained(files.folder, **OFFLINE)
    return ClipScorer(net, tokenizer, device)
