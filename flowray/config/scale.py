"""What sets the scale of every value, so that trials which differ in it do not compare: recipe
keys, and the unit that a version tells errors in.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

# beginnings of keys: pictures, resolution, latents
SCALE = ("model.autoencoder.", "model.latent.", "data.val_shards", "data.shards")
COUNTED = "model.autoencoder.parameters"  # a fact about the autoencoder, not a choice of one
UNIT = "data/var"  # Var(z1) of a row, about the data's mean latent
IN_UNITS = ("shoot/nmse", "shoot/cond_gain")
OLDER_UNIT = "over the variance about one mean for all channels, as older versions have it"


def older_unit(key: str, row: Mapping[str, Any]) -> bool:
    """Whether the row's value of the metric is in the unit of before there was `data/var`: with
    channels whose means differ a constant latent scores below 1 in it.
    """
    base = key.removeprefix("ema/")
    return base in IN_UNITS and key in row and f"{key.removesuffix(base)}{UNIT}" not in row


def scale_keys(keys: Iterable[str], *, own_pictures: bool) -> list[str]:
    """Those of the dotted keys that set the scale.

    own_pictures: all trials are judged on `data.val_shards`, whatever they train on.
    """
    found = [key for key in keys if key.startswith(SCALE) and key != COUNTED]
    return [key for key in found if key != "data.shards"] if own_pictures else found
