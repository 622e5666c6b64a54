"""CrossFlow's published config files, as recipe keys. They are Python; of it only the numbers and
strings are read, nothing is run.
"""

from __future__ import annotations

import ast
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flowray.config.errors import InputError
from flowray.config.load import load_recipe
from flowray.config.recipe import Recipe

BASE = "crossflow_256"  # the recipe that the keys are over
DIT = {"width": 1280, "depth": 36, "heads": 20, "patch": 2}  # DiT-H/2, which 'dit' stands for
T5_WIDTH, T5_COMPRESSED, T5_PARAMETERS = 4096, 1024, 4_762_310_656
KL = 0.01  # on the sum over the latent; here loss.kl is its mean


def recipe_of(path: Path) -> Recipe:
    """The recipe that a published config comes to: BASE with `recipe_keys`."""
    keys = recipe_keys(path).items()
    return load_recipe(BASE, [f"{key}={json.dumps(value)}" for key, value in keys]).recipe


def recipe_keys(path: Path) -> dict[str, Any]:
    """Dotted recipe keys over BASE that say what the config says. InputError: no such config, or
    one of a kind that is not read here.
    """
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
    except (OSError, SyntaxError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read as a config of CrossFlow: {error}") from error
    said = _assigned(tree)
    try:
        return _keys(said, said["model"])
    except (KeyError, TypeError, IndexError) as error:
        raise InputError(f"{path}: is no config of CrossFlow's: lacks {error}") from error


def _keys(said: Mapping[str, Any], model: Mapping[str, Any]) -> dict[str, Any]:
    channels, height, width = said["z_shape"]
    text, t5 = model["textVAE"], model["clip_dim"] == T5_WIDTH
    dims = channels * height * width
    # its encoder ends in one linear layer where the latent has so many values, else in this
    conv = 2 * dims not in (4096, 8192)
    keys: dict[str, Any] = {
        "model.latent": {"channels": channels, "height": height, "width": width},
        "model.text.width": model["clip_dim"],
        "model.text.max_tokens": model["num_clip_token"],
        "model.head.layers": text["num_blocks"],
        "model.head.reductions": text.get("num_down_sample_block", 3),
        "model.head.heads": text["num_attention_heads"],
        "model.head.ffn": text["hidden_dim"],
        "model.head.dropout": text["dropout_prob"],
        "model.head.adaptor": "conv" if conv else "linear",
        "model.semantic.output": "adaptor" if conv else "mlp",
        "model.autoencoder.scaling_factor": said["autoencoder"]["scale_factor"],
        "loss.kl.weight": KL * dims,
        "flow.null_probability": model["cfg_indicator"],
        "optim.lr": said["optimizer"]["lr"],
        "sample.steps": said["sample"]["sample_steps"],
        "sample.guidance_scale": float(said["sample"]["scale"]),
    }
    if t5:
        keys |= {
            "model.text.path": "google/t5-v1_1-xxl",
            "model.text.scale": 10.0,
            "model.text.dtype": "bf16",
            "model.text.pad_to_max": True,  # T5 is run with its mask
            "model.text.parameters": T5_PARAMETERS,
            "model.head.compress": T5_COMPRESSED,
        }
    kind, again = said["nnet"]["name"], {"gradient_checkpointing": model["gradient_checking"]}
    if kind == "dimr":
        made = _dimr(model["stage_configs"], said["loss_coeffs"])
        return keys | {"model.velocity": made | again}
    if kind == "dit":
        time = {"of": "t", "frequencies": 256, "bound": "small_init"}
        made = {"kind": "dit", **DIT, "mlp_ratio": 4.0, "time": time}
        return keys | {"model.velocity": made | again}
    raise KeyError(f"a network that is read here, has nnet.name {kind!r}")


def _dimr(stages: list[dict[str, Any]], weights: list[float]) -> dict[str, Any]:
    first, *others = stages
    ratios = {stage["hidden_dim"] / stage["dim"] for stage in stages}
    kernels = {stage["kernel_size"] for stage in others}
    finals = {stage["final_kernel_size"] for stage in stages}
    patches = [stage["input_feature_ratio"] for stage in stages]
    if (
        len(ratios) > 1
        or len(kernels) > 1
        or finals != {3}
        or any(stage["image_input_ratio"] != 1 for stage in stages)
    ):
        raise KeyError("stages of one mlp ratio and kernel, without input interpolation")
    if patches != [2 ** (len(stages) - 1 - i) for i in range(len(stages))]:
        raise KeyError(f"stages each twice as fine, has patches {patches}")
    return {
        "kind": "dimr",
        "widths": [stage["dim"] for stage in stages],
        "depths": [stage["num_blocks"] // 2 * 2 + 1 for stage in stages],
        "level_weights": [float(weight) for weight in weights],
        "heads": first["num_attention_heads"],
        "mlp_ratio": ratios.pop(),
        **({"kernel": kernels.pop()} if kernels else {}),
    }


def _assigned(tree: ast.Module) -> dict[str, Any]:
    """What is assigned to a name or to an attribute of `config`, wherever it stands."""
    found: dict[str, Any] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign) and len(node.targets) == 1:
            target = node.targets[0]
            name = getattr(target, "attr", getattr(target, "id", ""))
            found[name] = _value(node.value)
    return found


def _value(node: ast.expr) -> Any:
    """Constants, lists, calls with keywords as dicts, and quotients; None of anything else."""
    if isinstance(node, ast.Constant):
        return node.value
    if isinstance(node, ast.List | ast.Tuple):
        return [_value(each) for each in node.elts]
    if isinstance(node, ast.Call):
        return {word.arg: _value(word.value) for word in node.keywords if word.arg}
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Div):
        return _value(node.left) / _value(node.right)
    return None
