"""What to type where a run needed more memory than there was."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from flowray.config.errors import InputError
from flowray.config.load import override_recipe
from flowray.config.recipe import Recipe

GIB = 2**30
MOST = 3  # things to type
ACTIVATIONS = ("activations_estimate", "text_activations_estimate")
CACHE = ("text_cache_at_most",)


def advice(recipe: Recipe) -> str:
    """One line: what takes most of a worker's memory by its plan, and which keys would make that
    less; '' where the plan cannot be made or nothing is left to be changed.
    """
    from flowray.cli.plan import make_plan  # torch is slow to import

    try:
        memory: dict[str, int] = make_plan(recipe)["memory_per_gpu"]
    except InputError:
        return ""
    parts = {
        "activations": sum(memory.get(name, 0) for name in ACTIVATIONS),
        "the text cache": sum(memory.get(name, 0) for name in CACHE),
    }
    total = sum(memory.values())
    parts["weights, gradients and optimiser"] = total - sum(parts.values())
    largest = sorted(parts, key=lambda name: -parts[name])
    typed = [change for name in largest if parts[name] for change in _changes(name, recipe)]
    if not typed:
        return ""
    size, name = parts[largest[0]], largest[0]
    share = f"{size / GIB:.3g} of {total / GIB:.3g} GiB by --plan"
    return f"{name} take most of a worker's memory ({share}); try {', '.join(typed[:MOST])}"


def _changes(part: str, recipe: Recipe) -> Iterator[str]:
    """What would make the part less, the cheapest first; each is one that the recipe allows."""
    resources, train = recipe.resources, recipe.train
    tried: list[tuple[str, Any, Any]]
    if part == "activations":
        share = train.batch_size // resources.num_workers
        finer = [n for n in range(train.accumulate + 1, share + 1) if share % n == 0]
        half = not train.is_half and resources.gpus_per_worker > 0
        again = getattr(recipe.model.velocity, "gradient_checkpointing", None)
        tried = [
            *([("train.precision", "bf16", train.precision)] if half else []),
            *(("train.accumulate", n, train.accumulate) for n in finer[:1]),
            *([("model.velocity.gradient_checkpointing", True, None)] if again is False else []),
        ]
    elif part == "the text cache":
        tried = [("model.text.cache", False, None)]
    else:
        shared = resources.num_workers > 1 and resources.shard == "none"
        apart = train.grad_every > 0
        tried = [
            *([("resources.shard", "full", "none")] if shared else []),
            *([("train.grad_every", 0, train.grad_every)] if apart else []),
        ]
    for key, value, was in tried:
        try:
            override_recipe(recipe, {key: value})
        except InputError:
            continue
        text = str(value).lower() if isinstance(value, bool) else value
        yield f"{key}={text}" + ("" if was is None else f" (now {was})")
