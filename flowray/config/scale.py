"""Which recipe keys set the scale of every value, so that trials which differ in them do not
compare.
"""

from __future__ import annotations

from collections.abc import Iterable

# beginnings of keys: pictures, resolution, latents
SCALE = ("model.autoencoder.", "model.latent.", "data.val_shards", "data.shards")
COUNTED = "model.autoencoder.parameters"  # a fact about the autoencoder, not a choice of one


def scale_keys(keys: Iterable[str], *, own_pictures: bool) -> list[str]:
    """Those of the dotted keys that set the scale.

    own_pictures: all trials are judged on `data.val_shards`, whatever they train on.
    """
    found = [key for key in keys if key.startswith(SCALE) and key != COUNTED]
    return [key for key in found if key != "data.shards"] if own_pictures else found
