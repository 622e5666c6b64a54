"""Aspect-ratio buckets: the latent sizes at which pictures of several shapes are trained on, one
size a batch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from flowray.config.base import LatentSpec
from flowray.config.errors import InputError, RuleError
from flowray.config.losses import LossConfig
from flowray.config.model import DiTVelocity, ModelConfig
from flowray.config.towers import ImageTower
from flowray.config.train import DataConfig, TrainSection

Size = tuple[int, int]  # (height, width)
GRAPHS = 8  # that torch.compile keeps of one function; beyond it refuses

_RATIOS, _STEP = "data.aspect_ratios", "data.aspect_step"


def latent_sizes(latent: LatentSpec, ratios: Sequence[float], step: int) -> dict[Size, float]:
    """(height, width) in cells of every bucket and the ratio width / height it is for: first the
    latent's own, then the others, rising. {} without ratios: there are no buckets.

    The sides are multiples of `step` and have together no more cells than the latent, so that a
    batch costs no more; of these the pair is taken whose logarithms are nearest to those of
    sqrt(cells / ratio) and sqrt(cells * ratio). RuleError where two ratios give the same size.
    """
    if not ratios:
        return {}
    cells, own = latent.height * latent.width, latent.width / latent.height
    found: dict[Size, float] = {(latent.height, latent.width): own}
    for ratio in sorted(ratios):
        if math.isclose(ratio, own):
            continue
        size = _nearest(cells, ratio, step)
        if size in found:
            raise RuleError(
                f"{_RATIOS} {ratio:g} gives latents of {size[0]} x {size[1]} cells, as"
                f" {found[size]:g} does; leave one out, or lower {_STEP}",
                _RATIOS,
                _STEP,
            )
        found[size] = ratio
    return found


def _nearest(cells: int, ratio: float, step: int) -> Size:
    height, width = math.sqrt(cells / ratio), math.sqrt(cells * ratio)
    columns = {max(step, step * round_(width / step)) for round_ in (math.floor, math.ceil)}
    # more rows than the next multiple leave fewer columns: both are farther off
    sizes = {
        (rows, min(c, cells // rows // step * step))
        for rows in range(step, step * math.ceil(height / step) + 1, step)
        for c in columns
    }
    fit = [size for size in sizes if min(size) > 0]
    if not fit:
        raise RuleError(f"{_STEP} {step} is too large for a latent of {cells} cells", _STEP)
    return min(
        fit, key=lambda hw: (math.hypot(math.log(hw[0] / height), math.log(hw[1] / width)), hw)
    )


def sizes_of(data: DataConfig, latent: LatentSpec) -> tuple[Size, ...]:
    """The sizes of a recipe's `latent_sizes`."""
    return tuple(latent_sizes(latent, data.aspect_ratios, data.aspect_step))


def size_for(data: DataConfig, latent: LatentSpec, ratio: float) -> Size:
    """The size of the bucket of a ratio; InputError where a recipe has none."""
    own = latent.width / latent.height
    sizes = latent_sizes(latent, (*data.aspect_ratios, own), data.aspect_step)
    for size, known in sizes.items():
        if math.isclose(ratio, known, rel_tol=1e-3):
            return size
    told = ", ".join(f"{known:g}" for known in sorted(sizes.values()))
    raise InputError(f"--aspect {ratio:g}: the run was trained on {told}")


def check_buckets(
    data: DataConfig, model: ModelConfig, loss: LossConfig, train: TrainSection
) -> None:
    """RuleError where something of a recipe cannot take the sizes of its buckets."""
    sizes = sizes_of(data, model.latent)
    if not sizes:
        return
    patch = model.velocity.patch
    for height, width in sizes:
        if height % patch or width % patch:
            raise RuleError(
                f"{_RATIOS} gives latents of {height} x {width} cells, which velocity.patch {patch}"
                f" does not divide; type {_STEP}={math.lcm(data.aspect_step, patch)}",
                _STEP,
                "model.velocity.patch",
            )
    if data.prepare.resize == "none":
        raise RuleError(
            f"{_RATIOS} needs data.prepare.resize area or lanczos, by which pictures come to the"
            " size of their bucket",
            "data.prepare.resize",
            _RATIOS,
        )
    if loss.clip.weight > 0 and isinstance(model.semantic, ImageTower):
        raise RuleError(
            f"{_RATIOS}: loss.clip with model.semantic.kind image compares z0 itself, number by"
            " number, with a vector of one size; take model.semantic.kind=small, set"
            f" loss.clip.weight to 0, or empty {_RATIOS}",
            "model.semantic.kind",
            "loss.clip.weight",
            _RATIOS,
        )
    routed = isinstance(model.velocity, DiTVelocity) and model.velocity.route is not None
    graphs = len(sizes) * (2 if routed else 1)  # with all tokens, and with a part of them
    if train.compile and graphs > GRAPHS:
        raise RuleError(
            f"{_RATIOS} gives {graphs} sizes of blocks, each a graph of its own with train.compile,"
            f" of which torch keeps {GRAPHS}; leave some out, or set train.compile false",
            "train.compile",
            _RATIOS,
        )
