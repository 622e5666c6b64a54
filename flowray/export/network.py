"""The trained half of a pipeline, as a model of diffusers. Exports carry this file's code, and what
it needs of flowray's, in a file of their own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor

from flowray.config.flow import SampleConfig
from flowray.config.model import ModelConfig
from flowray.model.assemble import FlowCore
from flowray.model.autoencoder import Autoencoder
from flowray.model.latent import LatentScale
from flowray.model.prompts import PromptTokenizer
from flowray.model.text import bare_text
from flowray.sample.generate import check_finite, decoded, latent_batches


@dataclass(frozen=True)
class Settings:
    """What a run's recipe says of its pictures. model: its `text.width` is known."""

    model: ModelConfig
    sample: SampleConfig
    scale: LatentScale


class FlowNetwork(ModelMixin, ConfigMixin):  # type: ignore[misc]  # of diffusers itself
    """Queries, connector, head and velocity network; text model, tokenizer and autoencoder are lent
    for each call.
    """

    settings: ClassVar[Settings]

    @register_to_config
    def __init__(self) -> None:
        super().__init__()
        model = self.settings.model
        if model.text.width is None:
            raise ValueError("model.text.width: want the hidden size of the text model, got None")
        self.flow: Any = FlowCore(model, bare_text(model.text, model.text.width))

    def sampling(self, steps: int | None, guidance_scale: float | None) -> SampleConfig:
        """The run's own sampling, or with other steps or another scale."""
        asked = {"steps": steps, "guidance_scale": guidance_scale}
        return self.settings.sample.model_copy(
            update={key: value for key, value in asked.items() if value is not None}
        )

    def latents(
        self,
        text_encoder: Any,
        tokenizer: Any,
        prompts: Sequence[str],
        config: SampleConfig,
        seed: int,
    ) -> Tensor:
        """Scaled latents (B, C, H, W) fp32 of the prompts; an error where one is not finite."""
        prompt_tokenizer = PromptTokenizer(tokenizer, self.settings.model.text)
        with self.flow.text.lent(text_encoder, prompt_tokenizer):
            latents = torch.cat(list(latent_batches(self.flow, prompts, config, seed)))
        check_finite(latents, prompts)
        return latents

    def pictures(
        self,
        vae: Any,
        text_encoder: Any,
        tokenizer: Any,
        prompts: Sequence[str],
        config: SampleConfig,
        seed: int,
    ) -> np.ndarray:
        """Pictures uint8 (B, H, W, 3) of the prompts."""
        latents = self.latents(text_encoder, tokenizer, prompts, config, seed)
        autoencoder = Autoencoder(vae, self.settings.model.latent, self.settings.scale)
        return decoded(autoencoder, latents, config.batch_size)
