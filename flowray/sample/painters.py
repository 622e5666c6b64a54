"""Latents of captions by a run's flow, and by its source alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from flowray.config.progress import SILENT, Progress
from flowray.sample.generate import latent_batches, source_latents
from flowray.sample.restore import OpenedRun

Flow = Callable[[Sequence[str]], Tensor]  # captions -> integrated latents (B, C, H, W)
# captions -> mu and z0, each (B, C, H, W)
WithoutFlow = Callable[[Sequence[str]], tuple[Tensor, Tensor]]


def painters(
    opened: OpenedRun, seed: int, progress: Progress = SILENT
) -> tuple[Flow, WithoutFlow | None]:
    """The flow of a run, and its source without the flow; None of a noise source, which is no
    caption's own: there is nothing to decode in the flow's place.
    """

    def flow(prompts: Sequence[str]) -> Tensor:
        made = []
        with progress.task("sampling", len(prompts)) as advance:
            for part in latent_batches(opened.model, prompts, opened.recipe.sample, seed):
                made.append(part)
                advance(len(part))
        return torch.cat(made)

    def source(prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        return source_latents(opened.model, prompts, opened.recipe.sample, seed)

    return flow, source if opened.recipe.model.source.kind == "text" else None
