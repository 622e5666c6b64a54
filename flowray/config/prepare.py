"""How pictures become those that a model is trained on: the same for `flowray.data pack`, encoding
and evaluation.
"""

from __future__ import annotations

import hashlib
import json
from typing import Annotated, Literal

from pydantic import Field

from flowray.config.base import Config, PositiveInt

Byte = Annotated[int, Field(ge=0, le=255)]
WHITE = (255, 255, 255)


class PrepareConfig(Config):
    """What is done to every picture, the same where latents are made and where real pictures are
    looked at. What `min_size` and `max_aspect` leave out is no bad sample: `data.max_bad` does not
    count it.
    """

    background: tuple[Byte, Byte, Byte] = Field(
        WHITE, description="red, green, blue behind what is transparent, each of 255"
    )
    resize: Literal["none", "area", "lanczos"] = Field(
        "none",
        description=(
            "how a picture of another size than `model.latent` wants is brought to it, cropped at"
            " the centre; none: it is bad"
        ),
    )
    min_size: PositiveInt | None = Field(
        None,
        description=(
            "pictures whose shorter side has fewer px are left out; null: with `resize` those that"
            " would have to be enlarged"
        ),
    )
    max_aspect: float | None = Field(
        None, ge=1, description="pictures are left out whose longer side is more times the shorter"
    )

    @property
    def filters(self) -> bool:
        """Whether pictures may be left out."""
        return self.resize != "none" or self.min_size is not None or self.max_aspect is not None

    @property
    def tag(self) -> str:
        """Stands for all that differs from the defaults, in names of caches; "" for nothing."""
        differs = self.model_dump(exclude_defaults=True)
        said = json.dumps(differs, sort_keys=True)
        return hashlib.sha256(said.encode()).hexdigest()[:8] if differs else ""


AS_DECODED = PrepareConfig()
