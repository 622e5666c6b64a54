"""Whether this machine has what a run asks for: looked at before any picture is encoded, and by
`--plan`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path

from flowray.config.base import LatentSpec
from flowray.config.buckets import sizes_of
from flowray.config.cluster import in_cluster
from flowray.config.errors import InputError
from flowray.config.paths import is_address
from flowray.config.recipe import Recipe
from flowray.data.prepare import Preparation
from flowray.data.reader import ShardReader
from flowray.data.shards import EMBEDDED

LOOKED_AT = 1000  # samples of a split, of which the first, the middle and the last are decoded
SPREAD = 20  # samples of each split that are decoded where one of those is bad


def refuse_unready(recipe: Recipe) -> None:
    """InputError for the first of `problems`."""
    for problem in problems(recipe):
        raise InputError(problem)


def problems(recipe: Recipe) -> Iterator[str]:
    """A line for whatever would stop the run, cheapest first: GPUs, device, storage, shards,
    weights.

    Where RAY_ADDRESS names a cluster, its nodes and not this machine have the GPUs and the weights.
    """
    here = not in_cluster()
    on_this_machine = (_check_room, check_device) if here else ()
    for check in (*on_this_machine, _check_storage, check_shards, _check_start):
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


def _check_start(recipe: Recipe) -> None:
    """InputError where a new run's `train.init_from` cannot be used."""
    if recipe.train.init_from is not None:
        from flowray.train.begin import check_start

        check_start(recipe)


def _check_storage(recipe: Recipe) -> None:
    """InputError where the run's folder cannot be made or written."""
    from flowray.tune.plan import check_storage

    if problem := check_storage(Path(recipe.storage_path) / recipe.name, 0)["problem"]:
        raise InputError(f"storage_path: {problem}")


def unusable_shards(recipes: Iterable[Recipe]) -> Iterator[str]:
    """A line for each set of shards that a recipe of these could not train on."""
    seen = set()
    for recipe in recipes:
        known = (
            recipe.data.model_dump_json(),
            recipe.model.latent,
            recipe.model.autoencoder.model_dump_json(),
        )
        if known in seen:
            continue
        seen.add(known)
        try:
            check_shards(recipe)
        except InputError as error:
            yield str(error)


def check_shards(recipe: Recipe) -> None:
    """InputError where shards are not there, do not begin with pictures that decode and are of one
    size, or where `model.latent` is not what the autoencoder makes of them.
    """
    from flowray.data.make import picture_side
    from flowray.data.pictures import one_size
    from flowray.store.latents import are_encoded, split_shards

    if recipe.data.shards in EMBEDDED:
        side = picture_side(recipe.data.shards)
        _check_latent(recipe, side, side)
        return
    if is_address(recipe.data.shards):
        with suppress(InputError):  # what is wrong with it is said below, or by another check
            if are_encoded(recipe.data, recipe.model.autoencoder, recipe.model.latent):
                return  # nothing is fetched to be looked at again
    splits = split_shards(recipe.data)
    if recipe.data.aspect_ratios:  # training pictures are of many sizes
        del splits["train"]
    key = recipe.data.caption_key
    every = {
        split: ShardReader(shards, limit=LOOKED_AT, caption_key=key)
        for split, shards in splits.items()
    }
    readers = list(every.values())
    prepare = preparation(recipe)
    if prepare.config.resize != "none" and prepare.size is None:
        return  # any size may come, and which one is made of it only the autoencoder's config says
    try:
        size = one_size(readers, "data.shards", prepare)
    except InputError:
        usual = _usual_size(readers, recipe.data.max_bad, prepare)
        if usual is None:
            for split, reader in every.items():
                _refuse_bad(split, reader, recipe.data.max_bad, prepare)
            raise
        size = usual
    _check_latent(recipe, *size)


def preparation(recipe: Recipe, *, buckets: bool = False) -> Preparation:
    """What is done to held-out pictures, with `buckets` to those of training; without `resize`
    where the autoencoder's config is not here, or is the fault.
    """
    from flowray.model.autoencoder import planned_picture_size

    latent, autoencoder = recipe.model.latent, recipe.model.autoencoder
    others = sizes_of(recipe.data, latent)[1:] if buckets else ()
    latents = [latent, *(LatentSpec(channels=1, height=h, width=w) for h, w in others)]
    try:
        sizes = [planned_picture_size(autoencoder, each) for each in latents]
    except InputError:  # the line that `unusable_weights` has
        sizes = [None]
    own, *rest = sizes
    return Preparation(recipe.data.prepare, own, tuple(size for size in rest if size))


def _usual_size(
    readers: Sequence[ShardReader], max_bad: float, prepare: Preparation
) -> tuple[int, int] | None:
    """(height, width) of over half of the pictures that are looked at, where some may be bad; None
    where there is no such size. How many are bad is for the encoder to find out.
    """
    from flowray.data.pictures import decode_image

    # of a set that goes on beyond these samples any share may allow one
    if not max_bad or not any(len(r) >= min(LOOKED_AT, 1 / max_bad) for r in readers):
        return None
    sizes, looked = Counter[tuple[int, int]](), 0
    for reader in readers:
        for index in range(0, len(reader), -(-len(reader) // SPREAD)):
            looked += 1
            with suppress(InputError):
                sizes[decode_image(reader, index, prepare).shape[:2]] += 1
    usual = [size for size, count in sizes.items() if 2 * count > looked]
    return usual[0] if usual else None


def _refuse_bad(split: str, reader: ShardReader, max_bad: float, prepare: Preparation) -> None:
    """InputError, the line that encoding has, where a sample that was looked at is bad."""
    from flowray.data.index import samples_in
    from flowray.store.encode import Budget, decode_or_bad
    from flowray.store.latent_shards import Bad

    budget = Budget(split, sum(map(samples_in, reader.paths)), max_bad)
    for index in sorted({0, len(reader) // 2, len(reader) - 1}):
        if isinstance(found := decode_or_bad(reader, index, prepare), Bad):
            budget.add(reader.path(index), [found])


def _check_latent(recipe: Recipe, height: int, width: int) -> None:
    """InputError where pictures of so many px do not become latents of the recipe's shape. Nothing
    is said where the autoencoder's config is not here, or is the fault.
    """
    from flowray.model.autoencoder import planned_compression

    config, latent = recipe.model.autoencoder, recipe.model.latent
    try:
        found = planned_compression(config)
    except InputError:  # the line that `unusable_weights` has
        return
    if found is None:
        return
    channels, cell = found
    pictures = f"the pictures of {recipe.data.shards} are {width} x {height} px"
    if height % cell or width % cell:
        near = max(1, round(min(height, width) / cell)) * cell
        raise InputError(
            f"model.autoencoder: {config.path!r} takes {cell} px a cell, but {pictures}; pack them"
            f" with --size {near}"
        )
    made = LatentSpec(channels=channels, height=height // cell, width=width // cell)
    if made != latent:
        keys = (
            f"model.latent.{key}={value}" for key, value in made if value != getattr(latent, key)
        )
        raise InputError(
            f"model.latent: got {latent.shape}, but {pictures}, of which the autoencoder in"
            f" {config.path!r} makes {made.shape}; type {' '.join(keys)}"
        )


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
        check_file(find_place(path, key, "pictures"), key)
    else:
        open_model(path, key, "image_encoder")
