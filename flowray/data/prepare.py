"""Pictures as a model is trained on them: the one function of `pack`, encoding and evaluation."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageOps

from flowray.config.errors import InputError
from flowray.config.prepare import AS_DECODED, PrepareConfig
from flowray.data.decode import decode_rgb

TOO_SMALL, ASPECT, OTHER_SIZE = "too small", "aspect ratio", "another size"
FILTERED = (TOO_SMALL, ASPECT)  # causes that the user asked for; other ones are bad samples
_FILTERS = {"area": Image.Resampling.BOX, "lanczos": Image.Resampling.LANCZOS}


class Refused(InputError):
    """A picture that is not to be used, as its size says. cause: TOO_SMALL, ASPECT, OTHER_SIZE."""

    def __init__(self, message: str, cause: str):
        super().__init__(message)
        self.cause = cause


class Filtered(Refused):
    """A picture that is not one of those that were asked for. cause: of FILTERED."""


@dataclass(frozen=True)
class Preparation:
    """A config, and the (height, width) in px that `resize` makes; None: no model wants any.

    others: further ones, of buckets; a picture is brought to the one of the nearest aspect ratio.
    strict: pictures that come out with another size than these are refused.
    """

    config: PrepareConfig = AS_DECODED
    size: tuple[int, int] | None = None
    others: tuple[tuple[int, int], ...] = ()
    strict: bool = False

    def __call__(self, data: bytes) -> np.ndarray:
        """The picture in a file's bytes as uint8 (H, W, 3): as `decode_rgb` has it, and where
        `resize` says so cropped at the centre and resized to `size`, or one of `others`.

        area: every pixel of the picture goes into one pixel of the result, all by the same weight;
        lanczos: Pillow's, of three lobes. A picture of that size is left as it is. ValueError where
        it does not decode. Refused, or Filtered, where it is not to be used, by its header: of a
        huge picture not a pixel is decoded then.
        """
        return self.fitted(decode_rgb(data, self.config.background, self._look))

    def fitted(self, rgb: np.ndarray) -> np.ndarray:
        """A picture (H, W, 3) that is decoded, as `resize` makes it."""
        wanted = self._size_for(rgb.shape[1], rgb.shape[0])
        if not self._resizes or wanted is None or rgb.shape[:2] == wanted:
            return rgb
        height, width = wanted
        method = _FILTERS[self.config.resize]
        return np.asarray(ImageOps.fit(Image.fromarray(rgb), (width, height), method))

    def _look(self, width: int, height: int) -> None:
        self.refuse(width, height)
        if not self.strict or self.size is None or self._resizes:
            return
        if (height, width) not in (self.size, *self.others):
            want_height, want_width = self.size
            raise Refused(
                f"the picture is {width} x {height} px, model.latent and the autoencoder want"
                f" {want_width} x {want_height}; data.prepare.resize or `flowray.data pack --size"
                " PX` makes one size",
                OTHER_SIZE,
            )

    def refuse(self, width: int, height: int) -> None:
        """Filtered where pictures of so many px, upright, are not to be used."""
        shorter, longer = sorted((width, height))
        least, config = self.config.min_size, self.config
        if least is not None and shorter < least:
            raise Filtered(f"{width} x {height} px, min_size is {least}", TOO_SMALL)
        wanted = self._size_for(width, height)
        if least is None and self._resizes and wanted is not None:
            wanted_height, wanted_width = wanted
            if height < wanted_height or width < wanted_width:
                raise Filtered(
                    f"{width} x {height} px would be enlarged to {wanted_width} x {wanted_height};"
                    " a lower min_size takes it so",
                    TOO_SMALL,
                )
        if config.max_aspect is not None and longer > config.max_aspect * shorter:
            ratio = longer / shorter
            raise Filtered(
                f"{width} x {height} px, {ratio:.2f} to 1, max_aspect is {config.max_aspect:g}",
                ASPECT,
            )

    @property
    def tag(self) -> str:
        """Stands for what is done, in names of caches; "" where pictures stay as they are."""
        if not self.config.tag or not self._resizes or self.size is None:
            return self.config.tag
        sizes = "-".join(f"{height}x{width}" for height, width in (self.size, *self.others))
        return f"{self.config.tag}-{sizes}"

    def _size_for(self, width: int, height: int) -> tuple[int, int] | None:
        """The (height, width) to which pictures of so many px are brought; of two equally near ones
        the first.
        """
        if self.size is None or not self.others:
            return self.size

        def off(size: tuple[int, int]) -> float:
            return abs(math.log(width * size[0] / (height * size[1])))

        return min((self.size, *self.others), key=off)

    @property
    def _resizes(self) -> bool:
        return self.config.resize != "none" and self.size is not None


AS_THEY_ARE = Preparation()
