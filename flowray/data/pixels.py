"""Pictures as tensors and back."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def to_pictures(images: list[np.ndarray]) -> Tensor:
    """uint8 (H, W, 3) arrays -> float (B, 3, H, W) in [-1, 1]."""
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float() / 127.5 - 1


def from_pictures(pictures: Tensor) -> np.ndarray:
    """float (B, 3, H, W) -> uint8 (B, H, W, 3)."""
    clipped = ((pictures.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    return clipped.permute(0, 2, 3, 1).cpu().numpy()
