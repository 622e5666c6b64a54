"""`flowray.train RECIPE --plan`: what a run is made of, what it takes and what would stop it;
nothing is written.

Parts and memory are counted on the meta device. Frozen networks that are not on this machine count
as the recipe says. Where nothing stands in the way, a few steps of one worker are then timed, with
its weights loaded and its memory taken; Ray is not started.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from transformers import DynamicCache

from flowray.cli.estimate import show_wall_time, wall_time
from flowray.cli.parts import in_parts
from flowray.cli.ready import problems
from flowray.config.buckets import sizes_of
from flowray.config.errors import InputError
from flowray.config.losses import EmaTeacher
from flowray.config.model import CausalText, DiTVelocity, ModelConfig
from flowray.config.progress import Progress
from flowray.config.recipe import Recipe
from flowray.config.towers import ImageTower
from flowray.losses.total import active_terms
from flowray.model.assemble import FlowModel, part_sizes, planned_model
from flowray.model.autoencoder import planned_autoencoder, planned_picture_size
from flowray.model.files import AUTOENCODER, TEXT
from flowray.model.images import ImageEncoder
from flowray.model.local import Kind, local_weights
from flowray.model.text import TextTokens
from flowray.train.optim import MUON, parameter_groups

FP32, GIB = 4, 2**30
SIZES = ("parameters", "trainable", "memory_per_gpu", "tokens", "checkpoint_bytes")
TEXT_BYTES = {"fp32": 4, "bf16": 2}


def make_plan(recipe: Recipe) -> dict[str, Any]:
    """The plan as plain data: disjoint `parameters` by part, the rest in bytes, tokens a sample,
    steps and images.

    InputError where the model cannot be made.
    """
    return {**_sizes(recipe), **_work(recipe)}


def _sizes(recipe: Recipe) -> dict[str, Any]:
    model = planned_model(recipe.model, recipe.loss)
    parameters = part_sizes(model)
    frozen = {part: count for part, count in part_sizes(model, trainable=False).items() if count}
    if "text.backbone" not in parameters and recipe.model.text.parameters:
        parameters["text.backbone"] = frozen["text.backbone"] = recipe.model.text.parameters
    if autoencoder := planned_autoencoder(recipe.model.autoencoder):
        parameters["autoencoder"] = frozen["autoencoder"] = autoencoder
    trained = sum(parameters.values()) - sum(frozen.values())
    return {
        "parameters": parameters,
        "trainable": trained,
        "memory_per_gpu": _memory(recipe, model, trained, frozen),
        "tokens": _tokens(recipe.model, model),
        # weights, average, optimiser
        "checkpoint_bytes": 2 * FP32 * trained + sum(_optimiser(recipe, model, trained).values()),
    }


def _optimiser(recipe: Recipe, model: FlowModel, trained: int) -> dict[str, int]:
    """Bytes of the optimisers' state: two numbers for each weight by AdamW, one by Muon."""
    groups = parameter_groups(model.trainable(), recipe.optim, model.velocity.last_layers)
    by_muon = sum(p.numel() for group in groups if group["name"] == MUON for p in group["params"])
    return {"adamw": 2 * FP32 * (trained - by_muon), "muon": FP32 * by_muon}


def _work(recipe: Recipe) -> dict[str, Any]:
    """What needs no model to be known."""
    train, workers = recipe.train, recipe.resources.num_workers
    return {
        "steps": train.steps,
        "images": train.steps * train.batch_size,
        "workers": workers,
        "batch_per_gpu": train.batch_size // workers // train.accumulate,
        "checkpoints_kept": train.checkpoints_on_disk,
        "weights": weights(recipe),
        "buckets": _buckets(recipe),
    }


def _buckets(recipe: Recipe) -> list[dict[str, Any]]:
    """Of each bucket the ratio width / height, and the sides in cells and, where the autoencoder is
    here, px; [] without buckets.
    """
    patch, found = recipe.model.velocity.patch, []
    for height, width in sizes_of(recipe.data, recipe.model.latent):
        latent = recipe.model.latent.model_copy(update={"height": height, "width": width})
        try:
            pixels = planned_picture_size(recipe.model.autoencoder, latent)
        except InputError:  # among the problems
            pixels = None
        found.append(
            {
                "ratio": width / height,
                "latent": [height, width],
                "pixels": None if pixels is None else list(pixels),
                "tokens": (height // patch) * (width // patch),
            }
        )
    return found


def _memory(
    recipe: Recipe, model: FlowModel, trained: int, frozen: dict[str, int]
) -> dict[str, int]:
    """Bytes on each GPU, by what they hold; activations are an estimate."""
    text = frozen.get("text.backbone", 0)
    batch = recipe.train.batch_size // recipe.resources.num_workers // recipe.train.accumulate
    half = recipe.train.is_half
    half_text = half or recipe.model.text.dtype != "fp32"
    # each loss's own gradient, all at once; the one being made, or their sum, is in `gradients`
    apart = recipe.loss.balance.kind != "none" or recipe.train.grad_every > 0
    memory = {
        "weights": (
            FP32 * trained
            + FP32 * (sum(frozen.values()) - text)
            + TEXT_BYTES[recipe.model.text.dtype] * text
        ),
        "gradients": FP32 * trained,
        **_optimiser(recipe, model, trained),
        "ema": FP32 * trained,
        "activations_estimate": batch * kept_per_sample(model) // (2 if half else 1),
        "text_activations_estimate": (
            batch * kept_behind_queries(model, text) // (2 if half_text else 1)
        ),
        "text_cache_at_most": (
            int(recipe.model.text.cache_gib * GIB) if recipe.model.text.cache else 0
        ),
        "loss_gradients": FP32 * trained * len(active_terms(recipe.loss)) if apart else 0,
        "ddp_buckets": FP32 * trained if recipe.resources.num_workers > 1 else 0,
    }
    memory = {name: size for name, size in memory.items() if size}
    return in_parts(memory, recipe, model, TEXT_BYTES[recipe.model.text.dtype] * text)


class _Fused(torch.autograd.Function):
    """Attention as the fused kernels of CPU and GPU keep it, inputs and output; on the meta
    device its whole matrix would count.
    """

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        out = query.new_empty(*query.shape[:-1], value.shape[-1])
        ctx.save_for_backward(query, key, value, out)
        return out


class _FusedAttention(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        fused = func is F.scaled_dot_product_attention
        return _Fused.apply(*args[:3]) if fused else func(*args, **(kwargs or {}))


def kept_per_sample(model: FlowModel) -> int:
    """Bytes that one sample's forward pass in fp32 keeps for the backward pass, counted on the meta
    device.

    Connector, head, velocity network and trainable picture encoders; a frozen language model's part
    is `kept_behind_queries`.
    """
    text, routed = model.config.text, _routed(model.config)

    def forward() -> object:
        kept = torch.zeros(1, routed[1], dtype=torch.long) if routed else None
        values = torch.zeros(1, text.tokens, model.text.lm_width, requires_grad=True)
        tokens = model.text.connect(
            TextTokens(values, torch.ones(1, text.tokens, dtype=torch.bool))
        )
        source, null = model.posterior(tokens), torch.zeros(1, dtype=torch.bool)
        velocities = model.velocity.levels(source.mu, torch.zeros(1), null, tokens, kept)
        return (
            source.logvar,
            velocities,
            [
                encoder(torch.zeros(1, 3, encoder.side, encoder.side))
                for encoder in _trained_encoders(model)
            ],
        )

    return _kept_bytes(model, forward)


def kept_behind_queries(model: FlowModel, parameters: int) -> int:
    """Bytes that a frozen language model in fp32 keeps for one sample's queries, on top of the
    prompt's cache.

    Where only its number of `parameters` and its width are known, a value for each parameter /
    width and query: within a fifth of the count for Qwen2 of 0.5, 1.5 and 7 G parameters.
    """
    text, width = model.config.text, model.text.lm_width
    if not isinstance(text, CausalText):
        return 0
    net = model.text.backbone
    if next(net.parameters(), None) is None:
        return FP32 * text.queries * parameters // width
    cache = DynamicCache(config=net.config)
    with torch.device("meta"), torch.no_grad():
        net(
            inputs_embeds=torch.zeros(1, text.max_tokens, width),
            past_key_values=cache,
            use_cache=True,
        )

    def forward() -> object:
        queries = torch.zeros(1, text.queries, width, requires_grad=True)
        return net(inputs_embeds=queries, past_key_values=cache, use_cache=True).last_hidden_state

    return _kept_bytes(net, forward)


def _kept_bytes(module: nn.Module, forward: Callable[[], object]) -> int:
    """Bytes of what autograd saves in `forward` on the meta device, weights apart, each storage
    once.
    """
    weights = {StorageWeakRef(p.untyped_storage()) for p in module.parameters()}
    kept: dict[StorageWeakRef, torch.UntypedStorage] = {}  # held: a later one would get its address

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if (key := StorageWeakRef(storage)) not in weights:
            kept[key] = storage
        return tensor

    with (
        torch.device("meta"),
        _FusedAttention(),
        torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
    ):
        held = forward()  # its graph is alive until all is counted
        size = sum(storage.nbytes() for storage in kept.values())
    del held
    return size


def _trained_encoders(model: nn.Module) -> list[ImageEncoder]:
    return [
        module
        for module in model.modules()
        if isinstance(module, ImageEncoder) and not module.frozen
    ]


def _tokens(config: ModelConfig, model: FlowModel) -> dict[str, int]:
    """Per sample: the longest prompt with its queries, what the head reads or, without one, the
    velocity network of the caption, what its transformer attends over, and what of it the blocks
    see that a part goes past.
    """
    text, latent, patch = config.text, config.latent, model.velocity.token_blocks().patch
    queries = text.queries if isinstance(text, CausalText) else 0
    return {
        "text": text.max_tokens + queries,
        "caption" if model.head is None else "head": text.tokens,
        "velocity": (latent.height // patch) * (latent.width // patch),
        **({f"{routed[0]} routed blocks": routed[1]} if (routed := _routed(config)) else {}),
    }


def _routed(config: ModelConfig) -> tuple[int, int] | None:
    """Blocks that a part of the tokens goes past in training, and how many tokens they see."""
    velocity, latent = config.velocity, config.latent
    if not isinstance(velocity, DiTVelocity) or velocity.route is None:
        return None
    tokens = (latent.height // velocity.patch) * (latent.width // velocity.patch)
    return len(velocity.routed), velocity.route.kept(tokens)


def weights(recipe: Recipe) -> list[dict[str, Any]]:
    """Every set of weights that the run would read, and whether it is on this machine."""
    model, loss = recipe.model, recipe.loss
    named: dict[str, str | None] = {TEXT: model.text.path, AUTOENCODER: model.autoencoder.path}
    kinds: dict[str, Kind] = {TEXT: "text", AUTOENCODER: "autoencoder"}
    if loss.clip.weight > 0 and isinstance(model.semantic, ImageTower):
        named["model.semantic.net.path"] = model.semantic.net.path
    if loss.dino.weight > 0 and not isinstance(loss.dino.teacher, EmaTeacher):
        named["loss.dino.teacher.path"] = loss.dino.teacher.path
    if loss.repa.weight > 0:
        named["loss.repa.teacher.path"] = loss.repa.teacher.path
    if loss.lpips.weight > 0:
        named |= {"loss.lpips.vgg": loss.lpips.vgg, "loss.lpips.linear": loss.lpips.linear}
    return [
        {"key": key, "path": path, "present": bool(local_weights(path, kinds.get(key, "pictures")))}
        for key, path in named.items()
        if path
    ]


def show_plan(recipe: Recipe, progress: Progress, *, as_json: bool, imports_s: float = 0.0) -> bool:
    """Print the plan, as one JSON object or as tables; whether nothing would stop the run. Of a
    model that cannot be made the sizes are null. imports_s: as for `wall_time`.
    """
    with progress.task("planning"):
        plan = _work(recipe) | dict.fromkeys(SIZES) | {"problems": list(problems(recipe))}
        try:
            plan |= _sizes(recipe)
        except InputError as error:
            _add(plan["problems"], error)
    plan["wall_time"] = {"seconds": None, "step_s": None, "basis": "see the problems"}
    with progress.task("timing a few steps"):
        memory = sum((plan["memory_per_gpu"] or {}).values())
        try:
            known = memory, plan["weights"], plan["problems"]
            plan["wall_time"] = wall_time(recipe, *known, imports_s=imports_s)
        except InputError as error:
            _add(plan["problems"], error)
    if as_json:
        print(json.dumps(plan))
    else:
        _print(plan, recipe)
    return not plan["problems"]


def _add(problems: list[str], error: InputError) -> None:
    if str(error) not in problems:
        problems.append(str(error))


def _print(plan: dict[str, Any], recipe: Recipe) -> None:
    console = Console(highlight=False)
    if plan["parameters"]:
        _print_sizes(plan, console)
    needed = {
        w["key"]: f"{w['path']}{'' if w['present'] else ' (not here)'}" for w in plan["weights"]
    }
    console.print(_table("weights it needs", needed))
    if plan["tokens"]:
        tokens = ", ".join(f"{count} {where}" for where, count in plan["tokens"].items())
        console.print(f"tokens a sample: {tokens}")
    if plan["buckets"]:
        told = {f"{each['ratio']:.2f}": _bucket(each) for each in plan["buckets"]}
        console.print(_table("buckets, width / height", told))
    console.print(
        f"{plan['steps']} steps of {recipe.train.batch_size} = {plan['images']:,} images on"
        f" {plan['workers']} worker(s), {plan['batch_per_gpu']} at a time on each"
    )
    console.print(show_wall_time(plan["wall_time"]), soft_wrap=True)
    for problem in plan["problems"]:
        console.print(f"problem: {problem}", markup=False, soft_wrap=True)
    if plan["checkpoint_bytes"]:
        size = _size(plan["checkpoint_bytes"])
        console.print(f"a checkpoint is {size}, {plan['checkpoints_kept']} are kept")


def _bucket(bucket: dict[str, Any]) -> str:
    (height, width), pixels = bucket["latent"], bucket["pixels"]
    of = f" of {pixels[1]} x {pixels[0]} px" if pixels else ""
    return f"{width} x {height} cells{of}, {bucket['tokens']} tokens"


def _print_sizes(plan: dict[str, Any], console: Console) -> None:
    parameters, memory = plan["parameters"], plan["memory_per_gpu"]
    console.print(_table("parameters", {part: f"{count:,}" for part, count in parameters.items()}))
    rows = {name.replace("_", " "): _size(size) for name, size in memory.items()}
    console.print(_table("memory per GPU", rows | {"together, about": _size(sum(memory.values()))}))
    if "text.backbone" not in parameters:
        console.print(
            "the text model is not here and the recipe has no model.text.parameters: it is left out"
            " of weights and memory"
        )
    console.print(
        "activations are estimates of what a backward pass needs; decoders of losses that look at"
        " pictures come on top"
    )


def _size(count: int) -> str:
    return f"{count / GIB:.2f} GiB" if count >= GIB else f"{count / 2**20:.1f} MiB"


def _table(title: str, rows: dict[str, str]) -> Table:
    table = Table(title=title, title_justify="left", box=None, show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(justify="right", overflow="fold")
    for name, value in rows.items():
        table.add_row(name, value)
    return table
