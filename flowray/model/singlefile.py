"""A KL autoencoder in one file, as Stable Diffusion's own code saves it, alone or in a checkpoint.

Such a file has no config. Everything but the scale shows in the shapes of its weights.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from diffusers import AutoencoderKL
from diffusers.loaders.single_file_utils import (
    LDM_VAE_KEYS,
    convert_ldm_vae_checkpoint,
    load_single_file_checkpoint,
)
from torch import Tensor

from flowray.config.errors import InputError
from flowray.config.model import AutoencoderConfig, KLAutoencoder
from flowray.model.files import CONFIG, check_file, refused
from flowray.model.pretrained import loading

_FIRST_STAGE = re.compile(r"encoder\.down\.0\.block\.\d+\.conv1\.weight")


def load_single_file(file: Path, config: AutoencoderConfig, where: str) -> Any:
    """The autoencoder in a file. InputError: another form, weights missing, no scale given."""
    weights = read_single_file(file, where)
    refuse_bare_file(file, config, where)
    with loading(where, file):
        shape = ldm_config(weights)
        net = AutoencoderKL.from_config(shape)
        report = net.load_state_dict(convert_ldm_vae_checkpoint(weights, shape), strict=False)
    if lacking := sorted(report.missing_keys):
        raise refused(where, file, f"lacks {len(lacking)} weights, such as {lacking[0]}")
    return net


def refuse_bare_file(file: Path, config: AutoencoderConfig, where: str) -> None:
    """InputError where the recipe does not say what no file of weights holds: the scale."""
    if not isinstance(config, KLAutoencoder):
        why = f"is one file, which kind {config.kind} is not read from; give a folder with {CONFIG}"
        raise refused(where, file, why)
    if config.scaling_factor is None:
        raise no_scale(file, where, "model.autoencoder.scaling_factor=")


def no_scale(file: Path, where: str, option: str) -> InputError:
    """The error for a file without a scale. option: what is typed before the number."""
    typed = f"type {option}0.18215 (SD 1 and 2) or {option}0.13025 (SDXL)"
    return refused(where, file, f"is one file and states no scale; {typed}")


def read_single_file(file: Path, where: str) -> dict[str, Tensor]:
    """The weights, by the names of Stable Diffusion's code. InputError: another form."""
    check_file(file, where)
    with loading(where, file):
        stored = load_single_file_checkpoint(str(file), local_files_only=True)
        found = (begin for begin in LDM_VAE_KEYS if any(key.startswith(begin) for key in stored))
        prefix = next(found, "")
        inside = [key for key in stored if key.startswith(prefix)]
        weights = {key.removeprefix(prefix): stored[key] for key in inside}
    if "encoder.down.0.block.0.conv1.weight" not in weights:
        why = "holds no KL autoencoder in the form of Stable Diffusion's code"
        if "encoder.conv_in.weight" in weights:
            why = f"holds diffusers' weights: put it into a folder with its {CONFIG}, and give that"
        raise refused(where, file, why)
    return weights


def ldm_config(weights: dict[str, Tensor]) -> dict[str, Any]:
    """diffusers' config of a KL autoencoder from its weights in Stable Diffusion's form."""
    widths: list[int] = []
    while (first := weights.get(f"encoder.down.{len(widths)}.block.0.conv1.weight")) is not None:
        widths.append(len(first))
    return {
        "down_block_types": ["DownEncoderBlock2D"] * len(widths),
        "up_block_types": ["UpDecoderBlock2D"] * len(widths),
        "block_out_channels": widths,
        "layers_per_block": sum(bool(_FIRST_STAGE.fullmatch(key)) for key in weights),
        "latent_channels": weights["decoder.conv_in.weight"].shape[1],
        "mid_block_add_attention": "encoder.mid.attn_1.q.weight" in weights,
        "use_quant_conv": "quant_conv.weight" in weights,
        "use_post_quant_conv": "post_quant_conv.weight" in weights,
    }
