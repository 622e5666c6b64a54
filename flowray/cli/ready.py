"""Whether this machine has what a run asks for: looked at before any picture is encoded, and by
`--plan`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from flowray.config.cluster import in_cluster
from flowray.config.errors import InputError
from flowray.config.recipe import Recipe
from flowray.data.reader import ShardReader
from flowray.data.shards import EMBEDDED


def refuse_unready(recipe: Recipe) -> None:
    """InputError for the first of `problems`."""
    for problem in problems(recipe):
        raise InputError(problem)


def problems(recipe: Recipe) -> Iterator[str]:
    """A line for whatever would stop the run, cheapest first: GPUs, device, shards, weights.

    Where RAY_ADDRESS names a cluster, its nodes and not this machine have the GPUs and the weights.
    """
    here = not in_cluster()
    for check in (_check_room, check_device, check_shards):
        if here or check is check_shards:
            try:
                check(recipe)
            except InputError as error:
                yield str(error)
    if here:
        yield from (line for _, line in unusable_weights([recipe]))


def unusable_weights(recipes: Iterable[Recipe]) -> Iterator[tuple[str, str]]:
    """Recipe key and a line for each set of weights that the recipes read and this machine could
    not load: they are not here, nor may they be downloaded, or they are not whole, quantised or of
    several variants.
    """
    from flowray.cli.plan import weights
    from flowray.model.local import may_download

    seen = set()
    for recipe in recipes:
        for each in weights(recipe):
            known = each["key"], each["path"]
            if known in seen or (not each["present"] and may_download(each["path"])):
                continue
            seen.add(known)
            try:
                _check_weights(recipe, *known)
            except InputError as error:
                yield each["key"], str(error)


def _check_room(recipe: Recipe) -> None:
    from flowray.tune.room import refuse_without_room, this_machine

    refuse_without_room(recipe.resources, this_machine())


def check_device(recipe: Recipe) -> None:
    """InputError where the recipe wants a GPU and torch can use none."""
    import torch

    if recipe.train.device == "cuda" and not torch.cuda.is_available():
        raise InputError(
            "train.device: got cuda, but torch can use no GPU here; type train.device=cpu"
        )


def check_shards(recipe: Recipe) -> None:
    """InputError where shards are not there or do not begin with a picture that decodes."""
    from flowray.data.pictures import decode_image
    from flowray.store.latents import split_shards

    if recipe.data.shards in EMBEDDED:
        return
    for shards in split_shards(recipe.data).values():
        decode_image(ShardReader(shards, limit=1), 0)


def _check_weights(recipe: Recipe, key: str, path: str) -> None:
    from flowray.model.autoencoder import check_autoencoder
    from flowray.model.files import check_file, open_model
    from flowray.model.local import find_place
    from flowray.model.text import check_text

    if key == "model.text.path":
        check_text(recipe.model.text)
    elif key == "model.autoencoder.path":
        check_autoencoder(recipe.model.autoencoder)
    elif key.startswith("loss.lpips."):
        check_file(find_place(path, key), key)
    else:
        open_model(path, key, "image_encoder")
