"""A KL autoencoder in one file, as Stable Diffusion's own code saves it: `vae-ft-mse-840000.safetensors`, or a whole checkpoint.

Such a file has no config. Everything but the scale shows in the shapes of its weights.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from diffusers import AutoencoderKL
from diffusers.loaders.single_file_utils import LDM_VAE_KEYS, convert_ldm_vae_checkpoint, load_single_file_checkpoint
from torch import Tensor

from flowray.config.errors import InputError
from flowray.config.model import AutoencoderConfig, KLAutoencoder
from flowray.model.files import check_file
from flowray.model.pretrained import loading


def load_single_file(file: Path, config: AutoencoderConfig, where: str) -> Any:
    """The autoencoder in a file. InputError, one line: not that format, weights missing, or no scale in the recipe."""
    if not isinstance(config, KLAutoencoder):
        raise InputError(f"{where}: {str(file)!r} is one file, which kind {config.kind} is not read from; give a folder with config.json")
    check_file(file, where)
    with loading(where, file):
        stored = load_single_file_checkpoint(str(file), local_files_only=True)
        prefix = next((begin for begin in LDM_VAE_KEYS if any(key.startswith(begin) for key in stored)), "")
        weights = {key.removeprefix(prefix): value for key, value in stored.items() if key.startswith(prefix)}
    if "encoder.down.0.block.0.conv1.weight" not in weights:
        folder = "diffusers' weights: put it into a folder with its config.json, and give that"
        what = folder if "encoder.conv_in.weight" in weights else "no KL autoencoder in the form of Stable Diffusion's code"
        raise InputError(f"{where}: {str(file)!r} holds {what}")
    if config.scaling_factor is None:
        raise InputError(
            f"{where}: {str(file)!r} is one file and states no scale; type model.autoencoder.scaling_factor=0.18215 "
            "(Stable Diffusion 1 and 2) or 0.13025 (SDXL)"
        )
    with loading(where, file):
        shape = ldm_config(weights)
        net = AutoencoderKL.from_config(shape)
        report = net.load_state_dict(convert_ldm_vae_checkpoint(weights, shape), strict=False)
    if lacking := sorted(report.missing_keys):
        raise InputError(f"{where}: {str(file)!r} lacks {len(lacking)} weights, such as {lacking[0]}")
    return net


def ldm_config(weights: dict[str, Tensor]) -> dict[str, Any]:
    """diffusers' config of a KL autoencoder from its weights under the names of Stable Diffusion's code."""
    widths: list[int] = []
    while (first := weights.get(f"encoder.down.{len(widths)}.block.0.conv1.weight")) is not None:
        widths.append(len(first))
    return {
        "down_block_types": ["DownEncoderBlock2D"] * len(widths),
        "up_block_types": ["UpDecoderBlock2D"] * len(widths),
        "block_out_channels": widths,
        "layers_per_block": sum(key.startswith("encoder.down.0.block.") and key.endswith(".conv1.weight") for key in weights),
        "latent_channels": weights["decoder.conv_in.weight"].shape[1],
        "mid_block_add_attention": "encoder.mid.attn_1.q.weight" in weights,
        "use_quant_conv": "quant_conv.weight" in weights,
        "use_post_quant_conv": "post_quant_conv.weight" in weights,
    }
