"""The pipeline of an export, as diffusers loads it. Exports carry a copy that is made of this
file.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any, Optional

import numpy as np
import torch
from diffusers.models.modeling_utils import ModelMixin
from diffusers.pipelines.pipeline_utils import DiffusionPipeline, ImagePipelineOutput
from PIL import Image
from transformers import PreTrainedModel, PreTrainedTokenizerBase


class FlowrayPipeline(DiffusionPipeline):
    """Captions to pictures by the flow that a run trained.

    references: of the frozen models that the export names and does not hold, component -> [library,
    class, name on the hub, folder in it, revision]; they are loaded where none is given.
    text_dtype: that the text model was trained against, which it is brought to.
    """

    _optional_components = ["vae", "text_encoder", "tokenizer"]
    transformer: Any
    vae: Any
    text_encoder: Any
    tokenizer: Any

    def __init__(
        self,
        transformer: ModelMixin,
        # diffusers reads these types, and not `X | None`
        vae: Optional[ModelMixin] = None,  # noqa: UP045
        text_encoder: Optional[PreTrainedModel] = None,  # noqa: UP045
        tokenizer: Optional[PreTrainedTokenizerBase] = None,  # noqa: UP045
        references: Optional[dict[str, list[str]]] = None,  # noqa: UP045
        text_dtype: str = "float32",
    ):
        super().__init__()
        parts: dict[str, Any] = {"vae": vae, "text_encoder": text_encoder, "tokenizer": tokenizer}
        for name, place in (references or {}).items():
            if parts[name] is None:
                parts[name] = _referred(name, place, text_dtype)
        if (encoder := parts["text_encoder"]) is not None:
            for weight in encoder.parameters():  # its buffers, such as rotary angles, stay fp32
                weight.data = weight.data.to(getattr(torch, text_dtype))
        self.register_modules(transformer=transformer, **parts)
        self.register_to_config(references=references, text_dtype=text_dtype)

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | Sequence[str],
        *,
        seed: int = 0,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        num_images_per_prompt: int = 1,
        output_type: str = "pil",
        return_dict: bool = True,
    ) -> Any:
        """Pictures of the prompts, num_images_per_prompt of each one after the other.

        seed: all that the noise depends on beside a picture's place. num_inference_steps,
        guidance_scale (1 is off): the run's own unless given. output_type: `pil`, `np` (B, H, W, 3)
        in [0, 1], or `latent`, scaled (B, C, H, W). ValueError: another one, or another dtype.
        """
        if output_type not in ("pil", "np", "latent"):
            raise ValueError(f"output_type: want pil, np or latent, got {output_type!r}")
        if self.transformer.dtype != torch.float32:
            raise ValueError(f"transformer: want float32, got {self.transformer.dtype}")
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        prompts = [each for each in prompts for _ in range(num_images_per_prompt)]
        network: Any = self.transformer
        config = network.sampling(num_inference_steps, guidance_scale)
        asked = self.text_encoder, self.tokenizer, prompts, config, seed
        if output_type == "latent":
            images: Any = network.latents(*asked)
        else:
            made: np.ndarray = network.pictures(self.vae, *asked)
            pil = output_type == "pil"
            images = [Image.fromarray(one) for one in made] if pil else made / np.float32(255)
        return ImagePipelineOutput(images=images) if return_dict else (images,)


def _referred(name: str, place: Sequence[str], text_dtype: str) -> Any:
    """A frozen model by its name on the hub."""
    library, kind, path, folder, revision = place
    dtype = {"text_encoder": {"dtype": getattr(torch, text_dtype)}}.get(name, {})
    loader: Any = getattr(importlib.import_module(library), kind)
    return loader.from_pretrained(path, subfolder=folder, revision=revision, **dtype)
