"""A worker's memory where weights are in parts (`resources.shard`), for `--plan`."""

from __future__ import annotations

from torch import nn

from flowray.config.recipe import Recipe
from flowray.config.train import ResourceConfig
from flowray.model.assemble import FlowModel

NODE = 8  # workers on a node, where a plan has to guess: what most GPU machines hold
FP32 = 4


def parts_of_weights(resources: ResourceConfig) -> int:
    """How many workers share one set of weights."""
    if resources.shard == "none":
        return 1
    return min(
        resources.num_workers, NODE if resources.shard == "hybrid" else resources.num_workers
    )


def in_parts(
    memory: dict[str, int], recipe: Recipe, model: FlowModel, text_bytes: int
) -> dict[str, int]:
    """Bytes on each GPU, by what they hold, of the same for a worker that holds all.

    text_bytes: of the frozen text model, among `weights`. What is gathered for a while comes on
    top: two blocks and all that is in no block in one piece, a block's gradient, and while probes
    and pictures are made all weights, the text model's too where it is in parts, and twice the
    largest tensor (`train/view.py`), when no activations are held.
    """
    parts = parts_of_weights(recipe.resources)
    if parts == 1:
        return memory
    kept = dict(memory)
    kept.pop("ddp_buckets", None)
    trained = memory["gradients"]
    frozen = memory["weights"] - trained
    if recipe.resources.shard_text:
        frozen -= text_bytes - text_bytes // parts
    blocks = [_bytes(block) for block in model.velocity.blocks_in_order()]
    rest, largest = trained - sum(blocks), max(blocks, default=0)
    half = recipe.train.is_half and not recipe.train.velocity_fp32
    kept["weights"] = trained // parts + frozen
    kept["adamw"], kept["ema"] = memory["adamw"] // parts, memory["ema"] // parts
    # micro-batches before the last leave their gradients whole
    whole = trained if recipe.train.accumulate > 1 else rest + largest
    kept["gradients"] = trained // parts
    kept["gathered_weights"] = rest + 2 * largest // (2 if half else 1)
    kept["gathered_gradients"] = whole
    active = memory["activations_estimate"] + memory.get("text_activations_estimate", 0)
    text = recipe.resources.shard_text
    shown = trained + (text_bytes if text else 0)
    shown += 2 * max(_bytes_of(p) for p in model.parameters() if p.requires_grad or text)
    kept["probes"] = max(0, shown - active)
    return {name: size for name, size in kept.items() if size}


def _bytes(module: nn.Module) -> int:
    """Of its weights in fp32."""
    return sum(_bytes_of(p) for p in module.parameters() if p.requires_grad)


def _bytes_of(parameter: nn.Parameter) -> int:
    """In fp32."""
    return FP32 * parameter.numel()
